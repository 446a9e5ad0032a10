"""Helpers of the tests: the script started as a user starts it, and a tiny setting for it."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Tests run in several workers (pyproject.toml), which would take the cores from each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# A model and a budget that train in a second.
TINY = {
    "N_EMBD": "32", "N_HEAD": "2", "N_LAYER": "2", "BLOCK_SIZE": "32", "BATCH_SIZE": "4",
    "MAX_STEPS": "6", "EVAL_INTERVAL": "3", "EVAL_BATCHES": "2", "WARMUP_STEPS": "2",
    "SAMPLE_TOKENS": "20", "DATA": "text.txt", "NUM_THREADS": "1",
}  # fmt: skip

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
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return environment | {"PYTHONPATH": str(ROOT)} | variables


def start_script(folder: Path, *arguments: str, script: str = "training.py", **variables: str):
    """Run a script of the repository in `folder` with these variables and no others of ours."""
    if sys.platform != "linux" or any(name.startswith(AT_START) for name in variables):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=folder,
            env=environment_of(variables),
            capture_output=True,
            timeout=120,
            encoding="utf-8",
        )
    return launch(folder, [str(ROOT / script), *arguments], [variables])[0]


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
    environments = [variables | group | (others or {} if i > 0 else {}) for i in range(n)]
    for i, environment in enumerate(environments):
        environment |= {"RANK": str(i), "LOCAL_RANK": str(i)}
    return launch(folder, [str(ROOT / "training.py")], environments)


def launch(
    folder: Path, command: list[str], environments: list[dict[str, str]]
) -> list[subprocess.CompletedProcess]:
    """Run a script by the launcher, once for each of the environments, all at the same time."""
    with tempfile.TemporaryDirectory() as outputs:
        orders = []
        for i, variables in enumerate(environments):
            order = {"command": command, "folder": str(folder), "outputs": f"{outputs}/{i}"}
            orders.append(order | {"environment": environment_of(variables)})
            Path(outputs, str(i)).mkdir()
        process = launcher()
        process.stdin.write(json.dumps(orders) + "\n")
        process.stdin.flush()
        exit_codes = json.loads(process.stdout.readline())
        return [
            subprocess.CompletedProcess(
                command,
                exit_code,
                *(Path(outputs, str(i), n).read_text(encoding="utf-8") for n in ("out", "err")),
            )
            for i, exit_code in enumerate(exit_codes)
        ]


def start_until(folder: Path, line: str, **variables: str) -> tuple[subprocess.Popen, str]:
    """training.py running in `folder`, and its record so far, which `line` has just entered."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "training.py")],
        cwd=folder,
        env={"PATH": os.environ["PATH"]} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    record = ""
    while line not in record:
        record += process.stdout.readline()
        assert process.poll() is None
    return process, record


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run training.py in a fresh folder that holds text.txt, in the tiny setting."""
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return start_script(tmp_path, *arguments, **TINY | variables)

    return run


def succeeded(process: subprocess.CompletedProcess) -> str:
    """The record of a run that must have ended well."""
    assert process.returncode == 0, process.stderr
    return process.stdout


def refused(process: subprocess.CompletedProcess) -> str:
    """The error of a run that must have been refused: exit code 2 and one line."""
    assert process.returncode == 2, process.stdout + process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    return lines[0]
