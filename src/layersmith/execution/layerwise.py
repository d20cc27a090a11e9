"""A parent taken apart: embedding, one stage of a layer after another, head.

A model's own forward decides what its layers are given besides hidden states: masks, positions, rotary tables. So it is
run once a batch with stand-ins for its layers, which note what they are given; from then on each layer is called with
just that, as often and on whichever hidden states are wanted. The head is the same forward with the hidden states
handed in after the last layer.

A layer is split in two where its descriptor's no-ops allow: the layer without its FFN is the stage of the attention,
the layer without its attention that of the FFN. Which of three ways the stages make up the layer is found by trying:

* ``sequence``: the FFN's stage reads what the attention's gives;
* ``parallel``: both read the layer's input, and what they add to it adds up;
* ``whole``: neither; the layer is one stage.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from layersmith.errors import first_line
from layersmith.execution.exchange import (
    LAYER_TYPE,
    exchanged,
    first_tensor,
    hands_over,
    layer_outputs,
    logits_and_hidden,
)
from layersmith.execution.flops import Arithmetic
from layersmith.execution.parent import Parent
from layersmith.heterogeneous.no_op import DummyBlock
from layersmith.library.alternative import Alternative, no_op_beside
from layersmith.library.library import Library

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
# What tokens that run at once may take where the parent's weights stay on the disk.
STREAMED_BYTES = 64 * 1024**2
# Elsewhere: this where it is much beside the weights, else a share of those.
_SMALL_BYTES = 256 * 1024**2
_SHARE_OF_WEIGHTS = 0.1


@dataclass(frozen=True)
class Call:
    """What a model gives one of its layers besides hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states that it came with."""
        hidden: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def without_hidden(self) -> Call:
        """The rest alone; hidden states need not be held on to."""
        kwargs = {name: value for name, value in self.kwargs.items() if name != "hidden_states"}
        return Call((None, *self.args[1:]) if self.args else (), kwargs)

    def of(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that a layer makes of others."""
        if self.args:
            return first_tensor(layer(hidden, *self.args[1:], **self.kwargs))
        return first_tensor(layer(**{**self.kwargs, "hidden_states": hidden}))


@dataclass(frozen=True)
class Batch:
    """Rows on their way through the model.

    Attributes:
        input_ids: ``[B, T]``.
        embedded: ``[B, T, D]``, what the first layer is given.
        calls: one a layer, without hidden states.
    """

    input_ids: torch.Tensor
    embedded: torch.Tensor
    calls: tuple[Call, ...]

    def without_embedded(self) -> Batch:
        """The rest alone, where hidden states wait elsewhere."""
        return replace(self, embedded=self.embedded.new_empty(0))

    def repeated(self, times: int) -> Batch:
        """The same rows several times over; nothing is copied for a single row."""
        if times == 1:
            return self
        num_rows = len(self.input_ids)

        def repeat(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim >= 2 and len(value) == num_rows:
                if num_rows == 1:
                    return value.expand(times, *value.shape[1:])
                return value.repeat(times, *[1] * (value.ndim - 1))
            if isinstance(value, tuple | list):
                return type(value)(repeat(v) for v in value)
            return {k: repeat(v) for k, v in value.items()} if isinstance(value, dict) else value

        seen: dict[int, Any] = {}  # layers are given the same objects

        def once(value: Any) -> Any:
            if id(value) not in seen:
                seen[id(value)] = repeat(value)
            return seen[id(value)]

        calls = tuple(Call(tuple(map(once, c.args)), {k: once(v) for k, v in c.kwargs.items()}) for c in self.calls)
        return Batch(repeat(self.input_ids), self.embedded, calls)


@dataclass(frozen=True)
class Stages:
    """How a layer is split.

    Attributes:
        layout: ``sequence``, ``parallel`` or ``whole``.
        attention, ffn: the layer without its FFN, and without its attention; None for ``whole``.
    """

    layout: str
    attention: nn.Module | None = None
    ffn: nn.Module | None = None


class _Enough(Exception):
    """The last layer has been called; nothing after it is wanted."""


class _StandIn(DummyBlock):
    """Stands for a layer: notes what it is given, and hands on hidden states in the form in which the layer would."""

    def __init__(self, original_layer: nn.Module, block_index: int, like: Any):
        super().__init__(original_layer, block_index)
        self.like = like
        self.call: Call | None = None
        self.stops = False
        self.gives: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.gives
        if hidden is None:
            self.call = Call(args, kwargs)
            if self.stops:
                raise _Enough
            hidden = self.call.hidden
        return hidden if isinstance(self.like, torch.Tensor) else type(self.like)((hidden, *self.like[1:]))


class StagedParent:
    """See the module's docstring.

    Attributes:
        library: of alternatives for its layers.
        layers: its decoder layers.
        vocab_size: V, of its logits.
        bytes_of_a_token: in hidden states.
        arithmetic: counts what is run.
    """

    def __init__(self, library: Library):
        parent = self._parent = library.parent
        self.library, self.layers = library, parent.layers
        probe = torch.arange(3, 11, device=parent.runtime.device)[None] % parent.language_config.vocab_size
        logits, _, outputs = layer_outputs(parent, probe)
        self.vocab_size = logits.shape[-1]
        self._stand_ins = [_StandIn(layer, i, outputs[i]) for i, layer in enumerate(self.layers)]
        hidden = first_tensor(outputs[0])
        self.bytes_of_a_token = hidden.element_size() * hidden.shape[-1]
        self.arithmetic = Arithmetic()
        self._stages: dict[int, Stages] = {}
        self._layouts: dict[int, str] = {}
        self._types = getattr(parent.language_config, "layer_types", None)
        self._norm = parent.model.get_submodule(parent.descriptor.final_norm_name().removesuffix(".weight"))
        self._output: Any = parent.head
        self._plain_head = False
        self._plain_head = self._has_plain_head(probe)
        self._counts: list[tuple[float, float]] = []
        self._of_head = 0.0

    @contextmanager
    def _without_layers(self) -> Iterator[_StandIn]:
        """While open, stand-ins are in the layers' places; yields the last."""
        with exchanged(self._parent, dict(enumerate(self._stand_ins))):
            yield self._stand_ins[-1]

    # ------------------------------------------------------------------------------------------ the way through

    def start(self, input_ids: torch.Tensor) -> Batch:
        """Embed rows ``[B, T]`` and note what each layer will be given."""
        with self._without_layers() as last:
            last.stops = True
            try:
                self._parent.model(input_ids=input_ids, use_cache=False)
            except _Enough:
                pass
            finally:
                last.stops = False
        calls = []
        for stand_in in self._stand_ins:
            assert stand_in.call is not None
            calls.append(stand_in.call)
            stand_in.call = None
        return Batch(input_ids, calls[0].hidden, tuple(call.without_hidden() for call in calls))

    def hidden_states(self, batch: Batch) -> list[torch.Tensor]:
        """What each layer is given, and what the last one gives: ``[B, T, D]`` each."""
        states = [batch.embedded]
        for i in range(len(self.layers)):
            states.append(self.run(batch, i, states[-1]))
        return states

    def run(self, batch: Batch, i: int, hidden: torch.Tensor, module: nn.Module | None = None) -> torch.Tensor:
        """Layer ``i``, or ``module`` in its place, on hidden states ``[B, T, D]``."""
        self._forget_others(i)
        module = self.layers[i] if module is None else module
        own_type, call = getattr(module, LAYER_TYPE, None), batch.calls[i]
        if isinstance(own_type, str) and self._types:
            call = batch.calls[list(self._types).index(own_type)]
        return self.arithmetic.count(key_of(module, hidden), lambda: call.of(module, hidden))

    @property
    def streamed(self) -> bool:
        """Whether weights stay on the disk until a layer runs."""
        return self._parent.stream is not None

    def read(self, i: int) -> None:
        """Have the weights of layer ``i`` in memory, and of no other where they stay on the disk."""
        self._forget_others(i)
        self._parent.layer(i)

    def head(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[B, T, V]`` and what the head reads, from what the last layer gives.

        For all tokens or some neighbouring ones; ``input_ids`` are theirs.
        """
        return self.arithmetic.count(("head", hidden.shape), lambda: self._head(input_ids, hidden))

    def _head(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._plain_head:
            read = self._norm(hidden)
            return self._output(read), read
        with self._without_layers() as last:
            last.gives = hidden
            try:
                return logits_and_hidden(self._parent, input_ids)
            finally:
                last.gives = None

    @torch.no_grad()
    def _has_plain_head(self, probe: torch.Tensor) -> bool:
        """Whether logits are the output embedding of the normed hidden states and nothing else, by trying."""
        hidden = self.start(probe).embedded
        expected, read = self.head(probe, hidden)
        return self._output is not None and torch.equal(self._output(read), expected)

    # ------------------------------------------------------------------------------------------ work

    def operations(self, start: int, end: int, rows: int, length: int) -> float:
        """About what layers from ``start`` until before ``end`` do on rows of so many tokens.

        Attentions as if every token looked at every other, and everything else in proportion to the tokens.
        """
        tokens, pairs = rows * length, rows * length**2
        return sum(matrices * tokens + attention * pairs for matrices, attention in self._counts[start:end])

    def head_operations(self, rows: int, length: int) -> float:
        """The same of the head."""
        return self._of_head * rows * length

    def note_operations(self, layers: Sequence[Hashable], head: tuple[str, torch.Size], of: torch.Size) -> None:
        """Let :meth:`operations` go by what was counted.

        Args:
            layers: their keys, when they ran on ``of`` rows and tokens.
            head: its key; the shape in it is what it ran on.
            of: ``[B, T]``.
        """
        (rows, length), (_, shape) = of, head
        self._counts = [(m / (rows * length), p / (rows * length**2)) for m, p in map(self.arithmetic.of, layers)]
        self._of_head = sum(self.arithmetic.of(head)) / (shape[0] * shape[1])

    # ------------------------------------------------------------------------------------------ stages

    def stages(self, i: int, batch: Batch, hidden: torch.Tensor) -> Stages:
        """How layer ``i`` is split; tried once, on ``hidden`` ``[B, T, D]`` that it is given."""
        if i not in self._stages:
            self._forget_others(i)
            self._stages[i] = self._split(i, batch, hidden)
            self._layouts[i] = self._stages[i].layout
        return self._stages[i]

    def _forget_others(self, i: int) -> None:
        """Stages hold on to their layer's weights; where these stay on the disk, one layer's are kept."""
        if self.streamed and i not in self._stages:
            self._stages.clear()

    def _split(self, i: int, batch: Batch, hidden: torch.Tensor) -> Stages:
        layout = self._layouts.get(i)
        if layout == "whole" or not self.can_split(i):
            return Stages("whole")
        attention, ffn = (self.library.layer(Alternative(i, other, "no_op")) for other in ("ffn", "attention"))
        if layout is not None:
            return Stages(layout, attention, ffn)
        with torch.no_grad():
            whole = self.run(batch, i, hidden)
            after = self.run(batch, i, hidden, attention)
            in_sequence = self.run(batch, i, after, ffn)
            side_by_side = after + self.run(batch, i, hidden, ffn) - hidden
        for layout, made in (("sequence", in_sequence), ("parallel", side_by_side)):
            if _equal(made, whole, hidden):
                return Stages(layout, attention, ffn)
        return Stages("whole")

    def can_split(self, i: int) -> bool:
        descriptor, block = self._parent.descriptor, self._parent.blocks[i]
        present = not any(own.no_op or own.replace_with_linear for own in (block.attention, block.ffn))
        return present and descriptor.attn_no_op_supported() and descriptor.mlp_no_op_supported()

    def replacement(self, alternative: Alternative) -> nn.Module:
        """What runs in the place of its layer, or of its stage where the layer is a ``sequence``."""
        stages = self._stages[alternative.layer]
        return self.module_of(alternative, stages) if stages.layout == "sequence" else self.library.layer(alternative)

    def replaced(
        self,
        batch: Batch,
        alternative: Alternative,
        hidden: torch.Tensor,
        middle: torch.Tensor | None,
        module: nn.Module | None = None,
    ) -> torch.Tensor:
        """What the layer of an alternative gives with it.

        Args:
            batch: the rows.
            alternative: of a layer whose stages are known.
            hidden: what the layer is given.
            middle: what its attention's stage gives, where an FFN's alternative of a ``sequence`` starts from there.
            module: its :meth:`replacement`, if that was made before.
        """
        i = alternative.layer
        stages = self._stages[i]
        module = self.replacement(alternative) if module is None else module
        if stages.layout != "sequence":
            return self.run(batch, i, hidden, module)
        if alternative.subblock == "ffn":
            assert middle is not None
            return self.run(batch, i, middle, module)
        return self.run(batch, i, self.run(batch, i, hidden, module), stages.ffn)

    def module_of(self, alternative: Alternative, stages: Stages) -> nn.Module:
        """What runs in the place of the stage that an alternative changes."""
        if stages.layout == "whole":
            return self.library.layer(alternative)
        return self.library.layer(alternative, no_op_beside(alternative))


def tokens_at_once(parent: Parent, staged: StagedParent | None, most: int) -> int:
    """Of ``most``, so many that what a layer makes of them stays small beside the parent's weights."""
    streamed = staged is not None and staged.streamed
    weights = sum(p.numel() * p.element_size() for p in parent.model.parameters())
    limit = STREAMED_BYTES if streamed else max(_SMALL_BYTES, _SHARE_OF_WEIGHTS * weights)
    vocab_size, held = parent.language_config.vocab_size, 0
    if staged is not None:
        vocab_size = staged.vocab_size
        # What every layer is given, unless that waits on the disk.
        held = 0 if streamed else staged.bytes_of_a_token * (len(staged.layers) + 1)
    # While it goes through a layer, or while the parent's logits are at hand.
    of_token = max(bytes_within_a_layer(parent), 8.0 * vocab_size)
    return int(min(most, max(1, limit // (of_token + held))))


def bytes_within_a_layer(parent: Parent) -> float:
    """About what a token takes while it, or its gradient, goes through a layer."""
    widest = max(sum(p.shape[-2] for p in layer.parameters() if p.ndim > 1) for layer in parent.layers)
    return 3.0 * parent.runtime.dtype.itemsize * widest


def key_of(module: nn.Module, hidden: torch.Tensor) -> tuple[Any, ...]:
    """Equal for modules that do as many operations on hidden states of this shape."""
    return (type(module), hidden.shape, tuple(p.shape for p in module.parameters()))


def _equal(made: torch.Tensor, whole: torch.Tensor, given: torch.Tensor) -> bool:
    update = (whole - given).float().abs().max().clamp_min(1e-12)
    return bool((made - whole).float().abs().max() <= _TOLERANCE.get(whole.dtype, 3e-2) * update)


class CannotTakeApart(Exception):
    """A parent does not give layer by layer what it gives as a whole; the message says why."""


@torch.no_grad()
def take_apart(library: Library, input_ids: torch.Tensor) -> StagedParent:
    """The parent taken apart, if so it gives what it gives as a whole; tried on rows ``[B, T]``, B at least 2.

    Raises:
        CannotTakeApart: it does not.
    """
    parent = library.parent
    if not hands_over(parent):
        raise CannotTakeApart("its layers leave each other more than hidden states")
    expected = parent.model(input_ids=input_ids, use_cache=False).logits
    try:
        staged = StagedParent(library)
        batch = staged.start(input_ids)
        hidden = batch.embedded.repeat(2, 1, 1)
        twice = batch.repeated(2)
        keys = []
        for i, layer in enumerate(staged.layers):
            keys.append(key_of(layer, hidden))
            hidden = staged.run(twice, i, hidden)
        half = max(1, input_ids.shape[1] // 2)
        made_of = hidden[: len(input_ids), :half].shape
        made = []
        for own in hidden.view(2, *batch.embedded.shape):
            parts = [(input_ids[:, :half], own[:, :half]), (input_ids[:, half:], own[:, half:])]
            made.append(torch.cat([staged.head(ids, part)[0] for ids, part in parts if ids.shape[1]], 1))
    except Exception as error:  # whatever a family's own code raises when it is not run as it expects
        raise CannotTakeApart(f"a layer cannot be called by itself: {first_line(error)}") from error
    if not all(_equal(logits, expected, torch.zeros_like(expected)) for logits in made):
        raise CannotTakeApart("called one by one, its layers give something else")
    staged.note_operations(keys, ("head", made_of), twice.input_ids.shape)
    staged.arithmetic = Arithmetic()
    return staged
