"""Rows to examples: the layouts that a row may have, and what each teaches.

The loss counts completions, which are the assistant's turns, and texts.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from data.corpus import DataError, printable
from data.rows import AS_TEXT


@dataclass(frozen=True)
class Example:
    """What one row teaches: a chat, with the tools that its assistant may use, or a text.

    Attributes:
        messages: the turns of a chat, each with a `role`, which is system, user, assistant or tool,
            and a `content`, which is a text. Other keys are the row's own (tool_calls, name,
            tool_call_id, ...). An assistant's turn with the `weight` 0 is kept out of the loss.
        tools: descriptions of functions, as JSON has them.
        text: the text of a row that is no chat; then there are no messages.
        place: the file and the row that it is from, as in "train.jsonl, line 3".
    """

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    place: str = ""


@dataclass(frozen=True)
class Layout:
    """A layout of rows: the columns that it needs, and those that it takes where they are there."""

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return self.needs + self.takes


PAIR = ("system", "history", "tools")
LAYOUTS = (
    Layout("OpenAI", ("messages",), ("system", "tools")),
    Layout("ShareGPT", ("conversations",), ("system", "tools")),
    Layout("Alpaca", ("instruction", "output"), ("input", *PAIR)),
    Layout("instructions", ("instruction", "response"), ("input", "context", *PAIR)),
    Layout("prompts", ("prompt", "completion"), PAIR),
    Layout("prompts", ("prompt", "response"), PAIR),
    Layout("questions", ("question", "answer"), ("context", *PAIR)),
    Layout("questions", ("question", "response"), ("context", *PAIR)),
    Layout("pairs", ("input", "output"), PAIR),
    Layout("queries", ("query", "response"), PAIR),
    Layout("texts", ("text",)),
)
COLUMNS = tuple(dict.fromkeys(column for layout in LAYOUTS for column in layout.columns))
ACCEPTED = f"{', '.join('+'.join(layout.needs) for layout in LAYOUTS)}, or COLUMNS; {AS_TEXT}"
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
PREFERENCES = {"chosen", "rejected"}
TREE = {"text", "role", "parent_id"}  # OASST's messages
MESSAGES = ({"role", "content"}, {"from", "value"})  # a chat's, where a row would be

# Who speaks, by the words that files have for it.
ROLES = ("system", "user", "assistant", "tool")
ROLE_OF = {role: role for role in ROLES} | {"developer": "system", "human": "user"}
ROLE_OF |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")
ROLE_OF |= dict.fromkeys(("observation", "function", "function_response"), "tool")
CALL = "function_call"  # an assistant's turn in ShareGPT, whose value is JSON
NAMES_SHOWN = 8  # of columns, in an error or in the log


def parse_rows(
    name: str, rows: Iterable[tuple[str, Any]], columns: Mapping[str, str]
) -> tuple[list[Example], str]:
    """The examples of a file's rows, and a line that says what the file has.

    Args:
        name: the file, for errors.
        rows: pairs of a place and a value, as `read_rows` has them.
        columns: what the file calls the columns of a layout, by their names here, as in
            {"prompt": "frage"}; then no other columns are read. Empty for the layouts' own names.

    The first row decides which layout the file has. Raises DataError, with the row's place, for a
    row that has not all that it needs, or another layout too.
    """
    examples: list[Example] = []
    layout: Layout | None = None
    rows = list(rows)
    seen: dict[str, bool] = {}  # every column of the file, and whether a row has a value there
    for _, row in rows:
        for column, value in row.items() if isinstance(row, dict) else ():
            seen[column] = seen.get(column, False) or value is not None
    for ours, theirs in columns.items():
        if theirs not in seen:
            raise DataError(
                f"COLUMNS={ours}:{printable(theirs)}: {printable(name)} has no such column; "
                f"accepted: {_names(seen)}"
            )
    for place, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"it is {_kind(row)} and no JSON object; accepted: {ACCEPTED}")
            if columns:
                row = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
            layout = layout or layout_of(row)
            examples.append(_example(row, layout, f"{printable(name)}, {place}"))
        except ValueError as error:
            raise DataError(f"{printable(name)}, {place}: {printable(str(error))}") from error
        except RecursionError as error:
            raise DataError(f"{printable(name)}, {place}: it is nested too deeply") from error
    names = {ours: columns.get(ours, ours) for ours in layout.columns}
    used = [theirs for theirs in names.values() if seen.get(theirs)]
    found = f"{layout.name} ({_names(used)}), {len(examples):,} rows"
    if ignored := [column for column in seen if column not in names.values()]:
        found += f"; ignored columns: {_names(ignored)}"
    return examples, printable(found)


def layout_of(row: Mapping[str, Any]) -> Layout:
    """The layout of a row. Raises ValueError where it has none, or several."""
    if set(row) >= PREFERENCES:
        raise ValueError(
            "it has chosen and rejected: preference pairs, which nothing here trains on; "
            "accepted: one completion, as COLUMNS=prompt,completion:chosen has it"
        )
    if set(row) >= TREE:
        raise ValueError(
            "it has text, role and parent_id: one message of a tree, which is no chat; accepted: "
            "a row for each chat, or the texts alone, as COLUMNS=text has them"
        )
    found = _layouts(_columns_with_values(row)) or _layouts(frozenset(row))
    if not found and any(set(row) >= message for message in MESSAGES):
        raise ValueError(
            'it is one message; accepted: a row for each chat, as in {"messages": [...]}'
        )
    if not found:
        named = {str(name).strip().lower(): name for name in row}
        if meant := _layouts(frozenset(named)):
            pairs = [f"{n}:{named[n]}" for n in meant[0].columns if n in named]
            raise ValueError(f"it has {_names(row)}; COLUMNS={','.join(pairs)} takes them")
        begun = [layout for layout in LAYOUTS if set(layout.needs) & set(row)]
        if begun:
            raise ValueError(f"it has {_names(row)} and lacks {_missing(row, begun[0])}")
        raise ValueError(f"it has {_names(row) or 'no columns'}; accepted: {ACCEPTED}")
    if len(found) > 1:
        several = " and ".join("+".join(layout.needs) for layout in found)
        choice = ",".join(name for name in found[0].columns if name in row)
        raise ValueError(f"it fits {several}; COLUMNS={choice} takes the first")
    return found[0]


@functools.lru_cache
def _layouts(columns: frozenset[str]) -> tuple[Layout, ...]:
    """The layouts that these columns fit, without those that are a part of another one."""
    fitting = [layout for layout in LAYOUTS if columns.issuperset(layout.needs)]
    return tuple(
        layout
        for layout in fitting
        if not any(set(layout.needs) < set(other.columns) for other in fitting if other != layout)
    )


def _columns_with_values(row: Mapping[str, Any]) -> frozenset[str]:
    """Columns but those with null, which files have where another row has a value."""
    return frozenset(name for name, value in row.items() if value is not None)


def _missing(row: Mapping[str, Any], layout: Layout) -> str:
    return ", ".join(name for name in layout.needs if name not in row)


def _example(row: Mapping[str, Any], layout: Layout, place: str) -> Example:
    """What a row teaches. Raises ValueError where it is not of this layout, or of another too."""
    fitting = _layouts(_columns_with_values(row))
    if fitting and layout_of(row) != layout:
        raise ValueError(
            f"it is of another layout, {'+'.join(fitting[0].needs)}, than the first row, which has "
            f"{'+'.join(layout.needs)}"
        )
    if missing := _missing(row, layout):
        raise ValueError(f"it lacks {missing}, which the first row has")
    if layout.needs == ("text",):
        return Example(text=_text(row["text"], "text"), place=place)
    system = []
    if row.get("system"):
        system = [{"role": "system", "content": _text(row["system"], "system")}]
    if len(layout.needs) == 1:  # a column of messages
        messages = _messages(row, layout.needs[0])
    else:
        messages = _earlier(row) + _pair(row, layout)
    if system and messages[:1] and messages[0]["role"] == "system":
        raise ValueError("it has a system column and a system turn; accepted: one of them")
    if not any(m["role"] == "assistant" and m.get("weight") != 0 for m in messages):
        raise ValueError(
            f"{layout.needs[-1]} has no turn of the assistant that counts, "
            "so nothing could be learned"
        )
    return Example((*system, *messages), tuple(_tools(row)), place=place)


def _pair(row: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """The turns of a prompt and a completion, each of which is a text or a list of messages."""
    asked, answered = layout.needs
    if isinstance(row[asked], list):
        prompt = [
            m | {"weight": 0} if m["role"] == "assistant" else m for m in _messages(row, asked)
        ]
    else:
        content = _text(row[asked], asked)
        for more in ("input", "context"):
            if more in layout.takes and row.get(more):
                content += "\n\n" + _text(row[more], more)
        prompt = [{"role": "user", "content": content}]
    if isinstance(row[answered], list):
        return prompt + _messages(row, answered)
    answer = _text(row[answered], answered, may_be_empty=True)
    return [*prompt, {"role": "assistant", "content": answer}]


def _earlier(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of the column history, a list of pairs of a question and an answer."""
    turns = []
    for pair in _list(row, "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history has {_kind(pair)}; accepted: pairs of question and answer")
        question, answer = (_text(text, "a text of history") for text in pair)
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    return turns


def _messages(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """The turns in a column. Raises ValueError, with the turn's number, for what is none."""
    if row[column] is None:
        raise ValueError(f"{column} is null; accepted: a list of messages")
    messages = []
    for number, turn in enumerate(_list(row, column), start=1):
        try:
            messages.append(_message(turn))
        except ValueError as error:
            raise ValueError(f"{column}, turn {number}: {error}") from error
    return messages


def _message(turn: Any) -> dict[str, Any]:
    """A turn of OpenAI's kind (role, content) or ShareGPT's (from, value)."""
    if not isinstance(turn, dict):
        raise ValueError(f"it is {_kind(turn)}; accepted: an object with role and content")
    speaker, content_key = ("role", "content") if "role" in turn else ("from", "value")
    if speaker not in turn:
        raise ValueError(
            f"it has {_names(turn) or 'nothing'}; accepted: role and content, or from and value"
        )
    rest = {k: v for k, v in turn.items() if k not in (speaker, content_key) and v is not None}
    word = turn[speaker]
    if word == CALL and speaker == "from":
        role, content, rest["tool_calls"] = "assistant", "", _calls(turn)
    else:
        role = ROLE_OF.get(word) if isinstance(word, str) else None
        if role is None:
            accepted = ", ".join((*ROLES, "developer") if speaker == "role" else (*ROLE_OF, CALL))
            raise ValueError(f"{speaker} is {_shown(word)}; accepted: {accepted}")
        content = _content(turn, content_key, role, has_calls=bool(rest.get("tool_calls")))
    _check_weight(rest, role)
    if "tool_calls" in rest:
        rest["tool_calls"] = [_called(call) for call in _list(rest, "tool_calls")]
    if not set(rest) <= {"weight"}:
        _check_characters("it", json.dumps(rest, ensure_ascii=False, default=str))
    return {"role": role, "content": content} | rest


def _content(turn: Mapping[str, Any], key: str, role: str, has_calls: bool) -> str:
    """The text of a turn's content.

    A system's and a tool's may be empty, since an empty system keeps a template from writing its
    own, and a tool may have nothing to say. So may an assistant's, as in Alpaca's data; the log
    counts empty answers. An empty question is a fault of the data.
    """
    if key not in turn and not has_calls:
        raise ValueError(f"it lacks {key}")
    content = turn.get(key)
    if content is None and has_calls:
        content = ""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise ValueError(
                    f"{key} has a part of type {_shown(kind)}; accepted: parts of type text"
                )
        content = "".join(_text(part.get("text"), "text", may_be_empty=True) for part in content)
    return _text(content, key, may_be_empty=role != "user")


def _check_weight(rest: dict[str, Any], role: str) -> None:
    """Raise ValueError for a weight that is neither 0 nor 1, or that no loss could have."""
    weight = rest.get("weight", 0)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"weight is {_shown(weight)}; accepted: 0 or 1")
    if role != "assistant" and rest.pop("weight", 0):
        raise ValueError(f"weight is 1 on a turn of role {role}; accepted: on the assistant's")


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a ShareGPT turn, whose value is JSON: one object or a list of them."""
    value = turn.get("value")
    if isinstance(value, str):
        value = _from_json("value", value)
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not {"name", "arguments"} <= set(call):
            raise ValueError("value is no call; accepted: JSON with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _called(call: Any) -> Any:
    """A tool call of OpenAI's kind with its arguments as an object, which chat templates write as
    JSON; OpenAI's own are a text that is JSON already."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError("tool_calls has no function with a name; accepted: OpenAI's format")
    if isinstance(function.get("arguments"), str):
        function = function | {"arguments": _from_json("arguments", function["arguments"])}
    return call | {"function": function}


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = _list(row, "tools")
    for tool in tools:
        if not isinstance(tool, dict):
            raise ValueError(f"tools has {_kind(tool)}; accepted: a list of objects")
    if tools:
        _check_characters("tools", json.dumps(tools, ensure_ascii=False, default=str))
    return tools


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    """The list in a column, which may be the text of one in JSON; empty where there is none."""
    value = row.get(column)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = _from_json(column, value)
    if not isinstance(value, list):
        raise ValueError(f"{column} is {_shown(value)}; accepted: a list")
    return value


def _from_json(column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{column} is {_shown(text)}, which is no JSON") from None


def _text(text: Any, name: str, may_be_empty: bool = False) -> str:
    """A text as it is. Raises ValueError where it is none, or empty and may not be."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {_shown(text)}; accepted: a text")
    if not text and not may_be_empty:
        raise ValueError(f"{name} is empty; accepted: a text that is not empty")
    _check_characters(name, text)
    return text


def _check_characters(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} has half of a surrogate pair, which is no character") from None


# ---- words for what was found


def _shown(value: Any) -> str:
    """A value in a few words, as in: the number 42."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return repr(value[:40])
    return _kind(value)


def _kind(value: Any) -> str:
    """What kind of value JSON would call it."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def _names(columns: Iterable[str]) -> str:
    """Columns' names in a line of limited length."""
    names = [name[:30] or "''" for name in columns]
    more = [f"{len(names) - NAMES_SHOWN:,} others"] if len(names) > NAMES_SHOWN else []
    return ", ".join(names[:NAMES_SHOWN] + more)
