"""The recipe: every choice of a run, with its default, in one place.

A recipe file is YAML with these sections and fields; what it leaves out has the default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from layersmith import schema
from layersmith.errors import InputError, UsageError

# The load for which a KV cache is counted, if none is named.
BATCH = 1
CONTEXT = 4096
# Of its tokens those that are written after the prompt, if none are named; at most half.
GENERATE = 128
# Tokens of `distill` where neither command nor recipe names a number.
DISTILLATION_TOKENS = 1_000_000
# The learning rate of distillation times the hidden size.
WIDTH_RATE = 0.15
# Tokens in a step of distillation, if none are named: a share of all, between two bounds.
STEP_SHARE, LEAST_STEP_TOKENS, MOST_STEP_TOKENS = 1 / 200, 2048, 524_288

Objective = Literal[
    "kl_divergence", "lm_loss", "top_1_agreement", "top_5_agreement", "top_10_agreement", "hidden_distance"
]

# What to do about rows that share long runs of text with evaluation.
Overlap = Literal["leave_out", "warn", "refuse", "allow"]

# Kinds of alternatives that have weights.
Trainable = Literal[
    "linear", "kv_heads", "head_groups", "query_heads", "window", "mixer_heads", "mixer_groups", "mixer_head_size",
    "state_size", "ffn_width", "experts", "expert_width", "shared_width", "experts_per_token",
]  # fmt: skip


@dataclass(frozen=True)
class DataRecipe:
    """What is read, and how much of it.

    Attributes:
        sequence_length: tokens in a row; at most what the model was made for.
        calibration_sequences: rows for the importance statistics.
        scoring_sequences: rows on which alternatives are scored.
        evaluation_sequences: rows on which parent and child are compared; never used before.
        training_sequences: rows for distillation, from documents that are in no other split; 0 for none.
        evaluation_source: where the evaluation rows come from; default: documents held out of the data.
        overlap: what to do about rows of other splits that share long runs of text with evaluation rows. ``leave_out``:
            go on without them; ``warn``: use them and say so; ``refuse``: stop; ``allow``: do not look.
        field: the column that holds the text; default: found by its usual names.
        split: of a hub dataset.
    """

    sequence_length: int = 512
    calibration_sequences: int = 64
    scoring_sequences: int = 32
    evaluation_sequences: int = 64
    training_sequences: int = 256
    evaluation_source: str | None = None
    overlap: Overlap = "leave_out"
    field: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class LibraryRecipe:
    """Which alternatives there are.

    Attributes:
        ffn_fractions: widths to which FFNs are narrowed, as fractions of the parent's, rounded to ``ffn_multiple``.
        ffn_sizes: the widths themselves; goes before ``ffn_fractions``.
        ffn_multiple: widths are multiples of this; default: 256 where the parent's is 2048 or more, else 64, 16 or 1.
        ffn_ranking: which channels stay. ``contribution``: those that add most to the output one by one;
            ``iterative``: removed one at a time, counting what was removed before; ``auto``: iterative where its
            statistics fit in ``statistics_gib``.
        kv_heads: numbers of KV heads; default: halves of the parent's down to one.
        kv_methods: ``contribution``: keep the KV heads that add most; ``pool``: average neighbours.
        query_heads: whether there may be fewer query heads, alone or with their KV head.
        windows: whether attentions that see everything may get the window that others of the model have.
        mixers: whether Mamba and linear-attention mixers may have fewer or smaller heads and a smaller state.
        head_fractions: to which the query heads of a KV head are reduced, KV heads that go with their query heads
            (these also to the default of ``kv_heads``), and all heads where each has its own keys; for mixers
            the heads of a group, the groups, the size of a head, and the state.
        expert_fractions: to which the number of experts, that of a token, and the width of experts are reduced.
        linear: subblocks that one linear map may replace.
        no_op: subblocks that may be removed.
        keep_layers: layers that stay as they are.
        statistics_gib: memory for importance statistics; what does not fit is gathered in further passes.
    """

    ffn_fractions: tuple[float, ...] = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
    ffn_sizes: tuple[int, ...] | None = None
    ffn_multiple: int | None = None
    ffn_ranking: Literal["auto", "contribution", "iterative"] = "auto"
    kv_heads: tuple[int, ...] | None = None
    kv_methods: tuple[Literal["contribution", "pool"], ...] = ("contribution", "pool")
    query_heads: bool = True
    windows: bool = True
    mixers: bool = True
    head_fractions: tuple[float, ...] = (0.75, 0.5, 0.25)
    expert_fractions: tuple[float, ...] = (0.875, 0.75, 0.5, 0.25)
    linear: tuple[Literal["attention", "ffn"], ...] = ("attention", "ffn")
    no_op: tuple[Literal["attention", "ffn"], ...] = ("attention", "ffn")
    keep_layers: tuple[int, ...] = ()
    statistics_gib: float = 4.0


@dataclass(frozen=True)
class LocalDistillationRecipe:
    """How alternatives learn to give what the parent's subblock gives.

    Attributes:
        reconstruct: refit the last projection of what was pruned by least squares, on the calibration rows.
        tokens: of the training rows that each alternative of the library sees, before it is scored; 0: none. Each row
            is seen once.
        coupled_tokens: that the chosen alternatives of a layer see, trained together after the search; 0: none.
        coupled_on: whose activations they are given. ``child``: what the child's layers before them have learned to
            give, so that of several processes one works; ``parent``: the parent's.
        kinds: of alternatives that are trained; default: all that have weights.
        learning_rate: of AdamW, as a share of each weight's root mean square; it falls in a straight line.
        coupled_learning_rate: the same, of what learns together, for an error of 1; for less, times its root.
        batch_tokens: tokens in one step.
        stop_below: past half of its tokens an alternative is done when its error on held-out rows falls by less than
            this share between two of the six times that it is looked at.
        memory_gib: for weights, gradients and optimizer of alternatives that are trained at once.
    """

    reconstruct: bool = True
    tokens: int = 131_072
    coupled_tokens: int = 131_072
    coupled_on: Literal["child", "parent"] = "child"
    kinds: tuple[Trainable, ...] | None = None
    learning_rate: float = 0.01
    coupled_learning_rate: float = 0.06
    batch_tokens: int = 1024
    stop_below: float = 0.005
    memory_gib: float = 8.0


@dataclass(frozen=True)
class ScoringRecipe:
    """How alternatives are judged.

    Attributes:
        objective: what the search minimises the sum of.
        mode: ``exact`` runs the model with every alternative on every row; ``second_order`` estimates KL divergence
            from a few backward passes and corrects it by exact runs where they tell most; ``auto`` is
            ``second_order`` where it can be had and saves work. Other objectives need ``exact``.
        samples: backward passes of ``second_order``.
        exact_passes: work that its exact runs may take, in forward passes of the parent over the scoring rows; three
            times as much where routers choose experts.
        precision: relative standard error of every score at which no more is run exactly.
        settled: nor, after a quarter of that work, once children chosen by the scores are thought to lose no larger a
            share more than the best by true scores.
        row_precision: of ``exact``: no further rows are run once the relative standard errors of the scores beside each
            other, against what all rows would give, are below this in the root mean square; 0: all rows are run.
        batch_tokens: tokens in one forward pass; fewer where they would take much beside the parent's weights.
        spill_gib: disk for hidden states between layers, where the parent's weights stay on the disk.
    """

    objective: Objective = "kl_divergence"
    mode: Literal["auto", "exact", "second_order"] = "auto"
    samples: int = 1
    exact_passes: float = 4.0
    precision: float = 0.05
    settled: float = 0.02
    row_precision: float = 0.0
    batch_tokens: int = 4096
    spill_gib: float = 16.0

    def rows_at_once(self, length: int) -> int:
        """Rows of so many tokens in one forward pass."""
        return max(1, self.batch_tokens // length)


@dataclass(frozen=True)
class DistillationRecipe:
    """How a whole child learns from the parent.

    Attributes:
        tokens: to learn from, in all; 0: `compress` does not distil.
        kl: weight of the KL divergence of predictions.
        hidden: weight of one minus the cosine of hidden states, mean over layers.
        lm: weight of the loss on the next token.
        temperature: at which predictions are compared.
        optimizer: ``muon``: torch's Muon for the matrices of the layers, with updates as large as AdamW's (arXiv
            2502.16982), and AdamW for the rest; ``adamw``: AdamW for all, as with FSDP and DeepSpeed always.
        learning_rate: at its peak; default: ``WIDTH_RATE`` over the hidden size, as the best rate of Adam goes with one
            over the width (arXiv 2203.03466).
        schedule: of the learning rate, by Transformers' name: ``cosine``, ``linear``, ``constant_with_warmup``, ...
        warmup: share of the steps in which the rate rises.
        weight_decay: of the optimizer.
        batch_tokens: in one step of the optimizer, over all processes; default: a 200th of all, but no fewer than 2048
            and no more than 524,288.
        device_tokens: in one forward pass of a process; a step's are gathered from as many as it takes.
        precision: ``auto`` is that of the run's ``dtype``; weights and optimizer stay in float32.
        gradient_checkpointing: run layers again in the backward pass instead of keeping what they made.
        cache_top: keep the parent's so many most likely next tokens on every row, with the rest's probability, instead
            of running it each time; 0: run it. Worth it where rows repeat; knows no hidden states.
        log_every: steps between two points of the curve.
        eval_every: steps between two evaluations on the scoring rows; 0: only at the end.
        save_seconds: between two checkpoints at least; longer where writing one takes long.
        overlap: what to do about rows that share long runs of text with evaluation; default: ``data.overlap``.
        report_to: where Transformers logs besides: ``tensorboard``, ``wandb``, ...
        finalists: different solutions that are tried; the one with the least KL after a short while goes on.
        finalist_tokens: of that while; default: a tenth of ``tokens``.
        finalist_distance: subblocks in which two of them differ at least; default: a tenth of all.
        trainer: any other field of Transformers' TrainingArguments.
    """

    tokens: int = 0
    kl: float = 1.0
    hidden: float = 1.0
    lm: float = 0.0
    temperature: float = 1.0
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    batch_tokens: int | None = None
    device_tokens: int = 4096
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    cache_top: int = 0
    log_every: int = 4
    eval_every: int = 0
    save_seconds: float = 60.0
    overlap: Overlap | None = None
    report_to: tuple[str, ...] = ()
    finalists: int = 1
    finalist_tokens: int | None = None
    finalist_distance: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def rate(self, hidden_size: int) -> float:
        """The learning rate for a model of some width."""
        return WIDTH_RATE / hidden_size if self.learning_rate is None else self.learning_rate

    def step_tokens(self, tokens: int) -> int:
        """Tokens of a step, where so many are learnt from."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        return round(min(MOST_STEP_TOKENS, max(LEAST_STEP_TOKENS, tokens * STEP_SHARE)))

    def check(self) -> None:
        """Raises: UsageError: a value that makes no sense."""
        for name in ("kl", "hidden", "lm", "weight_decay", "tokens", "eval_every", "cache_top", "save_seconds"):
            if getattr(self, name) < 0:
                raise UsageError(f"recipe distillation.{name}: cannot be negative, got {getattr(self, name)}.")
        if not self.kl + self.hidden + self.lm:
            raise UsageError("recipe distillation: kl, hidden and lm are all 0, so there is nothing to learn.")
        optional = ("learning_rate", "batch_tokens", "finalist_tokens", "finalist_distance")
        for name in ("temperature", "device_tokens", "log_every", "finalists", *optional):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"recipe distillation.{name}: must be positive, got {value}.")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"recipe distillation.warmup: {self.warmup} is not between 0 and 1.")
        if self.cache_top and self.hidden:
            raise UsageError(
                "recipe distillation.cache_top: what is kept of the parent has no hidden states. Set hidden to 0 too."
            )


@dataclass(frozen=True)
class CombinedLimit:
    """An upper limit on several costs together, e.g. ``{costs: {weights: 1, kv_cache: 2}, at_most: 10GiB}``.

    Attributes:
        costs: a budget's key, or a cost's own name, to how many times it counts.
        at_most: a fraction of what the parent has of that sum, or an amount, with or without a unit.
    """

    costs: dict[str, float]
    at_most: str | float


@dataclass(frozen=True)
class SearchRecipe:
    """What a solution must satisfy beside the budget, and how it is refined.

    Attributes:
        keep_layers: layers that stay as they are.
        most_no_op_attentions: attentions that may be removed, at most.
        most_no_op_ffns: FFNs that may be removed, at most.
        alike: which layers become the same, each subblock for itself: lists of layers, or a number, so many
            neighbours at a time; 0 for all layers, a uniform child. Layers that differ in the parent are not compared.
        tensor_parallel: heads and widths that are left are multiples of this; KV heads may also divide it.
        limits: on several costs together.
        refine_passes: work that refinement may take, in forward passes of the parent over the scoring rows; 0 for none.
        refine_rows: scoring rows on which most solutions are tried; default: as many as the work is enough for.
        frontier_points: budgets for which the frontier is computed.
    """

    keep_layers: tuple[int, ...] = ()
    most_no_op_attentions: int | None = None
    most_no_op_ffns: int | None = None
    alike: int | tuple[tuple[int, ...], ...] | None = None
    tensor_parallel: int = 1
    limits: tuple[CombinedLimit, ...] = ()
    refine_passes: float = 8.0
    refine_rows: int | None = None
    frontier_points: int = 50

    def __post_init__(self) -> None:
        schema.check_fields(self)
        for name in ("most_no_op_attentions", "most_no_op_ffns", "refine_passes"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"recipe search.{name}: cannot be negative, got {getattr(self, name)}.")
        for name, value in (("tensor_parallel", self.tensor_parallel), ("refine_rows", self.refine_rows)):
            if value is not None and value < 1:
                raise UsageError(f"recipe search.{name}: must be at least 1, got {value}.")
        if self.frontier_points < 2:
            raise UsageError("recipe search.frontier_points: must be at least 2.")
        if isinstance(self.alike, int) and self.alike < 0:
            raise UsageError("recipe search.alike: must be a number of layers, 0 for all, or lists of layers.")


@dataclass(frozen=True)
class CostsRecipe:
    """Where times come from, for budgets of time and for the report.

    Attributes:
        times: a CSV file with times from elsewhere, as ``layersmith costs`` writes it.
        device: a device that is not here, e.g. ``H100``: times are predicted from what its maker says of it.
        backend: ``eager``; ``compile``: with a static KV cache and ``torch.compile``, on a GPU as CUDA graphs.
        seconds: that measuring may take, about; fewer layers are timed, then fewer times, where it would take longer.
        rounds: how often each shape is timed, at most; of one round with all the others, so that a machine that slows
            down does so for all.
        decode_steps: tokens that are written to time one.
        checks: children, as a search would choose them, that are timed whole, to correct sums of parts.
        time_child: whether parent and child are timed for the report where the budget has no time in it.
    """

    times: str | None = None
    device: str | None = None
    backend: Literal["eager", "compile"] = "eager"
    seconds: float = 120.0
    rounds: int = 9
    decode_steps: int = 16
    checks: int = 6
    time_child: bool = True

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if self.times is not None and self.device is not None:
            raise UsageError("recipe costs: times and device both say where times come from. Leave one out.")
        if self.seconds <= 0 or min(self.rounds, self.decode_steps) < 1 or self.checks < 0:
            raise UsageError("recipe costs: seconds, rounds and decode_steps must be positive, checks not negative.")


@dataclass(frozen=True)
class Recipe:
    """All of it.

    Attributes:
        seed: of the data's order; the same seed gives the same child.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of the computation; ``auto`` is float32 on a CPU and bfloat16 on a GPU. The child keeps the parent's.
        completion_tokens: length of the sample that parent and child write for the report; 0 for none.
        prompts: what they continue; default: the start of an evaluation row.
        trust_remote_code: let Transformers run code that lies in the parent's folder.
        stream: whether the parent's weights stay on the disk until a layer runs; ``auto``: where they would take more
            than three quarters of the memory that is free.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    library: LibraryRecipe = field(default_factory=LibraryRecipe)
    local_distillation: LocalDistillationRecipe = field(default_factory=LocalDistillationRecipe)
    scoring: ScoringRecipe = field(default_factory=ScoringRecipe)
    distillation: DistillationRecipe = field(default_factory=DistillationRecipe)
    search: SearchRecipe = field(default_factory=SearchRecipe)
    costs: CostsRecipe = field(default_factory=CostsRecipe)
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    completion_tokens: int = 48
    prompts: tuple[str, ...] = ()
    trust_remote_code: bool = False
    stream: Literal["auto", "never", "always"] = "auto"

    def __post_init__(self) -> None:
        schema.check_fields(self)
        data, library = self.data, self.library
        for name in ("sequence_length", "calibration_sequences", "scoring_sequences", "evaluation_sequences"):
            if getattr(data, name) < (2 if name == "sequence_length" else 1):
                raise UsageError(f"recipe data.{name}: must be positive, got {getattr(data, name)}.")
        if data.training_sequences < 0:
            raise UsageError(f"recipe data.training_sequences: cannot be negative, got {data.training_sequences}.")
        for name in ("ffn_fractions", "head_fractions", "expert_fractions"):
            for fraction in getattr(library, name):
                if not 0 < fraction < 1:
                    raise UsageError(f"recipe library.{name}: {fraction} is not between 0 and 1.")
        for name in ("ffn_sizes", "kv_heads"):
            if any(size < 1 for size in getattr(library, name) or ()):
                raise UsageError(f"recipe library.{name}: sizes must be positive; removal is no_op.")
        if library.ffn_multiple is not None and library.ffn_multiple < 1:
            raise UsageError("recipe library.ffn_multiple: must be positive.")
        scoring = self.scoring
        if min(scoring.batch_tokens, scoring.samples) < 1 or library.statistics_gib <= 0:
            raise UsageError(
                "recipe: scoring.batch_tokens, scoring.samples and library.statistics_gib must be positive."
            )
        if min(scoring.exact_passes, scoring.precision, scoring.row_precision) < 0:
            raise UsageError("recipe: scoring.exact_passes, precision and row_precision cannot be negative.")
        if scoring.mode == "second_order" and scoring.objective != "kl_divergence":
            raise UsageError(f"recipe scoring.mode: second_order knows kl_divergence only, not {scoring.objective}.")
        self.distillation.check()

        local = self.local_distillation
        rates = local.learning_rate, local.coupled_learning_rate
        if min(*rates, local.batch_tokens, local.memory_gib) <= 0:
            raise UsageError("recipe local_distillation: learning rates, batch_tokens and memory_gib must be positive.")
        if min(local.tokens, local.coupled_tokens, local.stop_below) < 0:
            raise UsageError("recipe: local_distillation.tokens, coupled_tokens and stop_below cannot be negative.")

    def to_dict(self) -> dict[str, Any]:
        return schema.to_data(self)

    @staticmethod
    def from_dict(data: dict[str, Any], where: str = "recipe") -> Recipe:
        """Raises: UsageError: an unknown key, or a value that makes no sense."""
        return schema.parse(Recipe, data, where)

    @staticmethod
    def read(value: Recipe | dict[str, Any] | str | Path | None) -> Recipe:
        """A recipe from a YAML file, a mapping, or nothing.

        Raises:
            InputError: the file is missing or not YAML.
            UsageError: an unknown key, or a value that makes no sense.
        """
        if value is None:
            return Recipe()
        if isinstance(value, Recipe):
            return value
        if isinstance(value, dict):
            return Recipe.from_dict(value)
        import yaml

        try:
            data = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{value}: no such recipe.") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{value}: not a YAML recipe ({' '.join(str(error).split())}).") from error
        return Recipe.from_dict(data or {}, str(value))

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)
