"""What is the attention of a decoder layer and what its FFN, found by experiment.

The module that lets one token see another is the attention (or the Mamba or linear-attention mixer in its place); the
largest one that treats every token alone is the FFN. What else belongs to a subblock is what stops mattering for the
logits when the subblock gives zeros: its norms before and after, its scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layersmith.errors import UnsupportedModel
from layersmith.model_descriptor.infer.specimen import Argument, Call, Specimen, first_tensor_of

Record = dict[str, Any]


@dataclass(frozen=True)
class Subblock:
    """One subblock of a kind of layer; names are those in the layer.

    Attributes:
        modules: the modules that do its work.
        replaced: what its no-op puts where, as ``make_replacement`` reads it; empty if it has none.
        reason: why it has no no-op.
        stays: whether the no-op takes only the last part of its work away, because other layers use the rest.
    """

    modules: tuple[str, ...] = ()
    replaced: tuple[tuple[str, Record], ...] = ()
    reason: str = ""
    stays: bool = False

    @property
    def removable(self) -> bool:
        return bool(self.replaced)


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: what its two subblocks are, and whose its weights are.

    Attributes:
        attention, ffn: None where the kind has no such subblock.
        shared: modules that only both subblocks together need, e.g. a norm before parallel branches.
        owners: parameter or module name in the layer to ``"attention"`` or ``"ffn"``.
    """

    attention: Subblock | None
    ffn: Subblock | None
    shared: tuple[tuple[str, Record], ...]
    owners: dict[str, str]


def signature(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers of the same kind: classes and names, no sizes; of many experts the first counts."""
    modules = tuple(
        (name, type(module).__qualname__)
        for name, module in layer.named_modules()
        if not any(part.isdigit() and int(part) > 3 for part in name.split("."))
    )
    parameters = tuple(n for n, _ in layer.named_parameters() if not any(p.isdigit() for p in n.split(".")))
    return type(layer).__qualname__, modules, parameters


def find_kind(specimen: Specimen, layer_name: str) -> LayerKind:
    """Tell the subblocks of one decoder layer.

    Raises:
        UnsupportedModel: no part of the layer mixes tokens and none treats them alone.
    """
    return _Examination(specimen, layer_name).kind()


class _Examination:
    def __init__(self, specimen: Specimen, layer_name: str):
        self.specimen, self.layer_name = specimen, layer_name
        self.prefix = f"{layer_name}."
        self.layer = specimen.model.get_submodule(layer_name)
        self.inside = [layer_name, *(self.prefix + name for name, _ in self.layer.named_modules() if name)]
        self.calls = self._calls(specimen.ids)
        self.other_calls = self._calls(specimen.other_ids)
        hidden = next((v for v in self.calls[""].tensors().values() if v.ndim >= 2 and v.is_floating_point()), None)
        if hidden is None:
            raise UnsupportedModel(f"{layer_name} is called without hidden states.")
        self.length = self.specimen.ids.shape[1] if self.specimen.ids.shape[1] in hidden.shape else hidden.shape[-2]
        # Module to the argument that it passes on when it is silenced; None: it gives zeros.
        self.passes: dict[str, Argument] = {}
        self.always_dead: set[str] = set()
        self.always_dead = self._dead([])

    def _calls(self, ids: torch.Tensor) -> dict[str, Call]:
        calls: dict[str, Call] = {}
        for call in self.specimen.trace(ids, keep=self.inside):
            if call.name.startswith(self.prefix) or call.name == self.layer_name:
                calls.setdefault(call.name.removeprefix(self.layer_name).removeprefix("."), call)
        return calls

    # ------------------------------------------------------------------------------------------ experiments

    def _silenced(self, names: Sequence[str]) -> dict[str, Argument]:
        return {self.prefix + name: self.passes.get(name) for name in names}

    def _dead(self, names: Sequence[str]) -> set[str]:
        """Parameters of the layer that stop mattering when some of its modules are silenced."""
        try:
            found = self.specimen.dead(self._silenced(names), among=self.prefix)
        except Exception:  # a family's own code may not bear zeros here
            return set()
        return {name.removeprefix(self.prefix) for name in found} - self.always_dead

    def _keeps_stream(self, name: str) -> bool:
        """Whether the layer's input still reaches the logits when a module gives zeros.

        Gradients tell; where the model gives none, the input is changed instead.
        """
        taken: list[torch.Tensor] = []
        added = 0.0

        def watch(module: nn.Module, args: Any, kwargs: Any) -> Any:
            args = list(args)
            for place, value in itertools.chain(enumerate(args), kwargs.items()):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2:
                    change = torch.linspace(-1, 1, value.numel()).view_as(value)
                    watched = (value.detach() + added * change).requires_grad_()
                    taken.append(watched)
                    (args if isinstance(place, int) else kwargs)[place] = watched
                    break
            return tuple(args), kwargs

        handle = self.layer.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            with self.specimen.silenced({self.prefix + name: None}), torch.enable_grad():
                logits = self.specimen.forward(self.specimen.ids)
                if not taken:
                    return False
                grad = None
                with suppress(Exception):  # whatever a family's own code raises
                    (grad,) = torch.autograd.grad(logits.square().sum(), taken[0], allow_unused=True)
                if grad is None:
                    added = 1.0
                    return not torch.equal(self.specimen.forward(self.specimen.ids), logits)
        except Exception:  # a family's own code may not bear zeros here
            return False
        finally:
            handle.remove()
        return bool(grad.any())

    def _differing(self, name: str) -> dict[int | str, torch.Tensor]:
        """Tensor arguments of a module's call that depend on the tokens, with their values for the other tokens."""
        own, other = self.calls[name].tensors(), self.other_calls[name].tensors()
        return {
            key: other[key]
            for key, value in own.items()
            if key in other
            and value.is_floating_point()
            and value.shape == other[key].shape
            and self._token_dim(value) is not None
            and not torch.equal(value, other[key])
        }

    def _token_dim(self, tensor: torch.Tensor) -> int | None:
        """The dimension of a tensor that counts tokens."""
        return next((dim for dim in (1, 0) if tensor.ndim > dim and tensor.shape[dim] == self.length), None)

    def _mixes(self, name: str) -> bool | None:
        """Whether the module lets tokens see each other; None if it gives nothing a token."""
        call = self.calls[name]
        output = first_tensor_of(call.output)
        differing = self._differing(name)
        if output is None or not differing or not output.is_floating_point() or self._token_dim(output) is None:
            return None
        changed = {}
        at = min(min(self._changed_tokens(call.tensors()[key], other)) for key, other in differing.items())
        for key, other in differing.items():
            value = call.tensors()[key].clone()
            dim = self._token_dim(value) or 0
            value.select(dim, at).copy_(other.select(dim, at))
            changed[key] = value
        try:
            mixed = self._changed_tokens(self._called(name, {}), self._called(name, changed)) - {at}
        except Exception:  # it cannot run alone
            mixed = self._touched_in_place(name)
        return bool(mixed) or self._reads_elsewhere(name)

    def _called(self, name: str, changed: dict[int | str, torch.Tensor]) -> torch.Tensor:
        """The first tensor that a module gives for its arguments, some of them exchanged."""
        call = self.calls[name]
        args = [changed.get(i, value) for i, value in enumerate(call.args)]
        kwargs = {key: changed.get(key, value) for key, value in call.kwargs.items()}
        with torch.no_grad():
            output = first_tensor_of(self.layer.get_submodule(name)(*args, **kwargs))
        assert output is not None
        return output

    def _touched_in_place(self, name: str) -> set[int]:
        """Tokens of a module's output that change, though its input there does not, with one token of the layer's."""

        def disturb(module: nn.Module, args: Any, kwargs: Any) -> Any:
            args = list(args)
            for place, value in itertools.chain(enumerate(args), kwargs.items()):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and self._token_dim(value) is not None:
                    value = value.clone()
                    value.select(self._token_dim(value) or 0, 0).add_(0.1)
                    (args if isinstance(place, int) else kwargs)[place] = value
                    break
            return tuple(args), kwargs

        handle = self.layer.register_forward_pre_hook(disturb, with_kwargs=True)
        try:
            calls = self._calls(self.specimen.ids)
        finally:
            handle.remove()
        base, seen = first_tensor_of(self.calls[name].output), first_tensor_of(calls[name].output)
        if base is None or seen is None:
            return set()
        given: set[int] = set()
        for key, value in self.calls[name].tensors().items():
            if value.is_floating_point() and self._token_dim(value) is not None:
                given |= self._changed_tokens(value, calls[name].tensors()[key])
        return self._changed_tokens(base, seen) - given

    def _reads_elsewhere(self, name: str) -> bool:
        """Whether the output depends on the tokens by another way than the module's tensor arguments.

        So does an attention whose keys and values come from an earlier layer.
        """
        own = self.calls[name].tensors()

        def hand_back(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return tuple(own.get(i, v) for i, v in enumerate(args)), {k: own.get(k, v) for k, v in kwargs.items()}

        handle = self.layer.get_submodule(name).register_forward_pre_hook(hand_back, with_kwargs=True)
        try:
            calls = self._calls(self.specimen.other_ids)
        except Exception:  # a family's own code may not bear the exchange
            return False
        finally:
            handle.remove()
        base, seen = first_tensor_of(self.calls[name].output), first_tensor_of(calls[name].output)
        return base is not None and seen is not None and bool(self._changed_tokens(base, seen))

    def _changed_tokens(self, base: torch.Tensor, seen: torch.Tensor) -> set[int]:
        dim = self._token_dim(base)
        change = (seen - base).abs().movedim(dim or 0, 0).flatten(1).amax(1)
        return set(torch.nonzero(change > 1e-6 * base.abs().max()).flatten().tolist())

    # ------------------------------------------------------------------------------------------ the subblocks

    def kind(self) -> LayerKind:
        mixing, pointwise = self._candidates()
        attention = self._silenceable(self._first_in_chains(mixing, pointwise), mixes=True)
        ffn = self._ffn([name for name in pointwise if not any(a.startswith(f"{name}.") for a in attention)])
        if not attention and not ffn:
            raise UnsupportedModel(
                f"in {self.layer_name} no module mixes tokens and none transforms each alone, so its subblocks cannot "
                "be told."
            )
        dead_attention = self._dead(attention) if attention else set()
        dead_ffn = self._dead(ffn) if ffn else set()
        dead_both = self._dead(attention + ffn) if attention and ffn else set()
        shared = self._dead_modules(dead_both - dead_attention - dead_ffn, attention + ffn)
        return LayerKind(
            self._subblock(attention, dead_attention, ffn) if attention else None,
            self._subblock(ffn, dead_ffn, attention) if ffn else None,
            tuple((name, {"is": "same", **_form(self.calls[name])}) for name in shared),
            self._owners(attention, ffn, dead_attention, dead_ffn),
        )

    def _candidates(self) -> tuple[list[str], list[str]]:
        """Modules one level down that mix tokens, and those with matrices that do not."""
        mixing, pointwise = [], []
        for name in self._children(""):
            mixes = self._mixes(name)
            if mixes and self._has_matrices(name):
                mixing.append(name)
            elif mixes is False and self._has_matrices(name):
                pointwise.append(name)
        return mixing, pointwise

    def _first_in_chains(self, mixing: list[str], pointwise: list[str]) -> list[str]:
        """Mixing modules without those that only work on what another subblock module gives, e.g. a convolution."""
        downstream: set[str] = set()
        for name in [*mixing, *pointwise] if len(mixing) > 1 else ():
            downstream |= self._given_only_zeros([name]) - {name}
        return [name for name in mixing if name not in downstream]

    def _has_matrices(self, name: str) -> bool:
        return any(p.ndim >= 2 for p in self.layer.get_submodule(name).parameters())

    def _children(self, name: str) -> list[str]:
        """Called modules below a module; a list that is not called itself gives its members."""
        found = []
        for own, child in self.layer.get_submodule(name).named_children():
            full = f"{name}.{own}".removeprefix(".")
            if full in self.calls:
                found.append(full)
            elif isinstance(child, nn.ModuleList | nn.ModuleDict):
                found += self._children(full)
        return found

    def _silenceable(self, names: list[str], mixes: bool) -> list[str]:
        """Modules that can be silenced without losing the residual stream: these, or some inside them."""
        result = []
        for name in names:
            current = name
            while self._hidden_outputs(current) > 1 or not self._keeps_stream(current):
                inner = [c for c in self._children(current) if self._mixes(c) is mixes and self._has_matrices(c)]
                if len(inner) != 1 or not self._holds_matrices_of(inner[0], current):
                    # The residual is added inside.
                    current = name
                    self.passes[name] = self._residual_argument(name)
                    if self.passes[name] is None and (last := self._last_before_residual(name)) is not None:
                        del self.passes[name]
                        current = last
                    break
                current = inner[0]
            result.append(current)
        return result

    def _hidden_outputs(self, name: str) -> int:
        """How many tensors of the shape of the layer's hidden states a module returns."""
        output = self.calls[name].output
        parts = output if isinstance(output, tuple | list) else [output]
        hidden = next(v for v in self.calls[""].tensors().values() if v.ndim >= 2 and v.is_floating_point())
        return sum(isinstance(part, torch.Tensor) and part.shape == hidden.shape for part in parts)

    def _last_before_residual(self, name: str) -> str | None:
        """A module inside ``name`` that all of its matrices end in, and that can give zeros."""
        matrices = {own for own in self._own(name) if self.layer.get_parameter(own).ndim >= 2}
        for inner in reversed([n for n in self.calls if n.startswith(f"{name}.") and self._has_matrices(n)]):
            if self._keeps_stream(inner) and matrices <= self._dead([inner]) | self._own(inner):
                return inner
        return None

    def _holds_matrices_of(self, inner: str, outer: str) -> bool:
        """Whether no weight of more than one dimension is in ``outer`` but not in ``inner``."""
        own = self.layer.get_submodule(outer).named_parameters(prefix=outer)
        return not any(p.ndim >= 2 and not name.startswith(f"{inner}.") for name, p in own)

    def _residual_argument(self, name: str) -> Argument:
        """The argument that a module adds to what it computes: its output changes by just what that one changes."""
        output = first_tensor_of(self.calls[name].output)
        assert output is not None
        for key, value in self.calls[name].tensors().items():
            if value.shape == output.shape and value.is_floating_point():
                change = torch.linspace(-1, 1, value.numel()).view_as(value)
                seen = self._called(name, {key: value + change}) - self._called(name, {})
                if torch.allclose(seen, change, atol=1e-4):
                    return key
        return None

    def _ffn(self, pointwise: list[str]) -> list[str]:
        """The pointwise module with the largest matrices or what it ends in, and those that share its norm or class."""
        names = self._silenceable(pointwise, mixes=False)
        if not names:
            return []
        dead = {name: self._dead([name]) | self._own(name) for name in names}
        main = max(names, key=self._matrix_elements)
        for name in names:  # of a chain, the last one silences all the others
            if self._own(main) <= dead[name] and self.calls[name].begin > self.calls[main].begin:
                main = name
        chosen = [main]
        for name in names:
            if self._own(name) <= dead[main] or self._own(main) <= dead[name]:
                continue
            share_norms = bool(self._dead([main, name]) - dead[main] - dead[name])
            classes = {type(self.layer.get_submodule(c)) for c in chosen}
            if share_norms or type(self.layer.get_submodule(name)) in classes - {nn.Linear}:
                chosen.append(name)
        return chosen

    def _matrix_elements(self, name: str) -> int:
        return sum(p.numel() for p in self.layer.get_submodule(name).parameters() if p.ndim >= 2)

    def _own(self, name: str) -> set[str]:
        return {own for own, _ in self.layer.get_submodule(name).named_parameters(prefix=name)}

    def _owners(
        self, attention: list[str], ffn: list[str], dead_attention: set[str], dead_ffn: set[str]
    ) -> dict[str, str]:
        owners: dict[str, str] = {}
        first_ffn = min((self.calls[name].begin for name in ffn), default=None)
        # Buffers that are saved belong somewhere too, so the state_dict counts, not the parameters.
        for parameter in self.layer.state_dict():
            if any(parameter.startswith(f"{name}.") for name in attention):
                owner = "attention"
            elif any(parameter.startswith(f"{name}.") for name in ffn):
                owner = "ffn"
            elif parameter in dead_attention:
                owner = "attention"
            elif parameter in dead_ffn:
                owner = "ffn"
            else:
                owner = self._by_order(parameter, first_ffn, attention)
            owners[parameter] = owner
        return owners

    def _by_order(self, parameter: str, first_ffn: int | None, attention: Sequence[str]) -> str:
        """Weights that matter without either subblock go with the one that they run before, or else in or after."""
        if first_ffn is None:
            return "attention"
        if not attention:
            return "ffn"
        after_attention = max(self.calls[name].end for name in attention)
        module = parameter
        while module := module.rpartition(".")[0]:
            if module in self.calls:
                begin = self.calls[module].begin
                return "attention" if begin < first_ffn and begin < after_attention else "ffn"
        return "ffn"

    # ------------------------------------------------------------------------------------------ the no-op

    def _subblock(self, names: list[str], dead: set[str], other: list[str]) -> Subblock:
        replaced: list[tuple[str, Record]] = []
        for name in names:
            form = _form(self.calls[name])
            if name not in self.passes:
                replaced.append((name, {"is": "zeros", **form}))
            elif self.passes[name] is not None:
                replaced.append((name, {"is": "argument", "of": self.passes[name], **form}))
            else:
                reason = f"without {name} the layer's input is lost, and no argument of it passes the input on"
                return Subblock(tuple(names), (), reason)
        silent = self._given_only_zeros(names)
        for name in self._dead_modules(dead, [*names, *other], silent):
            replaced.append((name, {"is": "same", **_form(self.calls[name])}))
        return Subblock(tuple(names), tuple(replaced))

    def _dead_modules(self, dead: set[str], around: list[str], silent: Collection[str] = ()) -> list[str]:
        """Modules beside the subblocks whose every weight is dead, or that are silent; the outermost of each."""
        found: list[str] = []
        for name in self.calls:
            own = self._own(name) if name else set()
            beside = not any(name == a or name.startswith(f"{a}.") or a.startswith(f"{name}.") for a in around)
            if not own or not beside or any(name.startswith(f"{outer}.") for outer in found):
                continue
            if (own <= dead | self.always_dead and own & dead) or name in silent:
                found.append(name)
        return found

    def _given_only_zeros(self, names: list[str]) -> set[str]:
        """Modules with weights that see only zeros while others are silenced, e.g. a norm after the subblock."""
        with self.specimen.silenced(self._silenced(names)):
            calls = self.specimen.trace(self.specimen.ids, keep=self.inside)
        silent = set()
        for call in calls:
            given = [value for value in call.tensors().values() if value.is_floating_point()]
            if call.name.startswith(self.prefix) and given and not any(bool(value.any()) for value in given):
                silent.add(call.name.removeprefix(self.prefix))
        return silent


def _form(call: Call) -> dict[str, Any]:
    """How many things a module returns, whether in a list or by which names, and which are arguments passed on."""
    output = call.output
    form: dict[str, Any] = {"returns": len(output) if isinstance(output, tuple | list) else 0}
    if names := getattr(output, "_fields", ()):
        form["names"] = list(names)
    if isinstance(output, list):
        form["list"] = True
    passes = []
    for place, part in enumerate(output if form["returns"] else ()):
        if place and isinstance(part, torch.Tensor):
            given = (k for k, v in call.tensors().items() if v.dtype == part.dtype and torch.equal(v, part))
            passes += [[place, key] for key in itertools.islice(given, 1)]
    return form | ({"passes": passes} if passes else {})
