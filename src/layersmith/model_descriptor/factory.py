"""Descriptors by name: those that users register; every other name that Transformers knows is described on demand."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from layersmith.errors import UnsupportedModel, UsageError, did_you_mean
from layersmith.model_descriptor.base import ModelDescriptor

D = TypeVar("D", bound=type[ModelDescriptor])


class ModelDescriptorFactory:
    """Registers descriptors by name (a config's ``model_type``) and finds them again."""

    _registered: dict[str, type[ModelDescriptor]] = {}  # noqa: RUF012 - the registry is the class's purpose

    @classmethod
    def register(cls, **descriptors: type[ModelDescriptor]) -> None:
        """Register descriptors by name; a registered one goes before an inferred one."""
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
        """Every name that was registered."""
        return sorted(cls._registered)

    @classmethod
    def registered(cls, name: str) -> type[ModelDescriptor] | None:
        """The descriptor that was registered under ``name``, if any."""
        return cls._registered.get(name)

    @classmethod
    def get(cls, name: str | type[ModelDescriptor]) -> type[ModelDescriptor]:
        """The descriptor under ``name``; a descriptor class is returned as it is.

        What is not registered is inferred from the default config of the model type.

        Raises:
            UnsupportedModel: Transformers has no model type ``name``, or it cannot be described.
        """
        if not isinstance(name, str):
            return name
        if name in cls._registered:
            return cls._registered[name]
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if name not in CONFIG_MAPPING:
            known = [*cls._registered, *CONFIG_MAPPING.keys()]
            raise UnsupportedModel(
                f"No descriptor for model type {name!r}. {did_you_mean(name, known)} "
                "Write one against layersmith.ModelDescriptor and register it with ModelDescriptorFactory."
            )
        from layersmith.model_descriptor.describe import describe

        return describe(CONFIG_MAPPING[name]())


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
