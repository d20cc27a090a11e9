"""Speculative decoding: the child drafts for its parent: python speculative.py PARENT CHILD

The parent accepts a drafted token if it is the one that it would have written itself, so the text stays the parent's.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parent_path, child_path = sys.argv[1], sys.argv[2]
parent = AutoModelForCausalLM.from_pretrained(parent_path, dtype=torch.float32).eval()
child = AutoModelForCausalLM.from_pretrained(child_path, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(parent_path)
child.generation_config.num_assistant_tokens = 4
child.generation_config.num_assistant_tokens_schedule = "constant"
child.generation_config.assistant_confidence_threshold = 0.0

calls = {"parent": 0, "child": 0}
for name, model in (("parent", parent), ("child", child)):

    def count(module, arguments, name=name):
        calls[name] += 1

    model.register_forward_pre_hook(count)

prompts = [path.read_text(encoding="utf-8")[:400] for path in sorted(Path(torch.__file__).parent.glob("*.py"))[:4]]
written = 0
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt")
    before = dict(calls)
    alone = parent.generate(**ids, max_new_tokens=48, do_sample=False)
    calls.update(before)
    together = parent.generate(**ids, max_new_tokens=48, do_sample=False, assistant_model=child)
    assert torch.equal(alone, together), "the text differs from the parent's"
    written += together.shape[1] - ids["input_ids"].shape[1]
# Every forward pass of the parent writes one token itself; the others were drafted by the child.
accepted = written - calls["parent"]
print(f"the text is the parent's: {written} tokens with {calls['parent']} forward passes of the parent")
print(f"acceptance rate: {accepted / calls['child']:.0%} of {calls['child']} drafted tokens")
