"""Quantize a child's linear layers to int8 and int4 with torchao: python torchao_int8.py CHILD"""

import copy
import sys

import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

child = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.bfloat16).eval()
tokenizer = AutoTokenizer.from_pretrained(child)
ids = tokenizer("def read_file(path):\n    with open(path) as file:\n        return file.read()\n", return_tensors="pt")
with torch.no_grad():
    wanted = model(**ids).logits.float().log_softmax(-1)
for name, config in (
    ("int8", Int8WeightOnlyConfig()),
    ("int4, groups of 32", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
):
    quantized = copy.deepcopy(model)
    quantize_(quantized, config)
    with torch.no_grad():
        logits = quantized(**ids).logits.float().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - logits)).sum(-1).mean()
    agreement = (logits.argmax(-1) == wanted.argmax(-1)).float().mean()
    print(f"{name}: KL to the child {float(divergence):.4f} nats per token, same first token {float(agreement):.0%}")
