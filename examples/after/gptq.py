"""Quantize a child's linear layers to 4 bits with GPTQ through llm-compressor: python gptq.py CHILD OUT"""

import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

child, out = sys.argv[1], sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(child)
model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.float32)
texts = [path.read_text(encoding="utf-8")[:2000] for path in sorted(Path(torch.__file__).parent.glob("*.py"))[:16]]
rows = [tokenizer(text, truncation=True, max_length=128) for text in texts]
ids = tokenizer(texts[0], return_tensors="pt", truncation=True, max_length=128)
with torch.no_grad():
    wanted = model(**ids).logits.log_softmax(-1)
# Groups of 32 weights of a row share a scale: the widths of a child need not be multiples of 128, the usual group.
weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=Dataset.from_list(
        [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in rows]
    ),
    recipe=GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    ),
    max_seq_length=128,
    num_calibration_samples=len(rows),
    output_dir=out,
)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
for name, quantized in (("in memory", model), ("saved and loaded", again)):
    with torch.no_grad():
        logits = quantized(**ids).logits.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - logits)).sum(-1).mean()
    print(f"KL to the child after 4-bit GPTQ, {name}: {float(divergence):.4f} nats per token")
size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
print(f"weights on the disk: {size / 2**20:.1f} MiB")
