"""A file's content to rows: JSON arrays, JSON lines, CSV and parquet, also compressed by gzip.

A row is a dict from column to value, with the place in the file where it stands.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

from data.corpus import DataError, printable

GZIP, PARQUET, GIT_LFS = b"\x1f\x8b", b"PAR1", b"version https://git-lfs"  # how files begin
AS_TEXT = "TEXT=True takes DATA as plain text"
WHITESPACE = re.compile(r"[ \t\r\n]*")  # of JSON
LONGEST_REASON = 300  # characters of an error's one line that say what is wrong

Row = tuple[str, Any]  # "line 3" or "row 3", counted from 1, and what stands there


def read_rows(name: str, content: bytes, columns: Sequence[str]) -> list[Row]:
    """The rows of the file `name`.

    The content decides what it is, and only CSV is known by its ending, .csv or .tsv. Blank lines
    between rows are left out. One JSON object stands for its rows where it holds one list of
    objects, as in {"data": [...]}, and none of the `columns` that a row would have.

    Raises DataError, which names the file and the line, for content that is not read whole.
    """
    try:
        if content.startswith(GZIP):
            content = gzip.decompress(content)
        if content.startswith(PARQUET):
            rows = _parquet(content)
        elif (ending := name.lower().removesuffix(".gz")[-4:]) in (".csv", ".tsv"):
            rows = _csv(_text(content), ",;\t" if ending == ".csv" else "\t")
        else:
            rows = _json(_text(content), columns)
        if not rows:
            raise ValueError("it has no rows")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _error(name, "its gzip data are cut short or damaged") from error
    except RecursionError as error:
        raise _error(name, "it is JSON nested too deeply") from error
    except _Broken as error:
        raise _error(f"{name}, {error.place}", str(error)) from error
    except ValueError as error:
        raise _error(name, str(error)) from error
    return rows


class _Broken(ValueError):
    """What is wrong at a place of a file."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def _error(place: str, reason: str) -> DataError:
    return DataError(f"{printable(place)}: {printable(reason[:LONGEST_REASON])}")


def _text(content: bytes) -> str:
    """The text of a file in UTF-8, without its byte order mark."""
    if content.startswith(GIT_LFS):
        raise ValueError("it is a pointer of git-lfs and not the data; run git lfs pull")
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        raise ValueError(f"it is not UTF-8 but {encoding.upper()[:6]}, or no text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise _Broken(f"line {number}", "it is not UTF-8") from error
    if not text.strip():
        raise ValueError("the file is empty")
    return text


# ---- JSON


def _json(text: str, columns: Sequence[str]) -> list[Row]:
    """The rows of JSON lines, of a JSON array, or of an object over several lines."""
    lines = text.split("\n")  # and not at U+2028, which may stand in a JSON text
    written = [line for line in lines if line.strip()]
    # Either end tells lines from an object over several lines, if the other is broken.
    ends = (written[0], written[-1]) if written[0].lstrip().startswith("{") else ()
    if len(written) > 1 and any(map(_is_object, ends)):
        return _json_lines(lines)
    values = _json_values(text)
    if len(values) == 1 and isinstance(values[0], dict):
        tables = [value for value in values[0].values() if _is_table(value)]
        if len(tables) != 1 or set(values[0]) & set(columns):
            return [("line 1", values[0])]
        values = tables
    rows: list[Any] = []
    for value in values:
        rows += value if isinstance(value, list) else [value]
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _json_values(text: str) -> list[Any]:
    """The JSON values of a text: one, or several as joining files makes them."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    values, place = [], 0
    while (place := WHITESPACE.match(text, place).end()) < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            reason = _not_json(error.msg, error.colno)
            raise _Broken(f"line {error.lineno}", f"{reason}; {AS_TEXT}") from error
        values.append(value)
    return values


def _json_lines(lines: list[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line, object_pairs_hook=_object)))
        except json.JSONDecodeError as error:
            raise _Broken(f"line {number}", _not_json(error.msg, error.pos + 1)) from error
        except RecursionError as error:
            raise _Broken(f"line {number}", "it is nested too deeply") from error
        except ValueError as error:
            raise _Broken(f"line {number}", str(error)) from error
    return rows


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, which has every key once: json.loads would keep the last of several."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"an object has {twice[:40]!r} more than once")
    return found


def _not_json(reason: str, character: int) -> str:
    return f"it is not JSON ({reason} at character {character})"


# ---- CSV and parquet


def _csv(text: str, delimiters: str) -> list[Row]:
    """The rows of a CSV with a header, whose line says which of the `delimiters` divides cells.

    A quoted cell may have line breaks. A row is named by the line on which it begins.
    """
    csv.field_size_limit(2**31 - 1)  # 128 KiB are too few for a long conversation
    first = text.lstrip().partition("\n")[0]
    delimiter = max(delimiters, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows: list[Row] = []
    line = 1
    try:
        for cells in reader:
            place, line = f"line {line}", reader.line_num + 1
            if not cells or (len(cells) == 1 and not cells[0].strip()):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    raise _Broken(place, f"two columns have one name: {', '.join(header)}")
                continue
            if len(cells) != len(header):
                found = f"it has {len(cells)} cells, and the header {len(header)}"
                raise _Broken(place, found)
            rows.append((place, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise _Broken(f"line {line}", f"it is not CSV ({error})") from error
    return rows


def _parquet(content: bytes) -> list[Row]:
    """The rows of a parquet file.

    Objects inside a column have the keys of all rows' objects, with nulls where a row has none.
    These nulls are left out.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "parquet needs the package pyarrow: pip install pyarrow; or save the data as JSON lines"
        ) from error
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"it is not parquet that pyarrow reads ({reason})") from error
    return [
        (f"row {number}", {column: _without_nulls(value) for column, value in row.items()})
        for number, row in enumerate(table.to_pylist(), start=1)
    ]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
