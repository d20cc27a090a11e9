"""Time models in vLLM. It runs in vLLM's environment, without layersmith.

Standard input is a JSON object: ``folders`` of configs (weights are made up), ``prompt`` and ``generate`` in tokens.
Standard output gets one JSON line for each folder: seconds of the prefill and of one decode step.
"""

import gc
import json
import os
import sys
import time

# One thread and one process, so that CPU time is the time, whatever else the machine does.
os.environ |= {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

REPEATS = 4  # the least counts: what shares the caches only adds time


def main() -> None:
    task = json.load(sys.stdin)
    for folder in task["folders"]:
        print(json.dumps(timed(folder, task["prompt"], task["generate"], task["dtype"])), flush=True)
        gc.collect()  # ends the engine, before there is another


def timed(folder: str, prompt: int, generate: int, dtype: str) -> list[float]:
    """Seconds of the prefill and of one decode step."""
    llm = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, dtype=dtype, trust_remote_code=True, enforce_eager=True,
        max_model_len=prompt + generate, max_num_seqs=1, enable_prefix_caching=False,
    )  # fmt: skip
    ids = TokensPrompt(prompt_token_ids=[10 + i % 1000 for i in range(prompt)])

    def seconds(tokens: int) -> float:
        exactly = SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.process_time()
        llm.generate([ids], exactly, use_tqdm=False)
        return time.process_time() - begin

    seconds(8)
    prefill = min(seconds(1) for _ in range(REPEATS))
    whole = min(seconds(generate) for _ in range(REPEATS))
    return [prefill, (whole - prefill) / (generate - 1)]


main()
