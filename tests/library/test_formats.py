"""Number formats of weights: which weights have one, what they cost, and how a child with them is quantized."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import layersmith
from layersmith.costs.budget import Workload
from layersmith.distillation.quantize import quantize_child
from layersmith.execution.layerwise import split_layers
from layersmith.execution.parent import Parent, load_parent
from layersmith.library.alternative import Alternative
from layersmith.library.axes.find import find_axes
from layersmith.library.build import build_library
from layersmith.library.formats import InputMoments, in_formats, matrices, quantized, quantized_embeddings, saved_bytes
from layersmith.library.library import Library
from layersmith.library.statistics import Calibration
from layersmith.library.survey import survey
from layersmith.model_descriptor.describe import describe
from layersmith.quantization.formats import FORMATS
from layersmith.quantization.gptq import gptq_quantize, inverse_factor
from layersmith.quantization.rounding import quantize
from layersmith.recipe import LibraryRecipe, ScoringRecipe
from layersmith.run.progress import SILENT
from layersmith.run.runtime import Runtime
from layersmith.scoring.children import child_evaluator
from layersmith.scoring.formats import FormatTask, foretold, score_formats
from layersmith.stages.costs import cost_table, smaller_caches
from layersmith.stages.realize import write_formats
from tests.conformance.tiny import tiny_config
from tests.conftest import stock_model

TOKENS = torch.randint(0, 512, (6, 24), generator=torch.Generator().manual_seed(4))
RECIPE = LibraryRecipe(ffn_fractions=(0.5,), kv_heads=(2,), linear=("ffn",))


@pytest.fixture(scope="module")
def library(make_parent: Callable[..., Path]) -> Library:
    parent = load_parent(make_parent("llama"), Runtime(torch.device("cpu"), torch.float32))
    return build_library(parent, RECIPE, survey(parent, RECIPE), Calibration(TOKENS, 3))


def of_layer(library: Library, i: int) -> dict[str, list[str]]:
    parent = library.parent
    return matrices(parent.model, parent.descriptor, parent.layers[i], i, len(parent.blocks), library.axes[i])


def test_without_a_format_an_alternative_is_what_it_was() -> None:
    a = Alternative(3, "ffn", "ffn_width", "iterative", 64)
    assert "format" not in a.to_data()
    assert a.identity == "307cbf60b5a5fdbf79550d56051d90a9"
    b = a.in_format("int8")
    assert (b.key, b.shape) == ("layer 3: ffn 64 (iterative), int8", a)
    assert b.identity != a.identity
    assert not Alternative(0, "ffn", "parent", format="int8").is_parent
    no_op = Alternative(0, "ffn", "no_op")
    assert no_op.in_format("int8") == no_op
    assert not in_formats([no_op], ["int8"])


def test_all_linear_maps_of_a_subblock_have_its_format(library: Library) -> None:
    of_attention = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    of_ffn = [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    assert of_layer(library, 1) == {"attention": of_attention, "ffn": of_ffn}


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_is_quantized_for_its_inputs(is_tied: bool) -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = is_tied
    model = stock_model(config)
    width = config.hidden_size
    inputs = torch.randn(400, width, generator=torch.Generator().manual_seed(1))
    inputs = inputs @ torch.randn(width, width, generator=torch.Generator().manual_seed(2)) + 3  # correlated
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    nearest = quantized_embeddings(model, "q4_0")
    by_inputs = quantized_embeddings(model, "q4_0", inputs.T @ inputs / len(inputs))
    name = "model.embed_tokens.weight" if is_tied else "lm_head.weight"
    errors = [float((inputs @ (w[name].values() - head.detach()).T).square().mean()) for w in (nearest, by_inputs)]
    assert errors[1] < 0.6 * errors[0]
    if is_tied:
        assert list(by_inputs) == [name]
    else:  # embeddings multiply nothing
        expected = quantize(embeddings, FORMATS["q4_0"]).values()
        assert torch.equal(by_inputs["model.embed_tokens.weight"].values(), expected)
    assert not quantized_embeddings(model, "")


def mixture(family: str) -> tuple[Any, dict[str, list[str]]]:
    """A mixture of experts, and the weights of its last layer that can have formats."""
    model = stock_model(tiny_config(family))
    descriptor = describe(model.config)
    blocks = descriptor.parent_blocks(model.config)
    axes, i = find_axes(descriptor, model.config, blocks), len(blocks) - 1
    return model, matrices(model, descriptor, model.model.layers[i], i, len(blocks), axes[i])


def test_experts_have_formats_where_files_have_them_apart(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    assert not any("experts" in name for name in mixture("gpt_oss")[1]["ffn"])
    model, names = mixture("qwen3_moe")
    assert len(names["attention"]) == 4
    assert names["ffn"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = model.bfloat16()
    layer, prefix = model.model.layers[-1], f"model.layers.{len(model.model.layers) - 1}."
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = layer.mlp.experts.register_forward_pre_hook(lambda module, args: given.append(args[:2]))
    moments = InputMoments(layer, [*names["attention"], *names["ffn"]])
    with moments.watching():
        model(input_ids=TOKENS % model.config.vocab_size)
    handle.remove()
    for expert in range(len(layer.mlp.experts.down_proj)):
        x = given[0][0].flatten(0, -2)[(given[0][1].reshape(-1, given[0][1].shape[-1]) == expert).any(-1)].double()
        torch.testing.assert_close(
            moments.of(f"{names['ffn'][0]}:{expert}"), x.T @ x / len(x), rtol=1e-3, atol=1e-3, check_dtype=False
        )
    weights = {prefix + name: layer.get_parameter(name) for name in names["ffn"]}
    fitting = next(
        n for n in ("int4-g32", "int8") if all(FORMATS[n].refusal(w.shape) is None for w in weights.values())
    )
    rounded = quantized(layer, dict.fromkeys(names["ffn"], FORMATS[fitting]), moments).rounded
    saved = saved_bytes(model, weights, FORMATS[fitting])
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    for name, weight in rounded.items():
        layer.get_parameter(name).data = weight.values().bfloat16()
    model.save_pretrained(tmp_path)
    write_formats(tmp_path, model, {prefix + name: weight for name, weight in rounded.items()})
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == before - saved
    again = layersmith.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_moments_are_mean_products_of_inputs(library: Library) -> None:
    parent, names = library.parent, [n for s in of_layer(library, 2).values() for n in s]
    moments = InputMoments(parent.layers[2], names)
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    handles = [
        parent.layers[2]
        .get_submodule(n.removesuffix(".weight"))
        .register_forward_pre_hook(lambda module, args, n=n: seen[n].append(args[0].flatten(0, -2).double()))
        for n in names
    ]
    with moments.watching():
        for rows in TOKENS.split(3):
            parent.model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(moments._sums) == 4  # query, key and value have one input, gate and up another
    for n in names:
        x = torch.cat(seen[n])
        torch.testing.assert_close(moments.of(n), x.T @ x / len(x), rtol=1e-5, atol=1e-7)


def test_costs_count_every_byte_of_a_format(library: Library) -> None:
    formats = ["int8", "int4-g32"]
    table = cost_table(library.parent, library, Workload(1, 64), formats)
    plain = cost_table(library.parent, library, Workload(1, 64))
    assert {key: table.by_key[key] for key in plain.by_key} == plain.by_key
    assert (table.parent, table.fixed) == (plain.parent, plain.fixed)
    pairs = in_formats(library.alternatives, formats)
    assert len(table.by_key) == len(plain.by_key) + len(pairs)
    for a in pairs:
        layer, format = library.layer(a.shape), FORMATS[a.format]
        names = matrices(library.parent.model, library.parent.descriptor, layer, a.layer, 4, library.axes[a.layer])[
            a.subblock
        ]
        weights = {n: layer.get_parameter(n) for n in names}
        saved = sum(
            w.numel() * w.element_size() - format.bytes_of(w.shape)
            for w in weights.values()
            if format.refusal(w.shape) is None
        )
        costs, shape = table.by_key[a.key], plain.by_key[a.shape.key]
        assert costs["weight_bytes"] == shape["weight_bytes"] - saved < shape["weight_bytes"]
        assert costs["memory_bytes"] == costs["weight_bytes"] + costs["kv_cache_bytes"]
        assert costs["parameters"] == shape["parameters"]


def task(library: Library, folder: Path, formats: list[str], kv_alternatives: list[Alternative]) -> FormatTask:
    return FormatTask(
        library,
        split_layers(library.parent, library),
        formats,
        kv_alternatives,
        TOKENS,
        TOKENS[:4],
        ScoringRecipe(batch_tokens=48),
        0,
        folder,
        SILENT,
    )


def test_scores_add_up_to_what_a_format_costs(library: Library, tmp_path: Path) -> None:
    costs = cost_table(library.parent, library, Workload(1, 64), ["int8", "int4-g32"], ["int4"])
    caches = smaller_caches(library.alternatives, costs, ["int4"])
    scores, head_moment = score_formats(task(library, tmp_path, ["int8", "int4-g32"], caches))
    assert head_moment is None  # embeddings have none of these formats
    parents = [a for a in library.alternatives if a.is_parent]
    of_caches = scores.pop("int4 KV cache")
    assert {name: set(of) for name, of in scores.items()} == {
        name: {a.in_format(name).key for a in parents} for name in ("int8", "int4-g32")
    }
    assert of_caches.keys() == {a.with_kv_format("int4").key for a in parents if a.subblock == "attention"}
    assert min(map(min, of_caches.values())) > 0
    total = {name: sum(map(sum, of.values())) / 4 for name, of in scores.items()}
    assert 0 < 10 * total["int8"] < total["int4-g32"]
    of_parent = quantize_parent(library.parent, library, TOKENS)
    evaluator = child_evaluator(of_parent, TOKENS[:4], ScoringRecipe(), SILENT)
    (rows,) = evaluator.run([[a.in_format("int4-g32") for a in parents]], range(4))
    # The child's layers are quantized on the inputs of the child, those of the scores on the parent's.
    assert sum(r["kl_divergence"] for r in rows) / 4 == pytest.approx(total["int4-g32"], rel=0.5)
    again, _ = score_formats(task(library, tmp_path, ["int8", "int4-g32"], []))  # takes the weights that are there
    assert again == scores
    losses = {a.key: 0.5 for a in library.alternatives} | {a.key: 0.0 for a in parents}
    pairs = foretold(library.alternatives, losses, scores)
    assert set(pairs) == set(in_formats(library.alternatives, ["int8", "int4-g32"]))
    narrow = Alternative(1, "ffn", "ffn_width", "iterative", 32, format="int8")
    of_parent = Alternative(1, "ffn", "parent", format="int8")
    assert pairs[narrow] == 0.5 + pairs[of_parent] == 0.5 + sum(scores["int8"][of_parent.key]) / 4
    few = Alternative(1, "attention", "kv_heads", "contribution", 2, format="int8", kv_format="int4")
    both = foretold(library.alternatives, losses, scores | {"int4 KV cache": of_caches})
    alone = few.shape.with_kv_format("int4")
    assert both[few] == pytest.approx(both[few.with_kv_format("")] + both[alone] - 0.5)
    assert set(both) == set(in_formats(library.alternatives, ["int8", "int4-g32"], ["int4"]))
    for a, whole in ((few, few.with_kv_format("")), (alone, few.shape)):  # 2 heads of 16 numbers in float32
        changed, before = costs.by_key[a.key], costs.by_key[whole.key]
        assert (changed["kv_cache_bytes"], before["kv_cache_bytes"]) == (2 * 2 * 64 * (8 + 4), 2 * 2 * 64 * 16 * 4)
        assert changed["memory_bytes"] - changed["kv_cache_bytes"] == before["weight_bytes"] == changed["weight_bytes"]


def quantize_parent(parent: Parent, library: Library, tokens: torch.Tensor, **more: Any) -> Library:
    chosen = [a.in_format("int4-g32") for a in library.alternatives if a.is_parent]
    return quantize_child(library, chosen, tokens, 48)[0]


def test_a_layer_is_quantized_on_what_the_quantized_layers_before_it_return(library: Library) -> None:
    chosen = [Alternative(i, s, "parent", format="int4-g32") for i in (0, 1) for s in ("attention", "ffn")]
    chosen[2] = Alternative(1, "attention", "kv_heads", "contribution", 2)
    chosen += [Alternative(i, s, "parent") for i in (2, 3) for s in ("attention", "ffn")]
    of_parent = {name: weight.clone() for name, weight in library.parent.model.state_dict().items()}
    done, rounded = quantize_child(library, chosen, TOKENS, 48)
    child = done.compose(chosen)
    before = library.compose([a.shape for a in chosen])
    weights, format = before.state_dict(), FORMATS["int4-g32"]
    inputs: list[torch.Tensor] = []
    handle = child.model.layers[1].mlp.gate_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, -2).double())
    )
    child(input_ids=TOKENS)
    handle.remove()
    norms = {f"model.layers.{norm}.weight" for norm in ("0.input_layernorm", "0.post_attention_layernorm")}
    norms.add(norm := "model.layers.1.post_attention_layernorm.weight")
    for name, weight in child.state_dict().items():
        is_quantized = ("layers.0." in name or "layers.1.mlp" in name) and "proj" in name
        assert torch.equal(weight, weights[name]) != (is_quantized or name in norms), name
        assert (name in rounded) == is_quantized
        assert not is_quantized or torch.equal(rounded[name].values(), weight)
    # The FFN's first matrices are given what the quantized attention and the layers before it return.
    name = "model.layers.1.mlp.gate_proj.weight"
    scales = weights[norm] / child.state_dict()[norm]
    x = inputs[0] * scales  # what it was given before the norm held scales
    factor = inverse_factor(x.T @ x / len(x)).scaled(scales)
    expected = gptq_quantize(weights[name] * scales, factor, format).values()
    torch.testing.assert_close(child.state_dict()[name], expected)
    assert child.state_dict()[norm].bfloat16().float().equal(child.state_dict()[norm])
    for name, weight in library.parent.model.state_dict().items():
        assert torch.equal(weight, of_parent[name]), name
