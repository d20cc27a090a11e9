"""The hidden size of a family: found by experiment, and removing dead channels changes no logits."""

from __future__ import annotations

import pytest
import torch

from layersmith.errors import UnsupportedModel
from layersmith.hidden_size.config import Carrier, Configs, carriers, shapes_of, template
from layersmith.hidden_size.narrowing import Factor, Kept
from layersmith.hidden_size.pair import close
from layersmith.hidden_size.prove import prove_narrowing
from layersmith.model_descriptor.infer.specimen import Specimen
from layersmith.model_descriptor.stock import stock_model
from tests.conformance.tiny import tiny_config

NORM = "model.layers.{}.input_layernorm.weight"


def test_entries_of_channels_are_apart_or_neighbours() -> None:
    channels = torch.tensor([0, 2])
    assert Carrier("w", 0, times=2).entries(channels, 3).tolist() == [0, 2, 3, 5]
    assert Carrier("w", 0, times=2, interleaved=True).entries(channels, 3).tolist() == [0, 1, 4, 5]
    assert Carrier("w", 0, rest=2).staying(channels, 3).tolist() == [0, 2, 3, 4]
    heads = torch.tensor([1])
    assert Carrier("w", 0, times=2, unit=2).entries(heads, 4).tolist() == [2, 3, 6, 7]
    assert Carrier("w", 0, times=2, unit=2, interleaved=True).entries(heads, 4).tolist() == [4, 5, 6, 7]
    assert template("model.layers.11.mlp.experts.3.weight") == "model.layers.{}.mlp.experts.{}.weight"


def test_a_factor_is_a_power_of_the_root_of_the_ratio() -> None:
    weight = torch.tensor([0.5, 1.0])
    assert torch.allclose(Factor(1).of(weight, 4.0), torch.tensor([1.0, 2.0]))
    assert torch.allclose(Factor(1, offset=1.0).of(weight, 4.0), torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize(
    ("model_type", "factors"),
    [
        ("llama", {NORM: Factor(1)}),
        ("gemma3_text", {NORM: Factor(1, offset=1.0), "model.embed_tokens.weight": Factor(1)}),
        ("cohere", {}),  # norms that subtract a mean
        ("nanochat", {"model.layers.{}.mlp.fc1.weight": Factor(1)}),  # norms without weights
    ],
)
def test_dead_channels_go_without_a_change(model_type: str, factors: dict[str, Factor]) -> None:
    """The proof itself, with other weights and channels than those by which factors were found."""
    config = tiny_config(model_type)
    narrowing = prove_narrowing(config)
    assert factors.items() <= narrowing.factors.items()
    assert narrowing.centered == (model_type == "cohere")
    if narrowing.centered:
        return
    large, size = Specimen(config, seed=7), 40
    narrow = Specimen(narrowing.hidden_size.narrower(config, size), seed=8)
    of = narrowing.carriers(shapes_of(large.model), shapes_of(narrow.model), large.hidden_size, size)
    kept = torch.arange(large.hidden_size).roll(17)[:size].sort().values
    gone = torch.tensor(sorted(set(range(large.hidden_size)) - set(kept.tolist())))
    with torch.no_grad():
        for carrier in of:
            entries = carrier.entries(gone, large.hidden_size)
            large.model.state_dict()[carrier.name].index_fill_(carrier.dim, entries, 0)
    narrow.model.load_state_dict(narrowing.tensors(large.model.state_dict(), of, Kept(kept), large.hidden_size))
    assert close(large.run(), narrow.run(large.ids))
    with torch.no_grad():  # a test that can fail: a channel that is not dead matters
        large.model.state_dict()[of[0].name].select(of[0].dim, int(gone[0])).fill_(1.0)
    assert not close(large.run(), narrow.run(large.ids))


def test_what_changes_with_the_hidden_size_and_does_not_carry_it_is_refused() -> None:
    base = {"w": (8, 4)}
    with pytest.raises(UnsupportedModel, match="w has 8 entries with hidden size 4 and 7 with 2"):
        carriers(base, {"w": (7, 4)}, 4, 2)
    with pytest.raises(UnsupportedModel, match="v is there with only one"):
        carriers(base, {"w": (8, 4), "v": (1,)}, 4, 2)
    assert carriers(base, {"w": (4, 2)}, 4, 2) == (Carrier("w", 0, 2), Carrier("w", 1))


def test_a_size_that_follows_the_hidden_size_is_pinned() -> None:
    config = tiny_config("phi")  # whose heads are as large as the hidden size and their number say
    narrowing = prove_narrowing(config)
    narrower = narrowing.hidden_size.narrower(config, 48)
    assert Configs(narrower).size == 48
    heads = {n: t.shape for n, t in stock_model(narrower).state_dict().items() if n.endswith("q_proj.weight")}
    assert set(heads.values()) == {torch.Size((64, 48))}
