"""Export a child: check, write into a temporary folder, prove, and only then put the folder in its place."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from layersmith.errors import InputError, UsageError, did_you_mean
from layersmith.export.proof import Proof, prove
from layersmith.export.source import CannotExport, Source, open_source
from layersmith.export.target import TARGETS, Target
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.run.artifacts import read_json, whole_folder, write_json
from layersmith.run.folder import Run
from layersmith.run.progress import SILENT, Progress

# The record of the proof, in the folder of the export.
RECORD = "layersmith_export.json"
# Files of a checkpoint that an export keeps: tokenizer, chat template, generation settings, licence. The model card is
# left out: it describes how the child's own folder is loaded.
_COPIED = ("*token*.json", "*.model", "vocab*", "merges*", "*.jinja", "special_tokens_map.json",
           "generation_config.json", "LICENSE*")  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        folder: Where it is.
        target: Name of the target.
        layout: The class that its config names; empty if there is no config.
        proof: What shows that it is the same model.
        quantized: What quantizing it afterwards changed, in words; empty if it was not.
    """

    folder: Path
    target: str
    layout: str
    proof: Proof
    quantized: str = ""

    def __str__(self) -> str:
        named = f" as {self.layout}" if self.layout else ""
        quantized = f" {self.quantized}" if self.quantized else ""
        return f"{self.folder}: written for {self.target}{named}; {self.proof}.{quantized}"


def export(
    child: str | os.PathLike[str] | PreTrainedModel,
    out: str | os.PathLike[str],
    to: str = "padded",
    *,
    size: str | float | None = None,
    quantize: str | None = None,
    progress: Progress = SILENT,
) -> Exported:
    """Write a child in the layout of a target, and prove that the target's reader gives the same model.

    No code of the checkpoint runs. If anything fails, ``out`` does not appear.

    Args:
        child: Checkpoint folder, hub id, or a model from :func:`layersmith.load`.
        out: The new folder; if it exists, it must be empty.
        to: A name of :data:`layersmith.export.target.TARGETS`.
        size: Which of the nested children in a folder, such as ``0.7``. Default: the largest.
        quantize: Format of the weights, such as ``Q4_K_M``, in which the proved export is stored; for ``gguf`` only.
        progress: Receives steps and notes.

    Raises:
        UsageError: There is no such target, or it has no such format.
        InputError: The child is damaged, the folder is not empty, or a package is missing.
        CannotExport: The layout cannot express the child; the message says which layer, why, and what would fit.
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}: no such target. {did_you_mean(to, TARGETS)}")
    target, folder = TARGETS[to], Path(out)
    if target.extra is not None and find_spec(target.extra[0]) is None:
        package, extra = target.extra
        raise InputError(f"--to {to}: needs the package {package}: pip install 'layersmith[{extra}]'")
    if quantize is not None and target.quantize is None:
        raise UsageError(f"--quantize {quantize}: only --to gguf stores quantized weights.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already there and not empty. Choose another folder.")
    with open_source(child, size) as source, Run.locked_around(folder), progress.stage("export", 2, "steps") as advance:
        _refuse_what_has_no_place(source, to, target)
        write = target.prepare(source if target.keeps_formats else replace(source, compressed=None))
        with whole_folder(folder) as made:
            with quiet_transformers():
                write(made)
            if target.copies:
                copy_files(source, made)
            advance(1)
            proof = prove(source, made, to, target.reader, target.read, target.tolerance)
            quantized = target.quantize(source, made, quantize) if quantize and target.quantize else ""
            write_json(made / RECORD, _record(source, target, proof) | ({"quantized": quantized} if quantized else {}))
            advance(1)
    return Exported(folder, to, _layout(folder), proof, quantized)


def _refuse_what_has_no_place(source: Source, to: str, target: Target) -> None:
    """Raises: CannotExport: A layer has something that the layout cannot say, whatever the family."""
    if layers := [str(i) for i, block in enumerate(source.blocks) if block.attention.kv_cache_format]:
        raise CannotExport(
            f"layers {', '.join(layers)}: their KV caches have number formats of their own, which no export holds. "
            "Search again without kv_formats."
        )
    for i, block in enumerate(source.blocks):
        if block.inner_sizes and not target.keeps_inner_sizes:
            sizes = ", ".join(f"{name} {size}" for name, size in block.inner_sizes.items())
            raise CannotExport(
                f"--to {to}: layer {i} has {sizes}, and the layout has one such size for all layers. Search again "
                "without library.inner_sizes."
            )


def _layout(folder: Path) -> str:
    config = folder / "config.json"
    names = read_json(config).get("architectures") if config.is_file() else None
    return str(names[0]) if names else ""


def copy_files(source: Source, folder: Path) -> None:
    """Copy the tokenizer and what belongs to it, unless the target wrote files of these names."""
    for file in sorted({file for pattern in _COPIED for file in source.folder.glob(pattern) if file.is_file()}):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _record(source: Source, target: Target, proof: Proof) -> dict[str, Any]:
    versions = {package: version(package) for package in ("layersmith", "torch", "transformers")}
    family = getattr(source.language, "model_type", "")
    return {"purpose": target.purpose, "model_type": family, "proof": proof.to_dict(), "versions": versions}
