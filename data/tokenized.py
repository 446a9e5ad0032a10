"""A text in the tokens of a base's tokenizer, from a file that is made once and then mapped."""

import codecs
import contextlib
import dataclasses
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.corpus import DataError
from data.text import TextCorpus
from data.text_files import MIB, map_file
from data.tokenizer import count_unread, encode_all, vocabulary_size
from files.writing import replacing

BATCH_CHUNKS = 16  # chunks of text that are tokenized side by side
CHUNK_CHARACTERS = 64 * 1024
OVERLAP = 1024  # characters that two chunks have in common
SAME_TOKENS = 12  # in a row, of both chunks, make a seam
TRAILER = np.dtype([("n_tokens", np.uint64), ("n_unread", np.uint64)])


def tokenize_corpus(corpus: TextCorpus, tokenizer: str, folder: Path) -> TextCorpus:
    """The corpus in the tokens of `tokenizer`, from a file in `folder` that is made on first use.

    The file holds uint16, or uint32 where the vocabulary is larger, and is memory-mapped. Its name
    has the checksum of all bytes of the corpus and of the tokenizer, so it is made again when
    either changes. Its end says how many tokens it has, so it is made again when some are lost, and
    how many characters of the text no token stands for.

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
            n = n_unread = 0
            for ids, unread in _token_chunks(corpus, tokenizer):
                n, n_unread = n + len(ids), n_unread + unread
                file.write(ids.astype(dtype).tobytes())
            file.write(np.array((n, n_unread), TRAILER).tobytes())
    with open(path, "rb") as file:
        content = map_file(file)
    return dataclasses.replace(
        corpus,
        tokens=content[: -TRAILER.itemsize].view(dtype),
        checksum=f"sha256:{key}",
        n_bytes=len(corpus.tokens),
        n_unread=int(_trailer(path)["n_unread"]),
        tokenizer=tokenizer,
    )


def _trailer(path: Path) -> np.ndarray:
    """What the end of a file of tokens says, () of TRAILER."""
    with open(path, "rb") as file:
        file.seek(-TRAILER.itemsize, os.SEEK_END)
        return np.frombuffer(file.read(), TRAILER)[0]


def _is_whole(path: Path, dtype: np.dtype) -> bool:
    """Whether a file has as many tokens as its end says."""
    if not path.is_file() or path.stat().st_size < TRAILER.itemsize:
        return False
    n = int(_trailer(path)["n_tokens"])
    return path.stat().st_size == n * dtype.itemsize + TRAILER.itemsize


class _Chunk(NamedTuple):
    """Characters of the text, and their tokens as if these characters were all.

    `start` is where they are in the text, `ids` (n,) the tokens, and `places` (n, 2) where in the
    text each token begins and ends. Tokens that begin before `first` belong to the chunk before.
    """

    text: str
    start: int
    first: int
    ids: np.ndarray
    places: np.ndarray


def _token_chunks(corpus: TextCorpus, tokenizer: str) -> Iterator[tuple[np.ndarray, int]]:
    """The corpus's tokens (n,), some at a time, and how many characters none of these stands for.

    A tokenizer may join what a chunk's end would part, or put a mark before each chunk. So chunks
    overlap, and follow each other where both have the same tokens for some way. Where they never
    have, they become one chunk, together with all that follow until one has.
    """
    end = 0  # of the last token given

    def given(ids: np.ndarray, places: np.ndarray, stop: int) -> tuple[np.ndarray, int]:
        nonlocal end
        start, end = end, places[:, 1].max(initial=end)
        return ids, count_unread(ids, places, max(stop, end), tokenizer, start)

    group: list[_Chunk] = []  # neighbours without a seam
    for right in _chunks(corpus, tokenizer):
        # Only what looks like the end of a group is worth encoding all of it for.
        if group and _seam(group[-1], right) is not None:
            left = _joined(group, tokenizer)
            seam = _seam(left, right)
            if seam is not None:
                kept = (left.places[:, 0] >= left.first) & (left.places[:, 0] < seam)
                yield given(left.ids[kept], left.places[kept], 0)
                group, right = [], right._replace(first=seam)
        group.append(right)
    left = _joined(group, tokenizer)
    kept = left.places[:, 0] >= left.first
    yield given(left.ids[kept], left.places[kept], left.start + len(left.text))


def _joined(group: list[_Chunk], tokenizer: str) -> _Chunk:
    """Neighbouring chunks as one."""
    first, *others = group
    if not others:
        return first
    text = first.text + "".join(chunk.text[OVERLAP:] for chunk in others)
    (joined,) = _encoded(tokenizer, [(text, first.start)])
    return joined._replace(first=first.first)


def _seam(left: _Chunk, right: _Chunk) -> int | None:
    """A place in the text around which two chunks have the same tokens; None if there is none."""
    ours = {place: i for i, place in enumerate(left.places[:, 0].tolist())}
    run = 0
    for j, place in enumerate(right.places[:, 0].tolist()):
        if place > left.start + len(left.text):
            break
        i = ours.get(place)
        same = i is not None and left.ids[i] == right.ids[j]
        run = run + 1 if same and (left.places[i] == right.places[j]).all() else 0
        # Within a long run of one character a tokenizer may part the whole differently.
        varied = len(set(right.ids[max(0, j + 1 - SAME_TOKENS) : j + 1])) > SAME_TOKENS // 2
        if run >= SAME_TOKENS and varied:
            return int(right.places[j - SAME_TOKENS // 2, 0])
    return None


def _chunks(corpus: TextCorpus, tokenizer: str) -> Iterator[_Chunk]:
    """The corpus in chunks with their tokens; each begins with the last characters of the one
    before."""
    batch: list[tuple[str, int]] = []
    for chunk in _text_chunks(corpus):
        batch.append(chunk)
        if len(batch) == BATCH_CHUNKS:
            yield from _encoded(tokenizer, batch)
            batch = []
    yield from _encoded(tokenizer, batch)


def _encoded(tokenizer: str, batch: list[tuple[str, int]]) -> Iterator[_Chunk]:
    """The chunks of texts, each given with its place in the whole text."""
    found = encode_all([text for text, _ in batch], tokenizer)
    for (text, start), encoded in zip(batch, found, strict=True):
        yield _Chunk(text, start, start, encoded.ids, encoded.places + start)


def _text_chunks(corpus: TextCorpus) -> Iterator[tuple[str, int]]:
    """The corpus's text in chunks that overlap, each with its place in characters.

    Raises DataError for bytes that are not UTF-8, which a tokenizer cannot take.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, start = "", 0
    for i, block in enumerate(_blocks(corpus)):
        try:
            rest += decoder.decode(block, final=(i + 1) * MIB >= len(corpus.tokens))
        except UnicodeDecodeError as error:
            raise DataError(
                f"DATA={corpus.name}: the corpus is not UTF-8 (near byte "
                f"{i * MIB + error.start:,}), which the base's tokenizer needs"
            ) from error
        step, begin = CHUNK_CHARACTERS - OVERLAP, 0
        while len(rest) - begin > CHUNK_CHARACTERS:
            yield rest[begin : begin + CHUNK_CHARACTERS], start + begin
            begin += step
        rest, start = rest[begin:], start + begin
    yield rest, start


def _blocks(corpus: TextCorpus) -> Iterator[bytes]:
    """The bytes of the corpus, 1 MiB at a time; mapped pages leave memory after their use."""
    mapped = getattr(corpus.tokens.base, "obj", None)
    for start in range(0, len(corpus.tokens), MIB):
        yield corpus.tokens[start : start + MIB].tobytes()
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, start, min(MIB, len(corpus.tokens) - start))
