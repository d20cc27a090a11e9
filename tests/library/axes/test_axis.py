import layersmith
from layersmith.library.axes.find import find_axes
from tests.conftest import FAMILIES, block


def axes_of(config, blocks=None):
    return find_axes(layersmith.describe(config), config, blocks or layersmith.block_configs(config))


def test_axes_are_found_by_shape(family: str) -> None:
    config = FAMILIES[family]()
    for axes in axes_of(config):
        assert axes.reasons.keys() <= {"window"}
        assert axes.ffn.size == 64
        assert {(w.name, w.dim) for w in axes.ffn.weights} == {
            ("mlp.gate_proj.weight", 0),
            ("mlp.up_proj.weight", 0),
            ("mlp.down_proj.weight", 1),
        }
        assert axes.ffn.output == "mlp.down_proj"
        assert (axes.kv.size, axes.kv.num_heads, axes.kv.head_dim) == (4, 8, getattr(config, "head_dim", None) or 4)
        assert axes.kv.output == "self_attn.o_proj"
        assert (axes.kv.fewer_kv, axes.kv.fewer_groups, axes.kv.fewer_queries) == (True, True, True)
        names = {w.name for w in axes.kv.weights}
        assert {"self_attn.k_proj.weight", "self_attn.v_proj.weight"} <= names
        has_bias = family.startswith("qwen2") or family == "llama_tied"
        assert ("self_attn.k_proj.bias" in names) == has_bias


def test_reasons_where_there_is_nothing_to_narrow() -> None:
    config = FAMILIES["llama"]()
    blocks = [block({"no_op": True}), block({"num_key_value_heads": 1}), block(None, {"no_op": True}), block()]
    axes = axes_of(config, blocks)
    assert axes[0].kv is None
    assert "no attention" in axes[0].reasons["attention"]
    assert axes[1].kv.size == 1
    assert not axes[1].kv.fewer_kv
    assert not axes[1].kv.fewer_groups
    assert axes[1].kv.fewer_queries
    assert axes[2].ffn is None
    assert "no FFN" in axes[2].reasons["ffn"]
    assert axes[3].reasons.keys() <= {"window"}
