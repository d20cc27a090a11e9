"""Fine-tune a child with TRL's SFTTrainer: python sft.py CHILD OUT"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

child, out = sys.argv[1], sys.argv[2]
texts = [path.read_text(encoding="utf-8")[:2000] for path in sorted(Path(torch.__file__).parent.glob("*.py"))[:16]]
model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.float32)
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(child),
    train_dataset=Dataset.from_dict({"text": texts}),
    args=SFTConfig(
        output_dir=out, max_steps=6, per_device_train_batch_size=2, max_length=128, learning_rate=1e-4,
        logging_steps=2, report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False,
        gradient_checkpointing=False,
    ),
)  # fmt: skip
trainer.train()
print("losses:", [round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry])
trainer.save_model(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
equal = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
print("the saved child loads with the same weights:", equal)
