"""A small random model of a family, and what can be observed by running it.

Everything that an inferred descriptor says was observed here: which modules run, in which order, on what, and which
weights stop mattering when something is set to zero. The few names that are assumed are in ``conventions.py``.

Shapes: T tokens, D hidden, V vocabulary. One sequence at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from layersmith.errors import UnsupportedModel
from layersmith.foreign import Attempt, foreign_code
from layersmith.model_descriptor.conventions import CACHES
from layersmith.model_descriptor.stock import stock_class, stock_model

TOKENS = 11  # a length that no other size of a model is likely to have
_NOISE = 0.05

# None, or the place of an argument: its position or its name.
Argument = int | str | None


class CannotSilence(UnsupportedModel):
    """A module returns something whose first tensor cannot be replaced."""


@contextmanager
def experiment(question: str) -> Iterator[Attempt]:
    """Code of a family that may refuse to run, as an answer to a question; see :func:`foreign_code`.

    That a module cannot be silenced is a refusal too.
    """
    try:
        with foreign_code(question, refusal_is_answer=True) as attempt:
            yield attempt
    except CannotSilence as refusal:
        attempt.error = refusal


@dataclass
class Call:
    """One call of a module: when it began and ended in the order of all calls, its arguments and its output."""

    name: str
    begin: int
    end: int = -1
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    def tensors(self) -> dict[int | str, torch.Tensor]:
        """The tensors among the arguments, by position or name."""
        everything: dict[int | str, Any] = dict(enumerate(self.args))
        everything.update(self.kwargs)
        return {key: value for key, value in everything.items() if isinstance(value, torch.Tensor)}


class Specimen:
    """A random model in float32 whose every weight, biases and norms included, is off its usual starting value."""

    def __init__(self, config: PretrainedConfig, seed: int = 0):
        name = stock_class(config).__name__
        with torch.random.fork_rng(devices=[]), experiment("Can the model be built?") as attempt:
            torch.manual_seed(seed)
            self.model: nn.Module = stock_model(config, "cpu", torch.float32).float().eval()
        if attempt.error is not None:
            raise UnsupportedModel(f"{name} cannot be built from this config ({attempt.reason}).") from attempt.error
        self.config = self.model.config
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                # Some families exclude weights from training; here every weight has to show whether it matters.
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * _NOISE)
        vocab_size = int(self._embedding_rows())
        self.ids = (torch.arange(TOKENS)[None] * 7 + 3) % vocab_size
        self.other_ids = (torch.arange(TOKENS)[None] * 5 + 4) % vocab_size
        with experiment("Does the model run on text alone?") as attempt:
            self.logits = self.run(self.ids)
        if attempt.error is not None:
            raise UnsupportedModel(f"{name} cannot run on text alone ({attempt.reason}).") from attempt.error

    def _embedding_rows(self) -> int:
        try:
            return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return int(self.config.get_text_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        """D: the size of a token's embedding."""
        try:
            return int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        except (AttributeError, NotImplementedError):  # it has an unusual name; it is the first embedding that runs
            calls = (self.model.get_submodule(call.name) for call in self.trace(self.ids, keep=()))
            return next((m.embedding_dim for m in calls if isinstance(m, nn.Embedding)), 0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[1, T, V]``."""
        output = self.model(input_ids=ids, use_cache=False)
        return Attempt("").call(getattr, output, "logits")

    def run(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[1, T, V]`` without gradients."""
        with torch.no_grad():
            return self.forward(self.ids if ids is None else ids)

    def trace(self, ids: torch.Tensor, keep: Sequence[str] | None = None) -> list[Call]:
        """Every call of a module in one forward pass, in the order in which the calls began.

        Args:
            ids: The tokens.
            keep: Modules whose arguments and outputs are kept. Default: all.
        """
        calls: list[Call] = []
        open_calls: list[Call] = []
        clock = iter(range(1_000_000_000))
        handles = []

        def watch(name: str, module: nn.Module) -> None:
            kept = keep is None or name in keep

            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                call = Call(name, next(clock))
                if kept:
                    call.args, call.kwargs = _copied(tuple(args)), _copied(dict(kwargs))
                calls.append(call)
                open_calls.append(call)

            def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                call = open_calls.pop()
                call.end = next(clock)
                if kept:
                    call.output = _copied(output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))

        for name, module in self.model.named_modules():
            watch(name, module)
        try:
            self.run(ids)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def silenced(self, modules: Mapping[str, Argument]) -> Any:
        """See :meth:`silenced_in`."""
        return Specimen.silenced_in(self.model, modules)

    @staticmethod
    @contextmanager
    def silenced_in(model: nn.Module, modules: Mapping[str, Argument]) -> Iterator[None]:
        """While open, the first tensor that each of these modules returns is zero, or one of its arguments."""

        def replace(argument: Argument) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                if argument is None:
                    return with_first_tensor(output, torch.zeros_like)
                given = dict(enumerate(args)) | kwargs
                if argument not in given:
                    raise CannotSilence(f"{type(module).__name__} is called without its argument {argument!r}")
                return with_first_tensor(output, lambda _: given[argument])

            return hook

        handles = [
            model.get_submodule(name).register_forward_hook(replace(argument), with_kwargs=True)
            for name, argument in modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def dead(self, silenced: Mapping[str, Argument], among: str) -> set[str]:
        """Names of parameters, starting with ``among``, on which the logits do not depend while modules are silenced.

        Gradients show it. Where the model gives none, e.g. because its layers compute them in a special way for
        training only, each parameter is changed instead.
        """
        named = self.model.named_parameters()
        wanted = {name: p for name, p in named if name.startswith(among) and p.requires_grad}
        with self.silenced(silenced), torch.enable_grad():
            logits = self.forward(self.ids)
            # Weights of different signs and sizes, so that no sum cancels.
            weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()
            with experiment("Does the model give gradients?") as attempt:
                grads = torch.autograd.grad((logits * weights).sum(), list(wanted.values()), allow_unused=True)
            if attempt.failed:
                return {name for name, p in wanted.items() if not self._matters(p, logits)}
        return {name for name, grad in zip(wanted, grads, strict=True) if grad is None or not grad.any()}

    def _matters(self, parameter: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether the logits change when a parameter does."""
        with restored([parameter]), torch.no_grad():
            parameter.add_(torch.linspace(1, 2, parameter.numel()).view_as(parameter))
            return not torch.equal(self.forward(self.ids), logits)


@contextmanager
def restored(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """While open, weights may be changed; afterwards they are as before."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def cache_argument(model: nn.Module) -> str:
    """The name of the argument by which a model takes its cache."""
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in takes), "past_key_values")


def _copied(value: Any) -> Any:
    """A copy down to the tensors, since some models change theirs in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(part) for part in value)
    return {key: _copied(part) for key, part in value.items()} if type(value) is dict else value


def with_first_tensor(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What a module returned, with its first tensor changed.

    Raises:
        CannotSilence: It returned no tensor, tuple or list.
    """
    if isinstance(output, torch.Tensor):
        return change(output)
    parts = output if isinstance(output, tuple | list) else ()
    first = next((i for i, part in enumerate(parts) if isinstance(part, torch.Tensor)), None)
    if first is None:
        raise CannotSilence(f"a module returns {type(output).__name__}, in which no tensor can be replaced")
    made = getattr(output, "_make", type(output))  # a tuple whose parts have names
    return made([change(part) if i == first else part for i, part in enumerate(parts)])


def first_tensor_of(output: Any) -> torch.Tensor | None:
    """The first tensor in what a module returned."""
    parts = output if isinstance(output, tuple | list) else [output]
    return next((part for part in parts if isinstance(part, torch.Tensor)), None)
