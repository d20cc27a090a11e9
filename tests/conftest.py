"""Pico models of real families, and text that every machine has. Nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LAYERSMITH_STRICT"] = "1"  # an error of foreign code that is not expected fails the test

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import layersmith
from layersmith import AttentionConfig, BlockConfig, FFNConfig
from layersmith.costs.budget import Budget
from layersmith.heterogeneous.build import stock_class
from layersmith.model_descriptor.factory import ModelDescriptorFactory
from layersmith.stages.reopen import SearchRequest, search_several

torch.set_num_threads(1)
# Nothing is read from or written to the user's own cache. The processes of one call of pytest share a folder, so that
# each model is described once; it is removed when the first of them ends.
if "layersmith-tests-" not in os.environ.get("LAYERSMITH_CACHE", ""):
    _cache = tempfile.TemporaryDirectory(prefix="layersmith-tests-")
    os.environ["LAYERSMITH_CACHE"] = _cache.name

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

# Each differs from the others in something that has to be right: true head size, tied embeddings, biases, norms of
# queries and keys, attention windows in all layers or in some.
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **more: LlamaConfig(**SIZES | {"head_dim": 16, "tie_word_embeddings": False} | more),
    "llama_tied": lambda **more: LlamaConfig(**SIZES | {"tie_word_embeddings": True, "attention_bias": True} | more),
    "mistral": lambda **more: MistralConfig(**SIZES | {"sliding_window": 12} | more),
    "qwen2": lambda **more: Qwen2Config(**SIZES | more),
    "qwen2_windows": lambda **more: Qwen2Config(
        **SIZES | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2} | more
    ),
    "qwen3": lambda **more: Qwen3Config(**SIZES | {"head_dim": 8} | more),
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that every subblock matters; norms and biases that are not ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model


def torchrun(processes: int, *command: object) -> list[str]:
    """The command line of a script, or of ``-m`` and a module, in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, *map(str, command)]


def block(attention: dict[str, Any] | None = None, ffn: dict[str, Any] | None = None) -> BlockConfig:
    return BlockConfig(
        AttentionConfig(**(attention or {"num_key_value_heads": 4})), FFNConfig(**(ffn or {"intermediate_size": 64}))
    )


NO_ATTENTION = {"no_op": True}


def stock_model(config: PretrainedConfig, seed: int = 0) -> Any:
    return randomize(stock_class(config)._from_config(config), seed).eval()


def child_model(config: PretrainedConfig, blocks: list[BlockConfig], seed: int = 0) -> Any:
    return randomize(layersmith.build(config, blocks), seed).eval()


def search_again(run: str | Path, budget: Budget, objective: str | None = None, **more: Any) -> tuple[Any, Any]:
    """The library and the best solution of a finished run for another budget."""
    library, (solution, *_) = search_several(SearchRequest(run, budget, objective), **more)
    return library, solution


@pytest.fixture(autouse=True)
def own_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(ModelDescriptorFactory, "_registered", dict(ModelDescriptorFactory._registered))


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(family: str) -> PretrainedConfig:
    return FAMILIES[family]()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few modules of this Python's library."""
    folder = tmp_path_factory.mktemp("text")
    for module in (ast, json, subprocess, os, __import__("argparse"), __import__("typing"), __import__("shutil")):
        source = Path(str(module.__file__))
        (folder / f"{source.parent.name}-{source.name}").write_text(source.read_text(encoding="utf-8"))
    return folder


@pytest.fixture(scope="session")
def tokenizer(text_folder: Path) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZES["vocab_size"], special_tokens=["<end>"], initial_alphabet=alphabet)
    bpe.train([str(path) for path in sorted(text_folder.iterdir())], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", bos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session")
def make_parent(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Write a parent checkpoint of a family; remembers those it has written."""
    written: dict[tuple[Any, ...], Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "50GB", **more: Any) -> Path:
        key = (family, dtype, shard, *sorted(more.items()))
        if key not in written:
            folder = tmp_path_factory.mktemp(family)
            model = stock_model(FAMILIES[family](**more)).to(dtype)
            model.save_pretrained(folder, max_shard_size=shard)
            tokenizer.save_pretrained(folder)
            written[key] = folder
        return written[key]

    return make


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a process of its own."""

    def run(script: str, *arguments: str, without_layersmith: bool = False) -> subprocess.CompletedProcess[str]:
        if without_layersmith:  # as where it is not installed: importing it fails
            script = "import sys\nsys.modules['layersmith'] = None\n" + script
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
        return subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, timeout=300
        )

    return run


TINY_RECIPE: dict[str, Any] = {
    "data": {
        "sequence_length": 32,
        "calibration_sequences": 8,
        "scoring_sequences": 4,
        "evaluation_sequences": 4,
        "training_sequences": 8,
    },
    "library": {"ffn_fractions": [0.5, 0.25]},
    "local_distillation": {"tokens": 131_072, "coupled_tokens": 131_072},
    "scoring": {"batch_tokens": 64},
    "search": {"refine_passes": 10, "refine_rows": 2, "frontier_points": 6},
    "costs": {"time_child": False},
    "completion_tokens": 4,
}
