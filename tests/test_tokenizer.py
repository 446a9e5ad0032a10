"""Tokens: bytes, or a tokenizer's, of a text at once, in chunks, and one by one."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import TEXT
from hypothesis import example, given
from hypothesis import strategies as st

from data import DataError, load_corpus, tokenizer
from data.tokenizer import (
    decode,
    encode,
    end_token,
    stream_decoder,
    tokenize_corpus,
    vocabulary_size,
)


@pytest.fixture(scope="module")
def bpe() -> str:
    trained = tokenizers.ByteLevelBPETokenizer()
    sample = TEXT + "\n\n  indented\n\n\n\tx = 1  \n it's  \r\n" * 20
    trained.train_from_iterator([sample], vocab_size=400, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    return trained.to_str()


@given(st.text(st.sampled_from("ab \n\t\r'sé€\x1c\x85 "), max_size=400))
def test_chunks_have_the_tokens_of_the_whole(bpe, text):
    """Also where white space meets the end of a chunk, which decides how it is split."""
    size = tokenizer.CHUNK_CHARACTERS
    tokenizer.CHUNK_CHARACTERS = 5
    try:
        corpus = type("Corpus", (), {"tokens": np.frombuffer(text.encode(), np.uint8), "name": "x"})
        ids = [i for chunk in tokenizer._token_chunks(corpus, bpe) for i in chunk]
    finally:
        tokenizer.CHUNK_CHARACTERS = size
    assert ids == encode(text, bpe)


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
    corpus = type("Corpus", (), {"tokens": np.frombuffer(text.encode(), np.uint8), "name": "x"})
    chunks = list(tokenizer._text_chunks(corpus))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) < tokenizer.CHUNK_CHARACTERS + 20


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


def test_a_vocabulary_beyond_16_bits_takes_32(bpe, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(tokenizer, "vocabulary_size", lambda _: 2**16 + 1)
    corpus = tokenize_corpus(load_corpus(str(tmp_path / "text.txt"), Path()), bpe, tmp_path)
    assert corpus.tokens.dtype == np.uint32 and corpus.tokens.tolist() == encode(TEXT, bpe)


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
