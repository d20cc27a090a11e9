"""GISP: global iterative structured pruning by first-order importance.

Source: Wang et al., "From Local to Global: Revisiting Structured Pruning Paradigms for Large Language Models" (arXiv
2510.18030). The importance of a weight is abs(g * w), g being the gradient of the language-model loss over calibration
rows. It is summed over the weights of a head or channel, normalized within each block, and units are ranked over the
whole model. A small share is removed in each of many steps, between which importance is computed anew; the children of
one trajectory are nested. What normalizes a block is taken by the KL of the first children: nothing, the block's mean,
or its L2 norm; each with and without dividing a unit's importance by its number of parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.rivals.problem import Choice, Problem, Shape, batches, head_slices, orders_of, remove_lowest
from layersmith.execution.exchange import exchanged

NORMALIZATIONS = ("none", "mean", "l2")
Scores = tuple[torch.Tensor, torch.Tensor]  # of the heads and channels of a layer


def importance(problem: Problem, layers: Sequence[torch.nn.Module], rows: torch.Tensor) -> list[Scores]:
    """The sum of abs(g * w) over the weights of every head and channel; ``layers`` take the places of the parent's."""
    for layer in layers:
        layer.requires_grad_(True)
        layer.zero_grad()
    with torch.enable_grad(), exchanged(problem.library.parent, dict(enumerate(layers))):
        for batch in batches(rows, 2048):
            loss = problem.model(input_ids=batch, labels=batch, use_cache=False).loss
            (loss * len(batch) / len(rows)).backward()
    problem.work.tokens += 3 * rows.numel()
    scores = []
    for i, layer in enumerate(layers):
        heads, bundle = problem.heads(i), problem.width(i).bundles[0]
        of_heads, of_channels = torch.zeros(heads.num_heads), torch.zeros(bundle.size)
        for part, axes, total, sizes in (
            ("queries", heads.weights, of_heads, heads.sizes),
            ("channels", bundle.weights, of_channels, {"channels": bundle.size}),
        ):
            for axis in axes:
                if any(segment.part == part for segment in axis.segments):
                    weight = layer.get_parameter(axis.name)
                    assert weight.grad is not None
                    product = (weight.grad * weight.detach()).abs().movedim(axis.dim, 0).flatten(1).sum(1)
                    total += product[axis.positions(part, sizes)].sum(1)
        scores.append((of_heads, of_channels))
        layer.requires_grad_(False)
    return scores


def normalized(scores: torch.Tensor, how: str) -> torch.Tensor:
    divisor = {"none": scores.new_ones(()), "mean": scores.mean(), "l2": scores.norm()}[how]
    return scores / divisor.clamp_min(1e-20)


class Trajectory:
    """The units that are still there, and the order in which the others went."""

    def __init__(self, problem: Problem, normalization: str, per_parameter: bool = False):
        self.problem, self.normalization, self.per_parameter = problem, normalization, per_parameter
        self.layers = [copy.deepcopy(layer) for layer in problem.layers]
        # Steps after which a unit went; infinity while it is there. They are the scores of the final orders.
        self.gone = [
            (torch.full((heads,), torch.inf), torch.full((width,), torch.inf)) for heads, width in problem.whole
        ]
        self.removals = 0

    @property
    def shapes(self) -> list[Shape]:
        return [(int(heads.isinf().sum()), int(channels.isinf().sum())) for heads, channels in self.gone]

    def step(self, parameters: float, scores: list[Scores]) -> None:
        """Remove the units of lowest importance until at most these parameters are left."""
        slices, channels, members = [], [], []
        for i, ((heads, width), (gone_heads, gone_channels)) in enumerate(zip(scores, self.gone, strict=True)):
            order, _ = head_slices(self.problem, i, heads.masked_fill(gone_heads.isfinite(), -1))
            left = int(gone_heads.isinf().sum()) // len(order)
            members.append(order[:, :left])
            of_slices = normalized(heads, self.normalization)[order[:, :left]].sum(0)
            of_channels = normalized(width, self.normalization)[gone_channels.isinf()]
            if self.per_parameter:
                of_slices = of_slices / self.problem.sizes.slice[i]
                of_channels = of_channels / self.problem.sizes.channel[i]
            slices.append(of_slices)
            channels.append(of_channels)
        shapes = remove_lowest(self.problem, slices, channels, parameters)
        self.removals += 1
        for i, (heads, width) in enumerate(shapes):
            left = heads // members[i].shape[0]
            self._remove(i, members[i][:, left:].flatten(), self._lowest_channels(i, scores[i][1], width))

    def _lowest_channels(self, i: int, scores: torch.Tensor, left: int) -> torch.Tensor:
        there = self.gone[i][1].isinf()
        order = scores.masked_fill(~there, torch.inf).argsort(stable=True)
        return order[: int(there.sum()) - left]

    @torch.no_grad()
    def _remove(self, i: int, heads: torch.Tensor, channels: torch.Tensor) -> None:
        """Note the step, and set the weights that read the units to zero."""
        self.gone[i][0][heads] = self.removals
        self.gone[i][1][channels] = self.removals
        axis, bundle, layer = self.problem.heads(i), self.problem.width(i).bundles[0], self.layers[i]
        for part, axes, units, sizes in (
            ("queries", axis.weights, heads, axis.sizes),
            ("channels", bundle.weights, channels, {"channels": bundle.size}),
        ):
            for weight in axes:
                if any(segment.part == part for segment in weight.segments):
                    places = weight.positions(part, sizes)[units].flatten()
                    layer.get_parameter(weight.name).index_fill_(weight.dim, places, 0)

    def save(self, file: Path, steps: int) -> None:
        work = self.problem.work
        how = (self.normalization, self.per_parameter)
        torch.save((how, self.gone, self.removals, steps, work.tokens, work.seconds), file)

    @staticmethod
    def load(problem: Problem, file: Path) -> tuple[Trajectory, int]:
        """A trajectory that was saved, and the number of steps that it has made."""
        how, gone, removals, steps, tokens, seconds = torch.load(file)
        trajectory = Trajectory(problem, *how)
        problem.work.tokens += tokens
        problem.work.started -= seconds
        for i, (heads, channels) in enumerate(gone):
            trajectory._remove(i, heads.isfinite().nonzero()[:, 0], channels.isfinite().nonzero()[:, 0])
        trajectory.gone, trajectory.removals = gone, removals
        return trajectory, steps

    def choice(self) -> Choice:
        orders = orders_of(self.problem, *zip(*self.gone, strict=True))
        return Choice.of(self.problem, orders, self.shapes)


def gisp(
    problem: Problem, sizes: Sequence[float], step: float = 1 / 32, rows_a_step: int = 12, file: Path | None = None
) -> Iterator[tuple[float, Choice]]:
    """The children of one trajectory, for sizes in descending order.

    Args:
        problem: The problem.
        sizes: Parameters in the layers.
        step: Share of the layers' parameters that a step removes.
        rows_a_step: Calibration rows of each step; all are used in turn.
        file: Keeps the trajectory after each step, so that an interrupted call goes on.
    """
    rows = problem.all_rows
    left, done, made = float(problem.sizes.total), 0, 0
    trajectory: Trajectory | None = None
    if file is not None and file.is_file():
        trajectory, made = Trajectory.load(problem, file)
    for size in sizes:
        steps = max(1, round((left - size) / (step * problem.sizes.total)))
        for target in torch.linspace(left, size, steps + 1)[1:].tolist():
            numbers = (torch.arange(rows_a_step) + done * rows_a_step) % len(rows)
            done += 1
            if done <= made:
                continue
            layers = trajectory.layers if trajectory is not None else [copy.deepcopy(x) for x in problem.layers]
            scores = importance(problem, layers, rows[numbers])
            if trajectory is None:
                trajectory = _best_start(problem, target, scores)
            else:
                trajectory.step(target, scores)
            if file is not None:
                trajectory.save(file, done)
        left = size
        assert trajectory is not None
        if done >= made:  # an earlier call has yielded it otherwise
            yield size, trajectory.choice()


def _best_start(problem: Problem, target: float, scores: list[Scores], rows: int = 4) -> Trajectory:
    """The first step with each normalization; the one with the lowest KL on a few scoring rows."""
    found = []
    for how in NORMALIZATIONS:
        for per_parameter in (False, True):
            trajectory = Trajectory(problem, how, per_parameter)
            trajectory.step(target, scores)
            choice = trajectory.choice()
            (divergence,) = problem.divergences(choice.library, [choice.chosen], range(min(rows, len(problem.scoring))))
            found.append((divergence, trajectory))
    return min(found, key=lambda pair: pair[0])[1]
