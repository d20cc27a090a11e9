"""The layout of docs/architecture.md holds: layers import only what lies below them, and at the top of a module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "layersmith"

# From the ground up. A layer may import those before it and itself.
LAYERS = (
    "errors", "units", "untrusted", "foreign", "records", "tables", "block_config", "recipe", "modeling_layersmith",
    "upstream", "run", "data", "model_descriptor", "quantization", "heterogeneous", "execution", "library",
    "hidden_size", "costs", "scoring", "search", "distillation", "evaluation", "export", "report", "stages", "pipeline",
    "demo", "hub", "outputs", "terminal", "options", "screen", "exit_codes", "cli", "__main__",
)  # fmt: skip
# Imports inside these modules' functions keep `layersmith --help` and `import layersmith` quick: torch takes seconds.
DEFERRED = {"__init__.py", "cli.py", "screen.py"}


def module_of(path: Path) -> str:
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_of(path): path for path in SOURCE.rglob("*.py")}


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Modules of ours that a file imports, the line, and whether that is inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "layersmith":
            base = (node.module or "").removeprefix("layersmith").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                yield (name if name in FILES else base or "__init__"), node.lineno, id(node) in inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "layersmith":
                    yield (
                        alias.name.removeprefix("layersmith").removeprefix(".") or "__init__",
                        node.lineno,
                        (id(node) in inside),
                    )


def test_every_module_has_its_layer() -> None:
    assert {name.split(".")[0] for name in FILES} - {"__init__"} <= set(LAYERS)


def test_layers_import_only_what_lies_below_them() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {target}"
        for name, path in FILES.items()
        for target, line, _ in imports_of(path)
        if name != "__init__" and "__init__" not in (target.split(".")[0],)
        if LAYERS.index(target.split(".")[0]) > LAYERS.index(name.split(".")[0])
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    needs = {name: {t for t, _, _ in imports_of(path) if t in FILES and t != name} for name, path in FILES.items()}
    del needs["__init__"]  # it offers names lazily
    while out := [
        name
        for name, targets in needs.items()
        if not targets & needs.keys() or not any(name in others for others in needs.values())
    ]:
        for name in out:
            del needs[name]
    assert not needs, f"in circles, or between two: {sorted(needs)}"


def test_imports_are_at_the_top_of_a_module() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in FILES.values()
        for _, line, inside in imports_of(path)
        if inside and path.name not in DEFERRED
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_only_the_top_imports_the_pipeline() -> None:
    importers = {module for module, path in FILES.items() if "pipeline" in {t for t, _, _ in imports_of(path)}}
    assert importers <= {"__init__", "cli", "demo.job"}
