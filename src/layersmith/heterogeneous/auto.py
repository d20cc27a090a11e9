"""``AutoModelForCausalLM.from_pretrained`` loads children once layersmith is imported, without remote code.

Transformers picks a model class by the type of the config alone, and a child keeps its parent's. So the function that
picks is wrapped: for a config that carries block configs it gives the stock class, made heterogeneous. Importing
layersmith must not import Transformers, so the wrapping waits until Transformers imports the module itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.auto_factory"


def install() -> None:
    """Wrap now if Transformers' auto classes are loaded, else when they are."""
    if _MODULE in sys.modules:
        _wrap(sys.modules[_MODULE])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _wrap(module: Any) -> None:
    stock = module._get_model_class
    if getattr(stock, "knows_children", False):
        return

    def get_model_class(config: Any, model_mapping: Any) -> Any:
        chosen = stock(config, model_mapping)
        is_child = getattr(config, "layersmith", None) is not None or getattr(config, "block_configs", None)
        # A checkpoint that was loaded as remote code may have left its factory in the mapping; it knows children.
        if not is_child or not hasattr(chosen, "config_class"):
            return chosen
        from layersmith.heterogeneous.build import class_for

        return class_for(chosen, config)

    get_model_class.knows_children = True  # type: ignore[attr-defined]
    get_model_class.__wrapped__ = stock  # type: ignore[attr-defined]
    module._get_model_class = get_model_class


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find the module, and wraps it after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
