"""The stages of a run: one module makes one or a few of them. :mod:`layersmith.pipeline` runs them in this order.

A stage has one name: of its folder in the run, for ``--until``, on the progress bar, in the log and in the report.
Modules: ``job`` is what all stages are given; ``reopen``, ``inspect``, ``verify`` and ``dry_run`` are commands.
"""

# Name of a stage => what its folder holds.
HOLDS = {
    "narrowed": "parents with a smaller hidden size, and their losses",
    "hidden_size": "what every hidden size would cost, if the recipe names any, and which was taken",
    "describe": "what can be changed in each layer, and all alternatives",
    "data": "token rows of each split, and what they were made from",
    "costs": "counted costs of all alternatives, and their times if the budget limits any",
    "statistics": "the order of importance of all channels, heads and experts, and least-squares linear maps",
    "library": "all alternatives, and the weights of those that were refitted or trained",
    "scores": "metrics of every alternative on every scoring row",
    "formats": "scores of every subblock of the parent in every number format, if the recipe names any",
    "search": "the best solution by scores, and times as corrected by timing whole children",
    "frontier": "the best solution for every budget, and those of simpler methods",
    "refine": "losses of the whole children that were evaluated, and the refined solution",
    "solution": "the solution that is realized, and its costs",
    "pairs": "weights of the solution's alternatives after joint distillation",
    "child": "the child, a Hugging Face folder with a model card",
    "evaluation": "quality of the child compared with the parent, and sample texts",
    "clock": "times of parent and child on this machine, or as AIConfigurator predicts them for whole models",
    "distillation/data": "rows for global distillation",
    "distillation/long_data": "longer rows for the second part of global distillation",
    "distillation/finalists": "solutions that were distilled for a short while, and the winner",
    "distilled": "the child after global distillation",
    "distillation/evaluation": "quality of the child before and after global distillation",
}
NAMES = tuple(HOLDS)
