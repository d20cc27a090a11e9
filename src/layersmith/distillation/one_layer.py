"""Local distillation of one layer: refits and trains its replacements while rows pass through the parent's layer.

As far as memory allows, all replacements of the layer are trained at once; otherwise in groups, each of which runs the
parent's layer again.

Shapes: B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from layersmith.distillation.activations import BLOCK, Rows, Target, run_parent_layer
from layersmith.distillation.child_refit import ChildRefit
from layersmith.distillation.parent_refit import refit_layer
from layersmith.distillation.replacement import Replacement, ReplacementTraining
from layersmith.distillation.store import Store, layer_name
from layersmith.distillation.team import ALONE, Team
from layersmith.execution.layerwise import LayerwiseParent, Split, key_of
from layersmith.heterogeneous.checkpoint import weight_groups
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.library import Library
from layersmith.library.stored_weights import Tensors
from layersmith.recipe import LocalDistillationRecipe

# Times that the error on held-out rows is taken during training: more cost passes, fewer find the best weights later.
_EVALUATIONS = 6
# Bytes for each trained weight: itself, a float32 copy, its gradient, two moments, the best so far.
_BYTES_A_WEIGHT = 28


@dataclass
class LayerDistillation:
    """The distillation of one layer.

    Attributes:
        library: Library of the alternatives.
        layerwise: The parent, whose layers can be run one at a time.
        index: Index of the layer.
        replacements: What is trained.
        splits: Rows for ``calibration``, ``held out`` and ``training``, as far as there are any, at this layer.
        store: Where the results go.
        recipe: The recipe's section ``local_distillation``.
        on_child: Whether replacements are given the child's hidden states.
        team: The processes that train the layer, each on some of the rows.
        split: The layer's attention and FFN, as they can be run alone.
    """

    library: Library
    layerwise: LayerwiseParent[Library]
    index: int
    replacements: Sequence[Replacement]
    splits: dict[str, Rows]
    store: Store
    recipe: LocalDistillationRecipe
    on_child: bool
    team: Team = ALONE
    split: Split = field(init=False)

    def __post_init__(self) -> None:
        first = next(rows for rows in self.splits.values() if len(rows.tokens))
        self.split = self.layerwise.split(self.index, *first.start(self.layerwise, torch.arange(1)))

    def distill(self, advance: Callable[[float], None]) -> None:
        """Refit and train the replacements, and store their weights and records."""
        refitted: dict[str, Tensors] = {}
        if "calibration" in self.splits:
            refit = self._refit_on_child if self.on_child else self._refit
            refitted = refit(self.splits["calibration"], advance)
        if "training" not in self.splits:
            records = [r.record(refitted.get(r.identity, {}), {}) for r in self.replacements]
            self.store.write(layer_name(self.index), records, refitted)
            return
        held_out = self._held_out(advance)
        groups = self._groups()
        names = [layer_name(self.index, g if len(groups) > 1 else None) for g in range(len(groups))]
        rows = self.splits["training"]
        for name, group in zip(names, groups, strict=True):
            if not self.store.has(name):
                self._train_group(name, group, refitted, held_out)
        if not rows.parent.is_recorded:  # every group was trained before an interruption
            rows.pass_through_parent(self.layerwise, self.index)
        advance(len(rows.tokens))
        if len(groups) > 1:
            self.store.merge(names, layer_name(self.index))

    def _refit(self, rows: Rows, advance: Callable[[float], None]) -> dict[str, Tensors]:
        """Identity of a replacement to its refitted projection."""
        members = {
            subblock: [r.alternatives[0] for r in self.replacements if r.place == subblock] for subblock in SUBBLOCKS
        }
        return refit_layer(self.layerwise, self.index, self.split, members, rows, advance)

    def _refit_on_child(self, rows: Rows, advance: Callable[[float], None]) -> dict[str, Tensors]:
        """The same for the layer of a child, on the child's inputs."""
        refit = ChildRefit(self.library, self.layerwise, self.index, self.split, self.recipe.child_refit, self.team)
        weights = {r.identity: refit.refit(r.alternatives, rows, advance) for r in self.replacements}
        return {identity: tensors for identity, tensors in weights.items() if tensors}

    def _module(self, replacement: Replacement) -> nn.Module:
        """The module that runs in place of the parent's."""
        if replacement.place == BLOCK:
            return self.library.layer(*replacement.alternatives)
        return self.layerwise.module_of(replacement.alternatives[0], self.split)

    def _targets(self, rows: Rows, numbers: torch.Tensor) -> dict[str, Target]:
        """Targets on a batch of rows, which go through the parent's layer."""
        batch, hidden = rows.start(self.layerwise, numbers)
        targets, output = run_parent_layer(self.layerwise, self.index, self.split, batch, hidden)
        rows.record_parent(numbers, output)
        if self.on_child:
            return {BLOCK: replace(targets[BLOCK], given=rows.child_input(numbers, hidden))}
        return targets

    @torch.no_grad()
    def _held_out(self, advance: Callable[[float], None]) -> list[dict[str, Target]]:
        rows, held_out = self.splits["held out"], []
        for numbers in rows.batches():
            held_out.append(self._targets(rows, numbers))
            advance(len(numbers))
        return held_out

    def _groups(self) -> list[list[Replacement]]:
        """Replacements that are trained at once, so that each group fits in ``recipe.memory_gib``."""
        budget, used = self.recipe.memory_gib * 1024**3, 0.0
        groups: list[list[Replacement]] = [[]]
        for replacement in self.replacements:
            size = _BYTES_A_WEIGHT * sum(p.numel() for p in self._module(replacement).parameters())
            if groups[-1] and used + size > budget:
                groups.append([])
                used = 0.0
            groups[-1].append(replacement)
            used += size
        return groups

    def _training_of(self, replacement: Replacement, changed: Tensors) -> ReplacementTraining:
        module, kinds = self._module(replacement), self.recipe.kinds
        trained = [a for a in replacement.alternatives if not a.is_no_op and (kinds is None or a.kind in kinds)]
        subblocks = {a.subblock for a in trained}
        if replacement.place == BLOCK and kinds is None:  # a subblock that is the parent's is trained too
            subblocks = set(SUBBLOCKS) - {a.subblock for a in replacement.alternatives if a.is_no_op}
        names = {name for subblock in subblocks for name in self._weights_of(subblock, module)}
        return ReplacementTraining(replacement.identity, module, names, changed)

    def _weights_of(self, subblock: str, module: nn.Module) -> list[str]:
        """Names of a subblock's weights. What both subblocks use, e.g. a norm before them, is not trained."""
        names = [name for name, p in module.named_parameters() if p.is_floating_point()]
        if self.split.layout != "whole":
            other = self.split.ffn if subblock == "attention" else self.split.attention
            assert other is not None
            others = {name for name, _ in other.named_parameters()}
            return [name for name in names if name not in others]
        parent = self.library.parent
        prefix = parent.descriptor.layer_block_name(self.index)
        groups = weight_groups(parent.descriptor, [f"{prefix}.{name}" for name in names], len(parent.blocks))
        of_subblock = set(groups.get(f"block_{self.index}_{subblock}", ()))
        return [name for name in names if f"{prefix}.{name}" in of_subblock]

    @torch.no_grad()
    def _error(self, training: ReplacementTraining, held_out: Sequence[Target]) -> float:
        """The loss on all held-out rows."""
        error = size = 0.0
        for target in held_out:
            output = self.layerwise.run(target.batch, self.index, target.given, training.module)
            error += float((output.float() - target.output.float()).double().square().sum())
            size += float(target.contribution().double().square().sum())
        sums = torch.tensor([error, size], dtype=torch.float64, device=self.layerwise.parent.runtime.device)
        self.team.add_up([sums])
        error, size = sums.tolist()
        return error / max(size, 1e-30)

    def _train_group(
        self,
        name: str,
        group: Sequence[Replacement],
        refitted: dict[str, Tensors],
        held_out: list[dict[str, Target]],
    ) -> None:
        """Train a group of replacements, and store their weights and records."""
        unseen = {place: [targets[place] for targets in held_out] for place in {r.place for r in group}}
        trainings = [self._begun(r, refitted.get(r.identity, {}), unseen[r.place]) for r in group]
        skip = self.store.restore(name, trainings)
        rows = self.splits["training"]
        batches = rows.steps
        evaluate_after = {len(batches) * (n + 1) // _EVALUATIONS for n in range(_EVALUATIONS)}
        for step, numbers in enumerate(batches):
            active = [(r, t) for r, t in zip(group, trainings, strict=True) if t.active and step >= skip]
            with self.layerwise.arithmetic.needs():
                targets: dict[str, Target] = {}
                if len(numbers):
                    with torch.no_grad():
                        targets = self._targets(rows, numbers)
                for replacement, training in active:
                    tokens = rows.step_rows[step] * rows.tokens.shape[1]
                    _step(self, training, targets.get(replacement.place), tokens, step / len(batches))
            if active and step + 1 in evaluate_after:
                for replacement, training in active:
                    error = self._error(training, unseen[replacement.place])
                    training.evaluated(error, self.recipe.stop_below, (step + 1) / len(batches))
            if active:
                self.store.save(name, trainings, step + 1)
        records, weights = [], {}
        for replacement, training in zip(group, trainings, strict=True):
            result = training.weights(self.library.parent.dtype)
            if not result and training.before < training.pruned:
                result = refitted[replacement.identity]
            records.append(replacement.record(result, training.result()))
            if result:
                weights[replacement.identity] = result
        self.store.write(name, records, weights)

    def _begun(self, replacement: Replacement, refitted: Tensors, unseen: Sequence[Target]) -> ReplacementTraining:
        """A replacement ready for its first step, with its refitted projection if that is better on held-out rows."""
        training = self._training_of(replacement, refitted)
        pruned = before = self._error(training, unseen)
        if refitted:
            previous = training.exchange(refitted)
            before = self._error(training, unseen)
            if not before < pruned:
                training.exchange(previous)
                before = pruned
        rate = self.recipe.learning_rate
        if replacement.place == BLOCK:  # the larger its error, the longer its steps
            rate = self.recipe.coupled_learning_rate * min(1.0, before**0.5)
        training.begin(rate, pruned, before)
        return training


def _step(
    layer: LayerDistillation, training: ReplacementTraining, target: Target | None, tokens: int, progress: float
) -> None:
    """A step on a batch; a process of a team that has none of its rows has no target."""
    if target is None:
        size = torch.zeros((), dtype=torch.float64, device=layer.layerwise.parent.runtime.device)
        training.step_together(None, size, tokens, progress, layer.team)
        return
    with torch.enable_grad():
        if not layer.team.is_divided:
            training.step(_loss(layer, training, target), tokens, progress)
        else:
            output = layer.layerwise.run(target.batch, layer.index, target.given, training.module)
            error = (output.float() - target.output.float()).square().sum()
            size = target.contribution().double().square().sum()
            training.step_together(error, size, tokens, progress, layer.team)
    layer.layerwise.arithmetic.count_training(key_of(training.module, target.given))


def _loss(layer: LayerDistillation, training: ReplacementTraining, target: Target) -> torch.Tensor:
    """E|y' - y|^2 / E|y|^2 of a batch."""
    output = layer.layerwise.run(target.batch, layer.index, target.given, training.module)
    size = target.contribution().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (output.float() - target.output.float()).square().mean() / size
