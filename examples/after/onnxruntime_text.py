"""Continue a text with onnxruntime, without PyTorch: python onnxruntime_text.py EXPORT

The export is made by ``layersmith export CHILD EXPORT --to onnx``. Its graph has no KV cache, so that each token runs
the whole text again: it suits short texts and scoring.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

export = Path(sys.argv[1])
session = onnxruntime.InferenceSession(str(export / "model.onnx"), providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
ids = tokenizer.encode("def read_file(path):\n    with open(path").ids
for _ in range(16):
    tokens = np.array([ids])
    logits = session.run(None, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})[0]
    ids.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(ids))
