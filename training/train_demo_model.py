"""Train the small code model that layersmith ships, from nothing but this machine's Python.

    python training/train_demo_model.py --out src/layersmith/demo/demo-model --minutes 60

Data: every ``.py`` file of the standard library (site-packages left out). One module in forty is
held out, chosen by a hash of its path, so that the same modules are held out on every machine; the
held-out ones are never seen by the tokenizer or the model. The card that is written beside the
weights says how well the model does on them.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCAB_SIZE = 4096
HELD_OUT_EVERY = 40


def standard_library() -> tuple[dict[str, str], dict[str, str]]:
    """The library's sources as ``{path in the library: text}``: (training, held out)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # the library tests its own decoder with broken files
            continue
        if not text.strip():
            continue
        digest = hashlib.sha256(name.encode()).digest()
        # Held-out modules are ordinary ones: a test file's text is too near its siblings'.
        is_held_out = "test" not in name and int.from_bytes(digest[:4], "big") % HELD_OUT_EVERY == 0
        (held_out if is_held_out else training)[name] = text
    return training, held_out


def train_tokenizer(texts: dict[str, str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the training texts; it can spell any input."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=1024
    )


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str], order: torch.Generator | None) -> torch.Tensor:
    """All texts, each closed by the end token, as one int64 row."""
    encoded = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
    indices = torch.randperm(len(encoded), generator=order).tolist() if order else range(len(encoded))
    return torch.tensor([token for i in indices for token in [*encoded[i], tokenizer.eos_token_id]])


def optimizers_of(model: torch.nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def held_out_loss(model: PreTrainedModel, tokens: torch.Tensor, sequence_length: int) -> tuple[float, float, int]:
    """Mean loss in nats a token, its standard error over sequences, and the number of tokens."""
    rows = tokens[: len(tokens) // sequence_length * sequence_length].view(-1, sequence_length)
    model.eval()
    with torch.inference_mode():
        losses = torch.tensor([model(input_ids=row[None], labels=row[None]).loss.item() for row in rows])
    model.train()
    return losses.mean().item(), (losses.std() / math.sqrt(len(losses))).item(), rows.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="training time; the schedule follows it")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed)

    training, held_out = standard_library()
    tokenizer = train_tokenizer(training)
    held_out_tokens = pack(tokenizer, held_out, None)
    tokens = pack(tokenizer, training, order)
    held_out_bytes_per_token = sum(len(t.encode()) for t in held_out.values()) / len(held_out_tokens)
    print(f"{len(training)} modules, {len(tokens):,} tokens; held out {len(held_out)}, {len(held_out_tokens):,}")

    model = LlamaForCausalLM(model_config())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizers = optimizers_of(model, args.muon_lr, args.adam_lr)
    peak = [group["lr"] for o in optimizers for group in o.param_groups]

    def rows(step_rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([tokens[i : i + args.sequence_length] for i in step_rows])

    started, step, seen, smoothed = time.monotonic(), 0, 0, None
    queue = torch.empty(0, dtype=torch.long)
    while (done := (time.monotonic() - started) / (60 * args.minutes)) < 1.0:
        if len(queue) < args.batch_size:  # a new epoch, cut at another offset
            offset = int(torch.randint(args.sequence_length, (1,), generator=order))
            starts = torch.arange(offset, len(tokens) - args.sequence_length, args.sequence_length)
            queue = starts[torch.randperm(len(starts), generator=order)]
        batch, queue = rows(queue[: args.batch_size]), queue[args.batch_size :]
        # Warm up for 20 steps, hold, then fall linearly to zero over the last 60% of the time.
        rate = min(1.0, (step + 1) / 20) * min(1.0, (1.0 - done) / 0.6)
        groups = [group for o in optimizers for group in o.param_groups]
        for group, lr in zip(groups, peak, strict=True):
            group["lr"] = lr * rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, seen = step + 1, seen + batch.numel()
        smoothed = loss.item() if smoothed is None else 0.95 * smoothed + 0.05 * loss.item()
        if step % 20 == 0:
            speed = seen / (time.monotonic() - started)
            print(f"step {step} {done:6.1%} loss {smoothed:.4f} {speed:,.0f} tokens/s", flush=True)

    module: torch.nn.Module = model
    module.to(torch.bfloat16).float()  # what is shipped is what is measured
    held_out_nats, error, count = held_out_loss(model, held_out_tokens, args.sequence_length)
    bits_per_byte = held_out_nats / math.log(2) / held_out_bytes_per_token
    print(f"held out: {held_out_nats:.4f} +- {error:.4f} nats a token over {count:,} tokens")
    print(f"held out: {bits_per_byte:.4f} bits a byte")
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "training_modules": len(training),
        "training_tokens": len(tokens),
        "tokens_seen": seen,
        "steps": step,
        "minutes": args.minutes,
        "threads": args.threads,
        "seed": args.seed,
        "held_out_loss": round(held_out_nats, 4),
        "held_out_loss_standard_error": round(error, 4),
        "held_out_bits_per_byte": round(bits_per_byte, 4),
        "held_out_tokens": count,
        "held_out_modules": sorted(held_out),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    module.to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
