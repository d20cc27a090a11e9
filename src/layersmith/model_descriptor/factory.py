"""Descriptors by model type: those that users register, and inferred ones for every other type of Transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layersmith.errors import UnsupportedModel, UsageError, did_you_mean
from layersmith.foreign import foreign_code
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.infer.descriptor import infer
from layersmith.modeling_layersmith import as_parent
from layersmith.run.artifacts import file_digest

D = TypeVar("D", bound=type[ModelDescriptor])


class ModelDescriptorFactory:
    """The registry of descriptors by name, which is a config's ``model_type``."""

    _registered: dict[str, type[ModelDescriptor]] = {}  # noqa: RUF012 - the registry is the class's purpose

    @classmethod
    def register(cls, **descriptors: type[ModelDescriptor]) -> None:
        """Register descriptors by name; a registered one is preferred to an inferred one."""
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
        """The descriptor that was registered under ``name``, or None."""
        return cls._registered.get(name)

    @classmethod
    def for_config(cls, config: Any) -> type[ModelDescriptor]:
        """The descriptor that is registered for a config's model type, else one that is inferred by experiment.

        Raises:
            UnsupportedModel: What the experiments could not answer, and why.
        """
        if config.model_type in cls._registered:
            return cls._registered[config.model_type]
        try:
            return infer(as_parent(config))
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"{config.model_type}: {error} A descriptor written for layersmith.ModelDescriptor and registered with "
                "ModelDescriptorFactory can say what the experiments cannot answer."
            ) from error

    @classmethod
    def get(cls, name: str | type[ModelDescriptor]) -> type[ModelDescriptor]:
        """The descriptor under ``name``; a descriptor class is returned unchanged.

        If none is registered, one is inferred from the default config of the model type.

        Raises:
            UnsupportedModel: Transformers has no model type ``name``, or its descriptor cannot be inferred.
        """
        if not isinstance(name, str):
            return name
        if name in cls._registered:
            return cls._registered[name]
        if name not in CONFIG_MAPPING:
            known = [*cls._registered, *CONFIG_MAPPING.keys()]
            raise UnsupportedModel(
                f"No descriptor for model type {name!r}. {did_you_mean(name, known)} "
                "Write one against layersmith.ModelDescriptor and register it with ModelDescriptorFactory."
            )
        return cls.for_config(CONFIG_MAPPING[name]())


def import_descriptor(path: str) -> type[ModelDescriptor]:
    """The descriptor class at ``"package.module:ClassName"``, or the one registered under that name.

    Raises:
        UsageError: There is no such module or class, or it is no ``ModelDescriptor``.
    """
    if ":" not in path:
        return ModelDescriptorFactory.get(path)
    module, _, attribute = path.partition(":")
    descriptor = None
    try:
        with foreign_code(f"does {module} import?", refusal_is_answer=True) as attempt:
            descriptor = attempt.call(getattr, attempt.call(import_module, module), attribute)
    except SystemExit as error:
        raise UsageError(f"--descriptor {path}: {module} ends the process when it is imported.") from error
    if attempt.failed:
        raise UsageError(
            f"--descriptor {path}: {attempt.reason.rstrip('.')}. Give it as package.module:ClassName."
        ) from attempt.error
    if not (isinstance(descriptor, type) and issubclass(descriptor, ModelDescriptor)):
        raise UsageError(f"--descriptor {path}: {attribute} is not a subclass of layersmith.ModelDescriptor.")
    return descriptor


def source_of(descriptor: type[ModelDescriptor]) -> list[str | None]:
    """Digests of the modules that a descriptor and the classes that it extends are written in."""
    classes = [c for c in descriptor.__mro__ if issubclass(c, ModelDescriptor) and c is not ModelDescriptor]
    files = [getattr(sys.modules.get(c.__module__), "__file__", None) for c in classes]
    return [None if file is None else file_digest(Path(file)) for file in files]
