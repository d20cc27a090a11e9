"""Evaluate a child with lm-eval on a task of one's choice: python lm_eval_harness.py CHILD ITEMS.jsonl

Without Python: lm_eval --model hf --model_args pretrained=CHILD,trust_remote_code=True --tasks arc_easy
"""

import sys

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

child, items = sys.argv[1], sys.argv[2]
model = HFLM(pretrained=child, trust_remote_code=True, dtype="float32", batch_size=4, device="cpu")
task = {
    "task": "demo",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": items}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
results = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
print("accuracy:", results["results"]["demo"]["acc,none"])
