"""What every family is put to: the checks behind docs/families.md.

Each check is run on the stock parent too. Where the parent fails it, the table says so and shows the parent's failure;
nothing passes by being skipped.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, StaticCache

import layersmith
from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig
from layersmith.errors import LayersmithError, UnsupportedModel
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.build import decoder_layers
from layersmith.hidden_size.prove import reason_of
from layersmith.library.survey import Survey, survey
from layersmith.model_descriptor.infer.descriptor import InferredDescriptor
from layersmith.model_descriptor.infer.removal import silent_stay_silent
from layersmith.model_descriptor.infer.specimen import Specimen, cache_argument
from layersmith.model_descriptor.infer.subblocks import Subblock
from layersmith.model_descriptor.stock import causal_lm_config
from layersmith.recipe import LibraryRecipe
from layersmith.run.runtime import Runtime
from layersmith.stages.verify import axis_verdicts, over_layers
from tests.conformance.kinds import is_language_model_only, kind_of
from tests.conformance.libraries import child_of_library
from tests.conformance.resizings import resizings
from tests.conformance.tiny import tiny_config, tiny_model

OK = "ok"
CACHE_CHECKS = ("continuation", "chunked prefill", "left padding", "static cache", "generation")
CHECKS = (
    "groups",
    "attention no-op",
    "ffn no-op",
    "both no-ops",
    *CACHE_CHECKS,
    "heterogeneous build",
    "save and reload",
    "stock reload",
    "library",
)
NO_OPS = {"attention no-op": "attention", "ffn no-op": "ffn", "both no-ops": "both"}


@dataclass
class Verdict:
    """What was seen of one family.

    Attributes:
        model_type: of the config.
        kind: see :mod:`tests.conformance.kinds`; empty if it could not be told.
        language_only: whether text alone uses every part of the model.
        refused: why it is not described; empty if it is.
        parent: why the stock parent itself does not run; empty if it does.
        results: check to ``"ok"``, or to what went wrong; beginning with ``"parent: "`` where the parent fails it.
        notes: what the descriptor does not offer, and why.
        axes: axis to ``"ok"`` or the reason why there is none.
        mixers: names of the attention subblocks.
        seconds: that all this took.
    """

    model_type: str
    kind: str = ""
    language_only: bool = False
    refused: str = ""
    parent: str = ""
    results: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    mixers: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def described(self) -> bool:
        return not self.refused and not self.parent and "describe" not in self.results

    @property
    def passed(self) -> bool:
        """Described, and nothing fails that the stock parent can do."""
        return self.described and all(result == OK or by_parent(result) for result in self.results.values())


def by_parent(result: str) -> bool:
    """Whether a check failed because the stock parent fails it."""
    return result.startswith("parent: ")


def examine(model_type: str, with_hidden_size: bool = False) -> Verdict:
    """Put one family to all checks; to the proof of its hidden size, which may take a minute, only on request."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    verdict = Verdict(model_type)
    _examine(verdict)
    if with_hidden_size and verdict.axes:
        verdict.axes["hidden size"] = reason_of(tiny_config(model_type)) or OK
    verdict.seconds = round(time.perf_counter() - begin, 1)
    return verdict


def _examine(verdict: Verdict) -> None:
    config = None
    try:
        config = causal_lm_config(tiny_config(verdict.model_type))
        model = tiny_model(tiny_config(verdict.model_type))
        with torch.no_grad():
            model(input_ids=torch.arange(3, 14)[None])
    except Exception as error:
        verdict.parent = _words(error)
        verdict.kind = kind_of(config, None) if config is not None else ""
        return
    verdict.kind = kind_of(tiny_config(verdict.model_type), model)
    verdict.language_only = is_language_model_only(model)
    try:
        descriptor = layersmith.describe(config)
    except UnsupportedModel as error:
        verdict.refused = str(error)
        return
    except Exception as error:
        verdict.results["describe"] = _words(error)
        return
    assert issubclass(descriptor, InferredDescriptor)
    verdict.notes = list(descriptor.findings.notes)
    first = [k.attention.modules[0] for k in descriptor.findings.kinds if k.attention]
    verdict.mixers = sorted(set(first))
    examination = _Examination(config, model, descriptor)
    try:
        verdict.axes = examination.axes()
        verdict.notes += [note for note in examination.found.notes if " is not offered in " in note]
    except Exception as error:
        verdict.results["axes"] = _words(error)
    for name in CHECKS:
        try:
            examination.check(name)
            verdict.results[name] = OK
        except Exception as error:
            verdict.results[name] = _words(error)
            cached = "continuation" if name == "library" else name
            with_positions = cached in CACHE_CHECKS and examination.parent_needs_positions(cached)
            try:
                if with_positions:
                    examination.check(name)
                    verdict.results[name] = OK
                else:
                    examination.parents_check(name)
            except Exception as other:
                verdict.results[name] = _words(other) if with_positions else f"parent: {_words(other)}"
            examination.tell_positions = False


def _words(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = re.sub(r"/\S*/tmp\w+/", "", " ".join(str(error).split()))  # folders that are gone
    text = text if len(text) <= 300 else f"{text[:300].rstrip()} ..."
    if isinstance(error, LayersmithError | AssertionError):
        return text or f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


class _Examination:
    def __init__(self, config: PretrainedConfig, model: nn.Module, descriptor: type[InferredDescriptor]):
        self.config, self.model, self.descriptor = config, model, descriptor
        self.tell_positions = False
        self.blocks = layersmith.block_configs(config)
        self.kinds = [descriptor.findings.kinds[k] for k in descriptor.findings.of_layer]
        generator = torch.Generator().manual_seed(5)
        vocab = min(90, int(descriptor.get_language_model_config(config).vocab_size))
        self.ids = torch.randint(5, vocab, (2, 24), generator=generator)

    @cached_property
    def parent(self) -> Parent:
        runtime = Runtime(torch.device("cpu"), torch.float32)
        model: Any = self.model
        return Parent("", model, torch.float32, self.descriptor, tuple(self.blocks), "", runtime)

    @cached_property
    def found(self) -> Survey:
        """What the proof on this model's weights leaves of every axis, and the alternatives that run."""
        with self._without_gradients():
            return survey(self.parent, LibraryRecipe(inner_sizes=True))

    def axes(self) -> dict[str, str]:
        pairs = zip(self.found.axes, self.blocks, strict=True)
        return over_layers([axis_verdicts(axes, block) for axes, block in pairs])

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        self.model.requires_grad_(False)
        try:
            yield
        finally:
            self.model.requires_grad_(True)

    def library(self) -> None:
        """Every alternative runs; a child of some of them is what was seen, goes on from a cache, and is reloaded."""
        with self._without_gradients():
            child, has_cache = child_of_library(self.parent, self.found, self.ids)
            if has_cache:
                self.cache_check("continuation", child)
            self._reloads(child)

    def check(self, name: str) -> None:
        """One of ``CHECKS``.

        Raises:
            Exception: it fails.
        """
        if name in NO_OPS:
            for pattern in self.patterns(NO_OPS[name]):
                self.no_op(pattern)
        elif name in CACHE_CHECKS:
            for child in self.children:
                self.cache_check(name, child)
        else:
            getattr(self, name.replace(" ", "_"))()

    def parent_needs_positions(self, name: str) -> bool:
        """Whether the stock parent passes a cache check only if it is told the positions; from then on all are told.

        Some parents ask a layer without keys and values how long the cache is; ``generate`` tells them.
        """
        try:
            self.parents_check(name)
        except Exception:
            self.tell_positions = True
            with suppress(Exception):
                self.parents_check(name)
                return True
            self.tell_positions = False
        return False

    def parents_check(self, name: str) -> None:
        """The same of the stock parent, as far as it applies to it."""
        if name in CACHE_CHECKS:
            self.cache_check(name, self.model)
            return
        if name == "library":
            self.cache_check("continuation", self.model)
        with torch.no_grad():
            first, second = (self.model(input_ids=self.ids, use_cache=False).logits for _ in range(2))
        assert torch.equal(first, second), "two runs on the same text give different logits"
        if name == "groups":
            self._dead(())
        elif name not in NO_OPS:
            self._parents_reload()

    # ------------------------------------------------------------------------------------------ weights

    def groups(self) -> None:
        """Every weight is in one group, and no weight of a group matters only for the other subblock."""
        names = list(self.model.state_dict())
        predicates = self.descriptor.layer_name_predicates(len(self.blocks))
        for name in names:
            taken = [group for group, pattern in predicates.items() if pattern.match(name)]
            assert len(taken) == 1, f"{name} is in {len(taken)} weight groups"
        group_names = self.descriptor.get_weight_groups(names, len(self.blocks))
        assert sorted(n for group in group_names.values() for n in group) == sorted(names)
        embedding = f"{self.descriptor.input_embedding_name()}.weight"
        assert embedding in group_names["embedding"]
        layers = decoder_layers(self.model, self.descriptor, len(self.blocks))
        assert all(type(layer) in _classes(self.descriptor) for layer in layers)
        idle = self._dead(())
        without = {what: self._dead([what] * len(self.blocks)) - idle for what in ("attention", "ffn")}
        for what, other in (("attention", "ffn"), ("ffn", "attention")):
            for i in range(len(self.blocks)):
                wrong = [n for n in group_names.get(f"block_{i}_{what}", ()) if n in without[other] - without[what]]
                assert not wrong, f"{wrong[0]} is in the {what} group, and matters only where there is {other}"

    def _dead(self, pattern: Sequence[str]) -> set[str]:
        """Parameters that do not matter for the logits while subblocks are silenced."""
        parameters = dict(self.model.named_parameters())
        with self.silenced(pattern), torch.enable_grad():
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()
            try:
                grads = torch.autograd.grad((logits * weights).sum(), list(parameters.values()), allow_unused=True)
            except Exception:  # a model whose layers have a backward pass of their own, for training only
                return {name for name, parameter in parameters.items() if not self._matters(parameter, logits)}
        return {name for name, grad in zip(parameters, grads, strict=True) if grad is None or not grad.any()}

    def _matters(self, parameter: torch.Tensor, logits: torch.Tensor) -> bool:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.linspace(1, 2, kept.numel()).view_as(kept))
            changed = self.model(input_ids=self.ids, use_cache=False).logits
            parameter.copy_(kept)
        return not torch.equal(changed, logits)

    # ------------------------------------------------------------------------------------------ no-ops

    def patterns(self, what: str) -> list[list[str]]:
        """Which subblock goes from which layer: from the first of each kind, and from about every other layer."""
        firsts = [what if kind not in self.kinds[:i] else "" for i, kind in enumerate(self.kinds)]
        mixed = {
            "attention": ["attention", "", "", "attention"],
            "ffn": ["ffn", "", "ffn", ""],
            "both": ["attention", "both", "", "ffn"],
        }[what]
        return [firsts, _stretched(mixed, len(self.kinds))]

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

    def removed(self, pattern: Sequence[str]) -> Iterator[tuple[str, Subblock]]:
        """The layer's name and the subblock, for all that a pattern takes away."""
        for i, what in enumerate(_stretched(pattern, len(self.blocks))):
            for name in ("attention", "ffn"):
                subblock = getattr(self.kinds[i], name)
                if what in (name, "both") and subblock is not None:
                    yield self.descriptor.layer_block_name(i), subblock

    @contextmanager
    def silenced(self, pattern: Sequence[str]) -> Iterator[None]:
        """While open, subblocks of the parent give zeros, or their input where they add the residual themselves."""
        modules: dict[str, Any] = {}
        after: list[str] = []
        for prefix, subblock in self.removed(pattern):
            records = dict(subblock.replaced)
            modules |= {f"{prefix}.{module}": records.get(module, {}).get("of") for module in subblock.modules}
            after += [f"{prefix}.{module}" for module, record in subblock.replaced if record["is"] == "same"]
        with Specimen.silenced_in(self.model, modules), silent_stay_silent(self.model, after):
            yield

    def no_op(self, pattern: Sequence[str]) -> None:
        """The child gives what the parent gives with the outputs of those subblocks zeroed, and has no such weights."""
        child = self.child_of(self.changed(pattern))
        for prefix, subblock in self.removed(pattern):
            prefixes = tuple(f"{prefix}.{module}." for module in subblock.modules)
            left = [] if subblock.stays else [n for n in child.state_dict() if n.startswith(prefixes)]
            assert not left, f"{left[0]} is left of a removed subblock"
        with torch.no_grad(), self.silenced(pattern):
            wanted = self.model(input_ids=self.ids, use_cache=False).logits
        with torch.no_grad():
            seen = child(input_ids=self.ids, use_cache=False).logits
        assert torch.equal(seen, wanted), f"logits differ by {float((seen - wanted).abs().max()):.1e} {_said(pattern)}"

    # ------------------------------------------------------------------------------------------ caches

    @cached_property
    def children(self) -> list[nn.Module]:
        return [self.child_of(self.changed(pattern)) for pattern in self.childrens_patterns()]

    def childrens_patterns(self) -> list[list[str]]:
        """Attention gone from the first layer and FFNs from others; attention gone from the first layer of each type.

        Those layers are the ones whose cache is asked how long it is.
        """
        length = len(self.kinds)
        mixed = _stretched(["attention", "ffn", "both", ""], length)
        if not self._remembers(mixed):
            mixed = _stretched(["ffn", "", "attention", ""], length)
        types = getattr(self.descriptor.get_language_model_config(self.config), "layer_types", None) or [""] * length
        ofs = [(self.descriptor.findings.of_layer[i], types[i]) for i in range(length)]
        firsts = ["attention" if kind not in ofs[:i] else "" for i, kind in enumerate(ofs)]
        while not self._remembers(firsts) and any(firsts):
            firsts[max(i for i, what in enumerate(firsts) if what)] = ""
        return [mixed, firsts] if any(firsts) else [mixed]

    def _remembers(self, pattern: Sequence[str]) -> bool:
        """Some attention has to stay for there to be a cache."""
        pairs = zip(pattern, self.kinds, strict=True)
        return any(what not in ("attention", "both") and kind.attention is not None for what, kind in pairs)

    def cache_check(self, name: str, model: nn.Module) -> None:
        with torch.no_grad():
            getattr(self, f"_{name.replace(' ', '_')}")(model)

    def _pieces(self, model: nn.Module, cache: Any, pieces: Sequence[int]) -> None:
        """Logits piece by piece, by way of a cache (None: the one that the model makes), against those of one pass."""
        ids = self.ids[:, : sum(pieces)]
        full = model(input_ids=ids, use_cache=False).logits
        name = cache_argument(model)
        start, seen = 0, []
        for piece in pieces:
            cache_kwargs: dict[str, Any] = {} if cache is None else {name: cache}
            if self.tell_positions:
                cache_kwargs["position_ids"] = torch.arange(start, start + piece)[None]
            output = model(input_ids=ids[:, start : start + piece], use_cache=True, **cache_kwargs)
            cache = output.get(name, cache)
            seen.append(output.logits[:, -1])
            start += piece
        ends = torch.tensor(pieces).cumsum(0) - 1
        _close(torch.stack(seen, 1), full[:, ends])

    def _cache_for(self, model: nn.Module) -> Any:
        """None where the model makes a cache itself and returns it."""
        made = model(input_ids=self.ids[:, :2], use_cache=True).get(cache_argument(model))
        return DynamicCache(config=model.config) if made is None else None

    def _continuation(self, model: nn.Module) -> None:
        self._pieces(model, self._cache_for(model), [7, 1, 1, 1])
        self._pieces(model, self._cache_for(model), [7, 1, 5, 1, 9])

    def _chunked_prefill(self, model: nn.Module) -> None:
        self._pieces(model, self._cache_for(model), [8, 8, 8])

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

    def _generation(self, model: nn.Module) -> None:
        """Greedy generation takes the largest logit of a full forward pass, token by token."""
        prompt, more = self.ids[:, :8], 6
        # Some families force tokens at the beginning or end.
        model.generation_config.forced_bos_token_id = model.generation_config.forced_eos_token_id = None
        settings = {"max_new_tokens": more, "min_new_tokens": more, "do_sample": False, "pad_token_id": 0}
        settings |= {"output_logits": True, "return_dict_in_generate": True}
        given = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)  # type: ignore[operator]
        full = model(input_ids=given.sequences, use_cache=False).logits[:, 7:-1]
        _close(torch.stack(given.logits, 1), full)
        ends = model.generation_config.eos_token_id
        full[..., ends if ends is not None else []] = -torch.inf  # it may not end early
        chosen = full.gather(-1, given.sequences[:, 8:, None])[..., 0]
        behind = (full.amax(-1) - chosen) / full.abs().nan_to_num(posinf=0).amax()
        assert behind.max() < 2e-3, "a token was generated that has not the largest logit"

    # ------------------------------------------------------------------------------------------ sizes

    def heterogeneous_build(self) -> None:
        """One size differs in one layer: only weights of that subblock have another shape; and all such at once."""
        stock_shapes = _shapes(self.model)
        groups = self.descriptor.get_weight_groups(stock_shapes, len(self.blocks))
        together = list(self.blocks)
        for what, i, change in resizings(self.blocks, self.descriptor.findings):
            blocks = [change(block) if j == i else block for j, block in enumerate(self.blocks)]
            subblock = "attention" if blocks[i].attention != self.blocks[i].attention else "ffn"
            seen = _shapes(layersmith.build(self.config, blocks, dtype=torch.float32, device="meta"))
            other = {name for name in stock_shapes.keys() | seen.keys() if stock_shapes.get(name) != seen.get(name)}
            strange = sorted(other - set(groups.get(f"block_{i}_{subblock}", ())))
            assert not strange, f"another {what} in layer {i}: {strange[0]} changes too"
            assert other or what == "experts per token", f"another {what} in layer {i} changes no weight"
            together[i] = change(together[i])
        generator = torch.Generator().manual_seed(1)
        child = layersmith.build(self.config, together, dtype=torch.float32).eval()
        with torch.no_grad():
            for p in child.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.08)
            assert child(input_ids=self.ids, use_cache=False).logits.isfinite().all(), "logits are not finite"
        self._reloads(child)

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_and_reload(self) -> None:
        for child in self.children:
            self._reloads(child)

    def _reloads(self, child: nn.Module) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "child"
            layersmith.save(child, path)
            again = layersmith.load(path, dtype=torch.float32)
        self._same(child, again)

    def stock_reload(self) -> None:
        """Stock Transformers loads the child by the file in its folder."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "child"
            layersmith.save(self.children[0], path)
            again = _load_as_stock(path)
        self._same(self.children[0], again)

    def _parents_reload(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)  # type: ignore[operator]
            again = type(self.model).from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[attr-defined]
        self._same(self.model, again)

    def _same(self, model: nn.Module, again: nn.Module) -> None:
        saved, read = model.state_dict(), again.state_dict()
        assert read.keys() == saved.keys(), "the names of the weights differ"
        for name, tensor in read.items():
            assert torch.equal(tensor, saved[name]), f"{name} is another tensor"
        # Weights lie in a file as it comes. Some kernels round differently where they are not at multiples of 64 bytes.
        for parameter in again.parameters():
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            wanted, seen = (m(input_ids=self.ids, use_cache=False).logits for m in (model, again))
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


def _said(pattern: Sequence[str]) -> str:
    return "without " + ", ".join(f"{what} in layer {i}" for i, what in enumerate(pattern) if what)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _classes(descriptor: type[InferredDescriptor]) -> list[type[nn.Module]]:
    classes = descriptor.decoder_layer_cls()
    return list(classes) if isinstance(classes, list) else [classes]


def _close(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    change = float((seen - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
    assert change < 2e-3, f"logits differ by {change:.1e} of the largest"
