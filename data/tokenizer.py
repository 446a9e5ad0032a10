"""Text to tokens and back: bytes, or the tokenizer that came with a base.

A tokenizer is given as the content of its tokenizer.json, None for bytes, and needs the package
`tokenizers` only where it is not None.
"""

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora import MIB, Corpus, DataError, map_file
from lora.files import replacing

ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|im_end|>")  # what tokenizers call the end of a text
N_BYTES = 256  # the vocabulary of a model whose tokens are bytes
BATCH_CHUNKS = 16  # chunks of text that are tokenized side by side
CHUNK_CHARACTERS = 64 * 1024
CUT = re.compile(r"(?=[ \n]\S)")


def encode(text: str, tokenizer: str | None) -> list[int]:
    """The tokens of a text. Bytes that are no UTF-8, as the system hands them on, stay as they are
    where tokens are bytes, and become U+FFFD for a tokenizer."""
    if tokenizer is None:
        return list(text.encode("utf-8", "surrogateescape"))
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", errors="replace")
    return load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids


def decode(tokens: Iterable[int], tokenizer: str | None) -> str:
    """The text of tokens; U+FFFD where they are none."""
    if tokenizer is None:
        return bytes(tokens).decode("utf-8", errors="replace")
    return load_tokenizer(tokenizer).decode(list(tokens), skip_special_tokens=False)


def stream_decoder(tokenizer: str | None) -> Callable[[int | None], str]:
    """A function that takes the tokens of a text one by one, and None at its end, and returns what
    text each completes: nothing while a character lacks bytes."""
    if tokenizer is None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(
            b"" if token is None else bytes([token]), final=token is None
        )
    loaded = load_tokenizer(tokenizer)
    from tokenizers.decoders import DecodeStream

    stream, tokens, written = DecodeStream(skip_special_tokens=False), [], 0

    def write(token: int | None) -> str:
        nonlocal written
        if token is None:  # what the stream holds back, such as the first bytes of a character
            return decode(tokens, tokenizer)[written:]
        tokens.append(token)
        text = stream.step(loaded, token) or ""
        written += len(text)
        return text

    return write


@functools.lru_cache(maxsize=2)
def vocabulary_size(tokenizer: str | None) -> int:
    """How many tokens there are, or one more than the largest where numbers are left out."""
    if tokenizer is None:
        return N_BYTES
    return max(load_tokenizer(tokenizer).get_vocab().values(), default=-1) + 1


def end_mark(tokenizer: str | None) -> str:
    """The text of the token that ends a record: byte 0, or the tokenizer's own.

    Raises DataError when the tokenizer has none.
    """
    if tokenizer is None:
        return "\0"
    for name in ENDS:
        if load_tokenizer(tokenizer).token_to_id(name) is not None:
            return name
    raise DataError(f"the base's tokenizer has no token for the end of a text ({ENDS[0]})")


def end_token(tokenizer: str | None) -> int:
    """The token that ends a record. Raises DataError as `end_mark` does."""
    mark = end_mark(tokenizer)
    return 0 if tokenizer is None else load_tokenizer(tokenizer).token_to_id(mark)


@functools.lru_cache(maxsize=1)
def load_tokenizer(content: str) -> Any:  # a tokenizers.Tokenizer, which is optional
    """The Tokenizer of the package `tokenizers` for the content of a tokenizer.json.

    Raises DataError when the package is missing or the content is not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            "this base has a tokenizer, which needs the package tokenizers: pip install tokenizers"
        ) from error
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the package has no type of its own for it
        raise DataError(f"the base's tokenizer cannot be used: {error}") from error


def tokenize_corpus(corpus: Corpus, tokenizer: str, folder: Path) -> Corpus:
    """The corpus in the tokens of `tokenizer`, from a file in `folder` that is made on first use.

    The file holds uint16, or uint32 where the vocabulary is larger, and is memory-mapped. Its name
    has the checksum of all bytes of the corpus and of the tokenizer, so that it is made again when
    either changes; and its last 8 bytes say how many tokens it has, so that it is made again when
    some are lost.

    Raises FileError when it cannot be written.
    """
    digest = hashlib.sha256(tokenizer.encode())
    for block in _blocks(corpus):
        digest.update(block)
    key = digest.hexdigest()[:16]
    path = folder / f"tokens-{key}.bin"
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    if not _is_whole(path, dtype):
        with contextlib.suppress(OSError):  # of which writing the file will tell
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            n = 0
            for ids in _token_chunks(corpus, tokenizer):
                n += len(ids)
                file.write(np.array(ids, dtype).tobytes())
            file.write(np.uint64(n).tobytes())
    with open(path, "rb") as file:
        tokens = map_file(file)[:-8].view(dtype)
    return dataclasses.replace(
        corpus, tokens=tokens, checksum=f"sha256:{key}", n_bytes=len(corpus.tokens)
    )


def _is_whole(path: Path, dtype: np.dtype) -> bool:
    """Whether a file has as many tokens as its end says."""
    if not path.is_file() or path.stat().st_size < 8:
        return False
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        n = int(np.frombuffer(file.read(), np.uint64)[0])
    return path.stat().st_size == n * dtype.itemsize + 8


def _token_chunks(corpus: Corpus, tokenizer: str) -> Iterator[list[int]]:
    """The corpus's tokens, some at a time."""
    loaded = load_tokenizer(tokenizer)
    batch: list[str] = []
    for chunk in _text_chunks(corpus):
        batch.append(chunk)
        if len(batch) == BATCH_CHUNKS:
            yield from (e.ids for e in loaded.encode_batch(batch, add_special_tokens=False))
            batch = []
    yield from (e.ids for e in loaded.encode_batch(batch, add_special_tokens=False))


def _blocks(corpus: Corpus) -> Iterator[bytes]:
    """The bytes of the corpus, 1 MiB at a time, of which none stays in our memory."""
    mapped = getattr(corpus.tokens.base, "obj", None)
    for start in range(0, len(corpus.tokens), MIB):
        yield corpus.tokens[start : start + MIB].tobytes()
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, start, min(MIB, len(corpus.tokens) - start))


def _text_chunks(corpus: Corpus) -> Iterator[str]:
    """The corpus's text in chunks that begin with a space, or a line break, before a word.

    There GPT-2's tokenizer ends a token in any case, so that the chunks have the tokens of the
    whole. Text with neither is one chunk, in memory.

    Raises DataError for bytes that are no UTF-8, which such a tokenizer cannot take.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    for i, block in enumerate(_blocks(corpus)):
        try:
            rest += decoder.decode(block, final=(i + 1) * MIB >= len(corpus.tokens))
        except UnicodeDecodeError as error:
            raise DataError(
                f"DATA={corpus.name}: the corpus is not UTF-8 (near byte "
                f"{i * MIB + error.start:,}), which the base's tokenizer needs"
            ) from error
        begin = 0
        while cut := CUT.search(rest, begin + CHUNK_CHARACTERS):
            yield rest[begin : cut.start()]
            begin = cut.start()
        rest = rest[begin:]
    if rest:
        yield rest
