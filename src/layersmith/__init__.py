"""layersmith compresses a Hugging Face decoder model to a budget by choosing another architecture for every layer.

Importing this module is cheap: PyTorch and Transformers are imported by the first name that needs them. The import has
one side effect: from then on ``AutoModelForCausalLM.from_pretrained`` loads children without remote code
(:mod:`layersmith.heterogeneous.auto`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from layersmith.heterogeneous import auto as _auto

if TYPE_CHECKING:
    from layersmith.block_config import AttentionConfig, BlockConfig, FFNConfig, MambaConfig, MoEConfig
    from layersmith.costs.budget import Budget
    from layersmith.export.run import export
    from layersmith.heterogeneous.build import block_configs_of as block_configs
    from layersmith.heterogeneous.build import build
    from layersmith.heterogeneous.checkpoint import load, save
    from layersmith.hub import push
    from layersmith.model_descriptor.base import ModelDescriptor
    from layersmith.model_descriptor.describe import describe
    from layersmith.pipeline import Result, compress
    from layersmith.recipe import Recipe
    from layersmith.report.data import Evaluation
    from layersmith.run.progress import Event, Progress
    from layersmith.search.solution import Solution
    from layersmith.stages.distill_finished import Distilled, distill
    from layersmith.stages.evaluate_model import evaluate
    from layersmith.stages.inspect import Inspection, inspect
    from layersmith.stages.nested import NestedChildren, search_nested
    from layersmith.stages.reopen import Searched, report, search
    from layersmith.stages.verify import Verification, verify
    from layersmith.stages.vocabulary import Trimmed, trim_vocabulary

__version__ = version("layersmith")

# Public name -> where it lives.
_PUBLIC = {
    "ModelDescriptor": "layersmith.model_descriptor.base:ModelDescriptor",
    "BlockConfig": "layersmith.block_config:BlockConfig",
    "AttentionConfig": "layersmith.block_config:AttentionConfig",
    "FFNConfig": "layersmith.block_config:FFNConfig",
    "MoEConfig": "layersmith.block_config:MoEConfig",
    "MambaConfig": "layersmith.block_config:MambaConfig",
    "describe": "layersmith.model_descriptor.describe:describe",
    "block_configs": "layersmith.heterogeneous.build:block_configs_of",
    "build": "layersmith.heterogeneous.build:build",
    "load": "layersmith.heterogeneous.checkpoint:load",
    "save": "layersmith.heterogeneous.checkpoint:save",
    "compress": "layersmith.pipeline:compress",
    "export": "layersmith.export.run:export",
    "Result": "layersmith.pipeline:Result",
    "inspect": "layersmith.stages.inspect:inspect",
    "Inspection": "layersmith.stages.inspect:Inspection",
    "verify": "layersmith.stages.verify:verify",
    "Verification": "layersmith.stages.verify:Verification",
    "search": "layersmith.stages.reopen:search",
    "search_nested": "layersmith.stages.nested:search_nested",
    "NestedChildren": "layersmith.stages.nested:NestedChildren",
    "Searched": "layersmith.stages.reopen:Searched",
    "Solution": "layersmith.search.solution:Solution",
    "distill": "layersmith.stages.distill_finished:distill",
    "Distilled": "layersmith.stages.distill_finished:Distilled",
    "evaluate": "layersmith.stages.evaluate_model:evaluate",
    "Evaluation": "layersmith.report.data:Evaluation",
    "trim_vocabulary": "layersmith.stages.vocabulary:trim_vocabulary",
    "Trimmed": "layersmith.stages.vocabulary:Trimmed",
    "report": "layersmith.stages.reopen:report",
    "push": "layersmith.hub:push",
    "Budget": "layersmith.costs.budget:Budget",
    "Recipe": "layersmith.recipe:Recipe",
    "Progress": "layersmith.run.progress:Progress",
    "Event": "layersmith.run.progress:Event",
}

__all__ = [
    "AttentionConfig",
    "BlockConfig",
    "Budget",
    "Distilled",
    "Evaluation",
    "Event",
    "FFNConfig",
    "Inspection",
    "MambaConfig",
    "MoEConfig",
    "ModelDescriptor",
    "NestedChildren",
    "Progress",
    "Recipe",
    "Result",
    "Searched",
    "Solution",
    "Trimmed",
    "Verification",
    "block_configs",
    "build",
    "compress",
    "describe",
    "distill",
    "evaluate",
    "export",
    "inspect",
    "load",
    "push",
    "report",
    "save",
    "search",
    "search_nested",
    "trim_vocabulary",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(module), attribute)
    if name in ("heterogeneous", "model_descriptor"):
        return import_module(f"layersmith.{name}")
    raise AttributeError(f"module 'layersmith' has no attribute {name!r}")


class _Package(ModuleType):
    """This package: importing a subpackage does not hide the public function of the same name, such as ``search``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _class_for(stock: Any, config: Any) -> Any:
    from layersmith.heterogeneous.build import class_for  # here, since importing it imports PyTorch

    return class_for(stock, config)


_auto.install(_class_for)
