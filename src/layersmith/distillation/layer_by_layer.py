"""Local distillation of many layers: rows pass through the parent once, a layer at a time.

No gradient leaves a subblock, so layers are trained one after another. Several processes have some of the layers each,
and pass the rows on to each other as these leave a layer, so the alternatives are the same for any number of processes.
If layers are trained on the child's hidden states, those depend on the layers before them. Then the first process
trains them all, or all processes train every layer together, each on its own rows.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layersmith.distillation.activations import BLOCK, PassedStates, Rows
from layersmith.distillation.one_layer import LayerDistillation
from layersmith.distillation.replacement import Replacement
from layersmith.distillation.store import Store, layer_name
from layersmith.distillation.team import ALONE, Team, team_of
from layersmith.errors import UsageError
from layersmith.execution.hidden_states import States
from layersmith.execution.layerwise import LayerwiseParent, NotLayerwise, split_layers
from layersmith.library.alternative import Alternative
from layersmith.library.library import Library
from layersmith.library.stored_weights import Kept
from layersmith.recipe import LocalDistillationRecipe
from layersmith.run import ranks
from layersmith.run.progress import SILENT, Progress

# One training row in this many is held out: more make the errors more certain, fewer leave more to train on.
_HELD_OUT_EVERY = 24


@dataclass(frozen=True)
class TrainingSetup:
    """How alternatives are trained.

    Attributes:
        recipe: The recipe's section ``local_distillation``.
        seed: Seed of the order of rows.
        folder: Folder for finished layers and the state of the current one. An interrupted call resumes from it, to
            the same weights. Several processes need a folder that they share.
        inputs: Digest of everything that the weights depend on. Files made from other inputs are not used.
        progress: Receives the rows done, and notes.
    """

    recipe: LocalDistillationRecipe = field(default_factory=LocalDistillationRecipe)
    seed: int = 0
    folder: Path | None = None
    inputs: str = ""
    progress: Progress = SILENT


def rows_for(training: torch.Tensor, tokens: int) -> torch.Tensor:
    """As many rows as hold ``tokens`` tokens, and the rows to hold out."""
    rows = -(-tokens // training.shape[1])
    return training[: rows + -(-rows // _HELD_OUT_EVERY)]


@dataclass(frozen=True)
class LayerByLayer:
    """Refits and trains replacements, layer by layer.

    Attributes:
        library: Library of the alternatives.
        setup: How to train.
        replacements: By layer, what is trained.
        stage: Name of the progress stage.
        child: The child's changed layers, if replacements are trained on the child's hidden states instead of the
            parent's.
    """

    library: Library
    setup: TrainingSetup
    replacements: dict[int, list[Replacement]]
    stage: str
    child: dict[int, list[Alternative]] | None = None

    def run(self, calibration: torch.Tensor, training: torch.Tensor) -> Kept | None:
        """The trained weights; None, perhaps with a note, if nothing can be trained.

        Args:
            calibration: ``[N, T]`` rows for the closed-form refit, perhaps none.
            training: ``[N, T]`` rows to train on and to hold out; fewer than two train nothing.

        Raises:
            UsageError: There are several processes and no folder.
        """
        rows = training if len(training) > 1 else calibration
        if not len(rows):
            return None
        runtime = self.library.parent.runtime
        if runtime.world_size > 1 and self.setup.folder is None:
            raise UsageError("several processes distill into one folder: give them one with TrainingSetup(folder=...).")
        try:
            layerwise = split_layers(self.library.parent, self.library)
        except NotLayerwise as reason:
            self.setup.progress.note(
                f"alternatives are not distilled: the parent cannot run layer by layer, because {reason}."
            )
            return None
        ranks.start(runtime)
        with self._team(calibration, training) as team:
            store = Store(self.setup.folder, self.setup.inputs, team or ALONE)
            splits = self._splits(calibration, training, team or ALONE)
            self._all_layers(layerwise, store, splits, is_idle=team is None)
        kept = store.kept(range(len(layerwise.layers)))
        if layerwise.arithmetic.done:
            summary = f"{self.stage}: {_summary(kept.records)}"
            self.setup.progress.note(f"{summary}; {layerwise.arithmetic}" if len(training) > 1 else summary)
        return kept

    def _team(self, calibration: torch.Tensor, training: torch.Tensor) -> AbstractContextManager[Team | None]:
        """The processes that train each layer together; none for those that wait."""
        if self.child is None:
            return nullcontext(ALONE)  # each has layers of its own
        if self.setup.recipe.coupled_in == "first":
            return team_of(1)
        rows = [len(calibration)] if len(calibration) else []
        if len(training) > 1:
            rows.append(min(len(training) - 1, max(1, self.setup.recipe.batch_tokens // training.shape[1])))
        return team_of(min(ranks.count(), *rows))

    def _splits(self, calibration: torch.Tensor, training: torch.Tensor, team: Team) -> dict[str, Rows]:
        """The rows of this process."""
        batch_tokens, splits = self.setup.recipe.batch_tokens, {}
        if len(calibration):
            splits["calibration"] = Rows(team.mine(calibration), batch_tokens)
        if len(training) > 1:
            num_held_out = max(1, len(training) // (_HELD_OUT_EVERY + 1))
            splits["held out"] = Rows(team.mine(training[:num_held_out]), batch_tokens)
            splits["training"] = Rows.to_train(training[num_held_out:], batch_tokens, self.setup.seed, team)
        return splits

    def _all_layers(
        self, layerwise: LayerwiseParent[Any], store: Store, splits: dict[str, Rows], is_idle: bool
    ) -> None:
        layers = range(len(layerwise.layers)) if self.child is not None else layerwise.division.mine
        total = len(layers) * sum(len(rows.tokens) for rows in splits.values())
        with self.setup.progress.stage(self.stage, total, "rows through a layer") as advance:

            def work() -> None:
                with store.team.failing_together(), self._passed_on(layerwise, splits):
                    self._layers(layerwise, store, splits, advance, layers)

            ranks.together((lambda: None) if is_idle else work)

    @contextmanager
    def _passed_on(self, layerwise: LayerwiseParent[Any], splits: dict[str, Rows]) -> Iterator[None]:
        """While open, rows come from the layers of other processes and go on to them, where layers are dealt."""
        if self.child is not None or not ranks.are_several():
            yield
            return
        with layerwise.division.shared(States()) as states:
            for name, rows in splits.items():
                rows.parent = PassedStates(name, states)
            yield

    def _layers(
        self,
        layerwise: LayerwiseParent[Any],
        store: Store,
        splits: dict[str, Rows],
        advance: Callable[[float], None],
        mine: Sequence[int],
    ) -> None:
        """Take rows through some layers, and distil these."""
        for i in range(len(layerwise.layers)):
            replacements = self.replacements.get(i, [])
            if i not in mine:
                pass  # rows arrive at the next one
            elif replacements and not store.has(layer_name(i)):
                layer = LayerDistillation(
                    library=self.library,
                    layerwise=layerwise,
                    index=i,
                    replacements=replacements,
                    splits=splits,
                    store=store,
                    recipe=self.setup.recipe,
                    on_child=self.child is not None,
                    team=store.team,
                )
                layer.distill(advance)
            else:
                for rows in splits.values():
                    rows.pass_through_parent(layerwise, i)
                    advance(len(rows.tokens))
            # Up to its first changed layer the child is the parent; after the last one nothing is trained.
            if self.child and min(self.child) <= i < max(self.child):
                module = self._child_layer(i, self.child, store)
                for rows in splits.values():
                    rows.pass_through_child(layerwise, i, module)
            for rows in splits.values():
                rows.advance()

    def _child_layer(self, i: int, changed: Mapping[int, Sequence[Alternative]], store: Store) -> nn.Module:
        """A layer of the child, with its trained weights."""
        library = self.library.with_kept(self.library.kept, store.kept([i]))
        return library.layer(*changed.get(i, [Alternative(i, "ffn", "parent")]))


def _summary(records: Sequence[Mapping[str, Any]]) -> str:
    trained = [r for r in records if r["tokens"]]
    if not trained:
        what = (
            "layers refitted on the child's inputs"
            if any(r["subblock"] == BLOCK for r in records)
            else ("alternatives refitted")
        )
        return f"{sum(r['weights'] is not None for r in records)} {what}"
    tokens = sum(r["tokens"] for r in trained)
    text = f"{len(trained)} alternatives trained on {tokens:,} tokens in all"
    ratios = sorted(r["after"] / r["pruned"] for r in trained if r["pruned"])
    if not ratios:  # they replace what adds nothing
        return f"{text}; all pruned alternatives were exact"
    return (
        f"{text}; the median error on held-out rows is {ratios[len(ratios) // 2]:.2f} times that of the pruned "
        "alternative"
    )
