"""Smaller tokenizers cut every text without the dropped tokens as before."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from layersmith.data.vocabulary import tokens_to_keep, with_tokens

WORDS = ["import", "important", "report", "reporter", "imports", "port", "ported", "transport", "über", "naïve", "x"]


def texts(seed: int, count: int = 400) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(count)]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=330, special_tokens=["<end>", "<other>"], initial_alphabet=alphabet)
    made.train_from_iterator(texts(0), trainer)
    made.post_processor = processors.RobertaProcessing(("<end>", 0), ("<other>", 1))
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(texts(0), trainers.UnigramTrainer(vocab_size=60, special_tokens=["<u>"], unk_token="<u>"))
    made.post_processor = processors.TemplateProcessing("<u> $A", special_tokens=[("<u>", 0)])
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(texts(0), trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"]))
    return made


@pytest.mark.parametrize("kind", [byte_level, unigram, word_piece])
def test_texts_without_dropped_tokens_are_cut_as_before(kind: Any) -> None:
    before = kind()
    state = json.loads(before.to_str())
    mine = [text for text in texts(1) if "import" not in text and "über" not in text]
    used = {id for text in mine for id in before.encode(text).ids}
    kept = tokens_to_keep(state, used)
    assert used <= set(kept)
    assert len(kept) < before.get_vocab_size()
    after = Tokenizer.from_str(json.dumps(with_tokens(state, kept)))
    assert after.get_vocab_size() == len(kept)
    compared = 0
    for text in texts(2):  # also texts of the other kind
        ids = before.encode(text).ids
        if set(ids) <= set(kept):
            assert [kept[id] for id in after.encode(text).ids] == ids
            assert after.decode(after.encode(text).ids) == before.decode(ids)
            compared += 1
    assert compared > 50
    for token in ("<end>", "<other>", "<u>", "[UNK]"):
        if before.token_to_id(token) is not None:
            assert kept[after.token_to_id(token)] == before.token_to_id(token)


def test_every_text_can_still_be_written() -> None:
    before = byte_level()
    state = json.loads(before.to_str())
    after = Tokenizer.from_str(json.dumps(with_tokens(state, tokens_to_keep(state, []))))
    for text in ("important", "日本語 ß\n\t", "🙂"):
        assert after.decode(after.encode(text).ids) == text
    assert after.get_vocab_size() == 258


def test_tokens_of_bytes_stay_where_characters_need_not() -> None:
    vocabulary = {"<unk>": 0, **{f"<0x{n:02X}>": n + 1 for n in range(256)}, "a": 257, "b": 258, "c": 259, "ab": 260}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>", byte_fallback=True))
    state = json.loads(made.to_str())
    kept = tokens_to_keep(state, [260])
    assert kept == [*range(257), 257, 258, 260]
    after = Tokenizer.from_str(json.dumps(with_tokens(state, kept)))
    assert after.encode("abc").tokens == ["ab", "<0x63>"]
