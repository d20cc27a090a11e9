"""Local distillation: every alternative learns to give what the parent's subblock gives, on the parent's activations.

For a subblock that adds y to hidden states h, and an alternative of it that adds y', the loss is E|y' - y|^2 / E|y|^2.
No gradient leaves a subblock, so layers are trained one after another, and all the alternatives of a layer on what the
parent gives it: hidden states of all rows go through the parent once, a layer at a time. In the same way the last
projections of what was pruned are refitted first (see :mod:`layersmith.distillation.reconstruction`).

An alternative's error is taken on held-out rows of the training split, which no step sees: before, after, and a few
times between; the best weights are kept, and what no longer improves is stopped. So far as memory allows, a layer's
alternatives are trained at once; otherwise in groups, each of which has the parent's layer run again.

What was chosen for a layer is trained as a block, on what the child's layers before it give once they are trained: the
hidden states of parent and child go through the layers side by side.

Every rank of several trains every so many layers, and runs the parent by itself: alternatives come out the same,
however many ranks there are. On the child's activations the first trains all layers.

Source: Bercovich et al., "Puzzle" (arXiv 2411.19146), section 3.

Shapes: N rows, B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersmith.distillation.reconstruction import Moments, refits
from layersmith.distillation.store import Store, layer_name
from layersmith.distillation.student import Student
from layersmith.errors import UsageError
from layersmith.execution.layerwise import Batch, LayerwiseParent, NotLayerwise, Split, key_of, split_layers
from layersmith.heterogeneous.checkpoint import weight_groups
from layersmith.heterogeneous.plan import SUBBLOCKS
from layersmith.library.alternative import Alternative, changed_by_layer, pair_identity
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept, Tensors, digest_of
from layersmith.recipe import LocalDistillationRecipe
from layersmith.run import ranks
from layersmith.run.progress import SILENT, Progress

_HELD_OUT_EVERY = 24  # of the training rows one in so many is held out
_CHECKS = 6
_PROBE_TOKENS = 32
_STUDENT_BYTES = 28  # of a weight: itself, a float32 copy, its gradient, two moments, the best so far


def distill_locally(
    library: Library,
    calibration: torch.Tensor,
    training: torch.Tensor,
    recipe: LocalDistillationRecipe,
    *,
    seed: int = 0,
    work: Path | None = None,
    inputs: str = "",
    progress: Progress = SILENT,
) -> Library:
    """Refit and train the alternatives of a library, each by itself.

    Args:
        library: of alternatives as they were pruned.
        calibration: ``[N, T]`` rows for least squares.
        training: ``[N, T]`` rows; with fewer than two nothing is trained.
        recipe: how.
        seed: of the order of rows.
        work: a folder that keeps what is done; an interrupted call goes on from there, to the same weights. Several
            ranks must have one that they share.
        inputs: digest of everything that weights depend on; work of other inputs is not used.
        progress: told of rows done.

    Returns:
        The library with what was learned.

    Raises:
        UsageError: there are several ranks and no folder.
    """
    pupils: dict[int, list[Pupil]] = {}
    for a in library.alternatives:
        if a.traits.has_weights:
            pupils.setdefault(a.layer, []).append(Pupil((a,), a.subblock))
    own = calibration if recipe.reconstruct else calibration[:0]
    store, rows = Store(work, inputs), _enough(training, recipe.tokens)
    kept = _distill(library, pupils, own, rows, recipe, seed, store, progress, "distill")
    return library if kept is None else library.with_kept(kept)


def distill_chosen(
    library: Library,
    chosen: Sequence[Alternative],
    training: torch.Tensor,
    recipe: LocalDistillationRecipe,
    *,
    seed: int = 0,
    work: Path | None = None,
    inputs: str = "",
    progress: Progress = SILENT,
) -> Library:
    """Train what was chosen for each layer together: the attention's and the FFN's alternative as one block.

    They learn to give what the parent's layer gives, and so make up for each other. By ``recipe.coupled_on`` they are
    given what the child's layers before them give, in which what these lost is to be made up for, or what the parent's
    layer is given. Where one of both is the parent's own, it learns too. Layers that are the parent's stay as they are.

    Args:
        library: with what alternatives have learned by themselves.
        chosen: one alternative for each subblock of each layer.
        training, recipe, seed, work, inputs, progress: as for :func:`distill_locally`.

    Returns:
        The library with the pairs, which stand in the place of the two where both are asked for.
    """
    by_layer = changed_by_layer(chosen)
    gone = {i for i, own in by_layer.items() if sum(a.is_no_op for a in own) == len(SUBBLOCKS)}
    pupils = {i: [Pupil(tuple(own), BLOCK)] for i, own in by_layer.items() if i not in gone}
    if not pupils:
        return library
    store, rows = Store(work, inputs), _enough(training, recipe.coupled_tokens)
    child = by_layer if recipe.coupled_on == "child" else None
    pairs = _distill(library, pupils, training[:0], rows, recipe, seed, store, progress, "distill pairs", child)
    return library if pairs is None else library.with_kept(library.kept, pairs)


def _enough(training: torch.Tensor, tokens: int) -> torch.Tensor:
    """As many rows as so many tokens are in, and those to hold out."""
    rows = -(-tokens // training.shape[1])
    return training[: rows + -(-rows // _HELD_OUT_EVERY)]


def _distill(
    library: Library,
    pupils: dict[int, list[Pupil]],
    calibration: torch.Tensor,
    training: torch.Tensor,
    recipe: LocalDistillationRecipe,
    seed: int,
    store: Store,
    progress: Progress,
    stage: str,
    child: dict[int, list[Alternative]] | None = None,
) -> Kept | None:
    """What pupils learned; None where they can learn nothing. Given a child's changed layers, on its activations."""
    rows = training if len(training) > 1 else calibration
    if not len(rows):
        return None
    if library.parent.runtime.world_size > 1 and store.folder is None:
        raise UsageError("several processes distill into one folder: give them one with work=.")
    try:
        staged = split_layers(library.parent, library)
    except NotLayerwise as reason:
        progress.note(f"alternatives are not distilled, because the parent cannot run layer by layer: {reason}.")
        return None
    work = _Work(library, staged, pupils, recipe, seed, store, progress, child)
    kept = work.all_layers(calibration, training, stage)
    if staged.arithmetic.done:
        said = f"{stage}: {_in_words(kept.records)}"
        progress.note(f"{said}; {staged.arithmetic}" if len(training) > 1 else said)
    return kept


def _in_words(records: Sequence[Mapping[str, Any]]) -> str:
    trained = [r for r in records if r["tokens"]]
    if not trained:
        return f"{sum(r['weights'] is not None for r in records)} alternatives refitted"
    tokens = sum(r["tokens"] for r in trained)
    ratios = sorted(r["after"] / r["pruned"] for r in trained if r["pruned"])
    return (
        f"{len(trained)} trained on {tokens:,} tokens in all; the median error on held-out rows is "
        f"{ratios[len(ratios) // 2]:.2f} times what it was"
    )


BLOCK = "block"


@dataclass(frozen=True)
class Pupil:
    """Alternatives of one layer that learn together.

    Attributes:
        alternatives: none of them the parent's own.
        place: what they learn to give the output of: ``attention``, ``ffn`` or ``block``.
    """

    alternatives: tuple[Alternative, ...]
    place: str

    @property
    def identity(self) -> str:
        return pair_identity(self.alternatives) if self.place == BLOCK else self.alternatives[0].identity

    @property
    def key(self) -> str:
        return " + ".join((self.alternatives[0].key, *(a.name for a in self.alternatives[1:])))

    def record(self, weights: Tensors, learned: dict[str, Any]) -> dict[str, Any]:
        """What is written down of it."""
        a = self.alternatives[0]
        of = {"of": self.key, "identity": self.identity, "layer": a.layer, "subblock": self.place}
        if len(self.alternatives) == 1:
            of |= {"kind": a.kind, "method": a.method, "size": a.size}
        nothing: dict[str, Any] = {"pruned": None, "before": None, "after": None, "tokens": 0, "curve": []}
        return of | {"weights": digest_of(weights)} | nothing | learned


class Stream:
    """The hidden states ``[N, T, D]`` that rows have come to in one model."""

    def __init__(self) -> None:
        self.hidden: torch.Tensor | None = None
        self._next: torch.Tensor | None = None

    def gave(self, rows: torch.Tensor, num_rows: int, hidden: torch.Tensor) -> None:
        """What the layer at hand made of some of all rows."""
        if self._next is None:
            self._next = torch.empty((num_rows, *hidden.shape[1:]), dtype=hidden.dtype)
        self._next[rows] = hidden.detach().cpu()

    @property
    def went(self) -> bool:
        """Whether they have been through the layer at hand."""
        return self._next is not None

    def go_on(self) -> None:
        """To the next layer."""
        self.hidden, self._next = self._next, None


class Rows:
    """Rows of tokens, on their way through the parent, and through a child from its first changed layer on."""

    def __init__(self, tokens: torch.Tensor, batch_tokens: int):
        self.tokens, self.size = tokens, max(1, batch_tokens // tokens.shape[1])
        self.parent, self.child = Stream(), Stream()

    def batches(self) -> Iterator[torch.Tensor]:
        """Numbers of rows."""
        yield from torch.arange(len(self.tokens)).split(self.size)

    def start(self, staged: LayerwiseParent, rows: torch.Tensor) -> tuple[Batch, torch.Tensor]:
        """Rows as the parent's layer at hand is given them."""
        device = staged.parent.runtime.device
        batch = staged.start(self.tokens[rows].to(device))
        return batch, batch.embedded if self.parent.hidden is None else self.parent.hidden[rows].to(device)

    def of_child(self, rows: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """What the child's layer at hand is given, where the parent's is given ``parents``."""
        return parents if self.child.hidden is None else self.child.hidden[rows].to(parents.device)

    def gave(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        """What the parent's layer at hand made of rows."""
        self.parent.gave(rows, len(self.tokens), hidden)

    def child_gave(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        self.child.gave(rows, len(self.tokens), hidden)

    def go_on(self) -> None:
        """To the next layer."""
        self.parent.go_on()
        self.child.go_on()


@dataclass(frozen=True)
class Place:
    """What stands in the place of a subblock is given on a batch, and shall give; ``[B, T, D]`` each.

    Attributes:
        batch: the rows.
        given: to it; the parent's own, or the child's.
        parents: what the parent's is given.
        gives: what the parent's gives.
    """

    batch: Batch
    given: torch.Tensor
    parents: torch.Tensor
    gives: torch.Tensor

    def added(self) -> torch.Tensor:
        """What the parent's adds to hidden states, ``[B, T, D]``."""
        return self.gives.float() - self.parents.float()


def through(
    staged: LayerwiseParent, i: int, stages: Split, batch: Batch, hidden: torch.Tensor
) -> tuple[dict[str, Place], torch.Tensor]:
    """Run the parent's layer: the places of its subblocks and of itself, and what it gives."""
    if stages.layout == "whole":
        output = staged.run(batch, i, hidden)
        return dict.fromkeys(("attention", "ffn", BLOCK), Place(batch, hidden, hidden, output)), output
    middle = staged.run(batch, i, hidden, stages.attention)
    given = middle if stages.layout == "sequence" else hidden
    output = staged.run(batch, i, given, stages.ffn)
    whole = output if stages.layout == "sequence" else middle + output - hidden
    places = {"attention": Place(batch, hidden, hidden, middle), "ffn": Place(batch, given, given, output)}
    return places | {BLOCK: Place(batch, hidden, hidden, whole)}, whole


@dataclass
class _Work:
    """What is to be done, and with what."""

    library: Library
    staged: LayerwiseParent
    pupils: dict[int, list[Pupil]]
    recipe: LocalDistillationRecipe
    seed: int
    store: Store
    progress: Progress
    child: dict[int, list[Alternative]] | None

    def all_layers(self, calibration: torch.Tensor, training: torch.Tensor, stage: str) -> Kept:
        runtime, depth = self.library.parent.runtime, len(self.staged.layers)
        num_held_out = max(1, len(training) // (_HELD_OUT_EVERY + 1)) if len(training) > 1 else 0
        splits = {
            "least squares": calibration,
            "held out": training[:num_held_out],
            "training": training[num_held_out:],
        }
        if not num_held_out:
            splits.pop("training")
        of = {name: Rows(tokens, self.recipe.batch_tokens) for name, tokens in splits.items() if len(tokens)}
        total = depth * sum(len(rows.tokens) for rows in of.values())
        ranks.start(runtime)
        with self.progress.stage(stage, total, "rows through a layer") as advance:
            if self.child is None:
                ranks.together(lambda: self._own_layers(of, advance))
            else:  # what a layer is given, those before it must have learned to give
                ranks.on_first(lambda: self._own_layers(of, advance))
        return self.store.kept(range(depth))

    def _own_layers(self, of: dict[str, Rows], advance: Callable[[float], None]) -> None:
        """Take rows through all layers, and distil this rank's."""
        runtime = self.library.parent.runtime
        for i in range(len(self.staged.layers)):
            is_own = self.child is not None or i % runtime.world_size == runtime.rank
            if is_own and self.pupils.get(i) and not self.store.has(layer_name(i)):
                _Layer(self, i, of).distill(advance)
            else:
                for rows in of.values():
                    self.pass_on(i, rows)
                    advance(len(rows.tokens))
            if self.child and min(self.child) <= i < max(self.child):  # before its first changed one it is the parent
                layer = self._childs_layer(i, self.child)
                for rows in of.values():
                    self._pass_child_on(i, layer, rows)
            for rows in of.values():
                rows.go_on()

    @torch.no_grad()
    def pass_on(self, i: int, rows: Rows) -> None:
        """Take rows through a layer."""
        for numbers in rows.batches():
            batch, hidden = rows.start(self.staged, numbers)
            with self.staged.arithmetic.needs():
                rows.gave(numbers, self.staged.run(batch, i, hidden))

    def _childs_layer(self, i: int, changed: Mapping[int, Sequence[Alternative]]) -> nn.Module:
        """With what was learned."""
        library = self.library.with_kept(self.library.kept, self.store.kept([i]))
        return library.layer(*changed.get(i, [Alternative(i, "ffn", "parent")]))

    @torch.no_grad()
    def _pass_child_on(self, i: int, layer: nn.Module, rows: Rows) -> None:
        """Take rows through the child's layer."""
        for numbers in rows.batches():
            batch, hidden = rows.start(self.staged, numbers)
            with self.staged.arithmetic.needs():
                rows.child_gave(numbers, self.staged.run(batch, i, rows.of_child(numbers, hidden), layer))


class _Layer:
    """One layer: its alternatives refitted and trained, and rows taken through it."""

    def __init__(self, work: _Work, i: int, rows: dict[str, Rows]):
        self.work, self.i, self.rows = work, i, rows
        self.staged, self.library, self.recipe = work.staged, work.library, work.recipe
        first = next(iter(rows.values()))
        self.stages = self.staged.split(i, *first.start(self.staged, torch.arange(1)))
        self.pupils = work.pupils[i]

    def distill(self, advance: Callable[[float], None]) -> None:
        """Refit and train the layer's alternatives, and store what comes of it."""
        refitted: dict[str, Tensors] = {}
        if "least squares" in self.rows:
            refitted = self._refit(advance)
        if "training" not in self.rows:
            records = [pupil.record(refitted.get(pupil.identity, {}), {}) for pupil in self.pupils]
            self.work.store.write(layer_name(self.i), records, refitted)
            return
        held_out = self._held_out(advance)
        groups = self._groups()
        names = [layer_name(self.i, g if len(groups) > 1 else None) for g in range(len(groups))]
        for name, group in zip(names, groups, strict=True):
            if not self.work.store.has(name):
                self._teach(name, group, refitted, held_out)
        if not self.rows["training"].parent.went:
            self.work.pass_on(self.i, self.rows["training"])
        advance(len(self.rows["training"].tokens))
        if len(groups) > 1:
            self.work.store.merge(names, layer_name(self.i))

    # ------------------------------------------------------------------------------------------ least squares

    @torch.no_grad()
    def _refit(self, advance: Callable[[float], None]) -> dict[str, Tensors]:
        """Identity to the refitted projection."""
        rows = self.rows["least squares"]
        _, hidden = rows.start(self.staged, torch.arange(1))
        probe = self.staged.start(rows.tokens[:1, :_PROBE_TOKENS].to(hidden.device))
        places, _ = through(self.staged, self.i, self.stages, probe, hidden[:, :_PROBE_TOKENS])
        current = [probe]

        def run(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
            return self.staged.run(current[0], self.i, given, module)

        moments = {}
        for subblock in SUBBLOCKS:
            own = [p.alternatives[0] for p in self.pupils if p.place == subblock]
            stage, given = self._stage(subblock), places[subblock].given
            found = refits(self.library, own, stage, lambda a: self.staged.module_of(a, self.stages), run, given)
            moments[subblock] = Moments(stage, found, run, self.staged.arithmetic.add)
        for numbers in rows.batches():
            batch, hidden = rows.start(self.staged, numbers)
            current[0] = batch
            places, output = through(self.staged, self.i, self.stages, batch, hidden)
            for subblock in SUBBLOCKS:
                moments[subblock].add(places[subblock].given)
            rows.gave(numbers, output)
            advance(len(numbers))
        return {identity: own for m in moments.values() for identity, own in m.solve(self.library).items()}

    def _stage(self, subblock: str) -> nn.Module:
        whole = self.stages.layout == "whole"
        stage: nn.Module = self.staged.layers[self.i] if whole else getattr(self.stages, subblock)
        return stage

    def _module(self, pupil: Pupil) -> nn.Module:
        """What runs in the place of the parent's."""
        if pupil.place == BLOCK:
            return self.library.layer(*pupil.alternatives)
        return self.staged.module_of(pupil.alternatives[0], self.stages)

    # ------------------------------------------------------------------------------------------ training

    def _places(self, rows: Rows, numbers: torch.Tensor) -> tuple[dict[str, Place], torch.Tensor]:
        """Places on a batch of rows, and what the parent's layer gives."""
        batch, hidden = rows.start(self.staged, numbers)
        places, output = through(self.staged, self.i, self.stages, batch, hidden)
        if self.work.child is not None:
            places = {BLOCK: replace(places[BLOCK], given=rows.of_child(numbers, hidden))}
        return places, output

    @torch.no_grad()
    def _held_out(self, advance: Callable[[float], None]) -> list[dict[str, Place]]:
        rows, found = self.rows["held out"], []
        for numbers in rows.batches():
            places, output = self._places(rows, numbers)
            found.append(places)
            rows.gave(numbers, output)
            advance(len(numbers))
        return found

    def _groups(self) -> list[list[Pupil]]:
        """Pupils that are trained at once, so that they fit in the memory given."""
        budget, used = self.recipe.memory_gib * 1024**3, 0.0
        groups: list[list[Pupil]] = [[]]
        for pupil in self.pupils:
            size = _STUDENT_BYTES * sum(p.numel() for p in self._module(pupil).parameters())
            if groups[-1] and used + size > budget:
                groups.append([])
                used = 0.0
            groups[-1].append(pupil)
            used += size
        return groups

    def _student(self, pupil: Pupil, changed: Tensors) -> Student:
        module, kinds = self._module(pupil), self.recipe.kinds
        learning = [a for a in pupil.alternatives if not a.is_no_op and (kinds is None or a.kind in kinds)]
        subblocks = {a.subblock for a in learning}
        if pupil.place == BLOCK and kinds is None:  # the parent's own learns with what stands beside it
            subblocks = set(SUBBLOCKS) - {a.subblock for a in pupil.alternatives if a.is_no_op}
        names = {name for subblock in subblocks for name in self._weights_of(subblock, module)}
        return Student(pupil.identity, module, names, changed)

    def _weights_of(self, subblock: str, module: nn.Module) -> list[str]:
        """Weights of a subblock alone: what the other one uses too, e.g. a norm before both, stays as it is."""
        names = [name for name, p in module.named_parameters() if p.is_floating_point()]
        if self.stages.layout != "whole":
            other = self.stages.ffn if subblock == "attention" else self.stages.attention
            assert other is not None
            others = {name for name, _ in other.named_parameters()}
            return [name for name in names if name not in others]
        parent = self.library.parent
        prefix = parent.descriptor.layer_block_name(self.i)
        groups = weight_groups(parent.descriptor, [f"{prefix}.{name}" for name in names], len(parent.blocks))
        of_subblock = set(groups.get(f"block_{self.i}_{subblock}", ()))
        return [name for name in names if f"{prefix}.{name}" in of_subblock]

    def _loss(self, student: Student, place: Place) -> torch.Tensor:
        """E|y' - y|^2 / E|y|^2 of a batch."""
        made = self.staged.run(place.batch, self.i, place.given, student.module)
        size = place.added().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        return (made.float() - place.gives.float()).square().mean() / size

    @torch.no_grad()
    def _error(self, student: Student, held_out: Sequence[Place]) -> float:
        """The loss on all held-out rows."""
        error = size = 0.0
        for place in held_out:
            made = self.staged.run(place.batch, self.i, place.given, student.module)
            error += float((made.float() - place.gives.float()).double().square().sum())
            size += float(place.added().double().square().sum())
        return error / max(size, 1e-30)

    def _teach(
        self, name: str, group: Sequence[Pupil], refitted: dict[str, Tensors], held_out: list[dict[str, Place]]
    ) -> None:
        """Train a group of pupils, and store what comes of it."""
        store, rows = self.work.store, self.rows["training"]
        unseen = {place: [places[place] for places in held_out] for place in {p.place for p in group}}
        students = [self._student(pupil, refitted.get(pupil.identity, {})) for pupil in group]
        for pupil, student in zip(group, students, strict=True):
            pruned = before = self._error(student, unseen[pupil.place])
            if new := refitted.get(pupil.identity):
                old = student.take(new)
                before = self._error(student, unseen[pupil.place])
                if not before < pruned:
                    student.take(old)
                    before = pruned
            rate = self.recipe.learning_rate
            if pupil.place == BLOCK:  # the farther it has to go, the longer its steps
                rate = self.recipe.coupled_learning_rate * min(1.0, before**0.5)
            student.begin(rate, pruned, before)
        skip = store.restore(name, students)
        order = torch.randperm(len(rows.tokens), generator=torch.Generator().manual_seed(self.work.seed)).split(
            rows.size
        )
        looks = {len(order) * (n + 1) // _CHECKS for n in range(_CHECKS)}
        for step, numbers in enumerate(order):
            active = [(p, s) for p, s in zip(group, students, strict=True) if s.active and step >= skip]
            with self.staged.arithmetic.needs():
                with torch.no_grad():
                    places, output = self._places(rows, numbers)
                rows.gave(numbers, output)
                for pupil, student in active:
                    place = places[pupil.place]
                    with torch.enable_grad():
                        loss = self._loss(student, place)
                    student.learn(loss, len(numbers) * rows.tokens.shape[1], step / len(order))
                    self.staged.arithmetic.count_training(key_of(student.module, place.given))
            if active and step + 1 in looks:
                for pupil, student in active:
                    student.look(
                        self._error(student, unseen[pupil.place]), self.recipe.stop_below, (step + 1) / len(order)
                    )
            if active:
                store.save(name, students, step + 1)
        records, weights = [], {}
        for pupil, student in zip(group, students, strict=True):
            own = student.weights(self.library.parent.dtype)
            if not own and student.before < student.pruned:
                own = refitted[pupil.identity]
            records.append(pupil.record(own, student.record()))
            if own:
                weights[pupil.identity] = own
        store.write(name, records, weights)
