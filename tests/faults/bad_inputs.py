# ruff: noqa: E501 - a case is a line
"""A table of bad inputs: what is wrong, the command, the exit code, and a word that the message must contain.

``CASES`` is read by ``test_bad_input.py``. Each case has a folder of its own (:class:`Place`) with copies of a small
parent and of a finished run, made when the case asks for them. In a command, ``{parent}``, ``{run}``, ``{data}``,
``{recipe}``, ``{out}`` and ``{here}`` stand for paths in that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

DEEP = "[" * 100_000
LONG = "p" * 5000


@dataclass
class Place:
    """The folder of one case.

    Attributes:
        here: The folder, which is the working directory of the command.
        models: Checkpoint folders by name, of which copies are made.
        run_folder: Makes a finished run and returns its folder.
        text: A text file that is long enough.
    """

    here: Path
    models: dict[str, Path]
    run_folder: Callable[[], Path]
    text: Path

    @cached_property
    def parent(self) -> Path:
        return Path(shutil.copytree(self.models["parent"], self.here / "parent"))

    @cached_property
    def run(self) -> Path:
        return Path(shutil.copytree(self.run_folder(), self.here / "run", symlinks=True))

    @cached_property
    def data(self) -> Path:
        return Path(shutil.copy(self.text, self.here / "data.txt"))

    @cached_property
    def recipe(self) -> Path:
        (self.here / "recipe.yaml").write_text(RECIPE)
        return self.here / "recipe.yaml"

    @property
    def out(self) -> Path:
        return self.here / "out"

    def command(self, words: Iterable[str]) -> list[str]:
        """The words of a command with paths for their placeholders."""
        filled = []
        for word in words:
            for name in ("parent", "run", "data", "recipe", "out", "here"):
                if f"{{{name}}}" in word:
                    word = word.replace(f"{{{name}}}", str(getattr(self, name)))
            filled.append(word)
        return filled


RECIPE = """\
data: {sequence_length: 16, calibration_sequences: 4, scoring_sequences: 2, evaluation_sequences: 2,
       training_sequences: 8}
library: {ffn_fractions: [0.5]}
local_distillation: {tokens: 0, coupled_tokens: 0}
scoring: {batch_tokens: 64}
search: {refine_passes: 0, frontier_points: 3}
costs: {time_child: false}
completion_tokens: 0
"""

Harm = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        name: What is wrong.
        command: Words of the command.
        word: Part of the message, in any case.
        code: Exit code.
        harm: Makes the bad input.
    """

    name: str
    command: tuple[str, ...]
    word: str
    code: int = 2
    harm: Harm = lambda place: None


COMPRESS = ("compress", "{parent}", "{out}", "--data", "{data}", "--params", "0.95", "--recipe", "{recipe}",
            "--until", "costs")  # fmt: skip
INSPECT = ("inspect", "{parent}")
EVALUATE = ("evaluate", "{parent}", "--data", "{data}", "--sequences", "2", "--sequence-length", "16")
SEARCH = ("search", "{run}", "--params", "0.95")
DISTILL = ("distill", "{run}", "--tokens", "64")
COSTS = ("costs", "{parent}", "--recipe", "{recipe}", "--context", "32")


def with_option(command: tuple[str, ...], name: str, value: str) -> tuple[str, ...]:
    """A command with another value of an option; a value of None leaves the option out."""
    if name in command:
        at = command.index(name)
        command = command[:at] + command[at + 2 :]
    return (*command, name, value)


# ---------------------------------------------------------------------------------------------- harm to files


def write(name: str, content: str | bytes) -> Harm:
    """A file of the case's folder."""

    def harm(place: Place) -> None:
        place.parent, place.data  # noqa: B018
        path = place.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return harm


def remove(name: str) -> Harm:
    return lambda place: (place.parent / name).unlink()


def replaced_by_folder(name: str) -> Harm:
    def harm(place: Place) -> None:
        (place.parent / name).unlink()
        (place.parent / name).mkdir()

    return harm


def link(name: str, target: str) -> Harm:
    def harm(place: Place) -> None:
        place.parent  # noqa: B018
        path = place.here / name
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return harm


def fifo(name: str) -> Harm:
    def harm(place: Place) -> None:
        place.parent  # noqa: B018
        path = place.here / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return harm


def config(**changes: Any) -> Harm:
    """Change keys of the parent's config."""

    def harm(place: Place) -> None:
        path = place.parent / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    """Change the tensors of the parent."""

    def harm(place: Place) -> None:
        path = place.parent / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

    return harm


def cut(name: str, size: int) -> Harm:
    return lambda place: os.truncate(place.parent / name, size)


def safetensors_of(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file of any header."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def index(content: Any) -> Harm:
    """Put an index beside the parent's weights, which get a name of their own: a single file is read without it."""

    def harm(place: Place) -> None:
        (place.parent / "model.safetensors").rename(place.parent / "model-00001-of-00001.safetensors")
        text = content if isinstance(content, str) else json.dumps(content)
        (place.parent / "model.safetensors.index.json").write_text(text)

    return harm


def array(name: str, values: Any, **how: Any) -> Harm:
    return lambda place: np.save(place.here / name, np.asarray(values, **how), allow_pickle=True)


def table(name: str, columns: dict[str, list[Any]]) -> Harm:
    return lambda place: pyarrow.parquet.write_table(pyarrow.table(columns), place.here / name)


def set_to(name: str, value: float) -> Harm:
    """One number of a tensor of the parent."""
    return weights(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


# ---------------------------------------------------------------------------------------------- parents

_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "layers a word": ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    "layers negative": ({"num_hidden_layers": -1}, "layer"),
    "layers zero": ({"num_hidden_layers": 0}, "layer"),
    "layers a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    "layers null": ({"num_hidden_layers": None}, "num_hidden_layers"),
    "layers a list": ({"num_hidden_layers": [2]}, "num_hidden_layers"),
    "layers more than weights": ({"num_hidden_layers": 3}, "model.layers.2"),
    "layers fewer than weights": ({"num_hidden_layers": 1}, "model.layers.1"),
    "hidden size zero": ({"hidden_size": 0}, "config.json"),
    "hidden size negative": ({"hidden_size": -32}, "config.json"),
    "hidden size a word": ({"hidden_size": "wide"}, "hidden_size"),
    "hidden size other": ({"hidden_size": 64}, "config.json"),
    "vocabulary zero": ({"vocab_size": 0}, "config.json"),
    "vocabulary negative": ({"vocab_size": -5}, "config.json"),
    "vocabulary a word": ({"vocab_size": "many"}, "vocab_size"),
    "vocabulary larger": ({"vocab_size": 1024}, "config.json"),
    "vocabulary smaller": ({"vocab_size": 100}, "config.json"),
    "heads zero": ({"num_attention_heads": 0}, "config"),
    "heads negative": ({"num_attention_heads": -8}, "config"),
    "heads a word": ({"num_attention_heads": "eight"}, "num_attention_heads"),
    "heads do not divide": ({"num_attention_heads": 3}, "config"),
    "KV heads zero": ({"num_key_value_heads": 0}, "config"),
    "KV heads do not divide": ({"num_key_value_heads": 3}, "config"),
    "KV heads a word": ({"num_key_value_heads": "four"}, "num_key_value_heads"),
    "FFN width zero": ({"intermediate_size": 0}, "config"),
    "FFN width negative": ({"intermediate_size": -1}, "config"),
    "FFN width a word": ({"intermediate_size": "wide"}, "intermediate_size"),
    "FFN width null": ({"intermediate_size": None}, "intermediate_size"),
    "head size zero": ({"head_dim": 0}, "config"),
    "head size a word": ({"head_dim": "x"}, "head_dim"),
    "activation unknown": ({"hidden_act": "zork"}, "zork"),
    "activation a number": ({"hidden_act": 5}, "hidden_act"),
    "epsilon a word": ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    "rope scaling unknown": ({"rope_parameters": {"rope_type": "zonk", "rope_theta": 1e4}}, "config"),
    "rope scaling a word": ({"rope_parameters": "x"}, "rope_parameters"),
    "positions zero": ({"max_position_embeddings": 0}, "max_position_embeddings"),
    "positions negative": ({"max_position_embeddings": -4}, "max_position_embeddings"),
    "positions a word": ({"max_position_embeddings": "long"}, "max_position_embeddings"),
    "dtype unknown": ({"dtype": "zork"}, "config"),
    "dtype a number": ({"dtype": 5}, "config"),
    "tie a word": ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings"),
    "type unknown": ({"model_type": "zorgon"}, "zorgon"),
    "type a number": ({"model_type": 5}, "config"),
    "type null": ({"model_type": None}, "model type"),
    "type of an encoder": ({"model_type": "t5"}, "T5"),
    "type of images": ({"model_type": "vit"}, "causal"),
    "quantized by GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantiz"),
    "quantized by bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "bitsandbytes",
    ),
    "quantized by AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantiz"),
    "quantized in an unknown way": ({"quantization_config": {"quant_method": "zork"}}, "zork"),
    "quantization without a method": ({"quantization_config": {}}, "format"),
    "quantization a word": ({"quantization_config": "int4"}, "config"),
    "quantization a list": ({"quantization_config": [1]}, "config"),
    "plan a word": ({"layersmith": "x"}, "config.json"),
    "plan a list": ({"layersmith": [1]}, "config.json"),
    "plan empty": ({"layersmith": {}}, "config.json"),
    "plan a number": ({"layersmith": 5}, "config.json"),
    "plan without layers": (
        {"layersmith": {"decoder_layers": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]}},
        "config.json",
    ),
    "plan with layers a word": (
        {
            "layersmith": {
                "decoder_layers": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"],
                "layers": "two",
            }
        },
        "config.json",
    ),
    "plan names what is not there": (
        {"layersmith": {"decoder_layers": ["transformers.models.llama.zork.Layer"], "layers": [{}, {}]}},
        "config.json",
    ),
    "block configs a word": ({"block_configs": "x"}, "block_configs"),
    "block configs too few": ({"block_configs": [{"attention": {"num_key_value_heads": 4}, "ffn": {}}]}, "block_config"),
    "block configs of an unknown key": ({"block_configs": [{"zork": 1}] * 2}, "zork"),
}  # fmt: skip

_HEADER = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
_WEIGHT_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "model.safetensors"),
    "three bytes": (b"abc", "model.safetensors"),
    "header of 2**60 bytes": (safetensors_of(_HEADER, size=2**60), "model.safetensors"),
    "header of 99 MB that is not there": (safetensors_of(b"{}", size=99_000_000), "model.safetensors"),
    "header not JSON": (safetensors_of(b"{zork"), "model.safetensors"),
    "header not UTF-8": (safetensors_of(b"\xff\xfe{}"), "model.safetensors"),
    "header deep": (safetensors_of(b'{"x":' + DEEP.encode()), "model.safetensors"),
    "header a list": (safetensors_of(b"[1, 2]"), "model.safetensors"),
    "header empty": (safetensors_of(b"{}"), "has no weights for"),
    "dtype unknown": (safetensors_of(_HEADER.replace(b"F32", b"Q9"), bytes(8)), "model.safetensors"),
    "offsets beyond the file": (safetensors_of(_HEADER.replace(b"8]", b"800]"), bytes(8)), "model.safetensors"),
    "shape too large": (safetensors_of(_HEADER.replace(b"[2]", b"[4294967296,4294967296]")), "model.safetensors"),
    "other tensors": (safetensors_of(_HEADER, bytes(8)), "has no weights for"),
    "a pickle": (b"\x80\x04K\x01.", "model.safetensors"),
    "a zip": (b"PK\x03\x04" + bytes(60), "model.safetensors"),
}

_Q = "model.layers.1.self_attn.q_proj.weight"
_WEIGHTS: dict[str, tuple[Harm, str]] = {
    "truncated": (cut("model.safetensors", 40_000), "truncated"),
    "missing": (remove("model.safetensors"), "no safetensors weights"),
    "a folder": (replaced_by_folder("model.safetensors"), "model.safetensors"),
    "a dangling link": (link("parent/model.safetensors", "nowhere"), "model.safetensors"),
    "a fifo": (fifo("parent/model.safetensors"), "model.safetensors"),
    "/dev/zero": (link("parent/model.safetensors", "/dev/zero"), "model.safetensors"),
    "NaN in an attention": (set_to(_Q, float("nan")), _Q),
    "NaN in the embedding": (set_to("model.embed_tokens.weight", float("nan")), "model.embed_tokens.weight"),
    "infinity in an FFN": (set_to("model.layers.0.mlp.up_proj.weight", float("inf")), "mlp.up_proj.weight"),
    "minus infinity in the head": (set_to("lm_head.weight", float("-inf")), "lm_head.weight"),
    "NaN in a norm": (set_to("model.norm.weight", float("nan")), "model.norm.weight"),
    "one tensor missing": (weights(lambda tensors: tensors.pop(_Q)), _Q),
    "a norm missing": (weights(lambda tensors: tensors.pop("model.norm.weight")), "model.norm.weight"),
    "one tensor too many": (weights(lambda tensors: tensors.update(zork=torch.ones(2))), "zork"),
    "a shape other": (weights(lambda tensors: tensors.update({_Q: torch.ones(4, 4)})), "q_proj"),
}

_INDEX_NAME = "model.safetensors.index.json"
_INDICES: dict[str, Any] = {
    "not JSON": "{zork",
    "empty": "",
    "deep": DEEP,
    "a list": [1],
    "a number": 5,
    "no weight_map": {"metadata": {}},
    "weight_map a list": {"weight_map": ["model.safetensors"]},
    "weight_map of numbers": {"weight_map": {"x": 5}},
    "weight_map a word": {"weight_map": "x"},
    "weight_map null": {"weight_map": None},
    "weight_map empty": {"weight_map": {}},
    "a shard that is missing": {"weight_map": {"x": "model-00002-of-00002.safetensors"}},
    "a path above the folder": {"weight_map": {"x": "../secret.safetensors"}},
    "an absolute path": {"weight_map": {"x": "/etc/passwd"}},
    "an empty name": {"weight_map": {"x": ""}},
    "a name with NUL": {"weight_map": {"x": "a\0b.safetensors"}},
    "an overlong name": {"weight_map": {"x": LONG}},
}

_INDEX_WORDS = {"weight_map empty": "no safetensors weights", "an absolute path": "passwd"}

_CONFIG_FILES: dict[str, tuple[Harm, str]] = {
    "missing": (remove("config.json"), "config.json"),
    "empty": (write("parent/config.json", ""), "config"),
    "not JSON": (write("parent/config.json", "{zork"), "config"),
    "a list": (write("parent/config.json", "[1]"), "config"),
    "a number": (write("parent/config.json", "5"), "config"),
    "deep": (write("parent/config.json", DEEP), "config"),
    "not UTF-8": (write("parent/config.json", b"\xff\xfe\x00"), "config"),
    "huge number": (write("parent/config.json", '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"), "config"),
    "a folder": (replaced_by_folder("config.json"), "config.json"),
    "a dangling link": (link("parent/config.json", "nowhere"), "config.json"),
    "a fifo": (fifo("parent/config.json"), "config.json"),
    "/dev/zero": (link("parent/config.json", "/dev/zero"), "config.json"),
}

_TOKENIZERS: dict[str, Harm] = {
    "missing": lambda place: [(place.parent / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
    "empty": write("parent/tokenizer.json", ""),
    "not JSON": write("parent/tokenizer.json", "{zork"),
    "a list": write("parent/tokenizer.json", "[1]"),
    "deep": write("parent/tokenizer.json", DEEP),
    "of an unknown model": write("parent/tokenizer.json", '{"model": {"type": "Zork"}}'),
    "config not JSON": write("parent/tokenizer_config.json", "{zork"),
    "config a list": write("parent/tokenizer_config.json", "[1]"),
    "config of an unknown class": lambda place: (
        (place.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "Zork"}'),
        (place.parent / "tokenizer.json").unlink(),
    ),
}

_PARENT_PATHS: dict[str, tuple[str, Harm, str]] = {
    "missing": ("/no/such/model", lambda place: None, "no such folder"),
    "a hub name, offline": ("no-one/nothing", lambda place: None, "no-one/nothing"),
    "a file": ("{here}/afile", write("afile", "x"), "no such folder"),
    "an empty folder": ("{here}/empty", lambda place: (place.here / "empty").mkdir(), "config.json"),
    "a link to itself": ("{here}/loop", link("loop", "loop"), "loop"),
    "5000 characters": (LONG, lambda place: None, "too long"),
    "a name of 300 characters": ("{here}/" + "x" * 300, lambda place: None, "too long"),
    "empty": ("", lambda place: None, "config.json"),
    "/dev/null": ("/dev/null", lambda place: None, "/dev/null"),
    "a dangling link": ("{here}/dangling", link("dangling", "nowhere"), "dangling"),
    "a run": ("{run}", lambda place: None, "config.json"),
}


def _parents() -> Iterable[Case]:
    for name, (changes, word) in _CONFIGS.items():
        yield Case(f"config: {name}", COMPRESS, word, harm=config(**changes))
    for name, (harm, word) in _CONFIG_FILES.items():
        yield Case(f"config.json: {name}", COMPRESS, word, harm=harm)
    for name, (content, word) in _WEIGHT_FILES.items():
        yield Case(f"weights: {name}", COMPRESS, word, harm=write("parent/model.safetensors", content))
    for name, (harm, word) in _WEIGHTS.items():
        yield Case(f"weights: {name}", COMPRESS, word, harm=harm)
    for name, content in _INDICES.items():
        yield Case(f"index: {name}", COMPRESS, _INDEX_WORDS.get(name, "index"), harm=index(content))
    for name, harm in _TOKENIZERS.items():
        yield Case(f"tokenizer: {name}", COMPRESS, "tokenizer", harm=harm)
    for name, (path, harm, word) in _PARENT_PATHS.items():
        yield Case(f"parent: {name}", tuple(path if w == "{parent}" else w for w in COMPRESS), word, harm=harm)
    # The same harm under other commands, which read a parent in other ways.
    for command in (INSPECT, EVALUATE, COSTS):
        for name in ("layers a word", "quantized by GPTQ", "quantized in an unknown way", "plan a word", "heads zero"):
            if command is not INSPECT or not name.startswith("quantized"):
                changes, word = _CONFIGS[name]
                yield Case(f"{command[0]}, config: {name}", command, word, harm=config(**changes))
        yield Case(f"{command[0]}, config.json: deep", command, "config", harm=write("parent/config.json", DEEP))
    for command in (EVALUATE, COSTS):
        for name in ("empty", "header of 2**60 bytes", "header deep"):
            content, word = _WEIGHT_FILES[name]
            yield Case(f"{command[0]}, weights: {name}", command, word, harm=write("parent/model.safetensors", content))
        yield Case(f"{command[0]}, weights: NaN", command, _Q, harm=set_to(_Q, float("nan")))
        yield Case(
            f"{command[0]}, index: weight_map a list", command, "index", harm=index(_INDICES["weight_map a list"])
        )
    yield Case("streamed, weights: NaN", (*COMPRESS, "--set", "stream=always"), _Q, harm=set_to(_Q, float("nan")))


# ---------------------------------------------------------------------------------------------- data

_TEXT = "The quick brown fox jumps over the lazy dog. " * 400
_LINE = json.dumps({"text": _TEXT}) + "\n"
_DATA: dict[str, tuple[str, Harm, str]] = {
    "missing": ("{here}/none.txt", lambda place: None, "no such file"),
    "a hub name, offline": ("no-one/data", lambda place: None, "no-one/data"),
    "empty": ("{here}/d.txt", write("d.txt", ""), "no text"),
    "white space": ("{here}/d.txt", write("d.txt", " \n\t\n" * 100), "no text"),
    "an empty folder": ("{here}/d", lambda place: (place.here / "d").mkdir(), "empty folder"),
    "a folder of hidden files": ("{here}/d", write("d/.hidden", _TEXT), "empty folder"),
    "a folder of pictures": ("{here}/d", write("d/a.png", b"\x89PNG\r\n\x1a\n\xff\xfe"), "no text"),
    "binary": ("{here}/d.txt", write("d.txt", b"\xff\xfe\x00" * 100), "UTF-8"),
    "Latin-1": ("{here}/d.txt", write("d.txt", "Grüße ".encode("latin-1") * 100), "UTF-8"),
    "UTF-16": ("{here}/d.txt", write("d.txt", _TEXT.encode("utf-16")), "UTF-8"),
    "a zip": ("{here}/d.zip", write("d.zip", b"PK\x03\x04\xff\xff" * 10), "UTF-8"),
    "three words": ("{here}/d.txt", write("d.txt", "one two three"), "too few"),
    "JSONL binary": ("{here}/d.jsonl", write("d.jsonl", b"\xff\xfe\x00"), "UTF-8"),
    "JSONL with a broken line": ("{here}/d.jsonl", write("d.jsonl", _LINE + "{zork\n"), "line 2"),
    "JSONL without text": ("{here}/d.jsonl", write("d.jsonl", '{"a": 1}\n'), "no field with text"),
    "JSONL without the field": (
        "{here}/d.jsonl",
        write("d.jsonl", '{"a": "b"}\n'),
        "no field",
    ),
    "JSONL with many fields": (
        "{here}/d.jsonl",
        write("d.jsonl", json.dumps({f"field{i}": i for i in range(900)})),
        "no field with text",
    ),
    "JSONL of numbers": ("{here}/d.jsonl", write("d.jsonl", "1\n2\n"), "int"),
    "JSONL deep": ("{here}/d.jsonl", write("d.jsonl", DEEP), "line 1"),
    "JSONL with a huge number": ("{here}/d.jsonl", write("d.jsonl", '{"text": ' + "9" * 9999 + "}"), "line 1"),
    "JSONL with half a surrogate": ("{here}/d.jsonl", write("d.jsonl", '{"text": "a\\ud800b"}\n'), "surrogate"),
    "JSONL empty": ("{here}/d.jsonl", write("d.jsonl", ""), "no text"),
    "JSONL of empty texts": ("{here}/d.jsonl", write("d.jsonl", '{"text": ""}\n' * 9), "no text"),
    "JSONL of chats, no template": (
        "{here}/d.jsonl",
        write("d.jsonl", json.dumps({"messages": [{"role": "user", "content": _TEXT}]})),
        "chat template",
    ),
    "JSONL of broken chats": ("{here}/d.jsonl", write("d.jsonl", '{"messages": [5]}\n'), "chat message"),
    "JSONL of chats without content": ("{here}/d.jsonl", write("d.jsonl", '{"messages": [{"x": 1}]}\n'), "content"),
    "JSON deep": ("{here}/d.json", write("d.json", DEEP), "JSON"),
    "JSON with a huge number": ("{here}/d.json", write("d.json", "[" + "9" * 9999 + "]"), "JSON"),
    "JSON a number": ("{here}/d.json", write("d.json", "5"), "int"),
    "Parquet garbage": ("{here}/d.parquet", write("d.parquet", b"PAR1" + b"x" * 99), "Parquet"),
    "Parquet empty": ("{here}/d.parquet", write("d.parquet", b""), "Parquet"),
    "Parquet without text": ("{here}/d.parquet", table("d.parquet", {"a": [1, 2]}), "no field with text"),
    "Parquet without rows": ("{here}/d.parquet", table("d.parquet", {"text": []}), "no text"),
    "saved dataset broken": ("{here}/d", write("d/dataset_info.json", "{zork"), "dataset"),
    "saved datasets broken": ("{here}/d", write("d/dataset_dict.json", "[]"), "dataset"),
    "array garbage": ("{here}/d.npy", write("d.npy", b"x" * 99), "token ids"),
    "array empty file": ("{here}/d.npy", write("d.npy", b""), "token ids"),
    "array of objects": ("{here}/d.npy", array("d.npy", [{}, {}], dtype=object), "token ids"),
    "array of floats": ("{here}/d.npy", array("d.npy", np.arange(9999) % 500, dtype=np.float32), "float32"),
    "array of NaN": ("{here}/d.npy", array("d.npy", [float("nan")] * 999), "float64"),
    "array of words": ("{here}/d.npy", array("d.npy", ["a", "b"] * 999), "token ids"),
    "array of complex": ("{here}/d.npy", array("d.npy", [1j] * 999), "complex"),
    "array of truth values": ("{here}/d.npy", array("d.npy", [True] * 9999), "bool"),
    "array negative": ("{here}/d.npy", array("d.npy", -np.arange(9999)), "negative"),
    "array of ids too large": ("{here}/d.npy", array("d.npy", np.arange(9999) + 10**6), "token id"),
    "array of uint64 beyond int64": ("{here}/d.npy", array("d.npy", np.arange(9999, dtype=np.uint64) + np.uint64(2**63)), "token id"),
    "array empty": ("{here}/d.npy", array("d.npy", [], dtype=np.int64), "few"),
    "array a number": ("{here}/d.npy", array("d.npy", 5), "few"),
    "array short": ("{here}/d.npy", array("d.npy", [1] * 20), "few"),
    "safetensors without tokens": ("{parent}/model.safetensors", lambda place: None, "tokens"),
    "safetensors of floats": (
        "{here}/d.safetensors",
        lambda place: save_file({"tokens": torch.ones(9999)}, place.here / "d.safetensors"),
        "float32",
    ),
    "safetensors damaged": ("{here}/d.safetensors", write("d.safetensors", b"x" * 20), "d.safetensors"),
    "safetensors empty": ("{here}/d.safetensors", write("d.safetensors", b""), "d.safetensors"),
    "a fifo": ("{here}/d.txt", fifo("d.txt"), "d.txt"),
    "/dev/zero": ("/dev/zero", lambda place: None, "/dev/zero"),
    "/dev/null": ("/dev/null", lambda place: None, "/dev/null"),
    "a dangling link": ("{here}/d.txt", link("d.txt", "nowhere"), "d.txt"),
    "a link to itself": ("{here}/d.txt", link("d.txt", "d.txt"), "d.txt"),
    "5000 characters": (LONG, lambda place: None, "too long"),
    "a name of 300 characters": ("{here}/" + "x" * 300, lambda place: None, "too long"),
    "empty name": ("", lambda place: None, "data"),
    "mixture not YAML": ("{here}/d.yaml", write("d.yaml", "mixture: [1,"), "d.yaml"),
    "mixture of nothing": ("{here}/d.yaml", write("d.yaml", "mixture: []"), "mixture"),
    "mixture without a source": ("{here}/d.yaml", write("d.yaml", "mixture: [{weight: 1}]"), "source"),
    "mixture with a weight of zero": ("{here}/d.yaml", write("d.yaml", "mixture: [{source: data.txt, weight: 0}]"), "weight"),
    "mixture with a weight of NaN": ("{here}/d.yaml", write("d.yaml", "mixture: [{source: data.txt, weight: .nan}]"), "weight"),
    "mixture with an infinite weight": ("{here}/d.yaml", write("d.yaml", "mixture: [{source: data.txt, weight: .inf}]"), "weight"),
    "mixture of what is missing": ("{here}/d.yaml", write("d.yaml", "mixture: [{source: none.txt, weight: 1}]"), "none.txt"),
    "mixture deep": ("{here}/d.yaml", write("d.yaml", "mixture: " + DEEP), "d.yaml"),
}  # fmt: skip


def _data() -> Iterable[Case]:
    for name, (path, harm, word) in _DATA.items():
        yield Case(f"data: {name}", tuple(path if w == "{data}" else w for w in COMPRESS), word, harm=harm)
    for name in ("missing", "JSONL deep", "array of floats", "array of ids too large", "a fifo", "5000 characters"):
        path, harm, word = _DATA[name]
        command = with_option(EVALUATE, "--data", path)
        yield Case(f"evaluate, data: {name}", command, word, harm=harm)
        yield Case(f"distill, data: {name}", (*DISTILL, "--data", path), word, harm=harm)
    for name in ("missing", "JSONL deep"):
        path, harm, word = _DATA[name]
        yield Case(
            f"evaluation source: {name}", (*COMPRESS, "--set", f"data.evaluation_source={path}"), word, harm=harm
        )


# ---------------------------------------------------------------------------------------------- options

_BUDGETS: tuple[tuple[str, str, str, int], ...] = (
    ("--params", "0", "more than nothing", 2),
    ("--params", "-1", "more than nothing", 2),
    ("--params", "1.5", "at most 1", 2),
    ("--params", "nan", "not a budget", 2),
    ("--params", "inf", "not a budget", 2),
    ("--params", "-inf", "not a budget", 2),
    ("--params", "1e400", "--params", 2),
    ("--params", "1e9999999", "--params", 2),
    ("--params", "1e-400", "--params", 2),
    ("--params", "7 parsecs", "parsecs", 2),
    ("--params", "", "not a budget", 2),
    ("--params", "abc", "not a budget", 2),
    ("--params", "100GiB", "GiB", 2),
    ("--params", "-5GiB", "more than nothing", 2),
    ("--params", "٠.٧", "not a budget", 2),
    ("--params", "0.7.5", "not a budget", 2),
    ("--params", "150%", "more than the parent", 2),
    ("--params", "0.01", "smallest", 3),
    ("--params", "1K", "smallest", 3),
    ("--params", "0.5%", "smallest", 3),
    ("--active-params", "-1", "more than nothing", 2),
    ("--active-params", "5ms", "unit", 2),
    ("--weights", "5", "unit", 2),
    ("--weights", "12ms", "unit", 2),
    ("--weights", "1e400GiB", "--weights", 2),
    ("--weights", "1KiB", "smallest", 3),
    ("--kv-cache", "0", "more than nothing", 2),
    ("--kv-cache", "x", "not a budget", 2),
    ("--memory", "nanGiB", "not a budget", 2),
    ("--memory", "10 GiBB", "unit", 2),
    ("--memory", "1 KiB", "smallest", 3),
    ("--ttft", "0ms", "more than nothing", 2),
    ("--ttft", "5GiB", "unit", 2),
    ("--ttft", "1e400ms", "--ttft", 2),
    ("--ttft", "1e-400ms", "--ttft", 2),
    ("--time-per-token", "-3ms", "more than nothing", 2),
    ("--time-per-token", "3", "unit", 2),
    ("--throughput", "0", "more than nothing", 2),
    ("--throughput", "5 parsecs", "unit", 2),
    ("--throughput", "1e400tokens/s", "--throughput", 2),
    ("--throughput", "1e-400tokens/s", "--throughput", 2),
)
_OPTIONS: tuple[tuple[str, str, str], ...] = (
    ("--batch", "0", "batch"),
    ("--batch", "-1", "batch"),
    ("--batch", "x", "batch"),
    ("--batch", "1.5", "batch"),
    ("--batch", str(10**30), "batch"),
    ("--context", "0", "context"),
    ("--context", "-5", "context"),
    ("--context", "long", "context"),
    ("--context", str(10**400), "context"),
    ("--generate", "0", "generate"),
    ("--generate", "99999", "generate"),
    ("--until", "xyz", "no such stage"),
    ("--until", "", "no such stage"),
    ("--device", "cuda", "CUDA"),
    ("--device", "cuda:7", "CUDA"),
    ("--device", "meta", "meta"),
    ("--device", "mps", "mps"),
    ("--device", "xpu", "xpu"),
    ("--device", "tpu", "unknown"),
    ("--device", "", "device"),
    ("--device", "5", "device"),
    ("--descriptor", "nomod:Cls", "nomod"),
    ("--descriptor", "json:Cls", "Cls"),
    ("--descriptor", "json:JSONDecoder", "ModelDescriptor"),
    ("--descriptor", "zork", "zork"),
    ("--descriptor", ":", "descriptor"),
    ("--descriptor", "", "descriptor"),
    ("--descriptor", "..x:Y", "descriptor"),
    ("--recipe", "none.yaml", "no such recipe"),
    ("--recipe", ".", "recipe"),
    ("--recipe", "/dev/zero", "/dev/zero"),
    ("--recipe", LONG, "too long"),
    ("--set", "zork=1", "zork"),
    ("--set", "scoring.zork=1", "zork"),
    ("--set", "seed", "section.key=value"),
    ("--set", "=", "--set"),
    ("--set", "", "--set"),
    ("--set", "seed.x=1", "seed"),
    ("--set", "seed=[", "seed"),
    ("--set", f"seed={DEEP[:20000]}", "seed"),
    ("--zzz", "1", "--zzz"),
)
_DESCRIPTORS: dict[str, str] = {
    "syntax": "def (:",
    "raises": "raise RuntimeError('boo')",
    "exits": "import sys; sys.exit(0)",
    "asserts": "assert False",
    "imports": "import nothing_there_xyz",
    "recurses": "def f(): f()\nf()",
    "null": "x = 1\0",
}


def _options() -> Iterable[Case]:
    for option, value, word, code in _BUDGETS:
        command = COMPRESS if option == "--params" else tuple(w for w in COMPRESS if w not in ("--params", "0.95"))
        yield Case(f"{option} {value}", with_option(command, option, value), word, code)
    for option, value, word in _OPTIONS:
        command = COMPRESS if option == "--set" else with_option(COMPRESS, option, value)
        yield Case(f"{option} {value[:20]!r}", (*command, option, value) if option == "--set" else command, word)
    for name, content in _DESCRIPTORS.items():
        module = f"descriptor_{name}"
        yield Case(
            f"--descriptor that {name}", (*COMPRESS, "--descriptor", f"{module}:X"), module,
            harm=write(f"{module}.py", content),
        )  # fmt: skip
    nothing = ("--params", "0.95")
    yield Case("no budget", tuple(w for w in COMPRESS if w not in nothing), "no budget")
    yield Case("no data", tuple(w for w in COMPRESS if w not in ("--data", "{data}")), "--data")
    yield Case("no command", ("frobnicate",), "frobnicate")
    yield Case("no arguments", ("compress",), "parent")


# ---------------------------------------------------------------------------------------------- recipes

_SETTINGS: tuple[tuple[str, str], ...] = (
    ("seed=abc", "seed"),
    ("seed=1.5", "seed"),
    (f"seed={2**70}", "seed"),
    ("seed=-1", "seed"),
    ("seed=.nan", "seed"),
    ("seed=null", "seed"),
    ("device=meta", "meta"),
    ("device=5", "device"),
    ("dtype=foo", "dtype"),
    ("dtype=int8", "dtype"),
    ("dtype=5", "dtype"),
    ("stream=foo", "stream"),
    ("prompts=hello", "prompts"),
    ("completion_tokens=-1", "completion_tokens"),
    (f"completion_tokens={2**70}", "completion_tokens"),
    ("data=5", "data"),
    ("data=null", "data"),
    ("data.sequence_length=1", "sequence_length"),
    ("data.sequence_length=48.5", "sequence_length"),
    ("data.sequence_length=true", "sequence_length"),
    (f"data.sequence_length={2**70}", "sequence_length"),
    ("data.calibration_sequences=0", "calibration_sequences"),
    (f"data.calibration_sequences={10**30}", "calibration_sequences"),
    ("data.training_sequences=-1", "training_sequences"),
    ("data.overlap=zork", "overlap"),
    ("library=5", "library"),
    ("library.ffn_fractions=[.nan]", "ffn_fractions"),
    ("library.ffn_fractions=[.inf]", "ffn_fractions"),
    ("library.ffn_fractions=[1.5]", "ffn_fractions"),
    ("library.ffn_fractions=[0]", "ffn_fractions"),
    ("library.ffn_fractions=0.5", "ffn_fractions"),
    ("library.ffn_sizes=[100000]", "ffn_sizes"),
    ("library.ffn_sizes=[64]", "ffn_sizes"),
    ("library.ffn_sizes=[0]", "ffn_sizes"),
    ("library.ffn_sizes=[x]", "ffn_sizes"),
    ("library.ffn_multiple=100000", "ffn_multiple"),
    ("library.kv_heads=[7]", "kv_heads"),
    ("library.kv_heads=[1000]", "kv_heads"),
    ("library.kv_methods=[zork]", "kv_methods"),
    ("library.linear=[zork]", "linear"),
    ("library.keep_layers=[99]", "keep_layers"),
    ("library.keep_layers=[-1]", "keep_layers"),
    ("library.statistics_gib=0", "statistics_gib"),
    ("library.statistics_gib=.inf", "statistics_gib"),
    ("library.statistics_gib=.nan", "statistics_gib"),
    ("local_distillation.tokens=-1", "tokens"),
    ("local_distillation.learning_rate=.nan", "learning_rate"),
    ("local_distillation.learning_rate=0", "learning_rate"),
    ("local_distillation.kinds=[zork]", "kinds"),
    ("local_distillation.memory_gib=.inf", "memory_gib"),
    ("scoring.mode=foo", "mode"),
    ("scoring.objective=foo", "objective"),
    ("scoring.samples=0", "samples"),
    ("scoring.exact_passes=.inf", "exact_passes"),
    ("scoring.precision=.nan", "precision"),
    ("scoring.settled=.nan", "settled"),
    ("scoring.batch_tokens=0", "batch_tokens"),
    ("scoring.spill_gib=.inf", "spill_gib"),
    ("distillation.tokens=-3", "tokens"),
    ("distillation.finalists=0", "finalists"),
    ("distillation.temperature=.inf", "temperature"),
    ("distillation.warmup=2", "warmup"),
    ("distillation.kl=.nan", "kl"),
    ("search.keep_layers=[99]", "keep_layers"),
    ("search.keep_layers=[-1]", "keep_layers"),
    ("search.keep_attentions=[99]", "keep_attentions"),
    ("search.uniform_groups=[[0, 77]]", "uniform_groups"),
    ("search.uniform_groups=foo", "uniform_groups"),
    ("search.tensor_parallel=0", "tensor_parallel"),
    ("search.max_removed_ffns=-1", "max_removed_ffns"),
    ("search.refine_passes=.inf", "refine_passes"),
    ("search.frontier_points=1", "frontier_points"),
    ("search.limits=[{costs: {zonk: 1}, at_most: 5}]", "zonk"),
    ("search.limits=[{costs: {weights: .nan}, at_most: 5GiB}]", "costs"),
    ("search.limits=[{costs: {weights: 1}, at_most: zork}]", "zork"),
    ("search.limits=[{costs: {weights: 1}, at_most: .nan}]", "at_most"),
    ("search.limits=[{costs: {}, at_most: 5GiB}]", "costs"),
    ("costs.device=FooGPU", "FooGPU"),
    ("costs.times=none.csv", "none.csv"),
    ("costs.seconds=.inf", "seconds"),
    ("costs.seconds=-1", "seconds"),
    ("costs.rounds=0", "rounds"),
)
_RECIPES: dict[str, tuple[str | bytes, str]] = {
    "malformed": ("a: [1, ", "recipe"),
    "a list": ("[1]", "mapping"),
    "a word": ("hello", "mapping"),
    "an unknown key": ("sead: 1", "seed"),
    "an unknown key of a section": ("library: {ffn_fraction: [1]}", "ffn_fractions"),
    "a number as a key": ("5: 1", "5"),
    "a list as a key": ("[1]: 1", "recipe"),
    "binary": (b"\xff\xfe\x00", "recipe"),
    "a tag of Python": ("seed: !!python/object/apply:os.system ['true']", "recipe"),
    "deep": ("a: " + DEEP[:20000], "recipe"),
    "a key twice": ("seed: 1\nseed: 2\n", "seed"),
    "a date": ("seed: 2020-01-01", "seed"),
    "a huge number": ("seed: " + "9" * 5000, "recipe"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "recipe"),
}
_TRAINERS: tuple[tuple[str, str], ...] = (
    ("{zork: 1}", "zork"),
    ("{seed: 5}", "seed"),
    ("{output_dir: x}", "output_dir"),
    ("{logging_dir: x}", "logging_dir"),
    ("{push_to_hub: true}", "push_to_hub"),
    ("{hub_token: x}", "hub_token"),
    ("{deepspeed: /etc/passwd}", "deepspeed"),
    ("{fsdp: full_shard}", "fsdp"),
    ("{report_to: [wandb]}", "report_to"),
    ("{optim: adamw_bnb_8bit}", "bitsandbytes"),
    ("{optim: zork}", "zork"),
    ("{dataloader_num_workers: -3}", "dataloader_num_workers"),
    ("{max_grad_norm: abc}", "max_grad_norm"),
    ("{adam_beta1: abc}", "adam_beta1"),
    ("{adam_beta1: 2.0}", "adam_beta1"),
    ("{adam_epsilon: .nan}", "finite"),
    ("{weight_decay: x}", "weight_decay"),
    ("{lr_scheduler_type: zork}", "zork"),
    ("{lr_scheduler_kwargs: 5}", "lr_scheduler_kwargs"),
    ("{load_best_model_at_end: true}", "load_best_model_at_end"),
    ("{accelerator_config: /etc/passwd}", "accelerator_config"),
    ("{warmup_steps: x}", "warmup_steps"),
    ("{logging_steps: 0}", "logging_steps"),
    ("{eval_strategy: zork}", "zork"),
    ("5", "trainer"),
)


def _recipes() -> Iterable[Case]:
    for setting, word in _SETTINGS:
        yield Case(f"--set {setting[:60]}", (*COMPRESS, "--set", setting), word)
    for name, (content, word) in _RECIPES.items():
        command = with_option(COMPRESS, "--recipe", "{here}/bad.yaml")
        yield Case(f"recipe: {name}", command, word, harm=write("bad.yaml", content))
    tokens = (*with_option(COMPRESS, "--until", "statistics"), "--set", "distillation.tokens=256")
    for trainer, word in _TRAINERS:
        yield Case(f"trainer: {trainer}", (*tokens, "--set", f"distillation.trainer={trainer}"), word)
    yield Case("schedule unknown", (*tokens, "--set", "distillation.schedule=zork"), "zork")
    yield Case("logger unknown", (*tokens, "--set", "distillation.report_to=[zork]"), "zork")
    times = (*COMPRESS, "--ttft", "0.9", "--set", "costs.times={here}/t.csv")
    for name, content in {
        "garbage": b"\xc7\xff\x00",
        "empty": b"",
        "no columns": b"a,b\n1,2\n",
        "NUL": b"a\0b\n",
    }.items():
        yield Case(f"times: {name}", times, "t.csv", harm=write("t.csv", content))
    yield Case("times: a folder", times, "t.csv", harm=lambda place: (place.here / "t.csv").mkdir())


# ---------------------------------------------------------------------------------------------- other commands

_OUTS: dict[str, tuple[str, Harm, str]] = {
    "a file": ("{here}/afile", write("afile", "x"), "is a file"),
    "the parent": ("{parent}", lambda place: None, "not a run"),
    "a folder with other files": ("{here}/full", write("full/x", "x"), "not a run"),
    "a name of 300 characters": ("{here}/" + "y" * 300, lambda place: None, "too long"),
    "a path of 5000 characters": (LONG, lambda place: None, "too long"),
    "a link to itself": ("{here}/loop", link("loop", "loop"), "loop"),
    "a dangling link": ("{here}/dangling", link("dangling", "nowhere"), "dangling"),
    "below a file": ("{here}/afile/out", write("afile", "x"), "afile"),
    "below a dangling link": ("{here}/dangling/out", link("dangling", "nowhere/at/all"), "dangling"),
    "/dev/null": ("/dev/null", lambda place: None, "/dev/null"),
    "/proc": ("/proc/zork", lambda place: None, "/proc/zork"),
    "empty": ("", lambda place: None, "not a run"),
}


def _config_of_child(**changes: Any) -> Harm:
    def harm(place: Place) -> None:
        path = place.run / "child/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def _run_json(change: Callable[[dict[str, Any]], object]) -> Harm:
    def harm(place: Place) -> None:
        path = place.run / "run.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return harm


_CHILDREN: dict[str, dict[str, Any]] = {
    "plan a word": {"layersmith": "x"},
    "plan without layers": {
        "layersmith": {"decoder_layers": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]}
    },
    "plan of a class that is missing": {
        "layersmith": {"decoder_layers": ["transformers.models.llama.modeling_llama.Zork"], "layers": [{}, {}]}
    },
    "plan of a function": {"layersmith": {"decoder_layers": ["transformers.utils.hub.os.system"], "layers": [{}, {}]}},
    "plan of what is no layer": {
        "layersmith": {"decoder_layers": ["transformers.PreTrainedModel"], "layers": [{}, {}]}
    },
    "plan of numbers": {"layersmith": {"decoder_layers": [5], "layers": [1, 2]}},
}


def _commands() -> Iterable[Case]:
    for name, (path, harm, word) in _OUTS.items():
        yield Case(f"out: {name}", tuple(path if w == "{out}" else w for w in COMPRESS), word, harm=harm)
    for command in ("search", "distill", "report"):
        more = ("--params", "0.9") if command == "search" else ()
        yield Case(f"{command}: no such run", (command, "{here}/none", *more), "not a run")
        yield Case(f"{command}: not a run", (command, "{here}/full", *more), "not a run", harm=write("full/x", "x"))
        yield Case(f"{command}: a file", (command, "{here}/afile", *more), "not a run", harm=write("afile", "x"))
        yield Case(f"{command}: a long name", (command, LONG, *more), "too long")
        for name, change in {
            "of another format": lambda data: data.update(format=99),
            "a recipe of words": lambda data: data.update(recipe="x"),
            "no budget": lambda data: data.pop("budget"),
            "no parent": lambda data: data.pop("parent"),
            "a parent that is gone": lambda data: data["parent"].update(path="/nowhere/at/all"),
        }.items():
            yield Case(f"{command}: run.json {name}", (command, "{run}", *more), "", harm=_run_json(change))
        for content in ("", "{zork", "[1]", DEEP):
            yield Case(
                f"{command}: run.json {content[:9]!r}", (command, "{run}", *more), "run.json",
                harm=lambda place, content=content: (place.run / "run.json").write_text(content),
            )  # fmt: skip
    yield Case("search: objective", (*SEARCH, "--objective", "zonk"), "zonk")
    yield Case("search: out exists", (*SEARCH, "--out", "{here}/full"), "already there", harm=write("full/x", "x"))
    yield Case("search: out long", (*SEARCH, "--out", LONG), "too long")
    yield Case("search: no solutions", (*SEARCH, "--solutions", "0"), "--solutions")
    yield Case("search: too many solutions", (*SEARCH, "--solutions", "100000"), "--solutions")
    yield Case("search: distance of zero", (*SEARCH, "--min-distance", "0"), "--min-distance")
    yield Case("search: no budget", ("search", "{run}"), "no budget")
    yield Case("search: too small a budget", ("search", "{run}", "--params", "0.01"), "smallest", 3)
    yield Case("search: settings of another section", (*SEARCH, "--set", "seed=1"), "seed")
    yield Case("search: settings unknown", (*SEARCH, "--set", "search.zork=1"), "zork")
    yield Case("search: keep layers", (*SEARCH, "--set", "search.keep_layers=[99]"), "99")
    yield Case("distill: no tokens", (*DISTILL[:2], "--tokens", "0"), "--tokens")
    yield Case("distill: negative tokens", (*DISTILL[:2], "--tokens", "-5"), "--tokens")
    yield Case("distill: too many tokens", (*DISTILL[:2], "--tokens", str(10**30)), "tokens")
    yield Case("distill: no finalists", (*DISTILL, "--finalists", "0"), "finalists")
    yield Case("distill: logger", (*DISTILL, "--report-to", "zonk"), "zonk")
    yield Case("distill: device", (*DISTILL, "--device", "meta"), "meta")
    yield Case("distill: recipe missing", (*DISTILL, "--recipe", "none.yaml"), "none.yaml")
    yield Case(
        "distill: little text", (*DISTILL, "--data", "{here}/few.txt"), "too little text",
        harm=write("few.txt", "one two"),
    )  # fmt: skip
    for option, value, word in (
        ("--sequences", "0", "--sequences"),
        ("--sequences", "-1", "--sequences"),
        ("--sequences", str(10**30), "sequences"),
        ("--sequence-length", "1", "--sequence-length"),
        ("--seed", "x", "--seed"),
        ("--device", "meta", "meta"),
        ("--device", "tpu", "tpu"),
        ("--parent", "/no/such", "/no/such"),
        ("--parent", LONG, "too long"),
        ("--parent", "{here}/other", "vocabulary"),
    ):
        yield Case(
            f"evaluate: {option} {value[:30]}", with_option(EVALUATE, option, value), word,
            harm=lambda place: shutil.copytree(place.models["other vocabulary"], place.here / "other"),
        )  # fmt: skip
    for name, changes in _CHILDREN.items():
        evaluate = tuple("{run}/child" if w == "{parent}" else w for w in EVALUATE)
        yield Case(f"evaluate: child with {name}", evaluate, "config.json", harm=_config_of_child(**changes))
    for option, value, word in (
        ("--on", "FooGPU", "FooGPU"),
        ("--batch", "0", "batch"),
        ("--context", "-1", "context"),
        ("--device", "meta", "meta"),
        ("--csv", "{here}/folder", "folder"),
        ("--csv", "/proc/zork/t.csv", "/proc"),
        ("--csv", "{here}/" + "x" * 300, "too long"),
    ):
        yield Case(
            f"costs: {option} {value[:30]}", with_option(COSTS, option, value), word,
            harm=lambda place: (place.here / "folder").mkdir(),
        )  # fmt: skip
    yield Case("inspect: batch", (*INSPECT, "--batch", "0"), "batch")
    yield Case("inspect: context", (*INSPECT, "--context", "-1"), "context")
    for name, words, word in (
        ("no such target", ("{run}/child", "{out}", "--to", "zork"), "no such target"),
        ("no such child", ("/no/such/child", "{out}", "--to", "padded"), "no such folder"),
        ("a folder that is not empty", ("{run}/child", "{run}", "--to", "padded"), "not empty"),
    ):
        yield Case(f"export: {name}", ("export", *words), word)
    for name, changes in _CHILDREN.items():
        export = ("export", "{run}/child", "{out}", "--to", "vllm")
        yield Case(f"export: child with {name}", export, "config.json", harm=_config_of_child(**changes))
    for name in ("empty", "header of 2**60 bytes"):
        content, word = _WEIGHT_FILES[name]
        export, harm = ("export", "{parent}", "{out}", "--to", "padded"), write("parent/model.safetensors", content)
        yield Case(f"export, weights: {name}", export, word, harm=harm)
    yield Case("demo: out is a file", ("demo", "{here}/afile"), "is a file", harm=write("afile", "x"))
    yield Case("demo: budget", ("demo", "{out}", "--params", "nan"), "not a budget")


CASES: tuple[Case, ...] = (*_parents(), *_data(), *_options(), *_recipes(), *_commands())
