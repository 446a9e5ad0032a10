"""Starts scripts quickly: a process that has imported torch, and forks for each script.

Each line on stdin is an order of JSON, and is answered by a line: {"start": ...}, the arguments of
`become`, by the new process's number, and {"wait": number} by its exit code.
"""

import gc
import io
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback

import torch

SECONDS = 120  # which no script may take, but one that compiles: C++ compilers are slow


def become(
    command: list[str], folder: str, environment: dict[str, str], outputs: str, anew: bool
) -> None:
    """Be the script from here on, as far as it can tell, or, anew, in a Python of its own."""
    os.chdir(folder)
    files = [os.open(f"{outputs}/{name}", os.O_RDWR | os.O_CREAT) for name in ("in", "out", "err")]
    for number, file in enumerate(files):
        os.dup2(file, number)
    if "COMPILE" not in environment:
        signal.alarm(SECONDS)
    if anew or "COMPILE" in environment:  # a run that compiles postpones nothing
        os.execve(sys.executable, [sys.executable, *command], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = io.TextIOWrapper(io.FileIO(0))
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), "utf-8")
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w"), "utf-8", "backslashreplace", write_through=True
    )
    sys.argv, sys.path[0] = command, os.path.dirname(command[0])
    exit_code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        exit_code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    sys.stdout.flush()
    os._exit(exit_code)  # ending as Python does takes a second with torch


def warm_up() -> None:
    """Import what scripts import, and estimate the memory of a run, as each run does: the first
    time takes twice as long. It starts no threads, which a fork would lose.
    """
    import hardware
    from trainer.estimate import estimate
    from trainer.settings import Config
    from trainer.setup import plan_run

    hardware.postpone_compiler()
    # Autograd starts a thread for each device that it knows at its first step. Fake tensors bring
    # in a device, in torch for CUDA on a machine without one.
    torch.ones(1, requires_grad=True).sum().backward()
    sizes = {"N_EMBD": "32", "N_HEAD": "2", "N_LAYER": "2", "BLOCK_SIZE": "32", "BATCH_SIZE": "4"}
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("False", "True"):
            variables = sizes | {"OUT_DIR": folder, "USE_LORA": mode, "DEVICE": "cpu"}
            estimate(plan_run(Config.from_environment(variables)))


def main() -> None:
    if torch.cuda.device_count() == 0:  # asking for more would keep scripts from using CUDA
        warm_up()
    gc.freeze()  # or collecting garbage would copy all memory in each fork
    for line in sys.stdin:
        match json.loads(line):
            case {"start": script}:
                answer = os.fork()
                if answer == 0:
                    become(**script)
            case {"wait": pid}:
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(answer, flush=True)


if __name__ == "__main__":
    main()
