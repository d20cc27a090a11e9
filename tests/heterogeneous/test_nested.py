"""One checkpoint for several sizes: what is cut from it has the bits of the child that was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import layersmith
from layersmith.errors import InputError
from layersmith.heterogeneous.nested import SIZES, _positions, _taken, sizes_of, write_parts
from layersmith.heterogeneous.weight_files import weight_map
from layersmith.run.artifacts import read_tensors
from tests.conftest import FAMILIES, block, child_model

NOT_IN_LARGE = ("layers.2.mlp", "layers.3.mlp", "layers.0.mlp.down")
KEPT = torch.tensor([1, 4, 5, 20, 31, 40])


def test_a_smaller_child_is_cut_bit_by_bit(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    large = child_model(config, [block(ffn={"intermediate_size": 48})] * 4)
    small = child_model(config, [block(ffn={"intermediate_size": 6}), block(ffn={"no_op": True}), *[block()] * 2], 1)
    of_large = large.state_dict()
    for name, tensor in small.state_dict().items():
        source = of_large[name]
        if "layers.0.mlp" in name:
            source = source.index_select(1 if "down" in name else 0, KEPT)
        if not any(part in name for part in NOT_IN_LARGE):
            tensor.copy_(source)
    layersmith.save(large, tmp_path / "child")
    layersmith.save(small, tmp_path / "child" / SIZES / "0.5")
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "child" / SIZES / "0.5", whole)
    own = write_parts(tmp_path / "child", tmp_path / "child" / SIZES / "0.5")
    of_small = small.state_dict().items()
    assert own == sum(tensor.nbytes for name, tensor in of_small if any(part in name for part in NOT_IN_LARGE))
    assert sizes_of(tmp_path / "child") == ["0.5"]
    assert not list((tmp_path / "child" / SIZES / "0.5").glob("model*.safetensors"))

    again, tokens = layersmith.load(tmp_path / "child", size=0.5), torch.arange(24)[None]
    for name, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, layersmith.load(whole)(tokens).logits)
        assert torch.equal(layersmith.load(tmp_path / "child")(tokens).logits, large(tokens).logits)
    with pytest.raises(InputError, match=r"no nested child of size 0.6. It has 0.5"):
        layersmith.load(tmp_path / "child", size="0.6")
    assert set(weight_map(whole)) == set(small.state_dict())
    stored = read_tensors(tmp_path / "child" / SIZES / "0.5" / "parts.safetensors")
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], KEPT.int())


@pytest.mark.parametrize("dim", [1, 2])
def test_members_of_a_stack_keep_different_channels(dim: int) -> None:
    large = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[0, 2, 3], [1, 2, 5], [0, 4, 5]])
    small = _taken(large, dim, kept)
    found = _positions(large, small)
    assert found is not None
    assert found[0] == dim
    assert torch.equal(found[1], kept)
    assert _positions(large, small + 1) is None
    assert _positions(large, small.to(torch.bfloat16)) is None
