"""A parent run layer by layer: embedding, one decoder layer after another, head.

A model's own forward decides what its layers get besides hidden states: masks, positions, rotary tables. It therefore
runs once per batch with stand-ins in place of the layers, which record their arguments. From then on each layer is
called with these arguments, as often as needed and on any hidden states. The head is the same forward, in which the
stand-in for the last layer returns given hidden states.

A layer is split into its two subblocks where the descriptor's no-ops allow it. The layer without its FFN runs the
attention, the layer without its attention runs the FFN. An experiment shows how the two make up the layer:

* ``sequence``: the FFN reads the output of the attention;
* ``parallel``: both read the input of the layer, and their updates are added;
* ``whole``: neither is true, so the layer is not split.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from layersmith.execution.division import Division
from layersmith.execution.exchange import (
    LAYER_TYPE,
    exchanged,
    few_tokens,
    first_tensor,
    hands_over,
    logits_and_hidden,
    logits_on_more_tokens,
    more_tokens,
    outputs_on_few_tokens,
    tolerance,
)
from layersmith.execution.flops import Arithmetic
from layersmith.execution.memory import give_back
from layersmith.execution.parent import Parent
from layersmith.foreign import foreign_code
from layersmith.heterogeneous.no_op import DummyBlock
from layersmith.run import ranks

# Hidden states of tokens that run at once, where the parent's weights stay on the disk, by the kind of device: on a CPU
# memory is scarce; a GPU that holds a layer of such a parent has room, and is slow on few tokens.
STREAMED_BYTES = {"cpu": 64 * 1024**2, "cuda": 2 * 1024**3}
# The same where the weights are in memory: a share of their size, but at least what is small on any machine.
_SMALL_BYTES = 256 * 1024**2
_SHARE_OF_WEIGHTS = 0.1


class NotLayerwise(Exception):
    """A parent cannot be run layer by layer; the message says why."""


class Replacement(Protocol):
    """An alternative, as far as running it needs to know."""

    @property
    def layer(self) -> int: ...

    @property
    def subblock(self) -> str: ...


class LayerBuilder(Protocol):
    """Builds decoder layers that differ from the parent's; a library is one."""

    def layer(self, *alternatives: Any) -> nn.Module:
        """The layer with these alternatives in it."""

    def alone(self, alternative: Any) -> nn.Module:
        """The layer with this alternative and without its other subblock."""

    def without(self, i: int, subblock: str) -> nn.Module:
        """Layer ``i`` of the parent without one of its subblocks."""


Builder = TypeVar("Builder", bound=LayerBuilder)


@dataclass(frozen=True)
class Call:
    """The arguments of a decoder layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states among them.

        Raises:
            NotLayerwise: they have another name than in Transformers' layers.
        """
        if not self.args and "hidden_states" not in self.kwargs:
            raise NotLayerwise("its layers take no argument called hidden_states")
        hidden: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def without_hidden(self) -> Call:
        """The other arguments, so that hidden states need not stay in memory."""
        kwargs = {name: value for name, value in self.kwargs.items() if name != "hidden_states"}
        return Call((None, *self.args[1:]) if self.args else (), kwargs)

    def of(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that a layer returns for others."""
        if self.args:
            return first_tensor(layer(hidden, *self.args[1:], **self.kwargs))
        return first_tensor(layer(**{**self.kwargs, "hidden_states": hidden}))


@dataclass(frozen=True)
class Batch:
    """Rows on their way through the model.

    Attributes:
        input_ids: ``[B, T]``.
        embedded: ``[B, T, D]``, the input of the first layer.
        calls: one per layer, without hidden states.
    """

    input_ids: torch.Tensor
    embedded: torch.Tensor
    calls: tuple[Call, ...]

    def without_embedded(self) -> Batch:
        """The same batch for callers that keep its hidden states elsewhere."""
        return replace(self, embedded=self.embedded.new_empty(0))

    def repeated(self, times: int) -> Batch:
        """The same rows several times over; a single row is expanded, not copied."""
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

        seen: dict[int, Any] = {}  # layers get the same objects

        def once(value: Any) -> Any:
            if id(value) not in seen:
                seen[id(value)] = repeat(value)
            return seen[id(value)]

        calls = tuple(Call(tuple(map(once, c.args)), {k: once(v) for k, v in c.kwargs.items()}) for c in self.calls)
        return Batch(repeat(self.input_ids), self.embedded, calls)


@dataclass(frozen=True)
class Split:
    """How a layer is split into its subblocks.

    Attributes:
        layout: ``sequence``, ``parallel`` or ``whole``.
        attention, ffn: the layer without its FFN, and without its attention; None for ``whole``.
    """

    layout: str
    attention: nn.Module | None = None
    ffn: nn.Module | None = None


class _Enough(Exception):
    """The last layer was called; the rest of the forward is not needed."""


class _StandIn(DummyBlock):
    """Takes the place of a layer: records its arguments and returns hidden states in the form of the layer's output."""

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
        if isinstance(self.like, torch.Tensor):
            return hidden
        try:
            return type(self.like)((hidden, *self.like[1:]))
        except TypeError:
            raise NotLayerwise(f"its layers return a {type(self.like).__name__}") from None


@dataclass
class _Facts:
    """What is found out about a parent once, by running it.

    Attributes:
        vocab_size: V.
        bytes_of_a_token: size of one token's hidden states.
        stand_ins: one per layer.
        plain_head: whether logits are the output embedding of the normed hidden states and nothing else.
        layouts: how layers that were tried are split, see :class:`Split`.
        counts: operations of each layer, per token and per pair of tokens.
        head_count: operations of the head per token.
    """

    vocab_size: int
    bytes_of_a_token: int
    stand_ins: list[_StandIn]
    plain_head: bool = False
    layouts: dict[int, str] = field(default_factory=dict)
    counts: list[tuple[float, float]] = field(default_factory=list)
    head_count: float = 0.0

    @staticmethod
    def of(parent: Parent) -> _Facts:
        probe = few_tokens(parent)
        logits, _, outputs = outputs_on_few_tokens(parent)
        hidden = first_tensor(outputs[0])
        stand_ins = [_StandIn(layer, i, outputs[i]) for i, layer in enumerate(parent.layers)]
        facts = _Facts(logits.shape[-1], hidden.element_size() * hidden.shape[-1], stand_ins)
        with torch.no_grad():
            layerwise = LayerwiseParent(parent, NoAlternatives(), facts)
            expected, read = layerwise.head(probe, layerwise.start(probe).embedded)
            facts.plain_head = parent.head is not None and torch.equal(parent.head(read), expected)
        return facts


class LayerwiseParent(Generic[Builder]):
    """A parent that runs layer by layer; see the module's docstring. :func:`split_layers` makes one.

    Attributes:
        parent: the model.
        builder: builds layers with alternatives in them.
        layers: the parent's decoder layers.
        vocab_size: V, of its logits.
        bytes_of_a_token: size of one token's hidden states.
        arithmetic: counts the operations of everything that runs.
        division: the layers that are this process's where several work together.
    """

    def __init__(self, parent: Parent, builder: Builder, facts: _Facts):
        self.parent, self.builder, self.layers, self._facts = parent, builder, parent.layers, facts
        self.vocab_size, self.bytes_of_a_token = facts.vocab_size, facts.bytes_of_a_token
        self.arithmetic, self.division = Arithmetic(), Division(parent.owners, parent.runtime.device)
        self._splits: dict[int, Split] = {}
        self._types = getattr(parent.language_config, "layer_types", None)
        self._norm = parent.model.get_submodule(parent.descriptor.final_norm_name().removesuffix(".weight"))

    @property
    def streamed(self) -> bool:
        """Whether weights stay on the disk until a layer runs."""
        return self.parent.stream is not None

    @property
    def can_be_divided(self) -> bool:
        """Whether there are several processes, none of which has all layers in memory."""
        return self.streamed and ranks.are_several()

    @contextmanager
    def _without_layers(self) -> Iterator[_StandIn]:
        """While open, stand-ins take the layers' places; yields the last."""
        with exchanged(self.parent, dict(enumerate(self._facts.stand_ins))):
            yield self._facts.stand_ins[-1]

    # ------------------------------------------------------------------------------------------ the way through

    def start(self, input_ids: torch.Tensor) -> Batch:
        """Embed rows ``[B, T]`` and record the arguments of every layer."""
        with self._without_layers() as last:
            last.stops = True
            try:
                self.parent.model(input_ids=input_ids, use_cache=False)
            except _Enough:
                pass
            finally:
                last.stops = False
        calls = []
        for i, stand_in in enumerate(self._facts.stand_ins):
            if stand_in.call is None:
                raise NotLayerwise(f"its forward does not call layer {i}")
            calls.append(stand_in.call)
            stand_in.call = None
        return Batch(input_ids, calls[0].hidden, tuple(call.without_hidden() for call in calls))

    def start_here(self, batches: Iterable[torch.Tensor], put: Callable[[int, torch.Tensor], None]) -> dict[int, Batch]:
        """Start the batches that run in this process; where the first layer does, ``put`` gets their number and input.

        The division says which these are. The batches that are returned keep no input.
        """
        started, here = dict[int, Batch](), self.division.here_in_group
        for n, rows in enumerate(batches):
            if here and self.division.is_of_group(n):
                batch = self.start(rows)
                if 0 in here:
                    put(n, batch.embedded)
                started[n] = batch.without_embedded()
        return started

    def hidden_states(self, batch: Batch) -> list[torch.Tensor]:
        """The input of every layer and the output of the last: ``[B, T, D]`` each."""
        states = [batch.embedded]
        for i in range(len(self.layers)):
            states.append(self.run(batch, i, states[-1]))
        return states

    def run(self, batch: Batch, i: int, hidden: torch.Tensor, module: nn.Module | None = None) -> torch.Tensor:
        """The output of layer ``i``, or of ``module`` in its place, for hidden states ``[B, T, D]``."""
        self._forget_others(i)
        module = self.layers[i] if module is None else module
        layer_type, call = getattr(module, LAYER_TYPE, None), batch.calls[i]
        if isinstance(layer_type, str) and self._types:
            call = batch.calls[list(self._types).index(layer_type)]
        return self.arithmetic.count(key_of(module, hidden), lambda: call.of(module, hidden))

    def read(self, i: int) -> None:
        """Have the weights of layer ``i`` in memory; of a streamed parent, of this layer only."""
        self._forget_others(i)
        self.parent.layer(i)
        if self.streamed:  # of what the layer before left; where layers stay, no reading does this
            give_back()

    def head(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[B, T, V]`` and the hidden states that the head reads, from the output of the last layer.

        Both may be of all tokens or of some neighbouring ones; ``input_ids`` are theirs.
        """
        return self.arithmetic.count(("head", hidden.shape), lambda: self._head(input_ids, hidden))

    def _head(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._facts.plain_head:
            read = self._norm(hidden)
            return self.parent.head(read), read
        with self._without_layers() as last:
            last.gives = hidden
            try:
                return logits_and_hidden(self.parent, input_ids)
            finally:
                last.gives = None

    # ------------------------------------------------------------------------------------------ work

    def operations(self, start: int, end: int, rows: int, length: int) -> float:
        """Estimated operations of the layers ``start`` to ``end - 1`` on ``rows`` rows of ``length`` tokens.

        Attention counts as if every token attended to every other; everything else is proportional to the tokens.
        """
        tokens, pairs = rows * length, rows * length**2
        return sum(matrices * tokens + attention * pairs for matrices, attention in self._facts.counts[start:end])

    def head_operations(self, rows: int, length: int) -> float:
        """Estimated operations of the head."""
        return self._facts.head_count * rows * length

    # ------------------------------------------------------------------------------------------ subblocks

    def split(self, i: int, batch: Batch, hidden: torch.Tensor) -> Split:
        """How layer ``i`` is split; the experiment runs once, on ``hidden`` ``[B, T, D]``, an input of the layer."""
        if i not in self._splits:
            self._forget_others(i)
            self._splits[i] = self._find_split(i, batch, hidden)
            self._facts.layouts[i] = self._splits[i].layout
        return self._splits[i]

    def _forget_others(self, i: int) -> None:
        """Split layers hold weights; of a streamed parent, one layer's are kept."""
        if self.streamed and i not in self._splits:
            self._splits.clear()

    def _find_split(self, i: int, batch: Batch, hidden: torch.Tensor) -> Split:
        layout = self._facts.layouts.get(i)
        if layout == "whole" or not self._can_split(i):
            return Split("whole")
        attention, ffn = (self.builder.without(i, other) for other in ("ffn", "attention"))
        if layout is not None:
            return Split(layout, attention, ffn)
        with torch.no_grad():
            whole = self.run(batch, i, hidden)
            after = self.run(batch, i, hidden, attention)
            in_sequence = self.run(batch, i, after, ffn)
            in_parallel = after + self.run(batch, i, hidden, ffn) - hidden
        for layout, made in (("sequence", in_sequence), ("parallel", in_parallel)):
            if _equal(made, whole, hidden):
                return Split(layout, attention, ffn)
        return Split("whole")

    def _can_split(self, i: int) -> bool:
        descriptor, block = self.parent.descriptor, self.parent.blocks[i]
        present = not any(subblock.no_op or subblock.replace_with_linear for subblock in (block.attention, block.ffn))
        return present and descriptor.attn_no_op_supported() and descriptor.mlp_no_op_supported()

    def module_of(self, alternative: Replacement, split: Split) -> nn.Module:
        """The module that runs an alternative in place of its subblock; of the whole layer where that is not split."""
        return self.builder.layer(alternative) if split.layout == "whole" else self.builder.alone(alternative)

    def replacement(self, alternative: Replacement) -> nn.Module:
        """The module that runs an alternative in place of its subblock where layers are a ``sequence``, else layer."""
        in_sequence = self._splits[alternative.layer].layout == "sequence"
        return self.builder.alone(alternative) if in_sequence else self.builder.layer(alternative)

    def replaced(
        self,
        batch: Batch,
        alternative: Replacement,
        hidden: torch.Tensor,
        middle: torch.Tensor | None,
        module: nn.Module | None = None,
    ) -> torch.Tensor:
        """The output of a layer with an alternative in it.

        Args:
            batch: the rows.
            alternative: of a layer that was split.
            hidden: the input of the layer.
            middle: the output of its attention, if the alternative is an FFN's and the layer a ``sequence``.
            module: its :meth:`replacement`, if that exists already.
        """
        i = alternative.layer
        split = self._splits[i]
        module = self.replacement(alternative) if module is None else module
        if split.layout != "sequence":
            return self.run(batch, i, hidden, module)
        if alternative.subblock == "ffn":
            assert middle is not None
            return self.run(batch, i, middle, module)
        return self.run(batch, i, self.run(batch, i, hidden, module), split.ffn)


def split_layers(parent: Parent, builder: Builder, by_all: bool = False) -> LayerwiseParent[Builder]:
    """The parent, ready to run layer by layer. That it then computes what it computes as a whole is checked once.

    Args:
        parent: the model.
        builder: builds layers with alternatives in them.
        by_all: whether all processes will work on it together, so that they divide one that stays on the disk.

    Raises:
        NotLayerwise: it computes something else.
    """
    facts = parent.once("runs layer by layer", lambda: _checked(parent))
    if isinstance(facts, NotLayerwise):
        raise NotLayerwise(*facts.args)
    layerwise = LayerwiseParent(parent, builder, facts)
    layerwise.division.is_open = by_all and layerwise.can_be_divided
    return layerwise


class NoAlternatives:
    """Builds nothing; the check of a parent needs no alternatives."""

    def layer(self, *alternatives: Any) -> nn.Module:
        raise NotImplementedError

    alone = without = layer


@torch.no_grad()
def _checked(parent: Parent) -> _Facts | NotLayerwise:
    """What is known of the parent after the check, or why it cannot run layer by layer."""
    if not hands_over(parent):
        return NotLayerwise("its layers pass on more than hidden states")
    input_ids, expected = more_tokens(parent), logits_on_more_tokens(parent)
    with foreign_code("do the layers run one at a time?") as attempt:
        try:
            facts = _Facts.of(parent)
            logits = _logits_layer_by_layer(LayerwiseParent(parent, NoAlternatives(), facts), facts, input_ids)
        except NotLayerwise as reason:
            return reason
    if attempt.failed:
        return NotLayerwise(f"a layer cannot be called by itself: {attempt.reason}")
    if not all(made.shape == expected.shape and _equal(made, expected, torch.zeros_like(made)) for made in logits):
        return NotLayerwise("its layers, called one by one, compute something else")
    return facts


def _logits_layer_by_layer(
    layerwise: LayerwiseParent[Any], facts: _Facts, input_ids: torch.Tensor
) -> list[torch.Tensor]:
    """The logits of rows ``[B, T]`` that run twice in one batch, the head in two parts; counts operations meanwhile."""
    batch = layerwise.start(input_ids)
    hidden, twice, keys = batch.embedded.repeat(2, 1, 1), batch.repeated(2), []
    for i, layer in enumerate(layerwise.layers):
        keys.append(key_of(layer, hidden))
        hidden = layerwise.run(twice, i, hidden)
    num_rows, length = input_ids.shape
    half, logits = length // 2, []
    for states in hidden.chunk(2):
        parts = [(input_ids[:, :half], states[:, :half]), (input_ids[:, half:], states[:, half:])]
        logits.append(torch.cat([layerwise.head(ids, part)[0] for ids, part in parts], 1))
    tokens, count = 2 * num_rows * length, layerwise.arithmetic.of
    facts.counts = [(matrices / tokens, pairs / (tokens * length)) for matrices, pairs in map(count, keys)]
    facts.head_count = sum(count(("head", hidden[:num_rows, :half].shape))) / (num_rows * half)
    return logits


def tokens_at_once(parent: Parent, layerwise: LayerwiseParent[Any] | None, most: int) -> int:
    """How many tokens may run at once, at most ``most``: their memory stays small against the parent's weights."""
    weights = float(sum(p.numel() * p.element_size() for p in parent.model.parameters()))
    vocab_size, held, streamed = parent.language_config.vocab_size, 0, False
    if layerwise is not None:
        vocab_size, streamed = layerwise.vocab_size, layerwise.streamed
        # The inputs of all layers, unless they are kept on the disk.
        held = 0 if streamed else layerwise.bytes_of_a_token * (len(layerwise.layers) + 1)
    of_token = held + bytes_of_a_token_at_once(parent.layers, parent.runtime.dtype.itemsize, vocab_size)
    return tokens_that_fit(of_token, None if streamed else weights, most, parent.runtime.device.type)


def tokens_that_fit(of_token: float, weights: float | None, most: int, device: str) -> int:
    """How many tokens may run at once, at most ``most``.

    Args:
        of_token: Bytes that each takes.
        weights: Bytes of the parent's weights in memory; None if they stay on the disk.
        most: At most this many.
        device: ``cpu`` or ``cuda``.
    """
    limit = STREAMED_BYTES[device] if weights is None else max(_SMALL_BYTES, _SHARE_OF_WEIGHTS * weights)
    return int(min(most, max(1, limit // of_token)))


def bytes_of_a_token_at_once(layers: Sequence[nn.Module], itemsize: int, vocab_size: int) -> float:
    """Memory of a token within a layer, or with the parent's logits."""
    return max(bytes_within_a_layer(layers, itemsize), 8.0 * vocab_size)


def bytes_within_a_layer(layers: Sequence[nn.Module], itemsize: int) -> float:
    """Estimated memory of a token while it, or its gradient, goes through a layer."""
    return 3.0 * itemsize * max(sum(p.shape[-2] for p in layer.parameters() if p.ndim > 1) for layer in layers)


def key_of(module: nn.Module, hidden: torch.Tensor) -> tuple[Any, ...]:
    """Equal for modules that do the same number of operations on hidden states of this shape."""
    return (type(module), hidden.shape, tuple(p.shape for p in module.parameters()))


def _equal(made: torch.Tensor, whole: torch.Tensor, given: torch.Tensor) -> bool:
    update = (whole - given).float().abs().max().clamp_min(1e-12)
    return bool((made - whole).float().abs().max() <= tolerance(whole.dtype) * update)
