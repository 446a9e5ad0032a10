"""Tokens: bytes, or a tokenizer's, of a text at once, in chunks, and one by one."""

import contextlib
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import TEXT
from hypothesis import example, given
from hypothesis import strategies as st
from test_exchange import byte_fallback

from data import DataError, TextCorpus, load_corpus, open_corpus, text, tokenized
from data.text import check_length
from data.tokenized import tokenize_corpus
from data.tokenizer import (
    decode,
    encode,
    encode_all,
    end_token,
    stream_decoder,
    vocabulary_size,
)


@pytest.fixture(scope="module")
def bpe() -> str:
    trained = tokenizers.ByteLevelBPETokenizer()
    sample = TEXT + "\n\n  indented\n\n\n\tx = 1  \n it's  \r\n" * 20
    trained.train_from_iterator([sample], vocab_size=400, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    return trained.to_str()


def corpus_of(text: str) -> TextCorpus:
    return TextCorpus("x", np.frombuffer(text.encode(), np.uint8), "sha256:0", 1, 0)


def metaspace(scheme: str) -> tokenizers.Tokenizer:
    """A Unigram model as SentencePiece makes them; "first" puts a mark before the whole text."""
    words = tokenizers.Tokenizer(tokenizers.models.Unigram())
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    words.train_from_iterator([TEXT + MIXED, MIXED[::-1]], trainer)
    return words


def splitting(pattern: str) -> tokenizers.Tokenizer:
    """A byte-level BPE that splits a text by a regular expression, as Llama 3 and Qwen do."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    words.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tokenizers.Regex(pattern), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator([MIXED * 20, TEXT], trainer)
    return words


MIXED = "x = [1234567, 89];\n\n  it's.\nDON'T stop.\n\n\tno é 你好 \r\n a.b,c \x1c\x85"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    "gpt2": lambda bpe: bpe,
    "llama3": lambda bpe: splitting(LLAMA_3).to_str(),
    "qwen": lambda bpe: splitting(LLAMA_3.replace("{1,3}", "")).to_str(),
    "first": lambda bpe: metaspace("first").to_str(),
    "always": lambda bpe: metaspace("always").to_str(),
    "fallback": lambda bpe: byte_fallback().to_str(),
}


@pytest.mark.parametrize("kind", SPLITTERS)
def test_chunks_have_the_tokens_of_the_whole(bpe, kind, monkeypatch):
    """Also where a chunk's end parts a token or a number, or where a tokenizer marks beginnings."""
    monkeypatch.setattr(tokenized, "CHUNK_CHARACTERS", 90)
    monkeypatch.setattr(tokenized, "OVERLAP", 40)
    monkeypatch.setattr(tokenized, "BATCH_CHUNKS", 3)
    tokenizer = SPLITTERS[kind](bpe)
    choose = random.Random(0)
    pieces = [*MIXED.split(" "), *TEXT.split(" ")[:20], "12345678" * 9, "a" * 70]
    if kind not in ("first", "always"):  # whose choice of equally likely tokens is rounding's
        pieces += [" " * 50, "\n" * 9]
    for _ in range(60):
        text = choose.choice(["", " ", "\n"]).join(choose.choices(pieces, k=choose.randint(0, 90)))
        found = list(tokenized._token_chunks(corpus_of(text), tokenizer))
        assert [i for ids, _ in found for i in ids.tolist()] == encode(text, tokenizer)
        ((_, _, unread),) = encode_all([text], tokenizer)
        assert sum(n for _, n in found) == unread


def test_a_long_text_without_seams_is_encoded_as_a_whole_once(bpe, monkeypatch):
    given, encode_texts = [], tokenized.encode_all

    def count(texts: list[str], tokenizer: str):
        given.append(sum(map(len, texts)))
        return encode_texts(texts, tokenizer)

    monkeypatch.setattr(tokenized, "encode_all", count)
    monkeypatch.setattr(tokenized, "CHUNK_CHARACTERS", 4096)
    text = TEXT + "0 " * (10 * 4096) + TEXT * 5
    found = list(tokenized._token_chunks(corpus_of(text), bpe))
    assert [i for ids, _ in found for i in ids.tolist()] == encode(text, bpe)
    assert len(found) > 1 and sum(given) < 3 * len(text)


def test_characters_without_a_token_are_counted(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "text.txt").write_text("a bcd a " * 50)
    corpus = load_corpus(str(tmp_path / "text.txt"), Path())
    for _ in range(2):  # the file of tokens is made, and then found
        found = tokenize_corpus(corpus, words.to_str(), tmp_path)
        assert found.n_unread == 50 * (3 + 3)
    assert "unread:   300 characters, for which the tokenizer has no token" in found.describe()


@given(st.binary(max_size=40))
def test_bytes_come_back_one_by_one(text):
    tokens = list(text)
    write = stream_decoder(None)
    assert "".join(write(t) for t in [*tokens, None]) == decode(tokens, None)


@given(st.text(max_size=40))
@example("\ufffd")
@example("a\ufffdb\ufffd\ufffd")
def test_tokens_come_back_one_by_one(bpe, text):
    tokens = encode(text, bpe)
    write = stream_decoder(bpe)
    assert decode(tokens, bpe) == "".join(write(t) for t in [*tokens, None])


@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n", " "])
def test_chunks_are_short_whatever_ends_a_line(between):
    text = between.join(["words"] * 200_000)
    chunks = list(tokenized._text_chunks(corpus_of(text)))
    assert all(text[start : start + len(chunk)] == chunk for chunk, start in chunks)
    starts = [start for _, start in chunks]
    ends = [start + len(chunk) for chunk, start in chunks]
    assert starts[0] == 0 and ends[-1] == len(text)
    assert {end - start for end, start in zip(ends, starts[1:], strict=False)} == {
        tokenized.OVERLAP
    }
    assert max(len(chunk) for chunk, _ in chunks) <= tokenized.CHUNK_CHARACTERS


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 1001])
def test_tokens_that_were_cut_off_are_made_again(bpe, tmp_path, kept):
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = load_corpus(str(tmp_path / "text.txt"), Path())
    whole = tokenize_corpus(corpus, bpe, tmp_path / "out").tokens.tolist()
    (path,) = (tmp_path / "out").iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    assert tokenize_corpus(corpus, bpe, tmp_path / "out").tokens.tolist() == whole


def test_a_corpus_is_tokenized_once_and_again_when_text_or_tokenizer_change(bpe, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)

    def tokens(content: str) -> np.ndarray:
        corpus = tokenize_corpus(load_corpus(str(path), Path()), content, tmp_path / "out")
        assert corpus.n_bytes == len(path.read_bytes())
        return corpus.tokens

    first = tokens(bpe)
    assert first.dtype == np.uint16 and first.tolist() == encode(TEXT, bpe)
    (cache,) = (tmp_path / "out").iterdir()
    made = cache.stat().st_mtime_ns
    assert tokens(bpe).tolist() == first.tolist() and cache.stat().st_mtime_ns == made
    path.write_text(TEXT.replace("fox", "cat"))
    assert tokens(bpe).tolist() == encode(TEXT.replace("fox", "cat"), bpe)
    other = tokenizers.Tokenizer.from_str(bpe)
    other.add_tokens(["lazy dog"])
    assert tokens(other.to_str()).tolist() == encode(path.read_text(), other.to_str())
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_corpus_in_tokens_knows_the_bytes_that_they_stand_for(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "DECODED", 50)  # several chunks
    (tmp_path / "text.txt").write_text(TEXT)
    turns = []

    @contextlib.contextmanager
    def in_turn():
        turns.append(list(tmp_path.glob("out/*")))
        yield
        turns.append(list(tmp_path.glob("out/*")))

    corpus = open_corpus(
        str(tmp_path / "text.txt"), Path(), bpe, 8, token_folder=tmp_path / "out", in_turn=in_turn()
    )
    assert len(turns[0]) == 0 and len(turns[1]) == 1  # the file is made within
    predicted = corpus.validation[1:].tolist()
    n_bytes = len(decode(predicted, bpe).encode())
    assert len(predicted) < n_bytes and corpus.count_predicted() == (len(predicted), n_bytes)
    assert corpus.opening() == (encode("\n", bpe), [])
    assert any(line.startswith("tokens:") for line in corpus.describe())
    with pytest.raises(DataError, match=f"has {len(corpus.tokens):,} tokens"):
        check_length(corpus, len(corpus.tokens))


def test_a_sample_begins_with_the_text_where_a_tokenizer_leaves_white_space_out(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "text.txt").write_text("a " * 180 + "b " * 20)
    corpus = load_corpus(str(tmp_path / "text.txt"), Path())
    assert tokenize_corpus(corpus, words.to_str(), tmp_path).opening() == ([1], [])


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_vocabulary_beyond_16_bits_takes_32(bpe, tmp_path, monkeypatch, size, dtype):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(tokenized, "vocabulary_size", lambda _: size)
    corpus = tokenize_corpus(load_corpus(str(tmp_path / "text.txt"), Path()), bpe, tmp_path)
    assert corpus.tokens.dtype == dtype and corpus.tokens.tolist() == encode(TEXT, bpe)


def test_a_character_may_lie_on_both_sides_of_what_is_read_at_once(monkeypatch):
    monkeypatch.setattr(tokenized, "MIB", 5)
    text = "words of café, \u20ac and \U0001f600\U0001f600\U0001f600 \u20ac"
    assert list(tokenized._text_chunks(corpus_of(text))) == [(text, 0)]
    latin = dataclasses.replace(
        corpus_of(""), tokens=np.frombuffer(text.encode("latin-1", "replace"), np.uint8)
    )
    with pytest.raises(DataError, match=r"DATA=x: .* not UTF-8 \(near byte 12\)"):
        list(tokenized._text_chunks(latin))


def test_bytes_that_are_no_text_are_kept_as_bytes_and_marked_for_a_tokenizer(bpe):
    assert encode("a\udcff", None) == [97, 255]
    assert decode([97, 255], None) == "a\ufffd"
    assert encode("a\udcff", bpe) == encode("a\ufffd", bpe)


def test_special_tokens_are_shown_and_not_added(bpe):
    loaded = tokenizers.Tokenizer.from_str(bpe)
    end = loaded.token_to_id("<|endoftext|>")
    template = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    loaded.post_processor = template
    assert encode("the", loaded.to_str()) == encode("the", bpe)
    ((ids, _),) = tokenized._token_chunks(corpus_of("the"), loaded.to_str())
    assert ids.tolist() == encode("the", bpe)
    assert decode([end], bpe) == "<|endoftext|>" == stream_decoder(bpe)(end)


def test_of_several_ends_that_a_tokenizer_has_the_first_is_taken(bpe):
    loaded = tokenizers.Tokenizer.from_str(bpe)
    loaded.add_special_tokens(["</s>", "<eos>"])
    assert end_token(loaded.to_str()) == loaded.token_to_id("<|endoftext|>")


def test_text_that_is_not_utf8_is_refused_by_a_tokenizer(bpe, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(DataError, match="not UTF-8"):
        tokenize_corpus(load_corpus(str(tmp_path / "text.txt"), Path()), bpe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_sizes_and_ends(bpe):
    assert (vocabulary_size(None), end_token(None)) == (256, 0)
    loaded = tokenizers.Tokenizer.from_str(bpe)
    assert vocabulary_size(bpe) == loaded.get_vocab_size()
    assert end_token(bpe) == loaded.token_to_id("<|endoftext|>")
    plain = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()
    with pytest.raises(DataError, match="no token for the end"):
        end_token(plain)
    with pytest.raises(DataError, match="cannot be used"):
        encode("a", "{}")
    gaps = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    assert vocabulary_size(gaps.to_str()) == 70_001


def test_a_dropout_of_the_tokenizer_is_left_out(bpe):
    """Tokens drawn at random would be other data each time that they are made."""
    words = json.loads(bpe)
    words["model"]["dropout"] = 0.9
    assert encode("the dog does not mind", json.dumps(words)) == encode(
        "the dog does not mind", bpe
    )
