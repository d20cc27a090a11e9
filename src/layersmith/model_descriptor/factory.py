"""Which descriptor describes which model family: one literal table, and what users add to it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from layersmith.errors import UnsupportedModel, UsageError, did_you_mean
from layersmith.model_descriptor.base import ModelDescriptor

D = TypeVar("D", bound=type[ModelDescriptor])

# model_type of the config -> where its descriptor is; imported on first use.
_BUILT_IN = {
    "llama": "layersmith.model_descriptor.families.llama_like:LlamaModelDescriptor",
    "mistral": "layersmith.model_descriptor.families.llama_like:MistralModelDescriptor",
    "qwen2": "layersmith.model_descriptor.families.llama_like:Qwen2ModelDescriptor",
    "qwen3": "layersmith.model_descriptor.families.llama_like:Qwen3ModelDescriptor",
}


class ModelDescriptorFactory:
    """Registers descriptors by name (a config's ``model_type``) and finds them again."""

    _registered: dict[str, type[ModelDescriptor]] = {}  # noqa: RUF012 - the registry is the class's purpose

    @classmethod
    def register(cls, **descriptors: type[ModelDescriptor]) -> None:
        """Register descriptors by name; a registered one goes before a built-in one."""
        for name, descriptor in descriptors.items():
            cls.register_decorator(name)(descriptor)

    @classmethod
    def register_decorator(cls, name: str) -> Callable[[D], D]:
        """Register the decorated descriptor under ``name``.

        >>> @ModelDescriptorFactory.register_decorator("my_model")  # doctest: +SKIP
        ... class MyModelDescriptor(ModelDescriptor): ...
        """

        def register(descriptor: D) -> D:
            cls._registered[name] = descriptor
            return descriptor

        return register

    @classmethod
    def names(cls) -> list[str]:
        """Every name that :meth:`get` knows."""
        return sorted({*_BUILT_IN, *cls._registered})

    @classmethod
    def get(cls, name: str | type[ModelDescriptor]) -> type[ModelDescriptor]:
        """The descriptor registered under ``name``; a descriptor class is returned as it is.

        Raises:
            UnsupportedModel: nothing is registered under ``name``.
        """
        if not isinstance(name, str):
            return name
        if name in cls._registered:
            return cls._registered[name]
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            return getattr(import_module(module), attribute)
        raise UnsupportedModel(
            f"No descriptor for model type {name!r}. {did_you_mean(name, cls.names())} "
            "Write one against layersmith.ModelDescriptor and register it with ModelDescriptorFactory."
        )


def import_descriptor(path: str) -> type[ModelDescriptor]:
    """The descriptor class at ``"package.module:ClassName"``, or the one registered under that name.

    Raises:
        UsageError: no such module or class, or not a ``ModelDescriptor``.
    """
    if ":" not in path:
        return ModelDescriptorFactory.get(path)
    module, _, attribute = path.partition(":")
    try:
        descriptor = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--descriptor {path}: {error}. Give it as package.module:ClassName.") from error
    if not (isinstance(descriptor, type) and issubclass(descriptor, ModelDescriptor)):
        raise UsageError(f"--descriptor {path}: {attribute} is not a subclass of layersmith.ModelDescriptor.")
    return descriptor
