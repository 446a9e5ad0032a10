"""Opens DATA, whatever it is: which layout it has decides what reads it."""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from data.chat import Format, PlainFormat
from data.corpus import Corpus, DataError
from data.forms import NO_COLUMNS
from data.record_files import is_records
from data.records import load_records
from data.text import check_length, load_corpus
from data.tokenized import tokenize_corpus


def open_corpus(
    name: str | None,
    default_path: Path,
    tokenizer: str | None = None,
    block_size: int = 1,
    count_prompts: bool = False,
    token_folder: Path | None = None,
    in_turn: AbstractContextManager = nullcontext(),  # noqa: B008  it has no state
    format: Format | None = None,
    columns: Mapping[str, str] = NO_COLUMNS,
    text: bool = False,
) -> Corpus:
    """The corpus that DATA=`name` stands for, long enough for windows of `block_size` tokens.

    Args:
        name: DATA; records as `is_records` says, else a text as `find_text` says.
        default_path: the text that no name stands for, if it is there.
        tokenizer: the content of a tokenizer.json; None where tokens are bytes.
        count_prompts: whether the loss counts the prompts of records too.
        token_folder: where data in the tokens of `tokenizer` are kept; made when needed. With None
            a text's tokens are kept in the current folder, and records' are not.
        in_turn: entered while their file is looked for and made. Of several processes one should
            make it, and the others find it.
        format: how chats are written; by default the plain format.
        columns: what records call the columns of a layout; see `parse_rows`.
        text: whether to take records as a text too.

    Raises:
        DataError: the data cannot be used.
        FileError: the file of tokens cannot be written.
    """
    if not text and is_records(name):
        format = format or PlainFormat(tokenizer)
        with in_turn:
            return load_records(name, block_size, count_prompts, format, columns, token_folder)
    if columns:
        raise DataError("COLUMNS is of rows, but DATA is plain text; accepted: unset COLUMNS")
    corpus = load_corpus(name, default_path)
    if text:
        corpus = dataclasses.replace(corpus, n_records=0)  # it is what was asked for
    if tokenizer is not None:
        with in_turn:
            corpus = tokenize_corpus(corpus, tokenizer, token_folder or Path())
    check_length(corpus, block_size)
    return corpus
