"""Lets ``from_pretrained`` of Transformers' classes load children once layersmith is imported, without remote code.

Transformers picks a model class by the type of the config alone, and a child has its parent's. So two functions of
Transformers are wrapped: the one by which its auto classes pick a model class, and ``PreTrainedModel.from_pretrained``,
for children that are loaded by a concrete class. For a child both use the stock class made heterogeneous.

This is the one patch of another project that stays for the life of the process. Importing layersmith must not import
Transformers, so each function is wrapped when Transformers imports its module. Nothing of layersmith that needs
Transformers can be imported then, so the private name is used here and not in ``upstream.py``, and what makes a class
heterogeneous is given to :func:`install`.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# ``(stock model class, config of a child) -> the class that builds the child``.
ClassFor = Callable[[Any, Any], Any]


def install(class_for: ClassFor) -> None:
    """Wrap the functions now if Transformers has imported them, else when it does."""
    wrappers = {
        "transformers.models.auto.auto_factory": _wrap_get_model_class,
        "transformers.modeling_utils": _wrap_from_pretrained,
    }
    for name, wrap in wrappers.items():
        if name in sys.modules:
            wrap(sys.modules[name], class_for)
        elif not any(isinstance(finder, _AfterImport) and finder.module == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, partial(wrap, class_for=class_for)))


def _is_child(config: Any) -> bool:
    return getattr(config, "layersmith", None) is not None or bool(getattr(config, "block_configs", None))


def _wrap_get_model_class(module: Any, class_for: ClassFor) -> None:
    stock = module._get_model_class
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def get_model_class(config: Any, model_mapping: Any) -> Any:
        chosen = stock(config, model_mapping)
        # A checkpoint loaded as remote code may have registered its factory in the mapping, which loads children too.
        return class_for(chosen, config) if _is_child(config) and hasattr(chosen, "config_class") else chosen

    module._get_model_class = get_model_class


def _wrap_from_pretrained(module: Any, class_for: ClassFor) -> None:
    stock = vars(module.PreTrainedModel)["from_pretrained"].__func__
    if getattr(stock, "loads_children", False):
        return

    @wraps(stock)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(cls, "layers_of"):  # the class is not heterogeneous yet
            if kwargs.get("config") is None:
                kwargs = _with_config_of_child(cls, pretrained_model_name_or_path, kwargs)
            if _is_child(kwargs.get("config")):
                made = class_for(cls, kwargs["config"])
                return made.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return stock(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.loads_children = True  # type: ignore[attr-defined]
    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


_OF_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _with_config_of_child(cls: Any, path: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``from_pretrained``, with the config if the checkpoint is a child of this class.

    Arguments that set attributes of the config are applied to it and removed. For any other checkpoint nothing
    changes, and the stock method reads the config.
    """
    config_class = getattr(cls, "config_class", None)
    if config_class is None or path is None:
        return kwargs
    of_hub = {name: kwargs[name] for name in _OF_HUB if name in kwargs}
    try:
        data, _ = config_class.get_config_dict(path, **of_hub)
    except (OSError, ValueError):
        return kwargs
    if "layersmith" not in data or data.get("model_type") != config_class.model_type:
        return kwargs
    others = {name: value for name, value in kwargs.items() if name not in (*of_hub, "config")}
    config, others = config_class.from_dict(data, return_unused_kwargs=True, **others)
    return of_hub | others | {"config": config}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module after the ordinary finders have imported it."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]):
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
