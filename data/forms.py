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
from dataclasses import dataclass
from typing import Any

from data.corpus import DataError, printable

ROLES = ("system", "user", "assistant")
FORMS = "a prompt and a completion, messages, or a text"
LONGEST_REASON = 200  # characters of an error's one line that say what is wrong


@dataclass(frozen=True)
class Example:
    """What one row teaches: a chat, with the tools that its assistant may use, or a text."""

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict, ...] = ()
    text: str | None = None
    place: str = ""


def parse_examples(name: str, content: bytes) -> list[Example]:
    """The examples of a file's content. Raises DataError that names the line."""
    examples = []
    for number, line in _rows(name, content):
        try:
            examples.append(example_of(json.loads(line.decode("utf-8")), f"line {number}"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{printable(name)}, line {number}: {_reason(error)}") from error
    return examples


def _rows(name: str, content: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a file's content, with numbers from 1. Raises DataError for an empty file."""
    lines = content.removeprefix(codecs.BOM_UTF8).rstrip().split(b"\n")
    if lines == [b""]:
        raise DataError(f"{printable(name)}: the file is empty; accepted: a record in each line")
    return enumerate(lines, start=1)


def example_of(row: Any, place: str) -> Example:
    """The example of one row, a value read from JSON. Raises ValueError for what is none."""
    if not isinstance(row, dict):
        raise ValueError(f"it is no JSON object; accepted: an object with {FORMS}")
    forms = [set(row) & keys for keys in ({"prompt", "completion"}, {"messages"}, {"text"})]
    if sum(map(bool, forms)) != 1:
        raise ValueError(f"it has {', '.join(map(repr, row)) or 'nothing'}; accepted: {FORMS}")
    if "text" in row:
        return Example(text=_text(row, "text"), place=place)
    if "messages" not in row:
        user = {"role": "user", "content": _text(row, "prompt")}
        assistant = {"role": "assistant", "content": _text(row, "completion")}
        return Example((user, assistant), place=place)
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is no list of objects with role and content")
    for message in messages:
        _text(message, "content")
        if message.get("role") not in ROLES:
            raise ValueError(f"role is {message.get('role')!r}; accepted: {', '.join(ROLES)}")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("messages has no turn of the assistant, so nothing could be learned")
    return Example(tuple(messages), place=place)


def _text(found: dict, key: str) -> str:
    """The text found[key]. Raises ValueError where it is empty or no text."""
    text = found.get(key)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{key} is {str(text)[:40]!r}; accepted: a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} has half of a surrogate pair, which is no character") from None
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg} at character {error.pos + 1})"
    return printable(str(error)[:LONGEST_REASON])
