"""A small random model of a family, and what can be seen by running it.

Everything that an inferred descriptor says was seen here: which modules run, in which order, on what, and which weights
stop mattering when something is set to zero. Names are never looked at.

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

from layersmith.errors import UnsupportedModel, first_line
from layersmith.model_descriptor.stock import stock_class, stock_model

TOKENS = 11  # a length that no other size of a model is likely to have
_NOISE = 0.05

# None, or the place of an argument: its position or its name.
Argument = int | str | None


@dataclass
class Call:
    """One call of a module: where in the order of all calls it began and ended, what went in and came out."""

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
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model: nn.Module = stock_model(config, "cpu", torch.float32).float().eval()
        except Exception as error:  # whatever a family's own code raises
            raise UnsupportedModel(f"{name} cannot be built from this config ({first_line(error)}).") from error
        self.config = self.model.config
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                # Some families keep weights out of training; here every one has to show whether it matters.
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * _NOISE)
        vocab_size = int(self._embedding_rows())
        self.ids = (torch.arange(TOKENS)[None] * 7 + 3) % vocab_size
        self.other_ids = (torch.arange(TOKENS)[None] * 5 + 4) % vocab_size
        try:
            self.logits = self.run(self.ids)
        except Exception as error:
            raise UnsupportedModel(f"{name} cannot run on text alone ({first_line(error)}).") from error

    def _embedding_rows(self) -> int:
        try:
            return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return int(self.config.get_text_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        """D: what the input embedding gives for a token."""
        try:
            return int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        except (AttributeError, NotImplementedError):  # it is not called as usual; the first that runs is it
            calls = (self.model.get_submodule(call.name) for call in self.trace(self.ids, keep=()))
            return next((m.embedding_dim for m in calls if isinstance(m, nn.Embedding)), 0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=ids, use_cache=False)
        return output.logits

    def run(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[1, T, V]`` without gradients."""
        with torch.no_grad():
            return self.forward(self.ids if ids is None else ids)

    def trace(self, ids: torch.Tensor, keep: Sequence[str] | None = None) -> list[Call]:
        """Every call of a module in one forward pass, in the order of their beginning.

        Args:
            ids: the tokens.
            keep: modules whose arguments and outputs are kept; default: of all.
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
                value = args[argument] if isinstance(argument, int) else kwargs[argument]
                return with_first_tensor(output, lambda _: value)

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
        """Names beginning with ``among`` of parameters that do not matter for the logits while modules are silenced.

        Gradients tell; where the model gives none, e.g. since its layers compute them in a way of their own that is
        for training only, each parameter is changed instead.
        """
        named = self.model.named_parameters()
        wanted = {name: p for name, p in named if name.startswith(among) and p.requires_grad}
        with self.silenced(silenced), torch.enable_grad():
            logits = self.forward(self.ids)
            # Weights of different signs and sizes, so that no sum cancels.
            weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).sin()
            try:
                grads = torch.autograd.grad((logits * weights).sum(), list(wanted.values()), allow_unused=True)
            except Exception:  # whatever a family's own code raises
                return {name for name, p in wanted.items() if not self._matters(p, logits)}
        return {name for name, grad in zip(wanted, grads, strict=True) if grad is None or not grad.any()}

    def _matters(self, parameter: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether the logits are others once a parameter is another."""
        with restored([parameter]), torch.no_grad():
            parameter.add_(torch.linspace(1, 2, parameter.numel()).view_as(parameter))
            return not torch.equal(self.forward(self.ids), logits)


@contextmanager
def restored(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """What is written into weights within is gone after it."""
    kept = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def cache_argument(model: nn.Module) -> str:
    """What a model calls the cache that it is given and returns."""
    takes = inspect.signature(model.forward).parameters
    others = ("cache", "cache_params", "state", "past_buckets_states")
    return next((name for name in others if name in takes), "past_key_values")


def _copied(value: Any) -> Any:
    """The same with tensors copied, since some models change theirs in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(part) for part in value)
    return {key: _copied(part) for key, part in value.items()} if type(value) is dict else value


def with_first_tensor(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What a module returned, with its first tensor changed."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, tuple | list):
        first = next(i for i, part in enumerate(output) if isinstance(part, torch.Tensor))
        made = getattr(output, "_make", type(output))  # a tuple whose parts have names
        return made([change(part) if i == first else part for i, part in enumerate(output)])
    raise UnsupportedModel(f"a module returns {type(output).__name__}, in which no tensor can be exchanged")


def first_tensor_of(output: Any) -> torch.Tensor | None:
    """The first tensor in what a module returned."""
    parts = output if isinstance(output, tuple | list) else [output]
    return next((part for part in parts if isinstance(part, torch.Tensor)), None)
