"""What the commands do where stdout is no plain text file, and what a kill leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, environment_of, needs_posix

import compare
import export
import generate
import training
from files import FileError
from files.streams import reason_of, write_out
from files.writing import write_folder
from lora import Adapter, write_adapter
from lora import __main__ as lora_command
from trainer.settings import Config, GenerateConfig
from trainer.start import start
from trainer.stopping import Interrupted, StopSignals, terminable

COMMANDS = {"export": export.main, "compare": compare.main, "lora": lora_command.main}
# Those that answer --help before their imports.
STARTED = {
    "training": (training.__doc__, {}, Config), "generate": (generate.__doc__, {}, GenerateConfig),
    "export": (export.__doc__, {}),
}  # fmt: skip
NAMES = [*STARTED, "compare", "lora"]


class Stream:
    """A stdout with no more than `print` needs, such as a notebook's."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.text, self.fails = "", fails

    def write(self, text: str) -> None:
        if self.fails is not None:
            raise self.fails
        self.text += text

    def flush(self) -> None:
        pass


def help_of(name: str) -> int:
    arguments, hook = sys.argv, sys.excepthook
    sys.argv = [name, "--help"]
    try:
        return start(*STARTED[name]) if name in STARTED else COMMANDS[name](["--help"])
    except SystemExit as end:
        return end.code
    finally:
        sys.argv, sys.excepthook = arguments, hook


@pytest.mark.parametrize("name", NAMES)
def test_a_stdout_without_reconfigure_is_printed_to(name, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Stream())
    assert help_of(name) == 0
    assert len(sys.stdout.text) > 100


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the kernel has gone"), "the kernel has gone"),
        (ValueError("I/O operation on closed file"), "I/O operation on closed file"),
    ],
)
def test_a_stdout_that_fails_is_one_line(name, fails, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Stream(fails))
    assert help_of(name) == 2
    assert capsys.readouterr().err == f"error: stdout: {said}\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_stdout_is_no_error(name, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert help_of(name) == 0


@pytest.mark.parametrize("name", ["export", "compare", "lora"])
def test_an_error_of_the_system_is_not_stdouts(name, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    places = {
        "export": (export, "read_adapter"), "compare": (compare, "read_logs"),
        "lora": (lora_command, "rows_of"),
    }  # fmt: skip
    monkeypatch.setattr(*places[name], fail)
    assert COMMANDS[name](["a", "b"]) == 2
    assert capsys.readouterr().err == "error: Input/output error\n"


def test_an_error_names_its_file_and_stays_on_one_line():
    assert reason_of(OSError(2, "No such file", "a\nb")) == "a\\nb: No such file"
    assert reason_of(OSError("x\ny")) == "x\\ny" and reason_of(ValueError()) == "ValueError()"
    with pytest.raises(FileError, match="stdout: "):
        write_to_closed()


def write_to_closed() -> None:
    kept, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.close()
    try:
        write_out("a")
    finally:
        sys.stdout = kept


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    old, young = tmp_path / ".[a].x.new", tmp_path / ".[a].y.new"
    other = tmp_path / ".b.x.new"
    for folder in (old, young, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"1")
        if folder != young:
            for path in (folder / "model.safetensors", folder):
                os.utime(path, (time.time() - 5000,) * 2)
    os.utime(young, (time.time() - 5000,) * 2)  # its file is being written
    write_folder(tmp_path / "[a]", {"file": b"2"})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([young.name, other.name, "[a]"])


SLOW = """
import os, runpy, sys, time
def fsync(file):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = fsync
sys.argv = sys.argv[1:]
run = runpy.run_module if sys.argv[0] == "lora" else runpy.run_path
run(sys.argv[0], run_name="__main__")
"""


@needs_posix
@pytest.mark.parametrize(
    "command", [["lora", "export"], ["lora", "import"], [str(ROOT / "export.py")]]
)
def test_sigterm_leaves_nothing_half_written(command, tmp_path):
    names = ["lm_head", "blocks.0.attn.query"]
    tensors = {f"{n}.lora_{x}": torch.ones(4, 4) for n in names for x in "AB"}
    adapter = Adapter("base", dict.fromkeys(names, 4.0), tensors, {})
    write_adapter(tmp_path / "a.pt", adapter)
    source = "a.pt"
    if "import" in command:
        subprocess.run(
            [sys.executable, "-m", "lora", "export", tmp_path / "a.pt", tmp_path / "peft"],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        source = "peft"
    before = sorted(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command, source, "new"],
        cwd=tmp_path, env=environment_of({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "writing\n"
    assert sorted(tmp_path.iterdir()) != before
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert sorted(tmp_path.iterdir()) == before


@needs_posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_closed_terminal_ends_a_command_as_sigterm_does_but_after_nohup(name):
    number = getattr(signal, name)
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.received == number
    with pytest.raises(Interrupted) as ended, terminable():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert ended.value.args[1] == number
    former = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as stop, terminable():
            os.kill(os.getpid(), number)
        assert not stop.received
    finally:
        signal.signal(number, former)
