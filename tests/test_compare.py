"""Runs side by side: what is read, the table, the warnings, the plot, and what is refused."""

import io
import json
import math
import re
import shlex
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    ON_CPU,
    ROOT,
    TEXT,
    TINY,
    Started,
    environment_of,
    needs_posix,
    refused,
    start_script,
    succeeded,
)

import compare
from trainer.log_reader import Evaluation, RunLog, join, output_of, read_logs


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, str]:
    """Real outputs: a full run, a LoRA run on it, and a run that was interrupted and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    found = {"full": succeeded(start_script(folder, **TINY | ON_CPU))}
    found["lora"] = succeeded(start_script(folder, **TINY | ON_CPU, USE_LORA="True", LORA_RANK="4"))
    long = TINY | ON_CPU | {"MAX_STEPS": "100000", "OUT_DIR": "long"}
    process = Started(folder, ["training.py"], long)
    process.wait_for("step 6 |")
    process.send_signal(signal.SIGINT)
    found["interrupted"] = process.wait().stdout
    last = re.findall(r"^step (\d+)", found["interrupted"], re.MULTILINE)[-1]
    long["MAX_STEPS"] = str(int(last) + 6)
    found["resumed"] = succeeded(start_script(folder, **long, RESUME="True"))
    return found


@pytest.fixture
def files(outputs, tmp_path, monkeypatch) -> dict[str, str]:
    """The outputs as files in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in outputs.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return outputs


def compared(capsys, *arguments: str) -> str:
    assert compare.main(list(arguments)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def error_of(capsys, *arguments: str) -> str:
    """The one line with which arguments are refused."""
    assert compare.main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def warned(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("Warning: ")]


def changed(log: str, **variables: str) -> str:
    """The log with other values of these variables."""
    for name, value in variables.items():
        log, n = re.subn(rf"(?m)^(   {name}: )[^ \n]+", rf"\g<1>{value}", log)
        assert n == 1, name
    return log


def printed(log: str, pattern: str) -> str:
    return re.search(rf"(?m)^ *{pattern}", log).group(1)


def metrics(log: str, finished: bool = True) -> list[dict]:
    """The same run as metrics.jsonl has it."""
    run = output_of(Path("output.txt"), log.splitlines())
    values = {"True": True, "False": False, "default": None}
    config = {k.lower(): values.get(v, v) for k, v in run.config.items()}
    facts = {name: getattr(run, name) for name in ("device", "dtype", "data", "checksum", "base")}
    facts |= {"base_checkpoint": run.base_path}
    facts["parameters"] = {"total": run.total, "trainable": run.trainable, "embedding": 5}
    lines = [{"config": config, "run": facts}]
    lines += [
        vars(e) | {"train_loss": None, "learning_rate": 0.1, "tokens_per_second": 9.0}
        for e in run.evaluations
    ]
    names = ("best_val_loss", "final_val_loss", "training_time", "tokens_per_second")
    summary = {name: getattr(run, name) for name in (*names, "peak_memory")}
    summary |= {"median_step_time": run.median_step_time}
    summary |= {"files": {path: int(size * 2**20) for path, size in run.files.items()}}
    return [*lines, {"summary": summary}] if finished else lines


def write_lines(path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_has_the_figures_of_the_outputs(files, capsys):
    output = compared(capsys, "full.txt", "lora.txt")
    lines = output.splitlines()
    assert all(len(line) <= 100 for line in lines if not line.startswith("Warning: "))
    rows = {}
    for name in ("full", "lora"):
        (i,) = (i for i, line in enumerate(lines) if line.startswith(f"{name}.txt: "))
        rows[name], log = lines[i + 1].split(), files[name]
        total, trainable = (
            printed(log, pattern)
            for pattern in (r"Total parameters: (\S+)", r"Trainable \(\w+\): (\S+)")
        )
        share = 100 * int(trainable.replace(",", "")) / int(total.replace(",", ""))
        assert rows[name] == [
            total,
            trainable,
            f"{share:.2f}",
            printed(log, r"Training time: (\S+) s"),
            printed(log, r"Median step time: (\S+) ms"),
            printed(log, r"Tokens per second: (\S+)"),
            printed(log, r"Peak memory: (\S+) MiB"),
            printed(log, r"Best validation loss: (\S+)"),
            printed(log, r"Final validation loss: (\S+)"),
            printed(log, rf"Wrote out/{name}.pt: (\S+) MiB"),
        ]
        (run,) = read_logs(f"{name}.txt")
        milliseconds = float(printed(log, r"Median step time: (\S+) ms"))
        assert run.median_step_time == pytest.approx(milliseconds / 1000, rel=1e-9)
    assert "full.txt: full, data text.txt, 6 steps" in lines
    assert "lora.txt: LoRA rank 4, data text.txt, 6 steps" in lines
    ratios = lines[lines.index("lora.txt: LoRA rank 4, data text.txt, 6 steps") + 2].split()
    for ratio, one, two in zip(ratios, rows["lora"], rows["full"], strict=True):
        one, two = (float(value.replace(",", "")) for value in (one, two))
        assert float(ratio.removesuffix("x")) == pytest.approx(one / two, abs=0.03), (one, two)


def test_a_table_of_six_runs_fits_and_one_run_is_enough(files, capsys):
    table = compared(capsys, *["full.txt", "lora.txt"] * 3).partition("Warning")[0].splitlines()
    assert len(table) == 2 + 6 * 3 - 1 and max(map(len, table)) <= 100
    assert warned(compared(capsys, "full.txt")) == []


def test_a_base_is_named_plainly(files, capsys):
    (warning,) = warned(compared(capsys, "full.txt", "lora.txt"))
    assert "base differs: random weights (fingerprint " in warning
    assert ") in full.txt; out/full.pt (fingerprint " in warning and ") in lora.txt; " in warning
    assert warning.endswith("a run from random weights has more to learn than one from a trained "
                            "base")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"MAX_STEPS": "7"}, "MAX_STEPS differs: 6 in full.txt, same.txt; 7 in b.txt"),
        ({"BLOCK_SIZE": "16"}, "BLOCK_SIZE differs: 32 in full.txt, same.txt; 16 in b.txt"),
        ({"GRAD_ACCUM_STEPS": "2"}, "GRAD_ACCUM_STEPS differs: 1 in full.txt, same.txt; "
         "2 in b.txt"),
        ({"GRAD_CHECKPOINT": "True"}, "GRAD_CHECKPOINT differs: False in full.txt, same.txt; "
         "True in b.txt"),
        # As many validation windows, or others.
        ({"BATCH_SIZE": "8", "EVAL_BATCHES": "1"}, "BATCH_SIZE differs: 4 in full.txt, same.txt; "
         "8 in b.txt"),
        ({"EVAL_BATCHES": "5"}, "number of validation windows differs: 8 in full.txt, same.txt; "
         "20 in b.txt"),
    ],
)  # fmt: skip
def test_each_difference_of_settings_is_one_warning(files, capsys, change, warning):
    Path("same.txt").write_text(files["full"])
    Path("b.txt").write_text(changed(files["full"], **change))
    output = compared(capsys, "full.txt", "same.txt", "b.txt")
    assert warned(output) == [f"Warning: {warning}"]


@pytest.mark.parametrize(
    ("pattern", "by", "warning"),
    [
        (r"checksum: \S+", "checksum: sha256:abc", "data differs: text.txt (sha256:"),
        (r"(?<=fingerprint )\w+", "abc", "base differs: random weights (fingerprint "),
        (r"(?<=^dtype: )\w+", "float16", "dtype differs: "),
        (r"(?<=^Device: cpu \().*(?=\), )", "A CPU (old), 9 threads", "hardware differs: "),
        (r"(?<=^Device: )cpu(?= )", "mps", "device differs: cpu in full.txt; mps in b.txt"),
    ],
)
def test_each_difference_of_facts_is_one_warning(files, capsys, pattern, by, warning):
    other, n = re.subn(pattern, by, files["full"], flags=re.MULTILINE)
    assert n == 1
    Path("b.txt").write_text(other)
    (found,) = warned(compared(capsys, "full.txt", "b.txt"))
    assert found.startswith(f"Warning: {warning}") and by.removeprefix("checksum: ") in found


def test_runs_in_several_processes_are_told_from_others(files, capsys):
    Path("b.txt").write_text(files["full"].replace("\nData:", "\nProcesses: 2, each with 2\nData:"))
    (warning,) = warned(compared(capsys, "full.txt", "b.txt"))
    assert "number of processes differs: 1 in full.txt; 2 in b.txt" in warning


def test_runs_that_agree_give_no_warning(files, capsys):
    other = changed(files["full"], LEARNING_RATE="0.1", SEED="2")
    Path("b.txt").write_text(other)
    assert warned(compared(capsys, "full.txt", "b.txt")) == []


@pytest.mark.parametrize("name", ["full", "lora", "resumed"])
def test_an_output_cut_anywhere_is_shown_or_refused_in_one_line(files, capsys, name):
    lines = files[name].splitlines(keepends=True)
    last_loss = None
    for n in range(len(lines) + 1):
        for half in ("", lines[n][: len(lines[n]) // 2] if n < len(lines) else ""):
            Path("cut.txt").write_text("".join(lines[:n]) + half)
            if n == 0:
                assert "cut.txt is " in error_of(capsys, "full.txt", "cut.txt")
                continue
            output = compared(capsys, "full.txt", "cut.txt")
            (run,) = read_logs("cut.txt")
            text = "".join(lines[:n])
            assert len(run.evaluations) == len(re.findall(r"(?m)^step \d+ ", text))
            is_unfinished = "\nFinal validation loss" not in text
            warning = [line for line in warned(output) if "cut.txt is unfinished: " in line]
            assert len(warning) == is_unfinished
            if is_unfinished and run.evaluations:
                assert run.last_loss == run.evaluations[-1].val_loss
                step = run.evaluations[-1].step
                steps = run.config["MAX_STEPS"]
                assert warning[0].endswith(f"last evaluation at step {step} of {steps}")
            last_loss = run.last_loss
    assert last_loss == float(printed(files[name], r"Final validation loss: (\S+)"))


def test_an_unfinished_run_has_no_ratio_of_what_is_not_final(files, capsys):
    Path("cut.txt").write_text(files["full"].partition("step 6 |")[0])
    lines = compared(capsys, "full.txt", "cut.txt").partition("Warning")[0].splitlines()
    assert lines[-2].split()[5:] == [*"--", *[lines[-2].split()[7]] * 2, "-"]
    assert lines[-1].split() == ["1.00x"] * 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_other_encodings_and_line_endings_read_the_same(files, encoding):
    text = files["lora"].replace("\n", "\r\n")
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    Path("b.txt").write_bytes((mark + text).encode(encoding))
    (one,), (two,) = read_logs("lora.txt"), read_logs("b.txt")
    assert vars(one) | {"name": ""} == vars(two) | {"name": ""} and one.is_finished


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "b.txt cannot be read: No such file"),
        (b"", "b.txt is empty"),
        (b" \r\n", "b.txt is empty"),
        (b"hello\n", "b.txt is no output of training.py"),
        (b"PK\x03\x04\0\0\xff\xfe", "b.txt is a binary file"),
        (b"\xff\xfe\0", "b.txt is"),
        (b"{}\n", "b.txt, line 1: it is no part of a metrics.jsonl"),
        (b'{"config": {}', "b.txt has no complete line yet"),
        (b"{\n}\n", "b.txt, line 1 is not JSON"),
        (b'{"config": 1}\n', "b.txt, line 1: config is 1, not an object"),
        (b'{"config": {}, "run": {"data": 3}}\n', "b.txt, line 1: data is 3, not a string"),
        (b'{"config": {}}\n{"step": -1}\n', "b.txt, line 2: step is -1, not a whole number"),
        (b'{"config": {}}\n{"step": 1, "elapsed": "x"}\n', 'elapsed is "x", not a number'),
        (b'{"config": {}}\n[1]\n', "b.txt, line 2: it is no part"),
        (b'{"config": ' + b"[" * 200_000 + b"\n", "b.txt, line 1 is nested too deeply"),
        (b'{"config": {}}\n{"summary": {"peak_memory": 1' + b"0" * 400 + b"}}\n",
         "peak_memory is 1000"),
    ],
)  # fmt: skip
def test_what_is_no_log_is_refused_in_one_line(files, capsys, content, words):
    if content is not None:
        Path("b.txt").write_bytes(content)
    assert words in error_of(capsys, "full.txt", "b.txt", "--plot", "p.png")
    assert not Path("p.png").exists()


def test_a_run_that_trains_nothing_is_refused(files, capsys):
    Path("b.txt").write_text(changed(files["full"], EVAL_ONLY="True"))
    assert "b.txt is a log of EVAL_ONLY or MERGE, which train nothing" in error_of(capsys, "b.txt")


def test_runs_in_one_file_are_shown_apart(files, capsys):
    Path("both.txt").write_text(files["full"] + files["lora"])
    output = compared(capsys, "both.txt")
    assert "both.txt[1]: full" in output and "both.txt[2]: LoRA rank 4" in output
    assert len(warned(output)) == 1  # the base


def test_an_interrupted_run_and_its_rest_are_one_run(files, capsys):
    """In two files, in either form of redirection, or the rest alone."""
    Path("appended.txt").write_text(files["interrupted"] + files["resumed"])
    for arguments in (["interrupted.txt", "resumed.txt"], ["appended.txt"]):
        runs, notes = join(r for path in arguments for r in read_logs(path))
        assert len(runs) == len(notes) == 1 and "shown as one run" in notes[0]
        steps = [e.step for e in runs[0].evaluations]
        assert steps == sorted(set(steps)) and steps[0] == 0 and runs[0].is_finished
        assert steps[-1] == int(runs[0].config["MAX_STEPS"])
        seconds = [e.elapsed for e in runs[0].evaluations]
        assert seconds == sorted(seconds)
    output = compared(capsys, "resumed.txt")
    assert re.search(
        r"Note: resumed.txt goes on with an interrupted run, .* begin at step \d+", output
    )
    assert "unfinished" not in output
    assert "unfinished: last evaluation at step" in compared(capsys, "interrupted.txt")


def test_the_rest_of_another_run_is_not_joined(files):
    Path("b.txt").write_text(changed(files["interrupted"], SEED="2"))
    runs, notes = join([*read_logs("b.txt"), *read_logs("resumed.txt")])
    assert len(runs) == 2 and "whose log is not given" in notes[0]


def test_a_run_that_had_ended_is_not_gone_on_with(files, capsys):
    """RESUME=True with nothing left to do: a summary without an evaluation."""
    lines = changed(files["full"], RESUME="True").splitlines(keepends=True)
    Path("b.txt").write_text("".join(line for line in lines if not line.startswith("step ")))
    output = compared(capsys, "full.txt", "b.txt")
    assert "b.txt: full, data text.txt, 6 steps" in output
    assert "its evaluations begin at the end" in output


def test_half_a_number_is_not_read(files):
    text = files["full"]
    Path("b.txt").write_text(text[: text.index("Final validation loss: ") + 26])
    (run,) = read_logs("b.txt")
    assert not run.is_finished and run.best_val_loss is not None


def test_the_models_own_words_are_not_read(files):
    log = files["full"] + "   MAX_STEPS: 9\n   Total parameters: 1\n   N: 1\n"
    Path("b.txt").write_text(log)
    (run,), (other,) = read_logs("full.txt"), read_logs("b.txt")
    assert vars(run) | {"name": ""} == vars(other) | {"name": ""}


def test_the_base_itself_is_not_the_best_of_a_run():
    assert run_of([0, 10, 20], [1.0, 3.0, 2.0]).best_loss == 2.0
    assert run_of([0], [1.0]).best_loss is None


def test_metrics_and_output_of_a_run_read_the_same(files, capsys):
    write_lines(Path("m.jsonl"), metrics(files["lora"]))
    (one,), (two,) = read_logs("lora.txt"), read_logs("m.jsonl")
    same = {"name": "", "files": {}}
    assert vars(one) | same == vars(two) | same
    assert two.file_size == pytest.approx(one.file_size, abs=1e-5)
    assert warned(compared(capsys, "lora.txt", "m.jsonl")) == []
    lines = compared(capsys, "lora.txt", "m.jsonl").splitlines()
    assert lines[3] == lines[5]


def test_metrics_that_grow_are_read_at_every_byte(files, capsys):
    """A run that is still going: no summary, and perhaps half a line."""
    write_lines(Path("m.jsonl"), metrics(files["full"]))
    whole = Path("m.jsonl").read_bytes()
    ends = [match.start() for match in re.finditer(b"\n", whole)]
    first, *evaluations, summary = ends
    for n in range(first, len(whole)):
        Path("part.jsonl").write_bytes(whole[:n])
        (run,) = read_logs("part.jsonl")
        assert len(run.evaluations) == sum(end <= n for end in evaluations)
        assert run.is_finished == (n >= summary)
    Path("part.jsonl").write_bytes(whole[:first])
    assert "unfinished: no evaluation yet of 6 steps" in compared(capsys, "part.jsonl")


def test_metrics_of_a_resumed_run_are_one_run(files):
    lines = metrics(files["full"])
    again = [{**lines[0], "config": lines[0]["config"] | {"resume": True}}]
    write_lines(Path("m.jsonl"), [*lines[:3], *again, *lines[2:]])
    runs, notes = join(read_logs("m.jsonl"))
    assert [e.step for e in runs[0].evaluations] == [0, 3, 6] and len(runs) == len(notes) == 1
    write_lines(Path("m.jsonl"), [*lines[:3], *lines[2:]])  # a kill, and no first line again
    (run,) = read_logs("m.jsonl")
    assert [e.step for e in run.evaluations] == [0, 3, 6]


def test_a_folder_means_all_its_metrics(files, capsys, tmp_path):
    assert "is a folder without a *metrics.jsonl" in error_of(capsys, ".")
    write_lines(Path("lora-metrics.jsonl"), metrics(files["lora"], finished=False))
    write_lines(Path("full-metrics.jsonl"), metrics(files["full"]))
    output = compared(capsys, ".")
    assert output.index("full-metrics.jsonl: full") < output.index(
        "lora-metrics.jsonl: LoRA rank 4"
    )


def test_a_diverged_run_is_shown(files, capsys):
    text = re.sub(r"(step 6 .*val loss )\S+ \+- \S+", r"\1nan +- nan", files["full"])
    Path("b.txt").write_text(text.partition("Best validation")[0])
    output = compared(capsys, "full.txt", "b.txt", "--plot", "p.png")
    (run,) = read_logs("b.txt")
    assert math.isnan(run.last_loss) and run.best_loss == run.evaluations[1].val_loss
    assert "nan" in output and Path("p.png").exists()


def test_terminals_are_not_obeyed(files, capsys):
    lines = metrics(files["full"])
    lines[0]["run"]["data"] = "a\x1b[31mb\nc"
    write_lines(Path("m.jsonl"), lines)
    assert "data a?[31mb?c, " in compared(capsys, "m.jsonl")


@pytest.mark.parametrize("extension", ["png", "PDF", "svg"])
def test_the_plot_is_written_in_the_form_of_its_name(files, capsys, extension):
    name = f"$curves.{extension}"
    Path("_b$_$.txt").write_text(files["full"])  # names that matplotlib would interpret
    output = compared(capsys, "_b$_$.txt", "lora.txt", "interrupted.txt", "--plot", name)
    assert f"Wrote {name}: " in output
    content = Path(name).read_bytes()
    assert content.startswith(
        {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[extension.lower()]
    )
    if extension == "png":
        width, height = struct.unpack(">II", content[16:24])
        assert width == 1800 and 700 <= height <= 900
    if extension == "svg":
        # Text is drawn as glyphs, which comments name.
        for words in ("validation loss (nats per token)", "optimizer steps", "training time (s)",
                      "full on text.txt: _b$_$.txt", "LoRA rank 4 on text.txt: lora.txt",
                      "full on text.txt, unfinished: interrupted.txt",
                      "2 layers of width 32, context 32"):  # fmt: skip
            assert words in content.decode().replace(r"\$", "$"), words
    assert not list(Path().glob(".*partial"))


def test_the_axis_of_losses_shows_what_matters():
    """5.6 at the start does not flatten what follows; what is low at the start stays visible."""
    losses = [5.6, 2.5, *(1.4 + 0.9 / n for n in range(1, 19))]
    full = run_of([100 * i for i in range(20)], losses)
    low, high, words = compare.limits([full, run_of([0, 1000], [1.7, 1.2])])
    assert 1.0 < low < 1.2 and 2.3 < high < 3.0 and "up to 5.60" in words
    # The end of a short run is on it, however high; a single point is, too.
    assert compare.limits([full, run_of([0, 10], [5.6, 4.5])])[1] > 4.5
    low, high, words = compare.limits([run_of([0], [5.6])])
    assert low < 5.6 < high and words == ""
    assert compare.limits([run_of([0], [math.nan])]) == (0.0, 1.0, "")


def run_of(steps: list[int], losses: list[float]) -> RunLog:
    evaluations = zip(steps, losses, strict=True)
    return RunLog("x", evaluations=tuple(Evaluation(s, v, 0.01, float(s)) for s, v in evaluations))


def test_a_plot_that_cannot_be_made_is_one_line_and_no_file(files, capsys, monkeypatch):
    assert "curves.xyz: the name must end in .png, .pdf, .svg" in error_of(
        capsys, "full.txt", "--plot", "curves.xyz"
    )
    assert "there/p.png cannot be written: No such file" in error_of(
        capsys, "full.txt", "--plot", "there/p.png"
    )
    Path("b.txt").write_text(files["full"].partition("step 0")[0])
    assert "no evaluation to draw yet" in error_of(capsys, "b.txt", "--plot", "p.png")
    Path("p.png").write_text("before")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert error_of(capsys, "full.txt", "--plot", "p.png") == (
        "error: --plot needs matplotlib: pip install matplotlib"
    )
    assert Path("p.png").read_text() == "before"


def test_the_script_as_a_user_starts_it(files, tmp_path):
    """With help, with an error, without torch or matplotlib."""
    assert "--plot FILE" in succeeded(start_script(tmp_path, "--help", script="compare.py"))
    assert "nothing.txt" in refused(start_script(tmp_path, "nothing.txt", script="compare.py"))
    code = "import sys, compare; print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: run"),
        (["full.txt", "--plott", "p.png"], "unrecognized arguments: --plott"),
        (["full.txt", "--plot"], "argument --plot: expected one argument"),
    ],
)
def test_a_bad_argument_is_one_line(files, capsys, arguments, words):
    error = error_of(capsys, *arguments)
    assert words in error and error.endswith("; python compare.py --help shows what is accepted")


@needs_posix
@pytest.mark.parametrize("arguments", ["full.txt", "--help"])
@pytest.mark.parametrize(
    ("redirection", "exit_code", "errors"),
    [
        ("| (exec <&-; sleep 1)", 2, "error: stdout: Broken pipe\n"),
        (">/dev/full", 2, "error: stdout: No space left on device\n"),
        (">/dev/full 2>&-", 2, ""),
    ],
)
def test_what_cannot_be_printed_is_one_line(files, arguments, redirection, exit_code, errors):
    process = shell(f"sleep 0.2; {COMPARE} {arguments}", redirection)
    assert (process.returncode, process.stderr) == (exit_code, errors)


@needs_posix
def test_a_closed_stdout_is_no_error(files):
    process = shell(f"{COMPARE} full.txt", ">&-")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@needs_posix
def test_a_closed_stderr_leaves_stdout_alone(files):
    for redirection in ("2>&-", ">&- 2>&-"):
        process = shell(f"{COMPARE} nothing.txt", redirection)
        assert (process.returncode, process.stdout, process.stderr) == (2, "", "")


def test_a_stdout_that_is_no_file_is_printed_to(files, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert compare.main(["full.txt"]) == 0
    assert "full.txt: full, data text.txt, 6 steps\n" in sys.stdout.getvalue()


def test_ctrl_c_is_one_line(files, capsys, monkeypatch):
    def interrupt(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "read_logs", interrupt)
    assert compare.main(["full.txt"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


COMPARE = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'compare.py'))}"


def shell(command: str, redirection: str) -> subprocess.CompletedProcess:
    """Run a command with its output redirected; the exit code is the command's."""
    script = f"set -o pipefail; ({command}) {redirection}"
    environment = environment_of(
        {}
    )  # without PYTHONUNBUFFERED, under which nothing is left at exit
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
