"""Prompts and completions: records of .jsonl files, packed into blocks where none sees another.

A line is one JSON object in one of the forms

    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"text": "..."}

The loss counts completions, which are the assistant's turns, and texts. T is the block size: a
block is T tokens and the one that follows them.
"""

import bisect
import codecs
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora import BUILT_IN_RECORDS, DataError, aligned, printable
from data.tokenizer import encode, end_mark, end_token, vocabulary_size

# How a turn is put before the model, and what makes it go on with the assistant's. Nothing tells
# such a heading from the same words in a content, so contents should not have them; one with the
# mark that ends a record is refused.
TURN = "{role}: {content}\n"
OPENING = "assistant: "
PROMPT_FORMAT = TURN.format(role="user", content="{prompt}") + OPENING

ROLES = ("system", "user", "assistant")
FORMS = "a prompt and a completion, messages, or a text"
LONGEST_REASON = 200  # characters of an error's one line that say what is wrong
EVERY = 10  # one record of so many is for validation, where there is no valid.jsonl
IGNORED = -100  # the target that torch's cross-entropy does not count

Part = tuple[str | None, bool]  # a text, or None for the end, and whether the loss counts it
Record = list[Part]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed records: row for row inputs, targets, and which record of its block a token is of.

    Attributes:
        inputs: (n, T) unsigned integers.
        targets: (n, T) int32, the tokens that follow, IGNORED where the loss does not count them.
        segments: (n, T) uint16, 1, 2, ... for a block's records and 0 for padding.
        n_records, n_cut, n_dropped: how many records there were; how many of them were cut to T + 1
            tokens, and how many were left out since then nothing is left to count.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    n_records: int
    n_cut: int
    n_dropped: int

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, eq=False)
class RecordCorpus:
    """Records for training and validation; stands where a `Corpus` of text does."""

    name: str
    checksum: str
    train: Blocks
    validation: Blocks
    prompt_format: str  # how to ask a model that was trained on them: "{prompt}" for texts alone

    def describe(self) -> list[str]:
        """The data as `key: value` lines for the record, aligned, ASCII only."""
        facts = {"name": printable(self.name), "checksum": self.checksum}
        for name, blocks in (("train", self.train), ("validation", self.validation)):
            counted, used = (blocks.targets != IGNORED).sum(), (blocks.segments > 0).sum()
            facts[name] = (
                f"{blocks.n_records:,} records, {used:,} tokens ({counted:,} counted) in "
                f"{len(blocks):,} blocks, {1 - used / blocks.segments.size:.1%} padding"
            )
            if blocks.n_cut or blocks.n_dropped:
                facts[name] += f"; {blocks.n_cut:,} cut to a block"
                facts[name] += f", {blocks.n_dropped:,} left out, whose prompts fill one"
        facts["prompt"] = json.dumps(self.prompt_format)
        return aligned(facts)


def is_records(name: str | None) -> bool:
    """Whether DATA=`name` is python-instructions, a .jsonl file or a folder with train.jsonl."""
    if name is None:
        return False
    path = _path(name)
    return path.endswith(".jsonl") or os.path.isfile(os.path.join(path, "train.jsonl"))


def load_records(
    name: str, tokenizer: str | None, block_size: int, count_prompts: bool = False
) -> RecordCorpus:
    """Read and pack the records that DATA=`name` stands for.

    A folder's valid.jsonl is for validation; without it, or for a file, every tenth record is.

    Raises DataError for a file that cannot be read or has no records, and for a line that is none.
    """
    path = Path(_path(name))
    paths = [path / "train.jsonl", path / "valid.jsonl"] if path.is_dir() else [path]
    digest = hashlib.sha256()
    splits = []
    for file in paths:
        if os.path.lexists(file) or file == paths[0]:
            content = _read(file)
            digest.update(content)
            splits.append(parse_records(str(file), content, end_mark(tokenizer)))
    if len(splits) == 1:
        (records,) = splits
        if len(records) < 2:
            raise DataError(f"{paths[0]}: one record is too few, as validation needs one too")
        validation = records[EVERY - 1 :: EVERY] or records[-1:]
        kept = set(map(id, validation))
        splits = [[record for record in records if id(record) not in kept], validation]
    packed = [pack(records, tokenizer, block_size, count_prompts) for records in splits]
    for blocks in packed:
        if len(blocks) == 0:
            raise DataError(f"DATA={name}: with BLOCK_SIZE={block_size} no completion is left")
    asked = any(not counted for records in splits for record in records for _, counted in record)
    prompt_format = PROMPT_FORMAT if asked else "{prompt}"
    return RecordCorpus(name, f"sha256:{digest.hexdigest()[:16]}", *packed, prompt_format)


def parse_records(name: str, content: bytes, end: str = "\0") -> list[Record]:
    """The records of a file's content; `end` is the mark that ends a record, which none may have.

    Raises DataError that names the line.
    """
    lines = content.removeprefix(codecs.BOM_UTF8).rstrip().split(b"\n")
    if lines == [b""]:
        raise DataError(f"{printable(name)}: the file is empty; accepted: a record in each line")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(json.loads(line.decode("utf-8")), end))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{printable(name)}, line {number}: {_reason(error)}") from error
    return records


def _record(found: Any, end: str) -> Record:
    """The parts of one JSON object. Raises ValueError for what is no record."""
    if not isinstance(found, dict):
        raise ValueError(f"it is no JSON object; accepted: an object with {FORMS}")
    forms = [set(found) & keys for keys in ({"prompt", "completion"}, {"messages"}, {"text"})]
    if sum(map(bool, forms)) != 1:
        raise ValueError(f"it has {', '.join(map(repr, found)) or 'nothing'}; accepted: {FORMS}")
    if "text" in found:
        return [(_text(found, "text", end), True), (None, True)]
    if "messages" not in found:
        user = {"role": "user", "content": _text(found, "prompt", end)}
        assistant = {"role": "assistant", "content": _text(found, "completion", end)}
        return _turns([user, assistant], end)
    return _turns(found["messages"], end)


def _turns(messages: Any, end: str) -> Record:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is no list of objects with role and content")
    parts: Record = []
    for message in messages:
        role, content = message.get("role"), _text(message, "content", end)
        if role not in ROLES:
            raise ValueError(f"role is {role!r}; accepted: {', '.join(ROLES)}")
        if role == "assistant":
            parts += [(OPENING, False), (content, True), (None, True)]
        else:
            parts.append((TURN.format(role=role, content=content), False))
    if not any(counted for _, counted in parts):
        raise ValueError("messages has no turn of the assistant, so nothing could be learned")
    return parts


def _text(found: dict, key: str, end: str) -> str:
    text = found.get(key)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{key} is {str(text)[:40]!r}; accepted: a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} has half of a surrogate pair, which is no character") from None
    if end in text:
        raise ValueError(f"{key} has {end!r}, the mark that ends a record")
    return text


def pack(
    records: Sequence[Record], tokenizer: str | None, block_size: int, count_prompts: bool = False
) -> Blocks:
    """Put records into blocks, each whole and in one of them, with little padding (best fit
    decreasing; Johnson et al. 1974), in an order of blocks that says nothing of their length.
    """
    size, end = block_size + 1, end_token(tokenizer)
    encoded, n_cut, n_dropped = [], 0, 0
    for record in records:
        tokens: list[int] = []
        counted: list[bool] = []
        # Neighbours are encoded as one, as generate.py encodes a prompt in its format: a tokenizer
        # may join the end of one with the beginning of the next.
        for (ends, counts), parts in itertools.groupby(
            record, lambda part: (part[0] is None, part[1])
        ):
            new = [end] if ends else encode("".join(text for text, _ in parts), tokenizer)
            tokens += new
            counted += [counts or count_prompts] * len(new)
        n_cut += len(tokens) > size
        tokens, counted = tokens[:size], counted[:size]
        if any(counted[1:]):
            encoded.append((tokens, counted))
        else:
            n_dropped += 1
    blocks: list[list[int]] = []
    open_blocks: list[tuple[int, int]] = []  # room and number, sorted
    for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0])):
        length = len(encoded[i][0])
        at = bisect.bisect_left(open_blocks, (length, -1))
        room, number = open_blocks.pop(at) if at < len(open_blocks) else (size, len(blocks))
        if number == len(blocks):
            blocks.append([])
        blocks[number].append(i)
        if room > length + 1:
            bisect.insort(open_blocks, (room - length, number))
    np.random.default_rng(0).shuffle(blocks)
    dtype = np.min_scalar_type(vocabulary_size(tokenizer) - 1)
    tokens = np.full((len(blocks), size), end, dtype)
    targets = np.full((len(blocks), size), IGNORED, np.int32)  # of the tokens themselves
    segments = np.zeros((len(blocks), size), np.uint16)
    for row, block in enumerate(blocks):
        start = 0
        for segment, i in enumerate(block, start=1):
            ids, counted = map(np.array, encoded[i])
            stop = start + len(ids)
            tokens[row, start:stop] = ids
            targets[row, start + 1 : stop] = np.where(counted, ids, IGNORED)[1:]
            segments[row, start:stop] = segment
            start = stop
    parts = (tokens[:, :-1], targets[:, 1:], segments[:, :-1])
    return Blocks(*map(np.ascontiguousarray, parts), len(records), n_cut, n_dropped)


def _path(name: str) -> str:
    """The path that DATA=`name` stands for."""
    if name == BUILT_IN_RECORDS:
        return str(Path(__file__).resolve().parent / name)
    return os.path.expanduser(name)


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise DataError(f"DATA={printable(str(path))}: not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"DATA={printable(str(path))}: cannot be read: {error.strerror}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg} at character {error.pos + 1})"
    return printable(str(error)[:LONGEST_REASON])
