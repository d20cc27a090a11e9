"""Tokenizers as GGUF files hold them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from layersmith.data.pre_tokenizers import NAMES, split_as
from layersmith.errors import UnsupportedModel
from layersmith.export.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    gguf_tokenizer,
)

TEXT = ["the cat sat on the mat; the hat of the cat was 123 flat"]


def byte_level(splitter: Any, **more: Any) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(**more))
    bpe.pre_tokenizer = splitter
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=280, special_tokens=["<end>"]))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def sentencepiece() -> PreTrainedTokenizerFast:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "t", "h", "e", "th", "▁th", "▁the"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e")]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_byte_level_bpe() -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages }}"
    made = gguf_tokenizer(tokenizer, len(tokenizer) + 2)
    assert (made.model, made.pre, made.scores) == ("gpt2", "gpt-2", None)
    assert made.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert made.types[0] == CONTROL
    assert made.types[1] == NORMAL
    assert made.types[-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert made.special == {"eos": 0}
    assert made.metadata()["tokenizer.chat_template"] == "{{ messages }}"
    assert made.merges is not None
    assert "h e" in made.merges


def test_sentencepiece() -> None:
    tokenizer = sentencepiece()
    made = gguf_tokenizer(tokenizer, len(tokenizer))
    assert (made.model, made.merges) == ("llama", None)
    assert made.flags == {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    assert (made.types[0], made.types[1], made.types[3]) == (UNKNOWN, CONTROL, BYTE)
    assert made.scores is not None
    order = [made.scores[made.tokens.index(token)] for token in ("th", "▁th", "▁the")]
    assert order == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(("splits", "ignore_merges"), NAMES)
def test_every_way_to_split_has_its_name(splits: tuple[str, ...], ignore_merges: bool) -> None:
    name = NAMES[splits, ignore_merges]
    tokenizer = byte_level(pre_tokenizers.Whitespace())
    split_as(name, tokenizer.backend_tokenizer)
    assert gguf_tokenizer(tokenizer, 300).pre == name


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (pre_tokenizers.Whitespace(), "no name that is known here for this pre-tokenizer"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "no name that is known here"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), "isolated")]), "no name that is known here"),
    ],
)
def test_other_ways_to_split_are_refused(other: Any, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        gguf_tokenizer(byte_level(other), 300)


def test_more_tokens_than_embeddings_are_refused() -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    with pytest.raises(UnsupportedModel, match="tokens and the embeddings 20 rows"):
        gguf_tokenizer(tokenizer, 20)
