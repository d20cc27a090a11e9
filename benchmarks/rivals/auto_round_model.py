"""Round a model with the package auto-round in mixed precision, and save its weights as an ordinary checkpoint.

    python benchmarks/rivals/auto_round_model.py MODEL ROWS OUT --bits 4.6 --iterations 50

It runs by itself in an environment that has auto-round. ROWS is a JSON file with texts. AutoScheme chooses among
symmetric integers of 2, 3, 4 and 8 bits in groups of 64, such that linear maps have BITS a weight on average, scales
included; embeddings and head stay as they are. ``python -m benchmarks.bits --checkpoint`` measures OUT.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme, QuantizationScheme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    options = tuple(QuantizationScheme(bits=bits, group_size=64, sym=True) for bits in (2, 3, 4, 8))
    common: dict[str, Any] = {
        "nsamples": args.samples, "seqlen": args.length, "batch_size": 4, "enable_torch_compile": False,
        "dataset": args.rows, "device_map": "cpu",
    }  # fmt: skip
    scheme = AutoScheme(avg_bits=args.bits, options=options, **common)
    AutoRound(args.model, scheme=scheme, iters=args.iterations, **common).quantize_and_save(args.out, format="fake")
    print(f"{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
