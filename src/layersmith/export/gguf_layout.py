"""What a GGUF file must hold for llama.cpp: its architectures, the metadata, and the tensors made from a child's.

An architecture of llama.cpp is a fixed program. Most read one size for all layers. Two read sizes per layer: ``deci``,
which is Llama's program, and ``openelm``, which is Qwen3's. Where a program cannot leave a subblock out, zeros take its
place: they add nothing. A layer without both subblocks is left out of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from layersmith.export.source import CannotExport, Source
from layersmith.model_descriptor.stock import whole_number

# The key under which the file says which of the child's layers each block is.
LAYERS = "layersmith.layers"
# Width of a removed FFN that is replaced by zeros: the smallest that every quantization takes.
ZERO_WIDTH = 256
SILU_IS_ONE = 1.2784645427610738
_ALIKE = "Search with --set search.uniform_groups=0, or export it --to padded first and that copy --to gguf"


@dataclass(frozen=True)
class Arch:
    """An architecture of llama.cpp.

    Attributes:
        name: Its name in the file.
        mixed: Heads, KV heads and FFN widths are read per layer.
        pairs: Rotary embeddings turn neighbouring channels; those of Transformers turn channels half a head apart.
        removes_attention: A layer without attention, or with one linear map in its place, is read.
        biases: Tensors that may have a bias.
        qk_norms: Queries and keys are normalized.
        fused: Queries, keys and values are one matrix.
        experts: The FFNs are mixtures of experts.
        frequency_factors: A tensor with a factor for each rotary frequency is read.
        tied: The embeddings are the output layer's weights, always.
        square: Query heads times their size must be the hidden size.
    """

    name: str
    mixed: bool = False
    pairs: bool = False
    removes_attention: bool = False
    biases: frozenset[str] = frozenset({"attn_q", "attn_k", "attn_v"})
    qk_norms: bool = False
    fused: bool = False
    experts: bool = False
    frequency_factors: bool = False
    tied: bool = False
    square: bool = False


_LLAMA_BIASES = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
_LLAMA = Arch("llama", pairs=True, biases=_LLAMA_BIASES, frequency_factors=True)
_DECI = Arch(
    "deci", mixed=True, pairs=True, removes_attention=True, biases=_LLAMA_BIASES, frequency_factors=True
)  # fmt: skip
_OPENELM = Arch("openelm", mixed=True, biases=frozenset(), qk_norms=True, fused=True, tied=True)
# The stock architecture first, then the one whose layers may differ.
FAMILIES: dict[str, tuple[Arch, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "mixtral": (Arch("llama", pairs=True, biases=frozenset(), experts=True, frequency_factors=True),),
    "qwen2": (Arch("qwen2", square=True), _DECI),
    "qwen3": (Arch("qwen3", qk_norms=True), _OPENELM),
    "qwen3_moe": (Arch("qwen3moe", qk_norms=True, experts=True),),
}
_ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj"}  # fmt: skip
_DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "qwen3_moe": ("mlp.gate", "mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: Its name in the file.
        shape: Its shape, rows first.
        sources: The child's tensors that it is made of: itself, rows one after another, or a stack of experts.
        rotated: Number of heads whose channels are reordered in each source; 0 where none are.
        fill: Value of a tensor that is made of none.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    rotated: tuple[int, ...] = ()
    fill: float | tuple[float, ...] | Literal["identity"] = 0.0


@dataclass(frozen=True)
class Block:
    """A block of the file: the child's layer ``layer`` in an architecture's terms.

    Attributes:
        layer: Index of the child's layer.
        attention: ``heads``, one ``linear`` map, ``zeros`` in its place, or nothing.
        heads: Query heads.
        kv_heads: KV heads.
        ffn: ``whole``, one ``linear`` map, or ``zeros`` in its place.
        width: Width of the FFN, or of each expert.
    """

    layer: int
    attention: Literal["heads", "linear", "zeros", "none"]
    heads: int
    kv_heads: int
    ffn: Literal["whole", "linear", "zeros"]
    width: int


@dataclass(frozen=True)
class Layout:
    """Everything in the file but its tokenizer."""

    arch: Arch
    metadata: dict[str, Any]
    entries: tuple[Entry, ...]


def gguf_layout(source: Source) -> Layout:
    """Choose an architecture for a child and lay out its tensors.

    Raises:
        CannotExport: llama.cpp has no program for it; the message names the layer and what would fit.
    """
    family = str(getattr(source.language, "model_type", ""))
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CannotExport(f"--to gguf: only children of the families {known} can be written, not of {family}.")
    _refuse_windows(source)
    _experts(source)  # first, since a padded copy, which other refusals name as the way, cannot hold them either
    refusals = {}
    for arch in _candidates(source, FAMILIES[family]):
        try:
            blocks = tuple(_blocks(source, arch))
            entries = tuple(_entries(source, arch, blocks))
            _check_complete(source, arch, entries)
            return Layout(arch, _metadata(source, arch, blocks), entries)
        except CannotExport as error:
            refusals[arch] = error
    raise refusals[FAMILIES[family][-1]]  # of the one that reads most


def _refuse_windows(source: Source) -> None:
    """Refuse attention that does not see the whole context; none of these programs has it."""
    window, most = getattr(source.language, "sliding_window", None), source.language.max_position_embeddings
    for i in range(len(source.blocks)) if window and window < most else ():
        if source.heads(i) is not None and source.layer_type(i) in (None, "sliding_attention"):
            raise CannotExport(
                f"--to gguf: layer {i} sees the last {window:,} tokens of up to {most:,}, and this program of "
                f"llama.cpp sees all. Set max_position_embeddings to {window} in config.json: up to there both see "
                "the same."
            )


def _candidates(source: Source, archs: Sequence[Arch]) -> Sequence[Arch]:
    """The stock architecture first where it needs no zeros; otherwise the one that reads sizes per layer."""
    whole = all(not (b.attention.no_op or b.attention.replace_with_linear or b.ffn.no_op) for b in _kept(source))
    return archs if whole else archs[::-1]


def _kept(source: Source) -> list[Any]:
    return [b for b in source.blocks if not (b.attention.no_op and b.ffn.no_op)]


def head_size(source: Source) -> int:
    """Size of a head, which all layers share."""
    language = source.language
    size = whole_number(language, "head_dim")
    return size or language.hidden_size // language.num_attention_heads


# ---------------------------------------------------------------------------------------------- blocks


def _blocks(source: Source, arch: Arch) -> Iterator[Block]:
    """The blocks of the file."""
    kept = [i for i, b in enumerate(source.blocks) if not (b.attention.no_op and b.ffn.no_op)]
    if not kept:
        raise CannotExport("--to gguf: no layer is left, and llama.cpp needs one.")
    usual = _usual(source, arch, kept)
    for i in kept:
        heads, block = source.heads(i), source.blocks[i]
        if block.ffn.replace_with_linear and "ffn_gate" not in arch.biases:
            raise CannotExport(
                f"--to gguf: layer {i}: its FFN is one linear map, which llama.cpp's {arch.name} cannot compute. "
                """Search with --set 'library.linear=["attention"]'."""
            )
        zeros = (1, 1, ZERO_WIDTH) if arch.mixed else usual
        attention: Literal["heads", "linear", "zeros", "none"] = "heads"
        if block.attention.replace_with_linear and not arch.removes_attention:
            raise CannotExport(
                f"--to gguf: layer {i}: its attention is one linear map, which llama.cpp's {arch.name} does not have. "
                """Search with --set 'library.linear=["ffn"]'."""
            )
        if block.attention.replace_with_linear:
            attention, queries, kv = "linear", whole_number(source.language, "num_attention_heads") or 1, 0
        elif heads is not None:
            queries, kv = heads.queries, heads.kv
        elif arch.removes_attention and i != kept[0]:
            attention, queries, kv = "none", 0, 0  # the size of a head is read only if the first block has one
        else:
            attention, (queries, kv, _) = "zeros", zeros
        ffn: Literal["whole", "linear", "zeros"] = "zeros" if block.ffn.no_op else "whole"
        if block.ffn.replace_with_linear:
            ffn, width = "linear", source.language.hidden_size
        else:
            width = zeros[2] if block.ffn.no_op else _width(source, i, arch)
        made = Block(i, attention, queries, kv, ffn, width)
        if not arch.mixed and (made.heads, made.kv_heads, made.width) != usual:
            raise _differs(i, (made.heads, made.kv_heads, made.width), usual, arch)
        yield made


def _usual(source: Source, arch: Arch, kept: Sequence[int]) -> tuple[int, int, int]:
    """Query heads, KV heads and width of the first layer that has them."""
    heads = next((h for i in kept if (h := source.heads(i)) is not None), None)
    width = next(
        (_width(source, i, arch) for i in kept if not (f := source.blocks[i].ffn).no_op and not f.replace_with_linear),
        ZERO_WIDTH,
    )
    return (heads.queries, heads.kv, width) if heads is not None else (1, 1, width)


def _differs(i: int, sizes: tuple[int, int, int], usual: tuple[int, int, int], arch: Arch) -> CannotExport:
    words = ("query heads", "KV heads", "channels in its FFN or experts")
    what, this, other = next((w, a, b) for w, a, b in zip(words, sizes, usual, strict=True) if a != b)
    return CannotExport(
        f"--to gguf: layer {i} has {this} {what} where others have {other}, and llama.cpp's {arch.name} reads one "
        f"number for all layers. {_ALIKE}."
    )


def _width(source: Source, i: int, arch: Arch) -> int:
    ffn = source.blocks[i].ffn
    if arch.experts != (ffn.moe is not None):
        kinds = ("a dense FFN", "experts")
        raise CannotExport(
            f"--to gguf: layer {i} has {kinds[ffn.moe is not None]}, and llama.cpp's {arch.name} reads "
            f"{kinds[arch.experts]} in every layer. Nothing that layersmith does makes it fit."
        )
    width = ffn.intermediate_size if ffn.moe is None else ffn.moe.expert_intermediate_dim
    if width is None:
        raise CannotExport(f"--to gguf: layer {i}: the width of its FFN is not known.")
    return int(width)


# ---------------------------------------------------------------------------------------------- tensors


def _entries(source: Source, arch: Arch, blocks: Sequence[Block]) -> Iterator[Entry]:
    """All tensors of the file in its order."""
    yield _copy(source, "token_embd.weight", "model.embed_tokens.weight")
    yield _copy(source, "output_norm.weight", "model.norm.weight")
    if "lm_head.weight" in source.places:
        if arch.tied:
            raise CannotExport(
                f"--to gguf: the layers differ and the weights of the output layer are not the embeddings, as "
                f"llama.cpp's {arch.name} takes for granted. {_ALIKE}."
            )
        yield _copy(source, "output.weight", "lm_head.weight")
    factors = _frequency_factors(source, arch)
    if factors:
        yield Entry("rope_freqs.weight", (len(factors),), fill=factors)
    for number, block in enumerate(blocks):
        yield from _attention(source, arch, number, block)
        yield from _ffn(source, arch, number, block)


def _copy(source: Source, name: str, of: str, rotated: tuple[int, ...] = ()) -> Entry:
    if of not in source.places:
        raise CannotExport(f"--to gguf: the checkpoint has no tensor {of}.")
    return Entry(name, source.shapes[of], (of,), rotated)


def _attention(source: Source, arch: Arch, number: int, block: Block) -> Iterator[Entry]:
    hidden, size = source.language.hidden_size, head_size(source)
    prefix, layer = f"blk.{number}", f"model.layers.{block.layer}"
    if block.attention == "none":
        return
    if block.attention == "linear":
        yield _copy(source, f"{prefix}.attn_norm.weight", f"{layer}.input_layernorm.weight")
        yield _copy(source, f"{prefix}.attn_output.weight", f"{layer}.self_attn.linear.weight")
        return
    rows = {"attn_q": block.heads * size, "attn_k": block.kv_heads * size, "attn_v": block.kv_heads * size}
    rotated = {"attn_q": block.heads, "attn_k": block.kv_heads} if arch.pairs else {}
    if block.attention == "zeros":
        yield Entry(f"{prefix}.attn_norm.weight", (hidden,), fill=1.0)
        matrices = {"attn_qkv": sum(rows.values())} if arch.fused else rows
        for name, count in matrices.items():
            yield Entry(f"{prefix}.{name}.weight", (count, hidden))
        yield Entry(f"{prefix}.attn_output.weight", (hidden, rows["attn_q"]))
    else:
        yield _copy(source, f"{prefix}.attn_norm.weight", f"{layer}.input_layernorm.weight")
        names = {name: f"{layer}.{of}.weight" for name, of in _ATTENTION.items()}
        for name, count in rows.items():
            if source.shapes.get(names[name]) != (count, hidden):
                raise CannotExport(f"--to gguf: layer {block.layer}: {names[name]} is not of {count} x {hidden}.")
        if arch.fused:
            sources = tuple(names[name] for name in rows)
            yield Entry(f"{prefix}.attn_qkv.weight", (sum(rows.values()), hidden), sources)
            names = {"attn_output": names["attn_output"]}
        if arch.square and rows["attn_q"] != hidden:
            raise CannotExport(
                f"--to gguf: layer {block.layer} has {block.heads} query heads, and llama.cpp's {arch.name} reads "
                f"{hidden // size}."
            )
        for name, of in names.items():
            turned = (rotated[name],) if name in rotated else ()
            yield _copy(source, f"{prefix}.{name}.weight", of, turned)
            yield from _bias(source, arch, f"{prefix}.{name}", of, turned)
    for name, of in (("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")) if arch.qk_norms else ():
        if block.attention == "zeros":
            yield Entry(f"{prefix}.{name}.weight", (size,), fill=1.0)
        else:
            yield _copy(source, f"{prefix}.{name}.weight", f"{layer}.self_attn.{of}.weight")


def _bias(source: Source, arch: Arch, name: str, weight: str, rotated: tuple[int, ...] = ()) -> Iterator[Entry]:
    bias = weight.removesuffix("weight") + "bias"
    if bias in source.places and name.split(".")[-1] in arch.biases:
        yield _copy(source, f"{name}.bias", bias, rotated)


def _ffn(source: Source, arch: Arch, number: int, block: Block) -> Iterator[Entry]:
    hidden, width = source.language.hidden_size, block.width
    prefix, layer = f"blk.{number}", f"model.layers.{block.layer}"
    norm = f"{prefix}.ffn_norm.weight"
    if block.ffn == "zeros":
        yield Entry(norm, (hidden,), fill=1.0)
    else:
        yield _copy(source, norm, f"{layer}.post_attention_layernorm.weight")
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    if arch.experts:
        experts = _experts(source)
        router, folder, names = _EXPERTS[source.language.model_type]
        if block.ffn == "zeros":
            yield Entry(f"{prefix}.ffn_gate_inp.weight", (experts[0], hidden))
        else:
            yield _copy(source, f"{prefix}.ffn_gate_inp.weight", f"{layer}.{router}.weight")
        for part, shape in shapes.items():
            sources = tuple(f"{layer}.{folder}.{e}.{names[part]}.weight" for e in range(experts[0]))
            made = () if block.ffn == "zeros" else sources
            yield Entry(f"{prefix}.ffn_{part}_exps.weight", (experts[0], *shape), made)
        return
    if block.ffn == "linear":
        # SiLU(0 x + b) = 1 for this b, so that the FFN is down(up(x)).
        yield Entry(f"{prefix}.ffn_gate.weight", shapes["gate"])
        yield Entry(f"{prefix}.ffn_gate.bias", (width,), fill=SILU_IS_ONE)
        yield Entry(f"{prefix}.ffn_up.weight", shapes["up"], fill="identity")
        yield _copy(source, f"{prefix}.ffn_down.weight", f"{layer}.mlp.linear.weight")
        return
    for part, shape in shapes.items():
        weight = f"{layer}.{_DENSE[f'ffn_{part}']}.weight"
        if block.ffn == "zeros":
            yield Entry(f"{prefix}.ffn_{part}.weight", shape)
        else:
            yield _copy(source, f"{prefix}.ffn_{part}.weight", weight)
            yield from _bias(source, arch, f"{prefix}.ffn_{part}", weight)


def _experts(source: Source) -> tuple[int, int]:
    """Number of experts of every layer, and how many of them a token uses.

    Raises:
        CannotExport: Layers differ in them.
    """
    seen: dict[tuple[int, int], int] = {}
    for i, block in enumerate(source.blocks):
        if block.ffn.moe is not None:
            seen.setdefault((block.ffn.moe.num_local_experts, block.ffn.moe.num_experts_per_tok), i)
    if len(seen) > 1:
        (one, first), (other, second) = list(seen.items())[:2]
        raise CannotExport(
            f"--to gguf: layer {second} has {other[0]} experts, {other[1]} per token, and layer {first} {one[0]}, "
            f"{one[1]} per token; llama.cpp reads one number for all layers. Search with --set search.uniform_groups=0."
        )
    return next(iter(seen), (0, 0))


def _check_complete(source: Source, arch: Arch, entries: Sequence[Entry]) -> None:
    """Every tensor of the child is in the file once."""
    used = [name for entry in entries for name in entry.sources]
    left = sorted(source.places.keys() - set(used))
    if left or len(used) != len(set(used)):
        raise CannotExport(f"--to gguf: llama.cpp's {arch.name} has no place for {(left or used)[0]}.")


# ---------------------------------------------------------------------------------------------- metadata


def _metadata(source: Source, arch: Arch, blocks: Sequence[Block]) -> dict[str, Any]:
    """Keys and values of the file, without the tokenizer's."""
    language = source.language
    _refuse_what_no_program_says(source, arch)
    lists = {
        "feed_forward_length": [b.width for b in blocks],
        "attention.head_count": [b.heads for b in blocks],
        "attention.head_count_kv": [b.kv_heads for b in blocks],
    }
    size = head_size(source)
    values: dict[str, Any] = {
        "context_length": language.max_position_embeddings,
        "embedding_length": language.hidden_size,
        "block_count": len(blocks),
        **{key: numbers if arch.mixed else numbers[0] for key, numbers in lists.items()},
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(language.rms_norm_eps),
        "vocab_size": language.vocab_size,
        "rope.dimension_count": size,
        **_rope(source),
    }
    if arch.experts:
        count, used = _experts(source)
        values |= {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": blocks[0].width}
    return {**{f"{arch.name}.{key}": value for key, value in values.items()}, LAYERS: [b.layer for b in blocks]}


def _refuse_what_no_program_says(source: Source, arch: Arch) -> None:
    language = source.language
    wrong = {
        "hidden_act": getattr(language, "hidden_act", "silu") not in ("silu", "swish"),
        "norm_topk_prob": not getattr(language, "norm_topk_prob", True),
        "partial_rotary_factor": float(_rope_settings(source).get("partial_rotary_factor", 1.0)) != 1.0,
    }
    if name := next((name for name, is_wrong in wrong.items() if is_wrong), None):
        value = getattr(language, name, _rope_settings(source).get(name))
        raise CannotExport(
            f"--to gguf: {name} is {value!r} in every layer, which llama.cpp's {arch.name} does not compute. "
            "Nothing that layersmith does makes it fit."
        )


def _rope_settings(source: Source) -> dict[str, Any]:
    return dict(getattr(source.language, "rope_parameters", None) or {})


def _rope(source: Source) -> dict[str, Any]:
    """The keys for rotary embeddings."""
    settings = _rope_settings(source)
    kind, values = settings.get("rope_type", "default"), {"rope.freq_base": float(settings["rope_theta"])}
    if kind in ("default", "llama3"):
        return values
    usual = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    extra = sorted(name for name in settings.keys() - usual if settings[name] is not None)
    if kind not in ("linear", "yarn") or extra:
        what = f"{kind} ({', '.join(extra)})" if extra else kind
        raise CannotExport(f"--to gguf: no key of a GGUF file says rotary embeddings of the kind {what}.")
    values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(settings["factor"])}
    if kind == "yarn":
        before = settings.get("original_max_position_embeddings") or source.language.max_position_embeddings
        values["rope.scaling.original_context_length"] = int(before)
    return values


def _frequency_factors(source: Source, arch: Arch) -> tuple[float, ...]:
    """By what Llama 3 divides each rotary frequency; empty for other kinds of scaling."""
    settings = _rope_settings(source)
    if settings.get("rope_type") != "llama3":
        return ()
    if not arch.frequency_factors:
        raise CannotExport(f"--to gguf: llama.cpp's {arch.name} does not read Llama 3's rotary frequencies. {_ALIKE}.")
    size = head_size(source)
    plain = 1.0 / settings["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.language, torch.device("cpu"))
    return tuple((plain / scaled).tolist())
