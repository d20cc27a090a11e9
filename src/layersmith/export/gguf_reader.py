"""Run a GGUF file: what llama.cpp computes for the architectures that layersmith writes, in float32 with torch.

It knows the file alone: neither the child's config nor how the file was made. So equal logits prove the file. It is
written for that and reads every layer anew for every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

# Architectures whose rotary embeddings turn neighbouring channels.
_PAIRS = ("llama", "deci")
_YARN_FAST, _YARN_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file as a language model; see :class:`layersmith.export.proof.Reader`."""

    file: Path

    @cached_property
    def _contents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from gguf import GGUFReader

        reader = GGUFReader(self.file)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        return fields, {tensor.name: tensor for tensor in reader.tensors}

    @property
    def arch(self) -> str:
        return str(self._contents[0]["general.architecture"])

    def value(self, key: str, layer: int | None = None, default: Any = None) -> Any:
        """A value of the architecture's metadata; of one layer where it is a list."""
        value = self._contents[0].get(f"{self.arch}.{key}", default)
        return value[layer] if isinstance(value, list) and layer is not None else value

    def tensor(self, name: str) -> torch.Tensor | None:
        """A tensor in float32 with rows first; None if the file has none of this name."""
        from gguf import dequantize

        tensor = self._contents[1].get(name)
        if tensor is None:
            return None
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        return values.float().reshape([int(n) for n in reversed(tensor.shape)])

    def weight(self, name: str) -> torch.Tensor:
        """A weight that must be there."""
        tensor = self.tensor(f"{name}.weight")
        if tensor is None:
            raise ValueError(f"{self.file}: no tensor {name}.weight")
        return tensor

    # ------------------------------------------------------------------------------------------ running it

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, T, V]`` of token ids ``[B, T]``."""
        embeddings = self.weight("token_embd")
        hidden = embeddings[tokens]
        for layer in range(self.value("block_count")):
            hidden = self._block(layer, hidden)
        head = self.tensor("output.weight")
        return self._norm(hidden, "output_norm") @ (embeddings if head is None else head).T

    def greedy(self, tokens: torch.Tensor, count: int) -> list[int]:
        """The ``count`` tokens that follow token ids ``[1, T]`` when each is the most probable one."""
        for _ in range(count):
            tokens = torch.cat([tokens, self.logits(tokens)[:, -1:].argmax(-1)], 1)
        return tokens[0, -count:].tolist()

    def _block(self, i: int, hidden: torch.Tensor) -> torch.Tensor:
        heads, kv_heads = self.value("attention.head_count", i), self.value("attention.head_count_kv", i)
        if heads and not kv_heads:
            hidden = hidden + self._linear(self._norm(hidden, f"blk.{i}.attn_norm"), f"blk.{i}.attn_output")
        elif heads:
            hidden = hidden + self._attention(i, self._norm(hidden, f"blk.{i}.attn_norm"), heads, kv_heads)
        normed = self._norm(hidden, f"blk.{i}.ffn_norm")
        if f"blk.{i}.ffn_gate_inp.weight" in self._contents[1]:
            return hidden + self._experts(i, normed)
        gate, up = (self._linear(normed, f"blk.{i}.ffn_{part}") for part in ("gate", "up"))
        return hidden + self._linear(functional.silu(gate) * up, f"blk.{i}.ffn_down")

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight(name), self.value("attention.layer_norm_rms_epsilon"))

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self.weight(name), self.tensor(f"{name}.bias"))

    def _attention(self, i: int, x: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
        size, prefix = self.value("attention.key_length"), f"blk.{i}"
        counts = [heads, kv_heads, kv_heads]
        if f"{prefix}.attn_qkv.weight" in self._contents[1]:
            parts = self._linear(x, f"{prefix}.attn_qkv").split([n * size for n in counts], -1)
        else:
            parts = tuple(self._linear(x, f"{prefix}.attn_{part}") for part in "qkv")
        q, k, v = (part.unflatten(-1, (n, size)).transpose(1, 2) for part, n in zip(parts, counts, strict=True))
        if f"{prefix}.attn_q_norm.weight" in self._contents[1]:
            q, k = self._norm(q, f"{prefix}.attn_q_norm"), self._norm(k, f"{prefix}.attn_k_norm")
        q, k = self._rotated(q), self._rotated(k)
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._linear(mixed.transpose(1, 2).flatten(2), f"{prefix}.attn_output")

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embeddings of ``[B, heads, T, size]``."""
        size = self.value("rope.dimension_count")
        frequencies, scale = self._frequencies(size)
        angles = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos() * scale, angles.sin() * scale
        pairs = x.unflatten(-1, (-1, 2) if self.arch in _PAIRS else (2, -1))
        axis = -1 if self.arch in _PAIRS else -2
        a, b = pairs.unbind(axis)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(-2)

    def _frequencies(self, size: int) -> tuple[torch.Tensor, float]:
        """Rotary frequencies, and the factor of all cosines and sines."""
        base, factor = self.value("rope.freq_base"), self.value("rope.scaling.factor", default=1.0)
        plain = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        factors = self.tensor("rope_freqs.weight")
        if factors is not None:
            plain = plain / factors
        if self.value("rope.scaling.type") != "yarn":
            return plain / factor, 1.0
        length = self.value("rope.scaling.original_context_length")
        low, high = (
            size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (_YARN_FAST, _YARN_SLOW)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
        kept = 1 - ((torch.arange(size // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain / factor * (1 - kept) + plain * kept, 0.1 * math.log(factor) + 1

    def _experts(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """A mixture of experts whose weights are normalized over the experts that a token uses."""
        probabilities = self._linear(x, f"blk.{i}.ffn_gate_inp").softmax(-1)
        weights, chosen = probabilities.topk(self.value("expert_used_count"), -1)
        weights = weights / weights.sum(-1, keepdim=True)
        gates, ups, downs = (self.weight(f"blk.{i}.ffn_{part}_exps") for part in ("gate", "up", "down"))
        out = torch.zeros_like(x)
        for e in range(len(gates)):
            share = (weights * (chosen == e)).sum(-1, keepdim=True)
            out = out + share * functional.linear(
                functional.silu(functional.linear(x, gates[e])) * functional.linear(x, ups[e]), downs[e]
            )
        return out
