"""Dataset files as people have them: their layouts, their formats, folders, and what is refused."""

import dataclasses
import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY, refused, start_script, succeeded
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, load_records
from data.forms import ACCEPTED, COLUMNS, LAYOUTS, Example, parse_rows
from data.record_files import find_records, is_records, read_splits
from data.rows import read_rows
from trainer.settings import Config, ConfigError

ASKED = {"prompt": "2 + 2?", "completion": "4"}
FOUR = (("user", "2 + 2?"), ("assistant", "4"))


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parsed(*rows: object, columns: dict[str, str] | None = None) -> tuple[list[Example], str]:
    read = read_rows("a.jsonl", lines(*rows), COLUMNS)
    return parse_rows("a.jsonl", read, columns or {})


def example(row: object, **columns: str) -> Example:
    ((found,), _) = parsed(row, columns=columns)
    return found


def turns(found: Example) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in found.messages)


def values(content: bytes | str, name: str = "a.json") -> list[Any]:
    content = content.encode() if isinstance(content, str) else content
    return [value for _, value in read_rows(name, content, COLUMNS)]


def error_of(content: bytes | str, name: str = "a.json", **columns: str) -> str:
    """The one line that says why a file is refused."""
    content = content.encode() if isinstance(content, str) else content
    with pytest.raises(DataError) as error:
        parse_rows(name, read_rows(name, content, COLUMNS), columns)
    message = str(error.value)
    assert message.startswith(name) and message.isprintable() and len(message) < 400
    return message


# ---- layouts


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": "2 + 2?", "response": "4"},
        {"instruction": "2 + 2?", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4", "history": [], "system": ""},
        {"instruction": "2 + 2?", "input": None, "output": "4"},
        {"instruction": "2 + 2?", "response": "4", "context": ""},
        {"question": "2 + 2?", "answer": "4"},
        {"question": "2 + 2?", "response": "4"},
        {"input": "2 + 2?", "output": "4"},
        {"query": "2 + 2?", "response": "4"},
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": "4"},
        {"prompt": "2 + 2?", "completion": [{"role": "assistant", "content": "4"}]},
        {"messages": [{"role": r, "content": c} for r, c in FOUR], "prompt": "ignored"},
        {"messages": json.dumps([{"role": r, "content": c} for r, c in FOUR]), "text": None},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [{"role": r, "content": c} for r, c in FOUR]},
    ],
)
def test_each_layout_is_a_question_and_its_answer(row):
    found = example(row)
    assert found == Example(
        messages=({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}),
        place="a.jsonl, line 1",
    )


def test_a_text_is_a_text_and_no_chat():
    assert example({"text": "four", "id": 1}) == Example(text="four", place="a.jsonl, line 1")


def test_alpaca_has_a_system_earlier_turns_and_an_input():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    found = example(row | {"history": [["Hi", "Hello"], ["1 + 1?", "2"]]})
    assert turns(found) == (
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "1 + 1?"),
        ("assistant", "2"),
        ("user", "Add.\n\n2, 2"),
        ("assistant", "4"),
    )
    dolly = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "qa"}
    assert turns(example(dolly)) == (("user", "Who?\n\nAda wrote it."), ("assistant", "Ada"))


@pytest.mark.parametrize(
    ("words", "role"),
    [
        (("human", "user"), "user"),
        (("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
        (("system",), "system"),
        (("tool", "observation", "function_response"), "tool"),
    ],
)
def test_sharegpt_has_many_words_for_who_speaks(words, role):
    for word in words:
        row = [{"from": word, "value": "x"}, {"from": "gpt", "value": "y", "weight": None}]
        assert turns(example({"conversations": row})) == ((role, "x"), ("assistant", "y"))


def test_sharegpt_has_calls_and_tools():
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    tools = [{"name": "add", "description": "adds"}]
    row = {
        "conversations": [
            {"from": "human", "value": "2 + 2?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "4"},
        ],
        "tools": json.dumps(tools),
        "system": "Use tools.",
    }
    found = example(row)
    called = {"tool_calls": [{"type": "function", "function": call}]}
    assert found.messages == (
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": ""} | called,
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "4"},
    )
    assert found.tools == tuple(tools)
    row["conversations"][1]["value"] = json.dumps([call, call])
    assert len(example(row).messages[2]["tool_calls"]) == 2


def test_openai_has_parts_calls_weights_and_keys_of_its_own():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    made = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": t} for t in ("Be ", "brief.")]},
        {"role": "user", "content": "a", "name": "Ada", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": calls, "weight": 1},
        {"role": "tool", "content": "", "tool_call_id": "1"},
    ]
    found = example({"messages": messages, "tools": [{"type": "function"}]})
    assert found.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a", "name": "Ada"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "", "tool_calls": made, "weight": 1},
        {"role": "tool", "content": "", "tool_call_id": "1"},
    )
    assert found.tools == ({"type": "function"},)


def test_answers_within_a_prompt_of_messages_are_not_learned():
    prompt = [{"role": r, "content": r[0]} for r in ("user", "assistant", "user")]
    found = example({"prompt": prompt, "completion": [{"role": "assistant", "content": "b"}]})
    assert [m.get("weight") for m in found.messages] == [None, 0, None, None]


def test_the_log_says_the_layout_and_what_was_ignored():
    row = {"instruction": "a", "output": "b", "id": 3, "caf\u00e9": None}
    _, found = parsed(row, row | {"input": "c"})
    assert found == r"Alpaca (instruction, output, input), 2 rows; ignored columns: id, caf\xe9"
    _, found = parsed(*[ASKED] * 1200)
    assert found == "prompts (prompt, completion), 1,200 rows"
    _, found = parsed(ASKED | {f"c{i}": 0 for i in range(100)})
    assert found.endswith("; ignored columns: c0, c1, c2, c3, c4, c5, c6, c7, 92 others")


def test_columns_are_read_by_the_names_that_they_are_given():
    row = {"frage": "2 + 2?", "antwort": "4", "text": "never read", "completion": "nor this"}
    found, line = parsed(row, columns={"prompt": "frage", "completion": "antwort"})
    assert turns(found[0]) == FOUR
    assert line == "prompts (frage, antwort), 1 rows; ignored columns: text, completion"
    both = {"instruction": "2 + 2?", "output": "4", "text": "a template with 2 + 2?"}
    assert turns(example(both, instruction="instruction", output="output")) == FOUR
    chosen = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    assert turns(example(chosen, prompt="prompt", completion="chosen")) == FOUR


def test_a_column_that_the_file_lacks_is_named_with_those_that_it_has():
    with pytest.raises(DataError) as error:
        parsed({"frage": "a", "antwort": "b"}, columns={"prompt": "frage", "completion": "reply"})
    expected = "COLUMNS=completion:reply: a.jsonl has no such column; accepted: frage, antwort"
    assert str(error.value) == expected
    optional = [{"q": "a", "a": "b"}, {"q": "a", "a": "b", "s": "c"}]  # in some rows
    names = {"prompt": "q", "completion": "a", "system": "s"}
    assert [len(found.messages) for found in parsed(*optional, columns=names)[0]] == [2, 3]


USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "it is a number and no JSON object; accepted: " + ACCEPTED),
        ({}, "it has no columns; accepted: messages, conversations, instruction+output"),
        ({"name": "x", "version": 2}, "it has name, version; accepted: "),
        ({"prompt": "a"}, "it has prompt and lacks completion"),
        ({"prompt": 1, "completion": "b"}, "prompt is the number 1; accepted: a text"),
        ({"prompt": "a", "completion": 42}, "completion is the number 42; accepted: a text"),
        ({"prompt": "a", "completion": float("nan")}, "completion is the number nan"),
        ({"prompt": "a", "completion": True}, "completion is true; accepted: a text"),
        ({"prompt": "a", "completion": None}, "completion is null; accepted: a text"),
        ({"prompt": "a", "completion": {}}, "completion is an object; accepted: a text"),
        ({"prompt": "", "completion": "a"}, "prompt is empty"),
        ({"prompt": "", "completion": "b"}, "prompt is empty"),
        ({"text": "a", "messages": [BOT]}, "it fits messages and text; COLUMNS=messages takes"),
        (ASKED | {"response": "b"}, "it fits prompt+completion and prompt+response; COLUMNS=prom"),
        (ASKED | {"chosen": "a", "rejected": "b"}, "preference pairs, which nothing here trains"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs"),
        ({"messages": None}, "messages is null; accepted: a list"),
        ({"messages": "a"}, "messages is 'a', which is no JSON"),
        ({"messages": {}}, "messages is an object; accepted: a list"),
        ({"messages": [1]}, "messages, turn 1: it is a number"),
        ({"messages": []}, "messages has no turn of the assistant that counts"),
        ({"messages": [USER]}, "messages has no turn of the assistant that counts"),
        ({"messages": [USER, BOT | {"weight": 0}]}, "no turn of the assistant that counts"),
        ({"messages": [USER, BOT | {"weight": 0.5}]}, "turn 2: weight is the number 0.5; accepted"),
        ({"messages": [USER, BOT | {"weight": True}]}, "weight is true; accepted: 0 or 1"),
        ({"messages": [USER | {"weight": 1}, BOT]}, "turn 1: weight is 1 on a turn of role user"),
        ({"messages": [{"content": "a"}]}, "turn 1: it has content; accepted: role and content"),
        ({"messages": [USER, {"role": "bot", "content": "b"}]}, "turn 2: role is 'bot'; accepted"),
        ({"messages": [USER, {"role": ["x"], "content": "b"}]}, "turn 2: role is a list"),
        ({"messages": [USER, {"role": "assistant"}]}, "turn 2: it lacks content"),
        ({"messages": [BOT | {"content": None}]}, "content is null; accepted: a text"),
        ({"messages": [BOT | {"tool_calls": ["x"]}]}, "tool_calls has no function with a name"),
        ({"messages": [BOT | {"tool_calls": [{"function": {}}]}]}, "no function with a name"),
        ({"messages": [USER | {"content": ""}, BOT]}, "turn 1: content is empty"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}, BOT]}, "of type 'image_url'"),
        ({"messages": [USER | {"content": ["a"]}, BOT]}, "a part of type null"),
        ({"messages": [BOT], "tools": "[1]"}, "tools has a number; accepted: a list of objects"),
        ({"messages": [BOT], "tools": {"a": 1}}, "tools is an object; accepted: a list"),
        ({"messages": [{"role": "system", "content": "a"}, BOT], "system": "b"}, "one of them"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from is 'alien'; accepted: system"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "which is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "value is no call"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "turn 1: value is null"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history has a list; accepted"),
        ({"instruction": "a", "output": "b", "history": [["a", 1]]}, "history is the number 1"),
        ({"instruction": "a", "output": "b", "input": 7}, "input is the number 7"),
        ({"text": "\ud800"}, "text has half of a surrogate pair"),
        ({"text": "a", "role": "prompter", "parent_id": None}, "one message of a tree"),
        ({"role": "user", "content": "a"}, "it is one message; accepted: a row for each chat"),
        (
            {"Question": "a", "Answer ": "b", "n": 1},
            "COLUMNS=question:Question,answer:Answer  takes them",
        ),
        ({"messages": [BOT | {"name": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [BOT], "tools": [{"name": "\ud800"}]}, "tools has half of a surrogate pair"),
        (
            {
                "messages": [
                    BOT
                    | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}
                ]
            },
            "turn 1: it has half of a surrogate pair",
        ),
    ],
)
def test_what_is_no_example_is_refused_with_its_row(row, message):
    for content in (lines(row), json.dumps(row, indent=1), lines([row])):
        assert message in error_of(content)
    assert error_of(lines([row])).startswith("a.json, row 1: ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "it lacks completion, which the first row has"),
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"question": "a", "answer": "b"}, "it is of another layout, question+answer, than the f"),
        ({"text": "a"}, "it is of another layout, text, than the first row, which has prompt+"),
        (ASKED | {"text": "a"}, "it fits prompt+completion and text"),
        ([ASKED], "it is a list and no JSON object"),
    ],
)
def test_all_rows_have_the_layout_of_the_first(row, message):
    message = f"a.jsonl, line 3: {message}"
    assert message in error_of(lines(ASKED) + b" \r\n" + lines(row, ASKED), "a.jsonl")


def test_a_row_of_a_larger_layout_is_another_layout():
    pair = {"input": "a", "output": "b"}
    message = error_of(lines(pair, pair | {"instruction": "c"}), "a.jsonl")
    assert "line 2: it is of another layout, instruction+output, than the first row" in message


def test_an_error_is_a_line_that_one_can_read():
    for row in (
        {f"key {i}": 1 for i in range(5000)},
        {"messages": [{"role": "r" * 9000}]},
        {"k\n" * 999: 1},
    ):
        assert "line 1: " in error_of(lines(row), "a.jsonl")


# ---- formats


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "A.JSONL", "a.JSON.gz"])
def test_the_content_decides_and_not_the_ending(name):
    rows = [{"text": f"\u2028 {i} \u00e9"} for i in range(3)]
    compact = json.dumps(rows, ensure_ascii=False)
    contents = [
        compact,
        json.dumps(rows, indent=2),
        "\n" + compact.replace("}, {", "},\r\n{") + "\n\n",
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n \n",
        "\ufeff" + "\r\n".join(map(json.dumps, rows)),
        "\n".join(json.dumps(row, indent=2) for row in rows),  # objects over several lines
        json.dumps(rows[:1]) + "\n" + json.dumps(rows[1:]),  # two arrays, as `cat` joins them
        json.dumps({"version": 1, "data": rows}),
        json.dumps({"data": rows}, indent=1),
    ]
    for content in contents:
        assert values(content, name) == rows
        assert values(gzip.compress(content.encode()), name) == rows


def test_one_object_is_one_row():
    for row in ({"messages": [USER, BOT]}, ASKED | {"tools": [{"name": "f"}]}):
        for indent in (None, 2):
            assert read_rows("a.json", json.dumps(row, indent=indent).encode(), COLUMNS) == [
                ("line 1", row)
            ]


def test_places_are_lines_of_the_file_and_rows_of_an_array():
    content = b"\n" + lines(ASKED) + b"\n\n" + lines(ASKED)
    assert [place for place, _ in read_rows("a", content, COLUMNS)] == ["line 2", "line 5"]
    content = json.dumps([ASKED, ASKED], indent=1).encode()
    assert [place for place, _ in read_rows("a", content, COLUMNS)] == ["row 1", "row 2"]


GOOD = json.dumps(ASKED)
PACKED = gzip.compress(lines(*[ASKED] * 99), mtime=0)  # the same in every worker


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": the file is empty"),
        ("\ufeff \r\n", ": the file is empty"),
        ("[]", ": it has no rows"),
        ("[[]]", ", row 1: it is a list and no JSON object"),
        ("3", ", row 1: it is a number and no JSON object"),
        ('{"a": {"b": [{}]}, "c": 1}', ", line 1: it has a, c; accepted: "),
        ("text", ", line 1: it is not JSON (Expecting value at character 1); TEXT=True takes DATA"),
        (f"{GOOD}\n{{\n{GOOD}", ", line 2: it is not JSON ("),
        (f"{{\n{GOOD}\n{GOOD}", ", line 1: it is not JSON ("),
        (f"{GOOD}\n\n{GOOD[:-9]}", ", line 3: it is not JSON ("),
        (f"{GOOD}\n{GOOD} {GOOD}", ", line 2: it is not JSON (Extra data at character 41"),
        (
            f"[{GOOD},\n {GOOD}\n {GOOD}]",
            ", line 3: it is not JSON (Expecting ',' delimiter at cha",
        ),
        (f"[{GOOD},\n{GOOD}", ", line 2: it is not JSON ("),
        (GOOD.encode() + b"\n{\xff}", ", line 2: it is not UTF-8"),
        (f"{GOOD}\n{GOOD}".encode("utf-16"), ": it is not UTF-8 but UTF-16"),
        (f"{GOOD}\n{GOOD}".encode("utf-16-le"), ": it is not UTF-8 but UTF-16"),
        (f"{GOOD}\n{GOOD}".encode("utf-32"), ": it is not UTF-8 but UTF-32"),
        (bytes(range(256)), ": it is not UTF-8 but UTF-16, or no text"),
        (b"version https://git-lfs.github.com/spec/v1\noid", ": it is a pointer of git-lfs and no"),
        ("[" * 100_000, ": it is JSON nested too deeply"),
        (f'{GOOD}\n{{"text": ' + "[" * 100_000, ", line 2: it is nested too deeply"),
        (f'{GOOD}\n{{"prompt": "a", "completion": {"9" * 5000}}}', ", line 2: Exceeds the limit"),
        (f'{GOOD}\n{{"prompt": "a", "prompt": "b"}}', ", line 2: an object has 'prompt' more than"),
        ('[{"text": "a", "text": "b"}]', ": an object has 'text' more than once"),
        (
            PACKED[:-20],
            ": its gzip data are cut short or damaged",
        ),
        (b"\x1f\x8b" + bytes(30), ": its gzip data are cut short or damaged"),
        (gzip.compress(b"", mtime=0), ": the file is empty"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(content, message):
    assert error_of(content).startswith("a.json" + message)


@given(st.binary(max_size=200) | st.text(alphabet='[{"a:1,}]\n ').map(str.encode))
def test_any_content_is_rows_or_an_error(content):
    for name in ("a.json", "a.csv"):
        try:
            parse_rows(name, read_rows(name, content, COLUMNS), {})
        except DataError as error:
            assert str(error).isprintable()


KEYS = [*COLUMNS, "role", "content", "from", "value", "weight", "tool_calls", "type"]
VALUES = (
    st.none() | st.floats() | st.text(max_size=3) | st.sampled_from([*KEYS, "assistant", "gpt"])
)


@given(
    st.recursive(
        VALUES,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_row_is_an_example_or_an_error(row):
    try:
        ((found,), _) = parse_rows("a", [("row 1", row)], {})
        assert (found.text is None) != (found.messages == ())
    except DataError as error:
        assert str(error).startswith("a, row 1: ")


def test_a_turn_nested_deeper_than_can_be_written_again_is_an_error():
    call: list = []
    for _ in range(100_000):
        call = [call]
    with pytest.raises(DataError, match=r"^a, row 3: it is nested too deeply$"):
        parse_rows("a", [("row 3", {"messages": [USER, BOT | {"call": call}]})], {})
    while call:  # as Python would free it recursively
        call = call.pop()


def test_csv_has_a_header_quoted_line_breaks_and_a_byte_order_mark():
    content = '\ufeff"prompt", completion ,id\r\n"a ""b"",\n\nc",d,\r\n\r\ne,"f",2\r\n'
    rows = read_rows("a.CSV", content.encode(), COLUMNS)
    assert rows == [
        ("line 2", {"prompt": 'a "b",\n\nc', "completion": "d", "id": ""}),
        ("line 6", {"prompt": "e", "completion": "f", "id": "2"}),
    ]
    assert values(gzip.compress(b"text\n1\n", mtime=0), "a.csv.gz") == [{"text": "1"}]
    assert values("text\nno, comma; is a delimiter\n", "a.tsv") == [
        {"text": "no, comma; is a delimiter"}
    ]
    assert values("frage;antwort\na,b;c\n", "a.csv") == [{"frage": "a,b", "antwort": "c"}]
    assert values("prompt\tcompletion\na\tb\n", "a.csv") == [{"prompt": "a", "completion": "b"}]
    long = "x" * 200_000  # more than the csv module's own limit
    assert values(f"text\n{long}\n", "a.csv") == [{"text": long}]
    chat = json.dumps([USER, BOT]).replace('"', '""')
    read = read_rows("a.csv", f'messages\n"{chat}"\n'.encode(), COLUMNS)
    assert turns(parse_rows("a.csv", read, {})[0][0]) == (("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,completion\n", ": it has no rows"),
        ("", ": the file is empty"),
        ("prompt,completion\na,b\nc\n", ", line 3: it has 1 cells, and the header 2"),
        ("prompt,completion\n\na,b,c\n", ", line 3: it has 3 cells, and the header 2"),
        ("prompt,prompt\na,b\n", ", line 1: two columns have one name: prompt, prompt"),
        ('prompt,completion\na,b\n"c\n,d\n', ", line 3: it is not CSV (unexpected end of data)"),
        ('prompt,completion\n"a"x,b\n', ", line 2: it is not CSV ("),
        ("prompt,completion\n,a\n", ", line 2: prompt is empty"),
        ("a,b\nc,d\n", ", line 2: it has a, b; accepted: "),
        (b"prompt,completion\na,\xff\n", ", line 2: it is not UTF-8"),
        ("prompt,completion\na,b\n".encode("utf-16"), ": it is not UTF-8 but UTF-16"),
    ],
)
def test_broken_csv_is_refused_with_its_line(content, message):
    assert error_of(content, "a.csv").startswith("a.csv" + message)


def test_parquet_is_read_where_pyarrow_is_installed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rows = [
        {"messages": [USER, BOT | {"tool_calls": [call]}], "n": 1, "when": None},
        {"messages": [USER | {"name": "Ada"}, BOT], "n": None, "when": None},
    ]
    path = tmp_path / "train-00000-of-00001.Parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    splits = read_splits(find_records(str(path)), {})
    assert [found.messages for found in splits.train + splits.validation] == [
        tuple(row["messages"]) for row in rows
    ]  # without the nulls that parquet has in a turn that lacks another's key
    assert splits.found == {path.name: "OpenAI (messages), 2 rows; ignored columns: n, when"}
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"Parquet: it is not parquet that pyarrow reads \("):
        read_splits(find_records(str(path)), {})


def test_nulls_of_parquet_are_left_out(monkeypatch):
    """As `pyarrow` has them, which the tests can do without."""
    rows = [{"messages": [USER | {"name": None}, BOT | {"calls": [{"x": None}, 0]}], "n": None}]
    table = SimpleNamespace(to_pylist=lambda: rows)
    parquet = SimpleNamespace(read_table=lambda file: table)
    pyarrow = SimpleNamespace(parquet=parquet, ArrowException=ValueError)
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert read_rows("a.parquet", b"PAR1", COLUMNS) == [
        ("row 1", {"messages": [USER, BOT | {"calls": [{}, 0]}], "n": None})
    ]


def test_parquet_without_pyarrow_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "a.parquet: parquet needs the package pyarrow: pip install pyarrow" in error_of(
        b"PAR1....PAR1", "a.parquet"
    )


# ---- files and folders


def folder_of(root: Path, *names: str, n: int = 2) -> str:
    """A folder with these files, each of n rows with its own name as text."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines(*({"text": f"{name} {i}"} for i in range(n))))
    return str(root)


def files_of(examples: list[Example]) -> set[str]:
    return {example.text.rpartition(" ")[0] for example in examples}


@pytest.mark.parametrize(
    ("train", "validation", "left_out"),
    [
        (["train.jsonl"], ["valid.jsonl"], []),
        (["train.json"], ["val.jsonl"], ["extra.json"]),
        (["TRAIN.JSONL"], ["Dev.Json"], ["test.json"]),
        (["alpaca_train.json"], ["alpaca_eval.json"], ["alpaca_test.json"]),
        (["train-00000-of-00002.json", "train-00001-of-00002.json"], ["validation-0.json"], []),
        (["data/train-0.json"], ["data/validation-0.json"], ["data/test-0.json", "infos.json"]),
        (["en/training/0.json", "train/1.json"], ["valid/0.json"], ["test/0.json"]),
        (["alpaca.json"], ["alpaca.val.json"], ["alpaca.test.json"]),
        (["train/train.json"], ["train/val.json"], ["train/test.json"]),
        (["train.jsonl"], [], ["test.jsonl"]),
        (["only.json"], [], []),
        (["a.json", "sub/b.jsonl", "trainset.json", "evaluation.ndjson"], [], []),
    ],
)
def test_names_say_what_the_files_of_a_folder_are_for(tmp_path, train, validation, left_out):
    name = folder_of(tmp_path, *train, *validation, *left_out, n=1 if validation else 20)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".gitattributes").write_text("hidden")
    assert is_records(name)
    files = find_records(name)
    splits = read_splits(files, {})
    if validation:
        assert files_of(splits.train) == set(train)
        assert files_of(splits.validation) == set(validation)
        assert [splits.found[name][-16:] for name in validation] == ["; for validation"] * len(
            validation
        )
    else:
        assert files_of(splits.train + splits.validation) == set(train)
        assert len(splits.validation) == 2 * len(train)
    assert set(splits.found) == {*train, *validation, *left_out}
    assert all(splits.found[name].startswith("left out, as ") for name in left_out)
    assert {str(tmp_path / name) for name in train + validation} == set(
        map(str, files.train + files.validation)
    )


def test_a_folder_of_text_is_text_with_datasets_among_its_files(tmp_path):
    for name in ("package.json", "src/train.jsonl", "data/train.csv"):
        folder_of(tmp_path, name)
        (tmp_path / "main.py").write_text("print()")
        assert not is_records(str(tmp_path))
    (tmp_path / "main.py").rename(tmp_path / "src" / "main.py")
    assert not is_records(str(tmp_path))  # also where they lie deeper
    (tmp_path / "src" / "main.py").unlink()
    assert is_records(str(tmp_path))
    (tmp_path / "src" / "main.py").write_text("print()")
    folder_of(tmp_path, "val.jsonl")
    assert is_records(str(tmp_path))
    assert not is_records(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert not is_records(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["val.jsonl", "test.jsonl"], "test.jsonl, val.jsonl, and no file to train on; accepted"),
        (["train.json", "train.jsonl"], "train.json and train.jsonl look like the same data twice"),
        (["train.jsonl", "train.jsonl.gz"], "look like the same data twice"),
    ],
)
def test_a_folder_that_leaves_doubts_is_refused(tmp_path, names, message):
    with pytest.raises(DataError, match=r"^DATA=.*; accepted: ") as error:
        find_records(folder_of(tmp_path, *names))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((f"a.{e}", True) for e in ("json", "JSONL", "ndjson", "csv", "Tsv", "PARQUET")),
        *((name, True) for name in ("a.jsonl.gz", "a.gz", "python-instructions")),
        *((name, False) for name in ("a.txt", "json", "a.json5", "a.jsonl.bak", "a.csv/", "")),
        *((name, False) for name in ("python-code", "python-docs", "\0", None)),
    ],
)
def test_a_file_is_a_dataset_by_its_ending(name, expected):
    assert is_records(name) is (expected or name == "a.csv/")


def test_every_tenth_example_validates_without_a_file_for_it(tmp_path):
    splits = read_splits(find_records(folder_of(tmp_path, "a.jsonl", "b.jsonl", n=15)), {})
    assert [found.text for found in splits.validation] == [
        "a.jsonl 9", "b.jsonl 4", "b.jsonl 14",
    ]  # fmt: skip
    assert len(splits.train) == 27


def test_the_checksum_is_of_all_files_that_are_read(tmp_path):
    name = folder_of(tmp_path, "train.jsonl", "valid.jsonl", "test.jsonl")
    before = find_records(name).checksum()
    train, valid = ((tmp_path / file).read_bytes() for file in ("train.jsonl", "valid.jsonl"))
    of_train, of_valid = (hashlib.sha256(content).hexdigest() for content in (train, valid))
    said = f"train {of_train}\nvalidation {of_valid}\n".encode()
    assert before == f"sha256:{hashlib.sha256(said).hexdigest()[:16]}"
    first, _, rest = valid.partition(b"\n")  # a record that moves to the other split
    (tmp_path / "train.jsonl").write_bytes(train + first + b"\n")
    (tmp_path / "valid.jsonl").write_bytes(rest)
    assert find_records(name).checksum() != before
    (tmp_path / "train.jsonl").write_bytes(train)
    (tmp_path / "valid.jsonl").write_bytes(valid)
    folder_of(tmp_path, "test.jsonl", n=3)
    assert find_records(name).checksum() == before
    folder_of(tmp_path, "valid.jsonl", n=3)
    assert find_records(name).checksum() != before


# ---- the whole way


def run(folder: Path, **variables: str):
    return start_script(folder, **TINY | {"BLOCK_SIZE": "64", "MAX_STEPS": "1"} | variables)


def test_a_json_array_is_records_and_the_log_says_so(tmp_path):
    rows = [{"frage": f"{i}?", "antwort": f"{i}", "id": i} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    columns = {"COLUMNS": "prompt:frage, completion:antwort"}
    log = succeeded(run(tmp_path, DATA="a.json", **columns))
    assert "   a.json: prompts (frage, antwort), 20 rows; ignored columns: id\n" in log
    assert "18 records" in log and "COLUMNS: prompt:frage, completion:antwort *" in log
    assert json.loads((tmp_path / "out" / "full-metrics.jsonl").read_text().splitlines()[0])
    resumed = run(tmp_path, DATA="a.json", RESUME="True", MAX_STEPS="2", **columns)
    assert "Resuming" in succeeded(resumed)
    other = run(tmp_path, DATA="a.json", RESUME="True", COLUMNS="prompt:antwort,completion:frage")
    assert "a run with COLUMNS=prompt:frage, completion:antwort" in refused(other)
    assert "a.json, row 1: it has frage, antwort, id; " in refused(run(tmp_path, DATA="a.json"))


def test_what_is_no_dataset_is_text_when_it_is_asked_for(tmp_path):
    (tmp_path / "package.json").write_text(json.dumps({"name": "x", "files": ["a"] * 200}))
    error = refused(run(tmp_path, DATA="package.json"))
    assert "package.json, line 1: it has name, files; accepted: messages, " in error
    assert error.endswith("TEXT=True takes DATA as plain text")
    log = succeeded(run(tmp_path, DATA="package.json", TEXT="True"))
    assert "first 90% train" in log
    log = succeeded(run(tmp_path, DATA="python-instructions", TEXT="True"))
    assert "first 90% train" in log and "files:    2\n" in log
    (tmp_path / "text.txt").write_text("plain text " * 200)
    error = refused(run(tmp_path, DATA="text.txt", COLUMNS="text"))
    assert "COLUMNS is of rows, but DATA is plain text" in error


def test_a_folder_has_the_same_data_in_every_run(tmp_path):
    """Also when runs have written into it: to out, to out-test, and beside the text itself."""
    (tmp_path / "text.txt").write_text("plain text " * 200)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("of the output folder")

    def checksum(**variables: str) -> str:
        log = succeeded(run(tmp_path, DATA=".", **variables))
        return log.partition("checksum: ")[2].partition("\n")[0]

    first = checksum()
    assert checksum() == checksum(TEST_MODE="True") == first
    assert checksum(OUT_DIR="other") == checksum(OUT_DIR=".") == checksum(OUT_DIR="other") == first


def test_a_folder_of_records_stays_one_when_runs_have_written_into_it(tmp_path):
    folder_of(tmp_path, "any.jsonl", n=20)
    for out in ("out", "out", ".", "."):
        log = succeeded(run(tmp_path, DATA=".", OUT_DIR=out))
        assert "18 records" in log and log.count(".jsonl: ") == 1
        if out == "out":
            (tmp_path / "out" / "notes.txt").write_text("of the output folder")


# ---- the settings


def test_columns_are_pairs_of_names():
    def pairs(text: str) -> tuple[tuple[str, str], ...]:
        return Config.from_environment({"COLUMNS": text}).columns.pairs

    assert pairs("prompt:frage, completion : die Antwort") == (
        ("prompt", "frage"), ("completion", "die Antwort"),
    )  # fmt: skip
    assert pairs("text") == (("text", "text"),)
    assert pairs("text:a:b") == (("text", "a:b"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt:a", "'promt' is no column of a layout (did you mean prompt?); accepted, as in"),
        ("a:prompt", "'a' is no column of a layout"),
        ("prompt:", "prompt: names no column of the file"),
        ("prompt:a,,", "'' is no column"),
        ("prompt:a,prompt:b", "has one name twice"),
        ("", "COLUMNS is set to nothing"),
    ],
)
def test_columns_that_mean_nothing_are_refused(text, message):
    with pytest.raises(ConfigError) as error:
        Config.from_environment({"COLUMNS": text})
    assert message in str(error.value)
    with pytest.raises(ConfigError, match="TEXT and COLUMNS exclude each other"):
        Config.from_environment({"COLUMNS": "text", "TEXT": "True"})


def test_the_width_of_a_terminal_is_no_setting():
    for width in ("80", " 132"):
        assert Config.from_environment({"COLUMNS": width}).columns is None


def test_layouts_have_names_for_all_that_they_read():
    assert {column for layout in LAYOUTS for column in layout.columns} == set(COLUMNS)
    assert dataclasses.fields(Example)[0].name == "messages"


def test_an_empty_answer_is_an_example_that_the_log_counts(tmp_path):
    rows = [{"prompt": "a", "completion": text} for text in ("b", "")]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_records(str(tmp_path), 40)
    assert (corpus.train.n_records, corpus.train.n_empty) == (2, 1)
    assert "; 1 with an empty answer" in corpus.describe()[2]
