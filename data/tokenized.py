"""A text in the tokens of a base's tokenizer, from a file that is made once and then mapped."""

import codecs
import contextlib
import dataclasses
import hashlib
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.corpus import DataError
from data.text import TextCorpus
from data.text_files import MIB, map_file
from data.tokenizer import load_tokenizer, vocabulary_size
from files.writing import replacing

BATCH_CHUNKS = 16  # chunks of text that are tokenized side by side
CHUNK_CHARACTERS = 64 * 1024
CUT = re.compile(r"(?=[ \n]\S)")


def tokenize_corpus(corpus: TextCorpus, tokenizer: str, folder: Path) -> TextCorpus:
    """The corpus in the tokens of `tokenizer`, from a file in `folder` that is made on first use.

    The file holds uint16, or uint32 where the vocabulary is larger, and is memory-mapped. Its name
    has the checksum of all bytes of the corpus and of the tokenizer, so it is made again when
    either changes. Its last 8 bytes say how many tokens it has, so it is made again when some are
    lost.

    Raises FileError when it cannot be written, and DataError for a corpus that is not UTF-8.
    """
    digest = hashlib.sha256(tokenizer.encode())
    for block in _blocks(corpus):
        digest.update(block)
    key = digest.hexdigest()[:16]
    path = folder / f"tokens-{key}.bin"
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    if not _is_whole(path, dtype):
        with contextlib.suppress(OSError):  # writing the file will report it
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
        corpus,
        tokens=tokens,
        checksum=f"sha256:{key}",
        n_bytes=len(corpus.tokens),
        tokenizer=tokenizer,
    )


def _is_whole(path: Path, dtype: np.dtype) -> bool:
    """Whether a file has as many tokens as its end says."""
    if not path.is_file() or path.stat().st_size < 8:
        return False
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        n = int(np.frombuffer(file.read(), np.uint64)[0])
    return path.stat().st_size == n * dtype.itemsize + 8


def _token_chunks(corpus: TextCorpus, tokenizer: str) -> Iterator[list[int]]:
    """The corpus's tokens, some at a time."""
    loaded = load_tokenizer(tokenizer)
    batch: list[str] = []
    for chunk in _text_chunks(corpus):
        batch.append(chunk)
        if len(batch) == BATCH_CHUNKS:
            yield from (e.ids for e in loaded.encode_batch(batch, add_special_tokens=False))
            batch = []
    yield from (e.ids for e in loaded.encode_batch(batch, add_special_tokens=False))


def _blocks(corpus: TextCorpus) -> Iterator[bytes]:
    """The bytes of the corpus, 1 MiB at a time; mapped pages leave memory after their use."""
    mapped = getattr(corpus.tokens.base, "obj", None)
    for start in range(0, len(corpus.tokens), MIB):
        yield corpus.tokens[start : start + MIB].tobytes()
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, start, min(MIB, len(corpus.tokens) - start))


def _text_chunks(corpus: TextCorpus) -> Iterator[str]:
    """The corpus's text in chunks that begin with a space, or a line break, before a word.

    GPT-2's tokenizer never joins a token across such a place, so the chunks have the tokens of the
    whole text. Text without such a place is one chunk, in memory.

    Raises DataError for bytes that are not UTF-8, which a tokenizer cannot take.
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
