"""What every family is put to: the checks behind docs/families.md.

Each check is run on the stock parent too. Where the parent fails it, the table says so and shows the parent's failure;
nothing passes by being skipped.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, StaticCache

import layersmith
from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import LayersmithError, UnsupportedModel
from layersmith.heterogeneous.build import decoder_layers
from layersmith.model_descriptor.inferred import InferredDescriptor, silent_stay_silent
from layersmith.model_descriptor.specimen import Specimen
from layersmith.model_descriptor.stock import own_config
from tests.conformance.tiny import tiny_config, tiny_model

OK = "ok"
CACHE_CHECKS = ("continuation", "chunked prefill", "left padding", "static cache")
CHECKS = ("groups", "attention no-op", "ffn no-op", "both no-ops", *CACHE_CHECKS, "save and reload", "stock reload")


@dataclass
class Verdict:
    """What was seen of one family.

    Attributes:
        model_type: of the config.
        refused: why it is not described; empty if it is.
        parent: why the stock parent itself does not run; empty if it does.
        results: check to ``"ok"``, or to what went wrong; beginning with ``"parent: "`` where the parent fails it.
        notes: what the descriptor does not offer, and why.
        axes: axis to ``"ok"`` or the reason.
        mixers: classes of the attention subblocks.
    """

    model_type: str
    refused: str = ""
    parent: str = ""
    results: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    mixers: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return (
            not self.refused
            and not self.parent
            and all(result == OK or result.startswith("parent: ") for result in self.results.values())
        )


def examine(model_type: str) -> Verdict:
    """Put one family to all checks."""
    torch.set_num_threads(1)
    verdict = Verdict(model_type)
    try:
        config = own_config(tiny_config(model_type))
        model = tiny_model(tiny_config(model_type))
        with torch.no_grad():
            model(input_ids=torch.arange(3, 14)[None])
    except Exception as error:
        verdict.parent = _words(error)
        return verdict
    try:
        descriptor = layersmith.describe(config)
    except UnsupportedModel as error:
        verdict.refused = str(error)
        return verdict
    except Exception as error:
        verdict.results["describe"] = _words(error)
        return verdict
    assert issubclass(descriptor, InferredDescriptor)
    verdict.notes = list(descriptor.findings.notes)
    first = [k.attention.modules[0] for k in descriptor.findings.kinds if k.attention]
    verdict.mixers = sorted(set(first))
    examination = _Examination(config, model, descriptor)
    for name, check in examination.checks().items():
        try:
            check()
            verdict.results[name] = OK
        except Exception as error:
            verdict.results[name] = _words(error)
            if name in CACHE_CHECKS:
                try:
                    examination.cache_check(name, model)
                except Exception as parents:
                    verdict.results[name] = f"parent: {_words(parents)}"
    return verdict


def _words(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:160]
    if isinstance(error, LayersmithError | AssertionError):
        return text or f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


class _Examination:
    def __init__(self, config: PretrainedConfig, model: nn.Module, descriptor: type[InferredDescriptor]):
        self.config, self.model, self.descriptor = config, model, descriptor
        self.blocks = layersmith.block_configs(config)
        generator = torch.Generator().manual_seed(5)
        vocab = min(90, int(descriptor.get_language_model_config(config).vocab_size))
        self.ids = torch.randint(5, vocab, (2, 24), generator=generator)

    def checks(self) -> dict[str, Callable[[], None]]:
        cache = {name: (lambda name=name: self.cache_check(name, self.child())) for name in CACHE_CHECKS}
        return {
            "groups": self.groups,
            "attention no-op": lambda: self.no_op(["attention", "", "", "attention"]),
            "ffn no-op": lambda: self.no_op(["ffn", "", "ffn", ""]),
            "both no-ops": lambda: self.no_op(["attention", "both", "", "ffn"]),
            **cache,
            "save and reload": self.reload,
            "stock reload": self.stock_reload,
        }

    # ------------------------------------------------------------------------------------------ weights

    def groups(self) -> None:
        names = list(self.model.state_dict())
        predicates = self.descriptor.layer_name_predicates(len(self.blocks))
        for name in names:
            taken = [group for group, pattern in predicates.items() if pattern.match(name)]
            assert len(taken) == 1, f"{name} is in {len(taken)} weight groups"
        found = self.descriptor.get_weight_groups(names, len(self.blocks))
        assert sorted(n for own in found.values() for n in own) == sorted(names)
        embedding = f"{self.descriptor.input_embedding_name()}.weight"
        assert embedding in found["embedding"]
        layers = decoder_layers(self.model, self.descriptor, len(self.blocks))
        assert all(type(layer) in _classes(self.descriptor) for layer in layers)

    # ------------------------------------------------------------------------------------------ no-ops

    def changed(self, pattern: Sequence[str]) -> list[BlockConfig]:
        blocks = []
        for block, what in zip(self.blocks, _stretched(pattern, len(self.blocks)), strict=True):
            attention, ffn = block.attention, block.ffn
            if what in ("attention", "both"):
                attention = AttentionConfig(no_op=True)
            if what in ("ffn", "both"):
                ffn = FFNConfig(no_op=True)
            blocks.append(BlockConfig(attention, ffn))
        return blocks

    def child_of(self, blocks: Sequence[BlockConfig]) -> nn.Module:
        """A child with the parent's weights."""
        child = layersmith.build(self.config, list(blocks), dtype=torch.float32)
        weights = self.model.state_dict()
        missing = [name for name in child.state_dict() if name not in weights]
        assert not missing, f"the child has weights that the parent does not: {missing[0]}"
        child.load_state_dict({name: weights[name] for name in child.state_dict()}, strict=True)
        return child.eval()

    def no_op(self, pattern: Sequence[str]) -> None:
        """The child gives what the parent gives with the outputs of those subblocks zeroed, and has no such weights."""
        blocks = self.changed(pattern)
        child = self.child_of(blocks)
        silenced: dict[str, Any] = {}
        after: list[str] = []
        for i, what in enumerate(_stretched(pattern, len(blocks))):
            kind = self.descriptor.findings.kinds[self.descriptor.findings.of_layer[i]]
            for name in ("attention", "ffn"):
                subblock = getattr(kind, name)
                if what not in (name, "both") or subblock is None:
                    continue
                prefix = self.descriptor.layer_block_name(i)
                for module in subblock.modules:
                    record = dict(subblock.replaced).get(module, {})
                    silenced[f"{prefix}.{module}"] = record.get("of")
                after += [f"{prefix}.{module}" for module, record in subblock.replaced if record["is"] == "same"]
                if not subblock.stays:
                    left = [
                        n
                        for n in child.state_dict()
                        if n.startswith(tuple(f"{prefix}.{module}." for module in subblock.modules))
                    ]
                    assert not left, f"{left[0]} is left of a removed subblock"
        with torch.no_grad(), Specimen.silenced_in(self.model, silenced), silent_stay_silent(self.model, after):
            wanted = self.model(input_ids=self.ids, use_cache=False).logits
        with torch.no_grad():
            seen = child(input_ids=self.ids, use_cache=False).logits
        assert torch.equal(seen, wanted), f"logits differ by {float((seen - wanted).abs().max()):.1e}"

    # ------------------------------------------------------------------------------------------ caches

    def child(self) -> nn.Module:
        """Attention gone from the first layer, an FFN from the second, both from the last but one."""
        pattern = ["attention", "ffn", "both", ""]
        kinds = [self.descriptor.findings.kinds[k] for k in self.descriptor.findings.of_layer]
        stretched = _stretched(pattern, len(kinds))
        # Some attention has to stay for there to be a cache.
        if all(what in ("attention", "both") or k.attention is None for what, k in zip(stretched, kinds, strict=True)):
            pattern = ["ffn", "", "attention", ""]
        return self.child_of(self.changed(pattern))

    def cache_check(self, name: str, model: nn.Module) -> None:
        with torch.no_grad():
            getattr(self, f"_{name.replace(' ', '_')}")(model)

    def _pieces(self, model: nn.Module, cache: Any, pieces: Sequence[int]) -> None:
        ids = self.ids[:, : sum(pieces)]
        full = model(input_ids=ids, use_cache=False).logits
        start, seen = 0, []
        for piece in pieces:
            part = ids[:, start : start + piece]
            seen.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits[:, -1])
            start += piece
        ends = torch.tensor(pieces).cumsum(0) - 1
        _close(torch.stack(seen, 1), full[:, ends])

    def _continuation(self, model: nn.Module) -> None:
        self._pieces(model, DynamicCache(config=model.config), [7, 1, 1, 1])
        self._pieces(model, DynamicCache(config=model.config), [7, 1, 5, 1, 9])

    def _chunked_prefill(self, model: nn.Module) -> None:
        self._pieces(model, DynamicCache(config=model.config), [8, 8, 8])

    def _static_cache(self, model: nn.Module) -> None:
        self._pieces(model, StaticCache(config=model.config, max_cache_len=40), [7, 1, 1, 1])

    def _left_padding(self, model: nn.Module) -> None:
        short, pad = self.ids[:1, :9], 6
        padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), short], 1)
        both = torch.cat([padded, self.ids[1:, : 9 + pad]])
        mask = torch.ones_like(both)
        mask[0, :pad] = 0
        more = {
            "max_new_tokens": 3,
            "min_new_tokens": 3,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            "pad_token_id": 0,
        }
        together = model.generate(both, attention_mask=mask, **more)  # type: ignore[operator]
        alone = model.generate(short, attention_mask=torch.ones_like(short), **more)  # type: ignore[operator]
        _close(together.logits[0][:1], alone.logits[0])
        if torch.equal(together.sequences[:1, -3:], alone.sequences[:, -3:]):
            _close(torch.stack(together.logits)[:, :1], torch.stack(alone.logits))

    # ------------------------------------------------------------------------------------------ checkpoints

    def reload(self) -> None:
        child = self.child()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "child"
            layersmith.save(child, path)
            again = layersmith.load(path, dtype=torch.float32)
            with torch.no_grad():
                wanted = child(input_ids=self.ids, use_cache=False).logits
                seen = again(input_ids=self.ids, use_cache=False).logits
            assert torch.equal(wanted, seen), f"logits differ by {float((seen - wanted).abs().max()):.1e}"
            assert again.state_dict().keys() == child.state_dict().keys()

    def stock_reload(self) -> None:
        """Stock Transformers loads the child by the file in its folder, and refuses it without."""
        child = self.child()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "child"
            layersmith.save(child, path)
            again = _load_as_stock(path)
            with torch.no_grad():
                wanted = child(input_ids=self.ids, use_cache=False).logits
                seen = again(input_ids=self.ids, use_cache=False).logits
            assert torch.equal(wanted, seen), f"logits differ by {float((seen - wanted).abs().max()):.1e}"


def _load_as_stock(path: Path) -> nn.Module:
    """As where layersmith is not installed: the wrapping of Transformers' auto classes is taken off for a moment."""
    from transformers.models.auto import auto_factory

    wrapped = auto_factory._get_model_class
    auto_factory._get_model_class = getattr(wrapped, "__wrapped__", wrapped)
    try:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
    finally:
        auto_factory._get_model_class = wrapped


def _stretched(pattern: Sequence[str], length: int) -> list[str]:
    return [*pattern, *[""] * length][:length]


def _classes(descriptor: type[InferredDescriptor]) -> list[type[nn.Module]]:
    classes = descriptor.decoder_layer_cls()
    return list(classes) if isinstance(classes, list) else [classes]


def _close(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    change = float((seen - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
    assert change < 2e-3, f"logits differ by {change:.1e} of the largest"
