"""Tests of data/: which bytes a name stands for, what each error says, what a batch holds."""

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import DataError, TextCorpus, load_corpus, open_corpus
from data.batches import training_batch, validation_windows, windows_batch
from data.text import check_length

ROOT = Path(__file__).resolve().parent.parent
NO_DEFAULT = Path("/nowhere/input.txt")
MIB = 1024 * 1024


def load(path: Path | str) -> TextCorpus:
    return load_corpus(str(path), NO_DEFAULT)


def text_of(corpus: TextCorpus) -> bytes:
    return corpus.tokens.tobytes()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def corpus_of(n_bytes: int) -> TextCorpus:
    return TextCorpus("x", np.zeros(n_bytes, np.uint8), "sha256:0", n_files=1, n_skipped=0)


def error_of(name: str) -> str:
    """The message for DATA=name, which must have the form that all of them share."""
    with pytest.raises(DataError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith("DATA=")
    assert "; accepted: " in message
    assert message.isprintable() and message.isascii()
    return message


# ---- a single file


def test_every_byte_of_a_file_is_a_token(tmp_path: Path) -> None:
    content = bytes(range(256)) * 3  # NUL and invalid UTF-8 too: a single file need not be text
    corpus = load(write(tmp_path / "all.bin", content))
    assert text_of(corpus) == content
    assert corpus.tokens.dtype == np.uint8 and corpus.tokens.ndim == 1
    assert (corpus.n_files, corpus.n_skipped) == (1, 0)
    assert corpus.name == str(tmp_path / "all.bin")


def test_tokens_cannot_be_written(tmp_path: Path) -> None:
    corpus = load(write(tmp_path / "a.txt", b"text"))
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 0


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "a.txt", b"text")
    assert text_of(load("~/a.txt")) == b"text"


# ---- which corpus


def test_default_file_is_used_only_when_no_name_is_given(tmp_path: Path) -> None:
    default = write(tmp_path / "input.txt", b"the default")
    other = write(tmp_path / "other.txt", b"the other")
    corpus = load_corpus(None, default)
    assert (text_of(corpus), corpus.name) == (b"the default", str(default))
    assert text_of(load_corpus(str(other), default)) == b"the other"
    assert load_corpus("python-docs", default).name == "python-docs"


def test_python_code_is_used_without_name_and_default_file(tmp_path: Path) -> None:
    assert load_corpus(None, tmp_path / "input.txt").name == "python-code"
    assert load_corpus(None, tmp_path).name == "python-code"  # a folder is no default file


def test_built_in_name_wins_over_a_file_that_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "python-docs", b"mine")
    assert text_of(load("python-docs")) != b"mine"
    assert text_of(load("./python-docs")) == b"mine"


# ---- built-in corpora


def test_python_code_is_the_standard_library_of_this_python() -> None:
    corpus = load("python-code")
    text = text_of(corpus)
    stdlib = Path(sysconfig.get_path("stdlib"))
    places = [
        text.find((stdlib / name).read_bytes()) for name in ("abc.py", "ast.py", "json/tool.py")
    ]
    assert -1 not in places and places == sorted(places)
    for left_out in ("encodings/utf_8.py", "pydoc_data/topics.py"):
        assert (stdlib / left_out).read_bytes() not in text
    assert 6e6 < len(text) < 14e6
    assert corpus.n_files > 300 and corpus.n_skipped == 0


def test_python_code_leaves_out_tests_tables_and_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for folder in (
        *("test", "tests", "json/tests", "tkinter/test", "idlelib/idle_test", "idlelib", "lib2to3"),
        *("encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"),
    ):
        write(tmp_path / folder / "left_out.py", b"left out\n")
    write(tmp_path / "notes.txt", b"not code\n")
    for name in ("b.py", "a/z.py", "testing/c.py", "unittest/test.py"):
        write(tmp_path / name, name.encode() + b"\n")
    assert text_of(load("python-code")) == b"a/z.py\nb.py\ntesting/c.py\nunittest/test.py\n"


def test_python_docs_are_joined_in_the_order_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = {"b": "second", "c": "caf\u00e9\n", "a": "first\n"}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", SimpleNamespace(topics=topics))
    corpus = load("python-docs")
    assert text_of(corpus) == "first\nsecond\ncaf\u00e9\n".encode()
    assert (corpus.n_files, corpus.n_skipped) == (3, 0)


def test_python_docs_are_the_topics_of_this_python() -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    corpus = load("python-docs")
    rest = text_of(corpus).decode()
    for key in sorted(topics):
        assert rest.startswith(topics[key]), key
        rest = rest.removeprefix(topics[key]).removeprefix("\n")
    assert rest == ""
    assert corpus.n_files == len(topics)


def test_stripped_python_is_named_and_a_path_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "this Python has no pydoc_data.topics; accepted: DATA=path" in error_of("python-docs")
    for root in (tmp_path, tmp_path / "missing"):
        monkeypatch.setattr(sysconfig, "get_path", lambda name, root=root: str(root))
        assert "this Python has no .py files" in error_of("python-code")
        assert "accepted: DATA=path" in error_of("python-code")


# ---- a folder


def test_folder_is_joined_in_the_order_of_posix_paths(tmp_path: Path) -> None:
    # As path parts "a/z" would come before "a.txt"; as a string "." comes before "/".
    for name in ("b", "a/z", "a.txt", "a/y/deep", "B"):
        write(tmp_path / name, name.encode() + b"\n")
    corpus = load(tmp_path)
    assert text_of(corpus) == b"B\na.txt\na/y/deep\na/z\nb\n"
    assert (corpus.n_files, corpus.n_skipped) == (5, 0)


def test_newline_is_added_only_between_files_that_lack_one(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"2\n"), ("c", b"3\r\n"), ("d", b"4")):
        write(tmp_path / name, content)
    assert text_of(load(tmp_path)) == b"1\n2\n3\r\n4"


def test_hidden_files_and_folders_are_left_out_but_a_hidden_root_is_not(tmp_path: Path) -> None:
    root = tmp_path / ".hidden"
    for name in (".secret", ".git/config", "a/.cache/x", "a/shown"):
        write(root / name, b"x" if name != "a/shown" else b"shown")
    corpus = load(root)
    assert (text_of(corpus), corpus.n_files, corpus.n_skipped) == (b"shown", 1, 0)


def test_files_that_are_not_text_are_counted_and_empty_ones_are_not(tmp_path: Path) -> None:
    write(tmp_path / "empty", b"")
    write(tmp_path / "nul", b"text\0text")
    write(tmp_path / "latin-1", "caf\u00e9 noir".encode("latin-1"))
    write(tmp_path / "cut", "caf\u00e9".encode()[:-1])  # half a character at a file's real end
    write(tmp_path / "utf-8", "caf\u00e9".encode())
    corpus = load(tmp_path)
    assert text_of(corpus) == "caf\u00e9".encode()
    assert (corpus.n_files, corpus.n_skipped) == (1, 3)


def test_records_that_are_read_as_text_are_said(tmp_path: Path) -> None:
    for name in ("notes.txt", "chats.jsonl", "More.CSV", "package.json"):
        write(tmp_path / name, b'{"text": "some text"}\n' * 9)
    said = "\n".join(load(tmp_path).describe())
    assert "records:  2 of the files by their names, read as text as others lie beside" in said
    asked = open_corpus(str(tmp_path), NO_DEFAULT, text=True)
    assert "records:" not in "\n".join(asked.describe())
    (tmp_path / "chats.jsonl").unlink()
    (tmp_path / "More.CSV").unlink()
    assert "records:" not in "\n".join(load(tmp_path).describe())


def test_only_the_first_64_kib_decide_and_may_end_within_a_character(tmp_path: Path) -> None:
    head = 64 * 1024
    euro = "\u20ac".encode()
    cut = b"x" * (head - 1) + euro + b"\0\xff"  # the boundary falls after the first of 3 bytes
    write(tmp_path / "a", cut)
    write(tmp_path / "b", b"x" * (head - 1) + b"\0")
    corpus = load(tmp_path)
    assert text_of(corpus) == cut
    assert (corpus.n_files, corpus.n_skipped) == (1, 1)


def test_folder_larger_than_a_chunk_is_joined_whole(tmp_path: Path) -> None:
    long = b"0123456789abcde\n" * (MIB // 16) + b"end"
    write(tmp_path / "a", long)
    write(tmp_path / "b", b"b")
    assert text_of(load(tmp_path)) == long + b"\nb"


def test_joined_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    corpus = load(write(tmp_path / "texts" / "a", b"text").parent)
    if os.name == "posix":  # on Windows the file has a name until the map is gone
        assert list(temporary.iterdir()) == []
    assert text_of(corpus) == b"text"


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symbolic links")
def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "a", b"a\n")
    write(root / "folder" / "b", b"b\n")
    write(tmp_path / "elsewhere" / "c", b"c\n")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "folder" / "up").symlink_to(root)  # a loop
    (root / "self").symlink_to(root / "self")
    (root / "dangling").symlink_to(tmp_path / "nothing")
    corpus = load(root)
    assert text_of(corpus) == b"a\nb\nc\n"
    assert (corpus.n_files, corpus.n_skipped) == (3, 2)


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symbolic links")
def test_of_two_ways_to_a_folder_the_first_in_order_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "m", b"middle\n")
    for i in range(8):  # many, since the system may list them in any order, also in the right one
        write(root / f"z{i}" / "text", b"%d\n" % i)
        (root / f"a{i}").symlink_to(root / f"z{i}")
    assert text_of(load(root)) == b"0\n1\n2\n3\n4\n5\n6\n7\nmiddle\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_in_a_folder_is_skipped_without_waiting_for_its_writer(tmp_path: Path) -> None:
    write(tmp_path / "a", b"a")
    os.mkfifo(tmp_path / "pipe")
    corpus = load(tmp_path)
    assert (text_of(corpus), corpus.n_skipped) == (b"a", 1)


# ---- checksum, split, description


def test_checksum_covers_every_byte_of_a_corpus_up_to_64_mib(tmp_path: Path) -> None:
    content = bytes(2 * MIB) + b"the end"
    path = write(tmp_path / "a", content)
    expected = "sha256:" + hashlib.sha256(content).hexdigest()[:16]
    assert load(path).checksum == expected
    folder = write(tmp_path / "folder" / "a", b"the same bytes").parent
    assert load(folder).checksum == load(folder / "a").checksum


def test_checksum_of_a_larger_corpus_is_of_size_and_samples_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()

    def checksum(size: int, *marks: int) -> str:
        os.truncate(path, 0)
        os.truncate(path, size)
        with open(path, "r+b") as file:
            for place in marks:
                file.seek(place)
                file.write(b"x")
        return load(path).checksum

    size = 640 * MIB
    blank = checksum(size)
    assert len(blank) == len("sha256:") + 16 + len(" (64 samples)")
    assert blank.endswith(" (64 samples)")
    assert checksum(size) == blank
    assert checksum(size + 1) != blank
    assert checksum(size, 0) != blank
    assert checksum(size, size - 1) != blank
    middle_sample = 32 * (size - MIB) // 63
    assert checksum(size, middle_sample) != blank
    assert checksum(size, middle_sample - 1) == blank  # between two samples
    assert "samples" not in checksum(64 * MIB)
    assert "samples" in checksum(64 * MIB + 1)


@pytest.mark.parametrize("size", [1, 10, 19, 1000, 12345])
def test_split_is_contiguous_disjoint_and_without_a_copy(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8).tobytes()
    corpus = load(write(tmp_path / "a", content))
    n_train = size * 9 // 10
    assert corpus.train.tobytes() == content[:n_train]
    assert corpus.validation.tobytes() == content[n_train:]
    assert np.shares_memory(corpus.validation, corpus.tokens)
    assert size == 1 or np.shares_memory(corpus.train, corpus.tokens)
    assert not np.shares_memory(corpus.train, corpus.validation)


def test_description_is_aligned_ascii_lines_of_key_and_value(tmp_path: Path) -> None:
    root = tmp_path / "caf\u00e9\nfolder"
    write(root / "a", b"x" * 12345)
    write(root / "b", b"\0")
    corpus = load(root)
    lines = corpus.describe()
    assert all(line.isascii() and line.isprintable() for line in lines)
    facts = dict(line.split(":", 1) for line in lines)
    assert {key: value.strip() for key, value in facts.items()} == {
        "name": str(tmp_path) + r"/caf\xe9\nfolder",
        "bytes": "12,345",
        "files": "1",
        "skipped": "1 (not text)",
        "checksum": corpus.checksum,
        "split": "first 90% train (11,110 bytes), last 10% validation (1,235 bytes)",
    }
    starts = {len(line) - len(line.split(":", 1)[1].lstrip()) for line in lines}
    assert len(starts) == 1
    assert not any(line.startswith("skipped") for line in load(root / "a").describe())


# ---- errors


@pytest.mark.parametrize(
    ("name", "near"),
    [("python-doc", "python-docs"), ("PYTHON-CODE", "python-code"), ("python_docs", "python-docs")],
)
def test_missing_path_near_a_built_in_name_suggests_it(
    name: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"DATA={name}: no such file or folder (did you mean {near}?); accepted: "
    assert error_of(name).startswith(expected)


def test_missing_path(tmp_path: Path) -> None:
    a_file = write(tmp_path / "a", b"a")
    for path in (tmp_path / "missing.txt", a_file / "below"):
        message = error_of(str(path))
        assert message.startswith(f"DATA={path}: no such file or folder; accepted: ")
        for accepted in ("python-code", "python-docs", "path of a file or of a folder"):
            assert accepted in message


def test_unusable_paths_still_give_one_line_of_ascii(tmp_path: Path) -> None:
    assert r"caf\xe9\n.txt: no such file" in error_of(str(tmp_path / "caf\u00e9\n.txt"))
    assert "no such file" in error_of(str(tmp_path) + "/\udcff")  # bytes that are not UTF-8
    assert "cannot be read (" in error_of(str(tmp_path / ("x" * 5000)))
    assert "cannot be read (" in error_of("nul\0inside")


def test_empty_value() -> None:
    assert error_of("").startswith("DATA=: the value is empty; accepted: ")


def test_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"")
    assert f"DATA={path}: the file is empty; " in error_of(str(path))
    with pytest.raises(DataError, match="the file is empty"):
        load_corpus(None, path)


def test_folder_without_text_files(tmp_path: Path) -> None:
    assert f"DATA={tmp_path}: the folder has no text files; " in error_of(str(tmp_path))
    write(tmp_path / "a", b"")
    write(tmp_path / "b", b"\0")
    assert "the folder has no text files (1 that are not text); " in error_of(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), os.devnull):
        assert f"DATA={path}: neither a regular file nor a folder; " in error_of(path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter, unlike tmp_path, which only its owner may."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def error_as_user(name: str) -> str:
    """As error_of, without the rights of root, for whom nothing is forbidden."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # nobody
    try:
        return error_of(name)
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize(
    ("name", "forbidden", "mode"),
    [
        ("texts/a", "texts/a", 0o000),
        ("texts", "texts", 0o000),
        ("texts", "texts/a", 0o000),  # one file of a folder: left out, it would be another corpus
        ("texts", "texts/sub", 0o000),
        ("texts", "texts/sub", 0o444),  # can be listed, but not entered
        ("texts/sub/b", "texts/sub", 0o000),
    ],
)
def test_permission_denied(open_folder: Path, name: str, forbidden: str, mode: int) -> None:
    write(open_folder / "texts" / "a", b"a")
    write(open_folder / "texts" / "sub" / "b", b"b")
    os.chmod(open_folder / forbidden, mode)
    try:
        message = error_as_user(str(open_folder / name))
    finally:
        os.chmod(open_folder / forbidden, 0o755)
    assert message.startswith(f"DATA={open_folder / name}: permission denied")
    if name == "texts":
        assert str(open_folder / forbidden) in message.split("; accepted")[0].split(": ", 1)[1]


def test_no_room_to_join_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", b"a")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    message = error_of(str(tmp_path))
    assert "cannot be joined in a temporary file" in message and "TMPDIR" in message


@pytest.mark.parametrize("block_size", [1, 2, 7, 8, 128])
def test_check_length_asks_for_the_smallest_corpus_that_works(block_size: int) -> None:
    needed = 10 * block_size + 1
    corpus = corpus_of(needed)
    check_length(corpus, block_size)
    training_batch(corpus.train, 2, block_size, seed=0, number=0)
    assert len(validation_windows(corpus.validation, 5, block_size)) >= 1
    with pytest.raises(DataError) as caught:
        check_length(corpus_of(needed - 1), block_size)
    message = str(caught.value)
    for part in ("DATA=x: ", f"{needed - 1:,} bytes", f"BLOCK_SIZE={block_size} ", f"{needed:,} "):
        assert part in message
    assert message.isprintable()


# ---- batches

RAMP = np.arange(200, dtype=np.uint8)  # each token is its own offset


def test_batch_is_windows_of_the_text_with_y_one_token_later() -> None:
    x, y = training_batch(RAMP, batch_size=6, block_size=16, seed=1, number=2)
    assert x.shape == y.shape == (6, 16)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x, x[:, :1] + torch.arange(16))
    assert torch.equal(y, x + 1)


def test_batch_depends_on_nothing_but_its_arguments() -> None:
    def draw(seed: int, number: int) -> list[int]:
        return training_batch(RAMP, 8, 4, seed, number)[0][:, 0].tolist()

    first = draw(1, 2)
    torch.manual_seed(0)
    np.random.seed(0)
    draw(1, 3)
    assert draw(1, 2) == first
    draws = [first, draw(2, 2), draw(1, 3), draw(2, 1)]
    assert len(set(map(tuple, draws))) == len(draws)
    offsets = np.random.default_rng([1, 2]).integers(196, size=8)  # as the design says
    assert first == offsets.tolist()


def test_offsets_are_uniform_from_the_first_to_the_last_possible() -> None:
    tokens, block_size = RAMP[:24], 4
    n_offsets = 20  # 0 to 19: the window at 19 ends with token 23, the last
    starts = torch.cat([training_batch(tokens, 100, block_size, 0, s)[0][:, 0] for s in range(100)])
    counts = torch.bincount(starts, minlength=n_offsets)
    assert len(counts) == n_offsets
    assert counts.min() > 400 and counts.max() < 600  # 500 +- 22 (standard deviation)
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # chi-square with 19 degrees, p = 0.001


def test_text_of_one_window_gives_that_window() -> None:
    x, y = training_batch(RAMP[:5], 3, 4, seed=0, number=0)
    assert x.tolist() == [[0, 1, 2, 3]] * 3 and y.tolist() == [[1, 2, 3, 4]] * 3


def test_text_without_a_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="4 tokens hold no window: block_size 4 needs 5"):
        training_batch(RAMP[:4], 3, 4, seed=0, number=0)
    with pytest.raises(ValueError, match="4 tokens hold no window"):
        validation_windows(RAMP[:4], 3, 4)
    with pytest.raises(ValueError, match="n_windows is 0"):
        validation_windows(RAMP, 0, 4)


def test_batch_from_a_mapped_file(tmp_path: Path) -> None:
    corpus = load(write(tmp_path / "a", RAMP.tobytes()))
    for mapped, expected in zip(
        training_batch(corpus.tokens, 8, 4, 1, 2), training_batch(RAMP, 8, 4, 1, 2), strict=True
    ):
        assert torch.equal(mapped, expected)


def test_batch_does_not_alias_the_text_or_its_partner() -> None:
    x, y = windows_batch(RAMP, np.array([0]), 4)
    x.zero_()
    assert y.tolist() == [[1, 2, 3, 4]] and RAMP[1] == 1


def test_validation_windows_are_evenly_spaced_over_the_whole_split() -> None:
    offsets = validation_windows(RAMP, n_windows=8, block_size=16)
    assert offsets.dtype == np.int64 and len(offsets) == 8
    assert offsets[0] == 0 and offsets[-1] == 200 - 17  # the last window ends with the last token
    gaps = np.diff(offsets)
    assert gaps.min() > 0 and gaps.max() - gaps.min() <= 1
    np.random.seed(1)
    assert np.array_equal(offsets, validation_windows(RAMP, 8, 16))
    with np.errstate(all="raise"):
        assert validation_windows(RAMP, 1, 16).tolist() == [0]


def test_short_split_gives_windows_that_do_not_overlap() -> None:
    assert validation_windows(RAMP[:10], n_windows=100, block_size=4).tolist() == [0, 5]
    for block_size in (7, 8):  # 8 divides the length, so that one window fewer has a next token
        many = validation_windows(RAMP, n_windows=100, block_size=block_size)
        assert len(many) == 199 // block_size and np.diff(many).min() >= block_size
    assert validation_windows(RAMP[:5], n_windows=100, block_size=4).tolist() == [0]


def test_windows_batch_gathers_the_given_offsets() -> None:
    x, y = windows_batch(RAMP, np.array([7, 0, 196]), 3)
    assert x.tolist() == [[7, 8, 9], [0, 1, 2], [196, 197, 198]]
    assert torch.equal(y, x + 1)
    assert windows_batch(RAMP, np.array([5]), 1)[1].tolist() == [[6]]
    with pytest.raises(IndexError):
        windows_batch(RAMP, np.array([197]), 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_on_cuda_equals_batch_on_cpu() -> None:
    for on_cuda, on_cpu in zip(
        training_batch(RAMP, 8, 4, 1, 2, device="cuda"),
        training_batch(RAMP, 8, 4, 1, 2),
        strict=True,
    ):
        assert on_cuda.device.type == "cuda" and on_cuda.is_contiguous()
        assert torch.equal(on_cuda.cpu(), on_cpu)


# ---- what every corpus has


def ramp_corpus(n_tokens: int) -> TextCorpus:
    """A text whose tokens are their own places."""
    return TextCorpus("x", np.arange(n_tokens, dtype=np.uint16), "sha256:0", 1, 0)


def test_a_text_draws_from_its_split() -> None:
    corpus = ramp_corpus(1000)  # 900 train
    x, y = corpus.training_batch(200, 16, seed=1, number=2, share=(1, 2))
    assert x.shape == (100, 16) and torch.equal(y, x + 1) and y.max() < 900
    expected = training_batch(corpus.train, 200, 16, 1, 2)[0][1::2]
    assert torch.equal(x, expected)
    windows = corpus.validation_windows(5, 16)
    assert np.array_equal(windows, validation_windows(corpus.validation, 5, 16))
    x, y = batch = corpus.validation_batch(windows, 16)
    assert x[0, 0] == 900 and y[-1, -1] == 999
    assert corpus.counted(batch).tolist() == [16] * 5
    assert corpus.passes(1800) == 2.0


@pytest.mark.parametrize("block_size", [1, 7, 9, 10, 33, 98, 99])
def test_all_windows_of_a_text_predict_every_token_but_the_first_once(block_size: int) -> None:
    corpus = ramp_corpus(1000)
    predicted = [
        token
        for windows, length in corpus.all_validation_windows(block_size)
        for token in corpus.validation_batch(windows, length)[1].flatten().tolist()
    ]
    assert predicted == list(range(901, 1000))
    assert corpus.count_predicted() == (99, 99)


def test_what_a_models_file_says_of_a_text_and_how_a_sample_begins() -> None:
    corpus = ramp_corpus(1000)
    assert corpus.metadata() == {"data": "x", "checksum": "sha256:0"}
    assert corpus.opening() == ([ord("\n")], [])


def test_open_corpus_finds_text_and_asks_for_its_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"x" * 100)
    assert open_corpus(None, path, block_size=9).name == str(path)
    with pytest.raises(DataError, match="needs at least 101"):
        open_corpus(str(path), NO_DEFAULT, block_size=10)


# ---- memory and time

# VmHWM is the peak of this process alone; ru_maxrss would start at that of the parent.
MEASURE = """
import sys, time
from pathlib import Path
import numpy as np
from data import load_corpus
from data.batches import training_batch

def mib(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

training_batch(np.zeros(1000, np.uint8), 32, 128, seed=0, number=0)  # first use of the libraries
memory, start = mib("VmRSS:"), time.perf_counter()
corpus = load_corpus(sys.argv[1], Path("nowhere"))
loaded = mib("VmHWM:")
for step in range(20):
    training_batch(corpus.train, 32, 128, seed=0, number=step)
seconds = time.perf_counter() - start
print(len(corpus.tokens), seconds, loaded - memory, mib("VmHWM:") - memory)
"""


def measure(path: Path) -> tuple[int, float, float, float]:
    """Bytes; seconds to load and draw 20 batches; MiB that loading, then all of it, has added."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    n_bytes, seconds, load_mib, mib = done.stdout.split()
    return int(n_bytes), float(seconds), float(load_mib), float(mib)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_corpus_larger_than_memory_costs_neither_memory_nor_time(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 8 * 1024**3)
    n_bytes, seconds, _, mib = measure(path)
    path.unlink()  # pytest keeps the last folders, and others would copy 8 GB of zeros
    assert n_bytes == 8 * 1024**3
    assert mib < 50
    assert seconds < 5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_joining_a_folder_costs_no_memory(tmp_path: Path) -> None:
    line = b"sixty-three characters of text, and then the line ends here...\n"
    text = write(tmp_path / "a", line * (60 * MIB // len(line)))
    # Not the batches: pages of the file that the system holds anyway count once they are touched.
    _, _, load_mib, _ = measure(tmp_path)
    text.unlink()
    assert load_mib < 10
