"""The recipe: every setting of a run with its default, in one place.

A recipe file is YAML with the sections and keys below; a key that is left out keeps its default. The text under each
field is its description in docs/recipe.md and in docs/recipe.schema.json, which are generated from this module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from annotated_types import Len
from pydantic import Field, NonNegativeFloat, PositiveFloat

from layersmith.errors import InputError, UsageError
from layersmith.records import parse, record, to_data
from layersmith.units import parse_seconds
from layersmith.untrusted import parse_yaml, read_yaml

# The workload for which the KV cache and times are counted unless another is given.
BATCH = 1
CONTEXT = 4096
# Tokens generated within the context unless given; never more than half of it.
GENERATE = 128
# Tokens for `layersmith distill` where neither the command nor the recipe gives a number.
DISTILLATION_TOKENS = 1_000_000
# Peak learning rate of global distillation times the hidden size.
WIDTH_RATE = 0.15
# Adapters learn best at a higher rate than all weights: times this one.
ADAPTERS_FASTER = 4.0
# Length of the rows in the second part of global distillation, in rows of the first, where the recipe does not say it.
LONGER_ROWS = 8
# Default tokens per optimizer step: this share of all tokens, clamped to these bounds.
STEP_SHARE, LEAST_STEP_TOKENS, MOST_STEP_TOKENS = 1 / 200, 2048, 524_288

Objective = Literal[
    "kl_divergence", "lm_loss", "top_1_agreement", "top_5_agreement", "top_10_agreement", "hidden_distance"
]
# What to do with rows that share long runs of text with evaluation rows.
Overlap = Literal["leave_out", "warn", "refuse", "allow"]
# Kinds of alternatives that have weights.
Trainable = Literal[
    "linear", "kv_heads", "head_groups", "query_heads", "window", "mixer_heads", "mixer_groups", "mixer_head_size",
    "state_size", "attention_size", "ffn_width", "experts", "expert_width", "shared_width", "experts_per_token",
    "ffn_size",
]  # fmt: skip
Subblock = Literal["attention", "ffn"]
# Whole numbers. Larger ones would overflow products of a few of them in 64 bits.
_LARGEST = 2**40
PositiveInt = Annotated[int, Field(gt=0, le=_LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_LARGEST)]
# Numbers of rows, steps or tokens at once beyond these are mistakes, which would take memory before they are noticed.
Count = Annotated[int, Field(gt=0, le=100_000_000)]
CountOrNone = Annotated[int, Field(ge=0, le=100_000_000)]
# Lists of sizes are as long as that at most.
_MOST = Len(0, 1000)
# Stands among the formats of a recipe if they are chosen for the budget.
AUTOMATIC = "auto"
# A share strictly between 0 and 1.
Fraction = Annotated[float, Field(gt=0, lt=1)]


@record("recipe: data.")
class DataRecipe:
    """Which text is read, and how much of it. All splits come from different documents."""

    sequence_length: Annotated[int, Field(ge=2, le=100_000_000)] = 512
    """Tokens per row; at most the parent's maximum context length."""
    calibration_sequences: Count = 64
    """Rows for importance statistics and least-squares refits."""
    scoring_sequences: Count = 32
    """Rows on which alternatives are scored."""
    evaluation_sequences: Count = 64
    """Rows on which parent and child are compared. They are used for nothing else."""
    long_scoring: Literal["auto", "always", "never"] = "auto"
    """Join scoring rows to longer ones, four times as long as the parent's window (4,096 tokens without one) or as its
    context allows, and end each with spans of its beginning in another order. Scores then count what a window or a
    smaller KV cache forgets. There are fewer rows and as many tokens, at least two rows. `auto` does so where windows
    are offered."""
    training_sequences: CountOrNone = 256
    """Rows for local and global distillation; 0 for none."""
    evaluation_source: str | None = None
    """Text to evaluate on, given like `--data`. Default: documents held out from the run's data."""
    overlap: Overlap = "leave_out"
    """What to do with rows that share long runs of text with evaluation rows: `leave_out` drops them, `warn` keeps
    them and adds a warning, `refuse` stops the run, `allow` does not check."""
    field: str | None = None
    """Column or JSON key that holds the text. Default: looked for under its usual names (`text`, `content`, ...)."""
    split: str = "train"
    """Split of a Hub dataset."""


@record("recipe: library.")
class LibraryRecipe:
    """Which alternatives are offered for each attention and FFN."""

    ffn_fractions: Annotated[tuple[Fraction, ...], _MOST] = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
    """FFN widths to offer, as fractions of the parent's width, rounded to `ffn_multiple`."""
    ffn_sizes: Annotated[tuple[Count, ...], _MOST] | None = None
    """FFN widths to offer, in channels. Overrides `ffn_fractions`."""
    ffn_multiple: PositiveInt | None = None
    """FFN widths are rounded to multiples of this. Default: 256 for parents of width 2048 or more, else 64, 16 or 1."""
    ffn_ranking: Literal["auto", "contribution", "iterative"] = "auto"
    """Which FFN channels are kept. `contribution` keeps those that add most to the output, judged one by one.
    `iterative` removes channels one at a time and accounts for those already removed. `auto` is `iterative` where its
    statistics fit in `statistics_gib`."""
    kv_heads: Annotated[tuple[Count, ...], _MOST] | None = None
    """Numbers of KV heads to offer. Default: the parent's number halved repeatedly down to one."""
    kv_methods: tuple[Literal["contribution", "pool"], ...] = ("contribution", "pool")
    """How KV heads are reduced. `contribution` keeps the heads that add most to the output; `pool` averages
    neighbouring heads."""
    query_heads: bool = True
    """Whether to offer fewer query heads, alone or together with their KV heads."""
    windows: bool = True
    """Whether full-attention layers may get the sliding window that other layers of the same model use."""
    mixers: bool = True
    """Whether Mamba and linear-attention mixers may get fewer or smaller heads and a smaller state."""
    inner_sizes: bool = False
    """Whether to offer smaller sizes inside attentions and FFNs that an attribute of the config sets alone: the size of
    heads, of queries and keys or of values only, the ranks of latent attention, the latent width of experts. Only
    layersmith's loader builds such children; exports refuse them, but ONNX."""
    head_fractions: Annotated[tuple[Fraction, ...], _MOST] = (0.75, 0.5, 0.25)
    """Head counts to offer, as fractions of the parent's: query heads per KV head, KV heads together with their query
    heads (in addition to the default of `kv_heads`), and all heads in multi-head attention. For mixers, the fractions
    apply to heads per group, groups, head size and state size. With `inner_sizes` they apply to those sizes too."""
    expert_fractions: Annotated[tuple[Fraction, ...], _MOST] = (0.875, 0.75, 0.5, 0.25)
    """Fractions of the parent's to offer for the number of experts, the experts per token and the expert width."""
    linear: tuple[Subblock, ...] = ("attention", "ffn")
    """Subblocks that may be replaced by one linear map."""
    no_op: tuple[Subblock, ...] = ("attention", "ffn")
    """Subblocks that may be removed."""
    keep_layers: tuple[int, ...] = ()
    """Layers (from 0) for which nothing is offered, so they stay like the parent's."""
    statistics_gib: PositiveFloat = 4.0
    """Memory for importance statistics, in GiB. Statistics that do not fit are gathered in additional passes."""


@record("recipe: local_distillation.")
class LocalDistillationRecipe:
    """How alternatives learn to reproduce the output of the subblock or layer that they replace."""

    reconstruct: bool = True
    """Refit the last projection of every pruned subblock by least squares on the calibration rows."""
    tokens: NonNegativeInt = 0
    """Training tokens for every alternative of the library, before it is scored; 0 for none. Each row is used once. The
    default library has about eight times the parent's parameters, so 16,384 tokens take as long as all other stages
    together. It helps parents that were trained on little text themselves."""
    coupled_tokens: NonNegativeInt = 32_768
    """Training tokens for joint distillation after the search: the chosen attention and FFN of a layer are trained
    together; 0 for none."""
    child_refit: Annotated[float, Field(ge=0, le=1)] = 0.5
    """After the search, refit the last projections of the changed layers by least squares on the child's inputs, so
    that each layer corrects this part of the errors of those before it; 0 for none. Needs `coupled_on: child`."""
    child_refit_sequences: NonNegativeInt = 64
    """Training rows for this refit besides the calibration rows, of those that joint distillation does not use."""
    coupled_on: Literal["child", "parent"] = "child"
    """Inputs of a layer in joint distillation. `child` uses the output of the child's already trained layers below, so
    each layer corrects the errors of those before it, but layers train one after the other in a single process.
    `parent` uses the parent's activations."""
    coupled_in: Literal["first", "all"] = "first"
    """Processes that do joint distillation on the child's inputs. With `all`, each has some rows of every step, as far
    as `batch_tokens` has several; results then differ by rounding from those of one process."""
    kinds: tuple[Trainable, ...] | None = None
    """Kinds of alternatives to train. Default: all kinds that have weights."""
    learning_rate: PositiveFloat = 0.01
    """Learning rate of AdamW relative to the root mean square of each weight tensor, with linear decay to 0."""
    coupled_learning_rate: PositiveFloat = 0.06
    """The same for joint distillation, multiplied by the square root of the layer's initial error (at most 1)."""
    batch_tokens: Count = 1024
    """Tokens per optimizer step."""
    stop_below: NonNegativeFloat = 0.005
    """Stop training an alternative early, after half of its tokens, when its error on held-out rows improves by less
    than this share between two of its six evaluations."""
    memory_gib: PositiveFloat = 8.0
    """Memory for the weights, gradients and optimizer states of alternatives that are trained at once, in GiB."""


@record("recipe: scoring.")
class ScoringRecipe:
    """How the loss increase of every alternative is measured."""

    objective: Objective = "kl_divergence"
    """Metric whose sum over replacements the search minimises."""
    mode: Literal["auto", "exact", "second_order"] = "auto"
    """`exact` runs the model once with every alternative on every row. `second_order` estimates the KL divergence from
    a few backward passes and corrects the estimates with exact runs where these matter most. `auto` is `second_order`
    where it is possible and saves work. Objectives other than `kl_divergence` need `exact`."""
    samples: Count = 1
    """Backward passes of `second_order` over the scoring rows."""
    exact_passes: NonNegativeFloat = 4.0
    """Work allowed for the exact runs of `second_order`, in forward passes of the parent over the scoring rows; three
    times as much for mixture-of-experts parents."""
    precision: NonNegativeFloat = 0.05
    """Stop the exact runs of `second_order` when every score has a relative standard error below this."""
    settled: float = 0.02
    """Stop them also, after a quarter of `exact_passes`, when the expected regret is below this share of the loss. The
    regret is the extra loss of choosing children by these scores rather than by exact ones."""
    row_precision: NonNegativeFloat = 0.0
    """Stop `exact` before all rows are used, once the root mean square of the relative standard errors between scores
    is below this; 0 uses all rows."""
    batch_tokens: Count = 4096
    """Tokens per forward pass. Fewer are used where activations would need much memory compared with the weights."""
    spill_gib: float = 16.0
    """Disk space for hidden states between layers, in GiB, where the parent's weights are streamed from the disk."""

    def __post_init__(self) -> None:
        if self.mode == "second_order" and self.objective != "kl_divergence":
            raise ValueError(f"mode second_order works with the objective kl_divergence only, not {self.objective}.")

    def rows_at_once(self, length: int) -> int:
        """Rows of this length in one forward pass."""
        return max(1, self.batch_tokens // length)


@record("recipe: distillation.")
class DistillationRecipe:
    """Global distillation: the whole child learns from the parent."""

    tokens: NonNegativeInt = 0
    """Training tokens in total; with 0, `compress` does not distil."""
    kl: NonNegativeFloat = 1.0
    """Weight of the KL divergence between the predictions of parent and child."""
    hidden: NonNegativeFloat = 1.0
    """Weight of one minus the cosine similarity of hidden states, averaged over layers."""
    lm: NonNegativeFloat = 0.0
    """Weight of the next-token cross-entropy loss on the text."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature at which predictions are compared."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon` uses torch's Muon for the matrices of the layers, with updates scaled to the size of AdamW's (arXiv
    2502.16982), and AdamW for the rest. `adamw` uses AdamW for all, as accelerate's FSDP and DeepSpeed always do."""
    lora_rank: NonNegativeInt = 0
    """Rank of adapters (LoRA) that are trained instead of all weights and merged at the end, by AdamW; 0 trains the
    weights. Needs far less memory, and one process can do it with weights that stay on the disk. Needs PEFT
    (`pip install 'layersmith[lora]'`)."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default: 0.15 / hidden size, since Adam's best rate falls with the width (arXiv
    2203.03466), and four times that for adapters."""
    schedule: str = "cosine"
    """Learning rate schedule, by its name in Transformers: `cosine`, `linear`, `constant_with_warmup`, ..."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the optimizer."""
    batch_tokens: Count | None = None
    """Tokens per optimizer step over all processes. Default: 1/200 of `tokens`, at least 2,048, at most 524,288."""
    device_tokens: Count = 4096
    """Tokens per forward pass of one process. Gradients are accumulated until `batch_tokens` is reached."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward and backward passes; `auto` is the run's `dtype`. Weights and optimizer states stay in
    float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    sharded: Literal["auto", "always", "never"] = "auto"
    """Whether to shard weights, gradients and optimizer states of parent and child over all processes (FSDP2), instead
    of keeping both models whole in each. `auto` does so where some process has no memory for both."""
    tensor_parallel: Count = 1
    """Number N of processes that compute the same rows together, each with a part of every layer, by Transformers' plan
    for tensor parallelism. The number of processes must be a multiple of N; groups of N have different rows, and
    weights are sharded over the groups (FSDP2). 1 gives each process different rows."""
    cache_top: NonNegativeInt = 0
    """Cache the parent's K most likely next tokens of every row, and the probability of the rest, instead of running
    the parent each time; 0 runs the parent. Useful where rows repeat. Needs `hidden: 0`."""
    log_every: PositiveInt = 4
    """Steps between two points of the training curve."""
    eval_every: NonNegativeInt = 0
    """Steps between two evaluations on the scoring rows; 0 evaluates only at the end."""
    save_seconds: NonNegativeFloat = 60.0
    """Minimum time between two checkpoints, in seconds. It grows where writing one takes long."""
    long_tokens: NonNegativeInt = 0
    """Training tokens of a second part with longer rows, after `tokens`; 0 leaves it out."""
    long_sequence_length: Count | None = None
    """Tokens of its rows, a multiple of `data.sequence_length`. Default: eight times that, or what the parent's context
    and the evaluation's text allow."""
    long_learning_rate: PositiveFloat | None = None
    """Its peak learning rate. Default: a third of the first part's."""
    long_data: str | None = None
    """Its text: a source as of `--data`, also a mixture. Default: the text of the first part, from where that ends."""
    overlap: Overlap | None = None
    """What to do with training rows that share long runs of text with evaluation rows. Default: `data.overlap`."""
    report_to: tuple[str, ...] = ()
    """Loggers of Transformers to report to: `tensorboard`, `wandb`, ..."""
    finalists: Count = 1
    """Number of different solutions to distil for a short while first. The one with the lowest KL divergence is then
    distilled to the end."""
    finalist_tokens: PositiveInt | None = None
    """Training tokens of each finalist. Default: a tenth of `tokens`."""
    finalist_distance: PositiveInt | None = None
    """Minimum number of subblocks in which two finalists differ. Default: a tenth of all subblocks."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Other fields of Transformers' `TrainingArguments`."""

    def __post_init__(self) -> None:
        if not self.kl + self.hidden + self.lm:
            raise ValueError("kl, hidden and lm are all 0, so there is nothing to learn.")
        try:
            json.dumps(self.trainer, allow_nan=False)
        except ValueError as error:
            raise ValueError("trainer: every number must be finite.") from error
        if self.cache_top and self.hidden:
            raise ValueError("cache_top keeps no hidden states of the parent. Set distillation.hidden to 0 too.")

    def rate(self, hidden_size: int) -> float:
        """The peak learning rate for a model of this hidden size."""
        if self.learning_rate is not None:
            return self.learning_rate
        return WIDTH_RATE / hidden_size * (ADAPTERS_FASTER if self.lora_rank else 1)

    def step_tokens(self, tokens: int) -> int:
        """Tokens per optimizer step for this number of training tokens."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        return round(min(MOST_STEP_TOKENS, max(LEAST_STEP_TOKENS, tokens * STEP_SHARE)))


@record("recipe: rounds.")
class RoundsRecipe:
    """Compression in rounds: a step, a short distillation, and all again from the child of that step."""

    count: Annotated[int, Field(ge=1, le=20)] = 1
    """Number of rounds. Each is a run of all stages whose parent is the child of the round before; what children are
    compared with and learn from is always the first parent."""
    sizes: Annotated[tuple[Fraction, ...], _MOST] | None = None
    """What the child of each round but the last may cost, as fractions of the parent's costs that the budget limits,
    e.g. `[0.9, 0.75]` for three rounds. Default: each round shrinks them by the same factor."""
    tokens: Annotated[tuple[NonNegativeInt, ...], _MOST] | None = None
    """Training tokens of global distillation at the end of each round but the last, which has `distillation.tokens`.
    Default: a tenth of that in each round."""

    def __post_init__(self) -> None:
        for name, values in (("sizes", self.sizes), ("tokens", self.tokens)):
            if values is not None and len(values) != self.count - 1:
                raise ValueError(f"rounds.{name} needs {self.count - 1} values, one for each round but the last.")
        if self.sizes is not None and list(self.sizes) != sorted(self.sizes, reverse=True):
            raise ValueError("rounds.sizes must fall from round to round.")


@record("recipe: hidden_size.")
class HiddenSizeRecipe:
    """Smaller hidden sizes that the search may choose for the whole model; see how-to/hidden-size.md."""

    fractions: Annotated[tuple[Fraction, ...], _MOST] = ()
    """Hidden sizes to offer, as fractions of the parent's, rounded to `multiple`; e.g. `[0.875]`.
    Default: none."""
    sizes: Annotated[tuple[Count, ...], _MOST] | None = None
    """Hidden sizes to offer, in channels. Overrides `fractions`."""
    multiple: PositiveInt = 8
    """Hidden sizes given by `fractions` are rounded to multiples of this."""
    ranking: Literal["activations", "second_order"] = "activations"
    """Which channels stay: those with the largest activations after norms, or those whose removal would cost most by a
    second-order estimate."""
    refit: bool = True
    """Whether the maps that read norms are refitted by least squares on the calibration rows."""


@record("recipe: search.limits.")
class CombinedLimit:
    """An upper limit on a weighted sum of costs, e.g. `{costs: {weights: 1, kv_cache: 2}, at_most: 10GiB}`."""

    costs: dict[str, float]
    """Cost (a budget's key such as `weights`, or a cost's name) to its weight in the sum."""
    at_most: str | float
    """The limit: a fraction of the parent's value of that sum, or an amount with or without a unit."""


@record("recipe: search.")
class SearchRecipe:
    """What a solution must satisfy besides the budget, and how it is refined."""

    keep_layers: tuple[int, ...] = ()
    """Layers (from 0) that stay like the parent's."""
    keep_attentions: tuple[int, ...] = ()
    """Layers (from 0) whose attention is neither removed nor replaced by a linear map; it may get fewer heads. Servers
    such as vLLM and llama.cpp need an attention in layer 0, and exports fill it up with zeros where it is missing."""
    max_removed_attentions: NonNegativeInt | None = None
    """Maximum number of attentions that may be removed. Default: no maximum."""
    max_removed_ffns: NonNegativeInt | None = None
    """Maximum number of FFNs that may be removed. Default: no maximum."""
    uniform_groups: NonNegativeInt | tuple[tuple[int, ...], ...] | None = None
    """Layers that must have the same shape. A number N forms groups of N neighbouring layers, 0 one group of all layers
    (a homogeneous child); or give lists of layers. Only layers that are equal in the parent are tied."""
    tensor_parallel: PositiveInt = 1
    """Tensor-parallel size to support: remaining head counts and widths are multiples of it. KV heads may also
    divide it."""
    limits: Annotated[tuple[CombinedLimit, ...], _MOST] = ()
    """Limits on weighted sums of costs."""
    refine_passes: NonNegativeFloat = 8.0
    """Work allowed for refinement, which evaluates whole candidate children, in forward passes of the parent over the
    scoring rows; 0 for none."""
    refine_rows: PositiveInt | None = None
    """Scoring rows on which most candidates are evaluated. Default: as many as `refine_passes` allows."""
    frontier_points: Annotated[int, Field(ge=2, le=10_000)] = 50
    """Number of budgets for which the frontier is computed."""

    RENAMED: ClassVar = {
        "most_no_op_attentions": "max_removed_attentions",
        "most_no_op_ffns": "max_removed_ffns",
        "alike": "uniform_groups",
    }


@record("recipe: costs.")
class CostsRecipe:
    """How prefill and decode times are obtained, for latency budgets and for the report."""

    times: str | None = None
    """CSV file with times measured elsewhere, in the format that `layersmith costs --csv` writes."""
    device: str | None = None
    """Predict times for a device that is not present, e.g. `H100`, from its published specifications."""
    server: str | None = None
    """Predict times under the load of a server on `device`: `vllm`, `sglang` or `tensorrt-llm`. They come from NVIDIA's
    AIConfigurator, whose names of devices are e.g. `h200_sxm`. Needs `pip install 'layersmith[serving]'`."""
    backend: Literal["eager", "compile"] = "eager"
    """`compile` times models with a static KV cache under `torch.compile`, on a GPU with CUDA graphs."""
    seconds: PositiveFloat = 120.0
    """Approximate time budget for measuring. If it does not suffice, fewer layers, then fewer rounds are timed."""
    rounds: Count = 9
    """Maximum number of times each shape is timed. Every round times all shapes in turn, so that a slow spell of the
    machine affects all of them equally."""
    decode_steps: Count = 16
    """Tokens generated to measure the time of one."""
    checks: CountOrNone = 6
    """Number of whole children, similar to what a search chooses, that are timed to correct sums of parts."""
    time_child: bool = True
    """Time parent and child for the report even if the budget has no latency limit."""

    def __post_init__(self) -> None:
        if self.times is not None and self.device is not None:
            raise ValueError("times and device both say where times come from. Leave one out.")
        if self.server is not None and self.device is None:
            raise ValueError("server needs the name of a device, e.g. device: h200_sxm.")


@record("recipe: evaluation.")
class EvaluationRecipe:
    """What is measured on parent and child besides loss and agreement on held-out text."""

    tasks: tuple[str, ...] = ()
    """Tasks whose accuracy is measured: names of tasks in lm-eval, or JSONL files with the fields `query`, `choices`,
    `gold` or `context`, `continuation`. Needs `pip install 'layersmith[tasks]'`."""
    task_items: PositiveInt | None = None
    """Number of items of each task, from its first on. Default: all."""
    task_shots: NonNegativeInt = 0
    """Number of solved examples shown before each item."""
    keep: dict[str, Annotated[float, Field(gt=0, le=1)]] = field(default_factory=dict)
    """Members of `tasks` and the least share of the parent's accuracy that the child must keep: `{arc_easy: 0.97}`. If
    the budget does not limit the size, the smallest such child is searched."""

    def __post_init__(self) -> None:
        for task in self.keep:
            if task not in self.tasks:
                raise ValueError(f"keep: {task} is not one of the tasks. Name it under evaluation.tasks too.")


@record("recipe: effort.")
class EffortRecipe:
    """How much work the run does; see how-to/time.md. Settings that differ from their defaults stay as they are."""

    within: str | None = None
    """Time that the whole run should take, e.g. `30min`; rounds share it equally. It chooses `level` once, from the
    arithmetic of every stage and the speed of this machine."""
    level: Annotated[float, Field(ge=0, le=6)] | None = None
    """Amount of work, from 0 to 6. Level 3 is that of the defaults; each level does about twice the work of the one
    before. Default: none, so that every setting has its default."""
    late_level: Annotated[float, Field(ge=0, le=6)] | None = None
    """The level of refinement, where it differs. A run with `within` chooses it after the search, from the time that is
    left."""
    last_level: Annotated[float, Field(ge=0, le=6)] | None = None
    """The level of the refit on the child's inputs and of joint distillation, where it differs from that of refinement.
    A run with `within` chooses it after refinement."""

    def __post_init__(self) -> None:
        if self.within is not None:
            parse_seconds(self.within, "recipe: effort.within")


@record("recipe: ")
class Recipe:
    """The complete recipe of a run."""

    data: DataRecipe = field(default_factory=DataRecipe)
    library: LibraryRecipe = field(default_factory=LibraryRecipe)
    local_distillation: LocalDistillationRecipe = field(default_factory=LocalDistillationRecipe)
    scoring: ScoringRecipe = field(default_factory=ScoringRecipe)
    distillation: DistillationRecipe = field(default_factory=DistillationRecipe)
    rounds: RoundsRecipe = field(default_factory=RoundsRecipe)
    hidden_size: HiddenSizeRecipe = field(default_factory=HiddenSizeRecipe)
    search: SearchRecipe = field(default_factory=SearchRecipe)
    costs: CostsRecipe = field(default_factory=CostsRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    effort: EffortRecipe = field(default_factory=EffortRecipe)
    formats: Annotated[tuple[str, ...], _MOST] = (AUTOMATIC,)
    """Number formats to offer for the weights of every attention and FFN besides the parent's data type, all of one
    file format: e.g. `[int8, int4-g128]`. `auto` offers int8 and integers of 4 bits if the budget limits bytes to fewer
    than the parent has. `bf16` alone, or nothing, offers none."""
    kv_formats: Annotated[tuple[str, ...], _MOST] = ()
    """Number formats to offer for the KV cache of every attention besides the parent's data type: `fp8`, `int4`.
    layersmith and Transformers compute with them; exports do not hold them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed. The same seed gives the same child."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: str = "auto"
    """Data type of the computation; `auto` is float32 on a CPU and bfloat16 on a GPU. The child is written in the
    parent's data type."""
    checkpoint_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type in which the weights of parent and child are stored. `auto` is the parent's, and bfloat16 for a parent
    whose weights are quantized (GGUF, FP8, ...). With another value the parent is converted first."""
    completion_tokens: CountOrNone = 48
    """Length of the sample that parent and child write for the report; 0 for none."""
    prompts: Annotated[tuple[str, ...], _MOST] = ()
    """Prompts of these samples. Default: the start of an evaluation row."""
    stream: Literal["auto", "never", "always"] = "auto"
    """Whether to keep the parent's weights on the disk and read them layer by layer. `auto` does so where they need
    more than three quarters of the free memory, once for each process. Several processes then hold some layers each."""

    RENAMED: ClassVar = {"trust_remote_code": "--trust-remote-code, an option of the command line only"}

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON data."""
        data: dict[str, Any] = to_data(self)
        return data

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @staticmethod
    def from_dict(data: object, where: str = "recipe") -> Recipe:
        """A recipe from plain data; ``where`` names its source in messages.

        Raises:
            UsageError: an unknown key, or a value of the wrong type or outside its range.
        """
        return parse(Recipe, data, f"{where}: ")

    @staticmethod
    def read(value: Recipe | dict[str, Any] | str | Path | None) -> Recipe:
        """A recipe from a YAML file or a mapping; None gives the defaults.

        Raises:
            InputError: the file is missing or not YAML.
            UsageError: an unknown key, or a value of the wrong type or outside its range.
        """
        if value is None:
            return Recipe()
        if isinstance(value, Recipe):
            return value
        if isinstance(value, dict):
            return Recipe.from_dict(value)
        if Path(value).exists() and not Path(value).is_file():
            raise InputError(f"{value}: not a YAML recipe, because it is not a file.")
        return Recipe.from_dict(read_yaml(Path(value), "recipe") or {}, str(value))

    def with_settings(self, settings: Sequence[str]) -> Recipe:
        """A copy with other values, given as on the command line.

        >>> Recipe().with_settings(["scoring.samples=2", "library.ffn_fractions=[0.5, 0.25]"]).scoring.samples
        2

        Args:
            settings: Items of the form ``section.key=value``; values are YAML.

        Raises:
            UsageError: not of that form, an unknown key, or a value of the wrong type or outside its range.
        """
        data = self.to_dict()
        for setting in settings:
            path, equals, text = setting.partition("=")
            *sections, key = path.strip().split(".")
            section: Any = data
            try:
                for name in sections:
                    section = section.setdefault(name, {})
                section[key] = parse_yaml(text)
            except (AttributeError, TypeError, ValueError) as error:
                raise UsageError(f"--set {setting:.200}: {path:.200} has no keys, or the value is not YAML.") from error
            if not equals:
                raise UsageError(f"--set {setting}: expected section.key=value, e.g. scoring.samples=2.")
        return Recipe.from_dict(data, "--set")
