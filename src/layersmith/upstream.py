"""Every use of a private or undocumented name of another project, one function each.

Each docstring names the public behaviour that the function stands in for. ``tests/test_upstream.py`` has a test for
each function, and is run against the lowest and the newest supported versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CompileConfig

# ---------------------------------------------------------------------------------------------- transformers


def compile_on_any_device() -> Any:
    """Settings for ``generate`` that compile the decode step on a CPU too, as ``generate`` does by itself on a GPU."""
    config: Any = CompileConfig(fullgraph=False)
    config._compile_all_devices = True
    return config


# ---------------------------------------------------------------------------------------------- torch


@contextmanager
def many_compiled_models() -> Iterator[None]:
    """Let ``torch.compile`` keep the code of thousands of models at once; the default drops all but eight."""
    from torch._dynamo import config  # here, because importing it takes a second

    with config.patch(recompile_limit=4096, accumulated_recompile_limit=16384):
        yield
