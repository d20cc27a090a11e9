"""The number formats of a run whose recipe leaves them open, which is the default.

Rounding weights to 8 or 4 bits loses far less than removing as many bytes. So a limit on bytes that the parent exceeds
is met with formats too: those of compressed-tensors that stock Transformers and vLLM load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

from layersmith.costs.budget import Limits, Workload
from layersmith.costs.counted import ModelShape, subblock_costs
from layersmith.distillation.quantize import layerwise_of
from layersmith.errors import UnsupportedModel
from layersmith.execution.layerwise import NoAlternatives
from layersmith.recipe import AUTOMATIC, Recipe
from layersmith.run.header import HEADER
from layersmith.stages.costs import COSTS, wants_times
from layersmith.stages.inspect import Outline, outline
from layersmith.stages.job import Job

_BYTES = ("memory_bytes", "weight_bytes")
_EIGHT_BITS = "int8"
# Of these the one that makes the parent smallest is offered: larger groups have fewer scales, but divide fewer widths.
_FOUR_BITS = ("int4-g128", "int4-g64", "int4-g32")


def with_formats(job: Job) -> Recipe:
    """The recipe of a job with the formats that it offers, if its recipe leaves them open.

    A run that is resumed keeps its formats.
    """
    recipe = job.recipe
    if AUTOMATIC not in recipe.formats or not any(limit.cost in _BYTES for limit in job.limits):
        return recipe
    space = outline(job.path, recipe.library, job.workload, job.family, job.trust_remote_code, recipe.checkpoint_dtype)
    chosen = automatic_formats(recipe, job.limits, space, job.progress.note)
    if (job.run.folder / HEADER).is_file():
        known = Recipe.from_dict(job.run.header()["recipe"]).formats
        return replace(chosen, formats=known) if known in ((AUTOMATIC,), chosen.formats) else chosen
    return chosen


def automatic_formats(recipe: Recipe, limits: Limits, space: Outline, note: Callable[[str], None]) -> Recipe:
    """The recipe with formats, if it leaves them open and a limit asks for fewer bytes than the parent has.

    Args:
        recipe: All settings.
        limits: The budget.
        space: The search space of the parent.
        note: Called with a sentence that says which formats are offered, or why none are.
    """
    parent = space.costs.parent
    asks = any(limit.cost in _BYTES and limit.resolve(parent[limit.base]) < parent[limit.cost] for limit in limits)
    if AUTOMATIC not in recipe.formats or not asks:
        return recipe
    reason = reason_against(recipe, limits)
    if reason is None and any(block.ffn.moe is not None for block in space.blocks):
        reason = "Transformers does not load every mixture of 8 or 4 bits; --formats int8,int4-g128 offers them"
    names = [] if reason else _useful(space)
    if names:
        note(f"weights may be stored in {' and '.join(names)} too, as memory is limited; --formats bf16 forbids it.")
    elif reason:
        note(f"weights keep the parent's data type, although memory is limited: {reason}.")
    return replace(recipe, formats=(AUTOMATIC, *names))


def without_impossible(job: Job) -> Recipe:
    """The recipe of a job without its automatic formats, if the parent's weights cannot be quantized.

    Raises:
        UnsupportedModel: They cannot, and the formats were asked for.
    """
    recipe = job.recipe
    if not job.formats or job.made_from(COSTS) is not None:
        return recipe
    try:
        layerwise_of(job.parent, NoAlternatives())
    except UnsupportedModel as reason:
        if AUTOMATIC not in recipe.formats:
            raise
        job.progress.note(str(reason))
        recipe = replace(recipe, formats=(AUTOMATIC,))
        job.run.change_recipe(recipe)
    return recipe


def reason_against(recipe: Recipe, limits: Limits) -> str | None:
    """Why a run offers no formats by itself."""
    if wants_times(limits, recipe.search):
        return "times of number formats are not measured"
    if recipe.rounds.count > 1:
        return "rounds remove parameters"
    if recipe.scoring.objective != "kl_divergence":
        return f"number formats are not scored by {recipe.scoring.objective}"
    if recipe.distillation.tokens and recipe.distillation.finalists > 1:
        return "finalists are trained without number formats"
    if find_spec("compressed_tensors") is None:
        return "number formats need the package compressed-tensors: pip install 'layersmith[quantized]'"
    return None


def _useful(space: Outline) -> list[str]:
    """Formats that make the parent smaller: one of 8 bits and one of 4."""
    shape = ModelShape(space.descriptor, space.config, space.blocks, space.axes, space.dtype)
    layers, _ = subblock_costs(shape, Workload(), (_EIGHT_BITS, *_FOUR_BITS))
    size: Counter[str] = Counter()
    for layer in layers:
        for place, costs in layer.items():
            size[place.partition(" ")[2]] += costs["weight_bytes"]
    smallest = min(_FOUR_BITS, key=size.__getitem__)
    return [name for name in (_EIGHT_BITS, smallest) if size[name] < size[""]]
