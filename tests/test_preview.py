"""PREVIEW: what a model will see, and in it what the loss counts."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT, refused, start_script, succeeded

from data import load_corpus, load_records
from data.corpus import IGNORED
from data.preview import marked, preview_lines

ROWS = [
    {"prompt": "2 + 2?", "completion": "4"},
    {"system": "+", "prompt": "1", "completion": "\x1b"},
    {"prompt": "long" * 30, "completion": "lost"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train", "valid"):
        rows = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    return tmp_path


def test_what_counts_stands_between_marks(folder):
    lines = preview_lines(load_records(str(folder), 40), 3, 40)
    shown = "\n".join(lines)
    assert "user: 2 + 2?\nassistant: [[4\\x00]]" in shown
    assert "system: +\nuser: 1\nassistant: [[\\x1b\\x00]]" in shown and "\x1b" not in shown
    assert "2 of 26 tokens counted" in shown
    coloured = "\n".join(preview_lines(load_records(str(folder), 40), 3, 40, colour=True))
    assert "assistant: \x1b[32m4\\x00\x1b[0m" in coloured


@pytest.mark.parametrize("block_size", [34, 35, 40, 200])  # a record fills a block, or does not
def test_examples_are_the_records_as_they_are_trained_on(folder, block_size):
    corpus = load_records(str(folder), block_size)
    examples = corpus.examples(99, block_size)
    counted = sum(sum(counts) for _, counts in examples)
    assert counted == (corpus.train.targets != IGNORED).sum()
    found = sorted(bytes(np.array(tokens)[counts].tolist()) for tokens, counts in examples)
    assert found[:2] == [b"\x1b\0", b"4\0"] and all(len(t) == len(c) for t, c in examples)


def test_a_text_counts_whole(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = load_corpus(str(tmp_path / "text.txt"), Path())
    assert [marked(*e, corpus) for e in corpus.examples(2, 9)] == [
        "t[[he quick ]]",
        " [[brown fox]]",
    ]


def test_the_script_shows_and_trains_nothing(folder):
    asked = {"DATA": ".", "BLOCK_SIZE": "40", "PREVIEW": "2"}
    log = succeeded(start_script(folder, **asked))
    assert "Example 2: " in log and "Example 3: " not in log and "[[" in log
    assert "3 records" in log and "1 left out, of which nothing would be counted" in log
    assert not (folder / "out").exists()
    said = refused(start_script(folder, **asked, MERGE="True"))
    assert "MERGE and PREVIEW exclude each other" in said


def test_data_of_which_nothing_counts_is_an_error(folder):
    (folder / "all.jsonl").write_text(json.dumps(ROWS[2]) + "\n" + json.dumps(ROWS[2]) + "\n")
    process = start_script(folder, DATA="all.jsonl", BLOCK_SIZE="40")
    assert "the loss would count no token of 1 records" in refused(process)
