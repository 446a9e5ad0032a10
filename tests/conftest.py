"""Helpers of the tests: the script started as a user starts it, and a tiny setting for it."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# Tests run in several workers (pyproject.toml), which would take the cores from each other. torch
# reads it when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")

# A model and a budget that train in a second.
TINY = {
    "N_EMBD": "32", "N_HEAD": "2", "N_LAYER": "2", "BLOCK_SIZE": "32", "BATCH_SIZE": "4",
    "MAX_STEPS": "6", "EVAL_INTERVAL": "3", "EVAL_BATCHES": "2", "WARMUP_STEPS": "2",
    "SAMPLE_TOKENS": "20", "DATA": "text.txt", "NUM_THREADS": "1",
}  # fmt: skip

needs_posix = pytest.mark.skipif(
    os.name == "nt", reason="needs signals that can be caught, named pipes, or a shell of POSIX"
)
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")

# What tests of the arithmetic run on; on mps float64, their reference, is missing.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# For runs in two processes, which would need a GPU each, and what they are compared with.
ON_CPU = {"DEVICE": "cpu"}

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind.\n" * 60


# Variables that Python or OpenMP read when they start: scripts with these need a new process.
AT_START = ("PYTHON", "OMP_", "LC_", "LANG")


@functools.cache
def launcher() -> subprocess.Popen:
    """A process that starts scripts without importing torch for each; ends with this one."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "launcher.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def environment_of(variables: dict[str, str]) -> dict[str, str]:
    """The environment of a script: these variables, and no others of ours."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT", "USERPROFILE", "TEMP")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return environment | {"PYTHONPATH": str(ROOT)} | variables


class Started:
    """A script that runs in `folder`, with these variables and no others of ours."""

    def __init__(self, folder: Path, command: list[str], variables: dict[str, str]) -> None:
        self.command = command
        self.outputs = tempfile.TemporaryDirectory()
        self.process: subprocess.Popen | None = None
        if not hasattr(os, "fork"):  # on Windows each script imports torch
            with (
                open(f"{self.outputs.name}/out", "wb") as out,
                open(f"{self.outputs.name}/err", "wb") as err,
            ):
                self.process = subprocess.Popen(
                    [sys.executable, str(ROOT / command[0]), *command[1:]],
                    cwd=folder, env=environment_of(variables), stdin=subprocess.DEVNULL,
                    stdout=out, stderr=err,
                )  # fmt: skip
            self.pid = self.process.pid
            return
        anew = sys.platform != "linux" or any(name.startswith(AT_START) for name in variables)
        self.pid = order(
            start={
                "command": [str(ROOT / command[0]), *command[1:]],
                "folder": str(folder),
                "environment": environment_of(variables),
                "outputs": self.outputs.name,
                "anew": anew,
            }
        )

    def written(self, name: str) -> str:
        """What it has written so far to "out" or "err"."""
        path = Path(self.outputs.name, name)
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, line: str) -> str:
        """The log so far, which `line` has just entered."""
        until = time.monotonic() + 120
        while line not in (log := self.written("out")):
            assert time.monotonic() < until and not self.written("err"), self.written("err")
            time.sleep(0.005)
        return log

    def send_signal(self, number: int) -> None:
        """Whether it still runs or not."""
        os.kill(self.pid, number)

    def wait(self) -> subprocess.CompletedProcess:
        """What it did, when it has ended."""
        exit_code = order(wait=self.pid) if self.process is None else self.process.wait()
        out, err = self.written("out"), self.written("err")
        self.outputs.cleanup()
        return subprocess.CompletedProcess(self.command, exit_code, out, err)


def order(**command: object) -> int:
    """The launcher's answer to a command."""
    process = launcher()
    process.stdin.write(json.dumps(command) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def start_script(
    folder: Path, *arguments: str, script: str = "training.py", **variables: str
) -> subprocess.CompletedProcess:
    """Run a script of the repository in `folder` with these variables and no others of ours."""
    return Started(folder, [script, *arguments], variables).wait()


def start_group(
    folder: Path, n: int = 2, others: dict[str, str] | None = None, **variables: str
) -> list[subprocess.CompletedProcess]:
    """Run training.py in n processes that work together, with the variables that torchrun sets,
    and with `others` in all but the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for i in range(n):
        own = {"RANK": str(i), "LOCAL_RANK": str(i)} | (others or {} if i > 0 else {})
        started.append(Started(folder, ["training.py"], ON_CPU | variables | group | own))
    return [process.wait() for process in started]


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run training.py in a fresh folder that holds text.txt, in the tiny setting."""
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return start_script(tmp_path, *arguments, **TINY | variables)

    return run


def succeeded(process: subprocess.CompletedProcess) -> str:
    """The log of a run that must have ended well."""
    assert process.returncode == 0, process.stderr
    return process.stdout


def refused(process: subprocess.CompletedProcess) -> str:
    """The error of a run that must have been refused: exit code 2 and one line."""
    assert process.returncode == 2, process.stdout + process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    return lines[0]
