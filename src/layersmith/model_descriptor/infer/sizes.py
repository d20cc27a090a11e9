"""The config attributes that set the sizes of a kind of layer."""

from __future__ import annotations

from dataclasses import dataclass

from layersmith.model_descriptor.experiment import Outcome
from layersmith.model_descriptor.infer.attributes import AttributePath
from layersmith.model_descriptor.infer.experts import FFNExperts
from layersmith.model_descriptor.infer.inner_sizes import InnerSize


@dataclass(frozen=True)
class MixerSizes:
    """The attributes that set the sizes of a Mamba or linear-attention mixer; None or empty where none does so alone.

    Shapes: H heads, P size of a head, N size of the state, G groups.

    Attributes:
        num_heads, head_dim: H and P, each with what has to change in proportion to it, e.g. the width of all heads.
        state_dim, num_groups: N and G.
        reader: The weight of the layer that reads the heads; its second dimension is H * P long.
        headless: Whether the state has no dimension for heads, so that H is 1.
        square: Whether the state is as large as a head because one attribute is both.
        groups: G where no attribute sets it: 1; 0 for one group for each head; None if it is unknown.
        is_alone: Whether the layer keeps only the state, and no keys and values.
        problem: Why no attribute sets them, where the model does not run with another value of a likely one.
    """

    num_heads: tuple[AttributePath, ...] = ()
    state_dim: AttributePath | None = None
    head_dim: tuple[AttributePath, ...] = ()
    num_groups: AttributePath | None = None
    reader: str = ""
    headless: bool = False
    square: bool = False
    groups: int | None = 1
    is_alone: bool = True
    problem: str = ""


@dataclass(frozen=True)
class Sizes:
    """The attributes that set the sizes of a kind of layer; None where no attribute does.

    Attributes:
        kv_heads: Number of key-value heads.
        width: Width of a dense FFN.
        num_experts, expert_width, shared_width, experts_per_token: Sizes of a mixture of experts.
        config_width: What the config calls a width of 1; some families halve the width that the config says.
        query_heads: Number of query heads, and the attributes that must be equal to it.
        head_size: The attribute that sets the size of a head, and its value in the small model; it has to be set
            when the number of query heads changes.
        width_at, shared_width_at: A weight of the layer, and a dimension of it, that are as long as the width.
        resized: Weights of an FFN whose width no attribute sets, and the dimension of each that is as long as it.
        mixer: Sizes of a Mamba or linear-attention mixer that keeps a state.
        flat: Weights in which experts lie one after another along the first dimension, each as long as the width.
        experts_of_both: Whether the number of experts, and of those that a token uses, is the attention's too.
        ffn_experts: What these numbers set in the FFN, where they also set the attention's experts.
        no_query_heads, no_kv_heads: Why there is no such number, where an experiment showed it.
        head_blocks: Blocks of the projection that heads end in, in the small model; each reads its share of the heads.
        head_pairs: Whether two heads work together, one of each half of all, and end next to each other.
        keys: Number of heads of the keys in the cache, where it is no number of KV heads that can differ alone.
        heads_elsewhere: Number of query heads in other kinds of layers that changes shapes of this kind too.
        inner: Sizes inside its subblocks.
        outcomes: The experiments that refuted attributes which looked like the number of heads, or like a width.
    """

    kv_heads: AttributePath | None = None
    width: AttributePath | None = None
    num_experts: AttributePath | None = None
    expert_width: AttributePath | None = None
    shared_width: AttributePath | None = None
    experts_per_token: AttributePath | None = None
    config_width: int = 1
    query_heads: tuple[AttributePath, ...] = ()
    head_size: tuple[AttributePath, int] | None = None
    width_at: tuple[str, int] | None = None
    shared_width_at: tuple[str, int] | None = None
    resized: tuple[tuple[str, int], ...] = ()
    mixer: MixerSizes | None = None
    flat: tuple[str, ...] = ()
    experts_of_both: bool = False
    ffn_experts: FFNExperts | None = None
    no_query_heads: str = ""
    head_blocks: int = 1
    head_pairs: bool = False
    no_kv_heads: str = ""
    keys: AttributePath | None = None
    heads_elsewhere: AttributePath | None = None
    inner: tuple[InnerSize, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
