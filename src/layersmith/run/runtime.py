"""Where this process computes: device, dtype, rank."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from layersmith.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where and how this process computes.

    Attributes:
        device: Device of the weights and activations.
        dtype: Dtype of the computation. Weights are rounded to the checkpoint's dtype first, so a wider dtype computes
            with the weights that the checkpoint holds.
        rank, world_size: Number of this process and of all processes that a launcher such as ``torchrun`` started.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @property
    def processes_on_device(self) -> int:
        """How many processes share the memory of the device: those of a machine share its CPU memory."""
        if self.world_size == 1 or self.device.type == "cuda":
            return 1
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    @staticmethod
    def detect(device: str = "auto", dtype: str = "auto") -> Runtime:
        """Read the settings; ``auto`` is the first CUDA device in bfloat16 if there is one, else the CPU in float32.

        Raises:
            UsageError: The device is not here, or the dtype is unknown.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"device {device!r}: unknown. Use cpu, cuda or cuda:N.") from error
        if chosen.type not in ("cpu", "cuda"):
            raise UsageError(f"device {device!r}: not supported. Use cpu, cuda or cuda:N.")
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device {device!r}: PyTorch sees no CUDA device here. Use --device cpu.")
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device {device!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices here.")
        if dtype == "auto":
            dtype = "bfloat16" if chosen.type == "cuda" else "float32"
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r}: use one of auto, {', '.join(DTYPES)}.")
        return Runtime(chosen, DTYPES[dtype], rank, world_size)
