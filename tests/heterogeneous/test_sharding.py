"""Two real processes, each with half of the layers."""

import json
import os
import subprocess
from pathlib import Path

import torch

import layersmith
from layersmith.heterogeneous.sharding import layers_of_rank
from tests.conftest import FAMILIES, NO_ATTENTION, block, child_model, torchrun

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from layersmith.heterogeneous.no_op import DummyBlock
from layersmith.heterogeneous.sharding import load_sharded
from layersmith.run.runtime import Runtime

dist.init_process_group("gloo")
runtime = Runtime.detect("cpu", "float32")
sharded = load_sharded(sys.argv[1], runtime)
ids = torch.arange(40).view(2, 20) * 7 % 512
mask = torch.ones_like(ids)
mask[0, :5] = 0
with torch.inference_mode():
    logits = sharded(ids), sharded(ids, mask)
real = sum(p.numel() for p in sharded.model.parameters() if p.device.type != "meta")
dummies = [i for i in range(4) if isinstance(sharded.model.model.layers[i], DummyBlock)]
torch.save(logits, f"{sys.argv[2]}/logits{runtime.rank}")
json.dump({"real": real, "dummies": dummies}, open(f"{sys.argv[2]}/rank{runtime.rank}", "w"))
dist.destroy_process_group()
"""


def test_every_layer_has_one_rank() -> None:
    for num_layers in range(1, 9):
        for world_size in range(1, num_layers + 1):
            shares = [list(layers_of_rank(num_layers, rank, world_size)) for rank in range(world_size)]
            assert [i for share in shares for i in share] == list(range(num_layers))
            assert all(shares)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    for name, config, blocks in (
        ("untied", FAMILIES["llama"](), [block(NO_ATTENTION), block({"num_key_value_heads": 2}), block(), block()]),
        ("tied", FAMILIES["llama_tied"](), [block(), block(), block(None, {"replace_with_linear": True}), block()]),
    ):
        folder = tmp_path / name
        model = child_model(config, blocks)
        layersmith.save(model, folder)
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        done = subprocess.run(
            torchrun(2, script, folder, tmp_path),
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        ids = torch.arange(40).view(2, 20) * 7 % 512
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        with torch.inference_mode():
            expected = model(ids).logits, model(ids, attention_mask=mask).logits
        held = []
        for rank in (0, 1):
            plain, masked = torch.load(tmp_path / f"logits{rank}")
            assert torch.equal(plain, expected[0])
            assert torch.equal(masked[1], expected[1][1])
            torch.testing.assert_close(masked[0, 5:], expected[1][0, 5:])
            report = json.loads((tmp_path / f"rank{rank}").read_text())
            assert report["dummies"] == ([2, 3] if rank == 0 else [0, 1])
            held.append(report["real"])
        whole = sum(p.numel() for p in model.parameters())
        tied = model.get_output_embeddings().weight.numel() if name == "tied" else 0
        assert sum(held) == whole + tied
