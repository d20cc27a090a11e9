"""A model split over several processes by layers; each process sends hidden states to the next.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from layersmith.errors import InputError, UsageError
from layersmith.heterogeneous.build import block_configs_of, build, decoder_layers
from layersmith.heterogeneous.checkpoint import weight_groups
from layersmith.heterogeneous.no_op import Same
from layersmith.heterogeneous.weight_files import check_files, weight_map
from layersmith.model_descriptor.base import ModelDescriptor
from layersmith.model_descriptor.describe import describe, read_config
from layersmith.model_descriptor.stock import causal_lm_config, quiet_transformers
from layersmith.modeling_layersmith import without_guard
from layersmith.run.runtime import Runtime


def layers_of_rank(num_layers: int, rank: int, world_size: int) -> range:
    """The contiguous layers of a rank; the numbers of layers differ by at most one."""
    return range(num_layers * rank // world_size, num_layers * (rank + 1) // world_size)


class ShardedModel:
    """The layers of one process. Call it with the same ``input_ids`` in every process."""

    def __init__(self, model: nn.Module, descriptor: type[ModelDescriptor], layers: range, runtime: Runtime):
        self.model, self.descriptor, self.layers, self.runtime = model, descriptor, layers, runtime
        self.hidden_size = descriptor.get_language_model_config(model.config).hidden_size

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits ``[B, T, V]`` in every process."""
        runtime, (B, T) = self.runtime, input_ids.shape
        is_first, is_last = runtime.rank == 0, runtime.rank == runtime.world_size - 1
        embedding = self.model.get_submodule(self.descriptor.input_embedding_name())
        if is_first:
            hidden = embedding(input_ids)
        else:
            hidden = torch.empty(B, T, self.hidden_size, dtype=runtime.dtype, device=runtime.device)
            dist.recv(hidden, src=runtime.rank - 1)
        # The layers of earlier ranks are dummies, so hidden states passed as embeddings reach the first layer of this
        # rank unchanged. Masks and positions depend only on their shape.
        output = self.model(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False).logits
        if not is_last:
            dist.send(output.contiguous(), dst=runtime.rank + 1)
            vocab_size = self.descriptor.get_language_model_config(self.model.config).vocab_size
            output = torch.empty(B, T, vocab_size, dtype=runtime.dtype, device=runtime.device)
        if runtime.world_size > 1:
            dist.broadcast(output, src=runtime.world_size - 1)
        return output


def load_sharded(
    path: str | Path, runtime: Runtime, *, descriptor: type[ModelDescriptor] | None = None
) -> ShardedModel:
    """Load only this rank's layers of a checkpoint folder.

    The model is built on the meta device, and layers of other ranks become dummies, whose tensors are not read.
    ``torch.distributed`` must be initialised if ``runtime.world_size > 1``.

    Raises:
        InputError: A tensor of this rank is not in the checkpoint.
        UsageError: There are more processes than layers.
    """
    check_files(path)
    config = causal_lm_config(without_guard(read_config(path)))
    descriptor = descriptor or describe(config)
    blocks = block_configs_of(config, descriptor)
    layers = layers_of_rank(len(blocks), runtime.rank, runtime.world_size)
    if not layers:
        raise UsageError(f"{path}: {len(blocks)} layers cannot be split over {runtime.world_size} processes.")
    is_first, is_last = runtime.rank == 0, runtime.rank == runtime.world_size - 1
    model = build(config, blocks, dtype=runtime.dtype, device="meta", descriptor=descriptor)
    for i, layer in enumerate(decoder_layers(model, descriptor, len(blocks))):
        if i not in layers:
            model.set_submodule(descriptor.layer_block_name(i), descriptor.create_dummy_block(layer, i))
    if not is_last:
        # Without norm and head the output of the model is the hidden states for the next rank.
        model.set_submodule(descriptor.final_norm_name(), Same())
        model.set_submodule(descriptor.output_embedding_name(), Same())

    names = list(model.state_dict())
    if not is_first:
        embedding = descriptor.input_embedding_name() + "."
        names = [name for name in names if not name.startswith(embedding)]
    stored = weight_map(Path(path))
    tied = descriptor.input_embedding_name() + ".weight"
    head = descriptor.output_embedding_name() + ".weight"
    weight_groups(descriptor, names, len(blocks))  # a name outside every group is an error before anything is read
    state = {}
    for name in names:
        source = tied if name == head and name not in stored else name
        if source not in stored:
            raise InputError(f"{path}: no weights for {name}; nothing was loaded.")
        with safe_open(stored[source], framework="pt", device=str(runtime.device)) as tensors:
            tensor = tensors.get_tensor(source)
            state[name] = tensor.to(runtime.dtype) if tensor.is_floating_point() else tensor
    with quiet_transformers():
        model.load_state_dict(state, strict=False, assign=True)
    descriptor.init_rotary_embedding(model, runtime)
    return ShardedModel(model.eval(), descriptor, layers, runtime)
