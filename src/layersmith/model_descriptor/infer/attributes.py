"""Number attributes of a config: how they are listed, read and overridden by their path.

A path has one name for each config on the way, e.g. ``("text_config", "num_attention_heads")``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from transformers import PretrainedConfig

from layersmith.model_descriptor import conventions

AttributePath = tuple[str, ...]


def numbers(
    config: PretrainedConfig, num_layers: int, above: AttributePath = ()
) -> Iterator[tuple[AttributePath, int]]:
    """Every attribute that is a positive number, a list with one number for each layer, or None (given as 0).

    Args:
        config: Config of a model or of a layer; configs inside it are searched too.
        num_layers: Number of layers. A list counts if it is as long.
        above: Path of ``config`` in the outermost config.
    """
    for name, value in vars(config).items():
        if name.startswith("_") or name.endswith(conventions.NOT_SIZES):
            continue
        if isinstance(value, PretrainedConfig):
            yield from numbers(value, num_layers, (*above, name))
        elif type(value) is int and value >= 1:
            yield (*above, name), value
        elif isinstance(value, list) and len(value) == num_layers and all(type(v) is int and v > 1 for v in value):
            yield (*above, name), value[0]
        elif value is None:
            yield (*above, name), 0


def numbers_of_layer(config: PretrainedConfig, num_layers: int, layer: int) -> dict[AttributePath, int]:
    """The same :func:`numbers` with the values of one layer, where a config holds a value for each layer."""
    by_layer = _names_by_layer(config)
    return {
        path: value_at(config, path, layer) or value if path[0] in by_layer else value
        for path, value in numbers(config, num_layers)
    }


def value_at(config: PretrainedConfig, path: AttributePath, layer: int = 0) -> int:
    """The number at ``path`` for one layer; 0 where the config says None or lacks the attribute."""
    value: Any = config.per_layer_config[layer] if path[0] in _names_by_layer(config) else config
    for name in path:
        value = getattr(value, name, None)
    return value[layer] if isinstance(value, list) else value or 0


def nested(config: Any, path: AttributePath, value: Any) -> dict[str, Any]:
    """Overrides that set the attribute at ``path``; a list with one number for each layer gets the value for all."""
    if path[0] in _names_by_layer(config):
        return {path[0]: value}
    old = getattr(config, path[0], None)
    if len(path) > 1:
        return {path[0]: nested(old, path[1:], value)}
    return {path[0]: [value] * len(old) if isinstance(old, list) else value}


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both overrides, merged at every depth; the second wins where both set the same attribute."""
    result = dict(first)
    for name, value in second.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _names_by_layer(config: Any) -> Collection[str]:
    return getattr(config, conventions.PER_LAYER, None) or ()
