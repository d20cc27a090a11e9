"""Fine-tune a child with LoRA through PEFT, and merge the adapter: python lora.py CHILD"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

child = sys.argv[1]
texts = [path.read_text(encoding="utf-8")[:2000] for path in sorted(Path(torch.__file__).parent.glob("*.py"))[:8]]
model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(child)

# "all-linear" adapts every linear layer that is left; layers whose attention or FFN was removed simply have fewer.
adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
adapted.print_trainable_parameters()
optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-3)
losses = []
for step in range(24):
    ids = tokenizer(texts[step % len(texts)], return_tensors="pt", truncation=True, max_length=256)["input_ids"]
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
print(f"loss of the first and the last {len(texts)} steps: {sum(losses[:8]) / 8:.3f}, {sum(losses[-8:]) / 8:.3f}")

adapted.eval()
ids = tokenizer(texts[0], return_tensors="pt", truncation=True, max_length=64)["input_ids"]
with torch.no_grad():
    before = adapted(ids).logits
    merged = adapted.merge_and_unload()
    print(f"largest difference of logits after the merge: {float((merged(ids).logits - before).abs().max()):.1e}")
if len(sys.argv) > 2:
    merged.save_pretrained(sys.argv[2])
    tokenizer.save_pretrained(sys.argv[2])
