"""Rows to records: the forms that a line of a .jsonl file may have, and how turns are written.

A row is one JSON object in one of the forms

    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"text": "..."}

A record is what the model reads for it. The loss counts completions, which are the assistant's
turns, and texts.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any

from data.corpus import DataError, printable

# How a turn is written for the model, and the words after which the assistant's turn follows. The
# same words inside a content look like a heading, so contents should not have them. A content with
# the mark that ends a record is refused.
TURN = "{role}: {content}\n"
OPENING = "assistant: "
PROMPT_FORMAT = TURN.format(role="user", content="{prompt}") + OPENING

ROLES = ("system", "user", "assistant")
FORMS = "a prompt and a completion, messages, or a text"
LONGEST_REASON = 200  # characters of an error's one line that say what is wrong

Part = tuple[str | None, bool]  # a text, or None for the end, and whether the loss counts it
Record = list[Part]


def parse_records(name: str, content: bytes, end: str = "\0") -> list[Record]:
    """The records of a file's content; `end` is the mark that ends a record, which none may have.

    Raises DataError that names the line.
    """
    records = []
    for number, line in _rows(name, content):
        try:
            records.append(record_of(json.loads(line.decode("utf-8")), end))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{printable(name)}, line {number}: {_reason(error)}") from error
    return records


def _rows(name: str, content: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a file's content, with numbers from 1. Raises DataError for an empty file."""
    lines = content.removeprefix(codecs.BOM_UTF8).rstrip().split(b"\n")
    if lines == [b""]:
        raise DataError(f"{printable(name)}: the file is empty; accepted: a record in each line")
    return enumerate(lines, start=1)


def record_of(row: Any, end: str) -> Record:
    """The parts of one row, a value read from JSON. Raises ValueError for what is no record."""
    if not isinstance(row, dict):
        raise ValueError(f"it is no JSON object; accepted: an object with {FORMS}")
    forms = [set(row) & keys for keys in ({"prompt", "completion"}, {"messages"}, {"text"})]
    if sum(map(bool, forms)) != 1:
        raise ValueError(f"it has {', '.join(map(repr, row)) or 'nothing'}; accepted: {FORMS}")
    if "text" in row:
        return [(_text(row, "text", end), True), (None, True)]
    if "messages" not in row:
        user = {"role": "user", "content": _text(row, "prompt", end)}
        assistant = {"role": "assistant", "content": _text(row, "completion", end)}
        return _turns([user, assistant], end)
    return _turns(row["messages"], end)


def _turns(messages: Any, end: str) -> Record:
    """The parts of a chat. Raises ValueError unless it has a turn of the assistant."""
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
    """The text found[key]. Raises ValueError where it is empty, no text, or has the mark `end`."""
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


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg} at character {error.pos + 1})"
    return printable(str(error)[:LONGEST_REASON])
