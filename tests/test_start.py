"""How commands begin and end: help without torch, Ctrl-C at any time, closed streams, arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment_of, needs_dev_full, refused, start_script, succeeded

COMMANDS = ("training.py", "generate.py", "export.py", "compare.py")


def python(folder: Path, *arguments: str, shell: str = "") -> subprocess.CompletedProcess:
    """A Python of its own, which has not imported torch, with `shell` behind its command."""
    command = f'exec "{sys.executable}" "$@" {shell}'
    return subprocess.run(
        ["sh", "-c", command, "sh", *arguments],
        cwd=folder, env=environment_of({}), capture_output=True, text=True,
    )  # fmt: skip


def with_torch(
    folder: Path, code: str, script: str, *arguments: str
) -> subprocess.CompletedProcess:
    """A command for which torch is a module with this code."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(code)
    start = f"import sys, runpy; sys.path.insert(0, {str(folder)!r}); sys.argv = sys.argv[1:]; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return python(folder, "-c", start, str(ROOT / script), *arguments)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_needs_no_torch(tmp_path, script):
    process = with_torch(tmp_path, "raise SystemExit('torch!')", script, "--help")
    assert f"python {script}" in succeeded(process)


@pytest.mark.parametrize("script", ["training.py", "generate.py"])
def test_what_is_not_understood_needs_no_torch_either(tmp_path, script):
    process = with_torch(tmp_path, "raise SystemExit('torch!')", script, "--rank=8")
    assert "'--rank=8' is not understood: configuration comes" in refused(process)


@pytest.mark.parametrize("script", ["training.py", "generate.py", "export.py"])
def test_ctrl_c_while_torch_is_imported_takes_one_line(tmp_path, script):
    interrupt = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)"
    arguments = ("a", "b") if script == "export.py" else ()
    process = with_torch(tmp_path, interrupt, script, *arguments)
    assert (process.returncode, process.stderr) == (130, "error: interrupted\n")


def test_other_errors_are_shown_as_python_shows_them(tmp_path):
    process = with_torch(tmp_path, "raise ValueError('a bug')", "training.py")
    assert process.returncode == 1 and "Traceback" in process.stderr
    assert process.stderr.endswith("ValueError: a bug\n")


def test_a_run_that_compiles_nothing_imports_no_compiler(tmp_path):
    """Not for its optimizer, nor for its estimate of memory, nor for what it recomputes."""
    code = "import atexit, runpy, sys\n"
    code += "atexit.register(lambda: print([*sys.modules], file=sys.stderr))\n"
    code += f"sys.argv = [{str(ROOT / 'training.py')!r}]; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    (tmp_path / "run.py").write_text(code)
    asked = TINY | {"USE_LORA": "True", "GRAD_CHECKPOINT": "True", "DATA": "python-docs"}
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment_of(asked),
        capture_output=True, text=True,
    )  # fmt: skip
    modules = done.stderr.rpartition("[")[2]
    assert "'trainer.estimate'" in modules and succeeded(done)
    assert "'torch._dynamo.utils'" not in modules and "'torch._inductor.ir'" not in modules


def test_the_compiler_is_there_for_those_who_use_it():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport hardware, torch\n"
    code += "hardware.postpone_compiler(); before = 'torch._dynamo.eval_frame' in sys.modules\n"
    code += "settings = torch._dynamo.config; settings.cache_size_limit = 3\n"
    code += "fast = torch.compile(lambda x: 2 * x, backend='eager')\n"
    code += "print(before, fast(torch.ones(1)).item(), torch._dynamo.config is settings,\n"
    code += "      hasattr(torch._dynamo, 'reset'), torch._dynamo.config.cache_size_limit)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "2.0", "True", "True", "3"], done.stderr


LORA = ("-m", "lora")
MANNERS = [*((str(ROOT / name), "--help") for name in COMMANDS), (*LORA, "--help"), LORA]


@pytest.mark.parametrize("arguments", MANNERS)
def test_a_closed_stdout_is_no_error(tmp_path, arguments):
    process = python(tmp_path, *arguments, shell=">&-")
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", MANNERS)
def test_a_full_stdout_is_one_line(tmp_path, arguments):
    process = python(tmp_path, *arguments, shell=">/dev/full")
    assert "stdout: No space left on device" in refused(process)


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("export.py", ["--rank", "8"], "'--rank'"),
        ("export.py", ["a"], "takes a checkpoint or an adapter, and the folder to write"),
        ("compare.py", ["--rank", "8"], "--rank"),
        ("lora/__main__.py", ["--rank", "8"], "'--rank' is no option"),
        ("lora/__main__.py", ["export", "--force", "a", "b"], "'--force' is no option"),
        ("lora/__main__.py", ["export", "a"], "export takes two names"),
    ],
)
def test_unknown_arguments_are_named_in_one_line(tmp_path, script, arguments, named):
    assert named in refused(start_script(tmp_path, *arguments, script=script))


def test_ctrl_c_while_the_package_lora_imports_torch_takes_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    process = python(tmp_path, "-m", "lora")  # which looks for modules in this folder first
    assert (process.returncode, process.stderr) == (130, "error: interrupted\n")


@needs_dev_full
def test_a_full_stderr_changes_no_exit_code(tmp_path):
    code = "from files.streams import write_err; write_err('a note')"
    assert python(tmp_path, "-c", code, shell="2>/dev/full").returncode == 0


@pytest.mark.parametrize("script", ["training.py", "generate.py"])
def test_few_compiled_shapes_are_kept_and_torch_is_told_before_it_is_imported(script, tmp_path):
    told = "import os; raise SystemExit(os.environ['LRU_CACHE_CAPACITY'])"
    process = with_torch(tmp_path, told, script)
    assert (process.returncode, process.stderr) == (1, "256\n")


@pytest.mark.parametrize("script", ["training.py", "generate.py"])
def test_a_missing_package_is_named_in_one_line(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / script)],  # without the folder of packages
        cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
    )  # fmt: skip
    expected = "error: the package torch is not installed: pip install -r requirements.txt\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, expected, "")
