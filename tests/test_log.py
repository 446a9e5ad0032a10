"""The log of a run: what is written of it, and that this is read again, whatever kept it."""

import datetime
import json
import math
from pathlib import Path

import pytest
from conftest import succeeded

from trainer.log import (
    EVALUATION,
    SAMPLE,
    START,
    evaluation_line,
    fields_of,
    summary_lines,
    time_left_lines,
    wrote_line,
)
from trainer.log_reader import Evaluation, LogError, RunLog, read_logs
from trainer.metrics import Metrics

EVALUATIONS = [
    {"step": 0, "train_loss": None, "val_loss": 5.596, "val_error": 0.0015,
     "learning_rate": 6e-05, "tokens_per_second": 0.0, "elapsed": 0.9},
    {"step": 100, "train_loss": 2.7767, "val_loss": 2.4034, "val_error": 0.0171,
     "learning_rate": 2.98e-3, "tokens_per_second": 23628.0, "elapsed": 18.9},
    {"step": 1000, "train_loss": 1.565, "val_loss": 1.4652, "val_error": 0.0159,
     "learning_rate": 0.0, "tokens_per_second": 23933.0, "elapsed": 178.6},
]  # fmt: skip
SUMMARY = {
    "best_val_loss": 1.4652, "final_val_loss": 1.4713, "training_time": 178.6,
    "median_step_time": 0.1696, "tokens_per_second": 24075.0, "peak_memory": 792.0,
    "compile_time": 3.0, "bytes_exchanged": 5.0,
}  # fmt: skip
LOG = [
    START,
    "   USE_LORA: False",
    "   MAX_STEPS: 1000 *",
    "   BASE_CHECKPOINT: default",
    "Device: cpu (Intel Xeon, 2 threads), no GPU was found",
    "dtype: bfloat16, which this CPU multiplies natively",
    "Data:",
    "   name:       python-code",
    "   checksum:   sha256:72bf4d52312c98b7",
    "Base: none, random weights (fingerprint 5fbca86079505ce4)",
    "Parameter Statistics:",
    "   Total parameters: 3,323,392",
    "   Trainable (all): 3,323,392",
    *map(evaluation_line, EVALUATIONS),
    *summary_lines(SUMMARY),
    wrote_line(Path("out/full.pt"), 13316915),
    f"{SAMPLE}400 tokens, temperature 0.8, top_k 50):",
    "   step 2000 | what a model may write",
    "   MAX_STEPS: 5",
]


def expected(name: str) -> RunLog:
    """What LOG says, to the digits that it prints."""
    return RunLog(
        name,
        config={"USE_LORA": "False", "MAX_STEPS": "1000", "BASE_CHECKPOINT": "default"},
        device="cpu (Intel Xeon, 2 threads)",
        dtype="bfloat16",
        data="python-code",
        checksum="sha256:72bf4d52312c98b7",
        base="5fbca86079505ce4",
        total=3323392,
        trainable=3323392,
        evaluations=tuple(
            Evaluation(*(e[key] for key in ("step", "val_loss", "val_error", "elapsed")))
            for e in EVALUATIONS
        ),
        files={"out/full.pt": 12.7},
        **{key: SUMMARY[key] for key in SUMMARY if key not in ("compile_time", "bytes_exchanged")},
    )


def test_the_time_that_is_left_is_said_where_it_is_more_than_a_minute():
    (line,) = time_left_lines(400, 10, [2.0, 9.0, 2.5])
    assert line == "Time: about 16 min to MAX_STEPS=400, by the steps so far"
    assert "about 10.8 h" in time_left_lines(400, 10, [100.0])[0]
    assert time_left_lines(400, 10, [0.1]) == time_left_lines(400, 10, []) == []


def test_what_the_log_says_is_read_again(tmp_path):
    path = write(tmp_path / "log.txt", LOG)
    assert read_logs(path) == [expected(str(path))]


def test_the_lines_are_those_that_users_know():
    assert [evaluation_line(e) for e in EVALUATIONS[:2]] == [
        "step 0 | train loss - | val loss 5.5960 +- 0.0015 | lr 6.00e-05 | tokens/s 0 | "
        "elapsed 0.9 s",
        "step 100 | train loss 2.7767 | val loss 2.4034 +- 0.0171 | lr 2.98e-03 | tokens/s 23628 | "
        "elapsed 18.9 s",
    ]
    assert [*summary_lines(SUMMARY), wrote_line("out/full.pt", 13316789)] == [
        "Best validation loss: 1.4652",
        "Final validation loss: 1.4713",
        "Training time: 178.6 s",
        "Median step time: 169.6 ms",
        "Tokens per second: 24075",
        "Peak memory: 792 MiB",
        "Wrote out/full.pt: 12.70 MiB",
    ]


@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0, 1e-12, 123456.789, 3e20])
def test_every_number_of_an_evaluation_is_read_again(number):
    """That of a diverged run, too, whose training loss is nan and no dash."""
    evaluation = {key: number for key in EVALUATIONS[0]} | {"step": 10**17}
    found = fields_of(EVALUATION, evaluation_line(evaluation))
    assert found.keys() == evaluation.keys() and found["step"] == "1" + "0" * 17
    for key in found.keys() - {"step"}:
        assert float(found[key]) == pytest.approx(number, abs=0.5, rel=0.01, nan_ok=True)
    assert found["train_loss"] == f"{number:.4f}"


@pytest.mark.parametrize("train_loss", ["-", "nan"])
def test_the_evaluation_before_the_first_step_is_read(tmp_path, train_loss):
    """With the dash, or with the nan that earlier versions printed."""
    lines = [line.replace("train loss - ", f"train loss {train_loss} ") for line in LOG]
    path = write(tmp_path / "log.txt", lines)
    assert read_logs(path) == [expected(str(path))]


def test_a_line_with_more_or_less_is_no_evaluation():
    line = evaluation_line(EVALUATIONS[1])
    for other in (line[:-1], f" {line}", f"{line} ", line.replace("2.4034", "2.x"), "step 3"):
        assert fields_of(EVALUATION, other) is None


# What stands before each line, by the program that puts it there; times go on past midnight.
PREFIXES = {
    "docker compose logs": "trainer-1  | ",
    "docker compose logs, colours": "\x1b[36mtrainer-1  | \x1b[0m",
    "docker logs -t": "{at:%Y-%m-%dT%H:%M:%S}.{n:09}Z ",
    "kubectl logs --timestamps": "{at:%Y-%m-%dT%H:%M:%S}.{n}+01:00 ",
    "kubectl logs --prefix --timestamps": "[pod/train-0-x7k2p/main] {at:%Y-%m-%dT%H:%M:%S}.{n}Z ",
    "container runtime's own file": "{at:%Y-%m-%dT%H:%M:%S}.{n:09}Z stdout F ",
    "ts": "{at:%b %d %H:%M:%S} ",
    "ts -s": "{at:%H:%M:%S} ",
    "ts %.s": "{at.timestamp:.0f}.{n:06} ",
    "journalctl": "{at:%b} {at.day:2d} {at:%H:%M:%S} node7 python[4711]: ",
    "torchrun --tee 3": "[default0]:",
    "srun -l": "0: ",
    "gh run view --log": "train\tRun training\t{at:%Y-%m-%dT%H:%M:%S}.{n:07}Z ",
    "logging": "[{at:%Y-%m-%d %H:%M:%S},{n:03}] ",
}


@pytest.mark.parametrize("program", PREFIXES)
def test_a_prefix_of_each_line_is_left_out(tmp_path, program):
    path = write(tmp_path / "log.txt", prefixed(PREFIXES[program], LOG))
    assert read_logs(path) == [expected(str(path))]


def test_runs_of_several_containers_are_told_apart(tmp_path):
    """Interleaved, with a third that trains nothing, and one again after it has ended."""
    other = [line.replace("python-code", "python-docs") for line in LOG]
    lines = []
    for one, two in zip(LOG, other, strict=True):
        lines += [f"full-1  | {one}", f"db-1    | {one[::-1]}", f"full-2  | {two}"]
    lines += [f"full-1  | {line}" for line in other]
    found = read_logs(path := write(tmp_path / "log.txt", lines))
    assert [log.data for log in found] == ["python-code", "python-docs", "python-docs"]
    assert found[0] == expected(f"{path}[1]")
    assert all(log.evaluations == found[0].evaluations for log in found)


def test_logs_one_after_the_other_need_not_have_one_prefix(tmp_path):
    """Nor an end: the second is not taken for the rest of the first."""
    cut = LOG[: LOG.index(evaluation_line(EVALUATIONS[1]))]
    lines = [*prefixed(PREFIXES["ts"], cut), *LOG, *prefixed("trainer-1  | ", cut), *LOG]
    logs = read_logs(path := write(tmp_path / "log.txt", lines))
    assert [len(log.evaluations) for log in logs] == [1, 3, 1, 3]
    assert logs[1] == expected(f"{path}[2]") and logs[3] == expected(f"{path}[4]")


@pytest.mark.parametrize("prefix", ["", "trainer-1  | "])
def test_colours_and_the_traces_of_a_progress_bar_are_left_out(tmp_path, prefix):
    """As `script` and `docker run -t` keep what a terminal was sent."""
    bar = "\r 17%|\u2588\u258b        | 166/1000 [00:28<02:21, 5.89step/s]"
    clear = "\r" + " " * (len(bar) - 1) + "\r"
    lines = [f"{prefix}\x1b]0;training\x07\x1b[1m{LOG[0]}\x1b[0m\x1b[K\r"]
    for line in LOG[1:]:
        show = f"{bar}{clear}" if line.startswith(("step", "Best")) else ""
        lines.append(f"{prefix}{show}\x1b[38;5;10m{line}\x1b(B\x1b[m\r")
    path = write(tmp_path / "log.txt", lines)
    assert read_logs(path) == [expected(str(path))]


@pytest.mark.parametrize("prefix", ["", "trainer-1  | "])
@pytest.mark.parametrize("name", ["EVAL_ONLY", "MERGE"])
def test_the_log_of_what_trains_nothing_is_refused(tmp_path, prefix, name):
    path = write(tmp_path / "log.txt", prefixed(prefix, [START, f"   {name}: True *"]))
    with pytest.raises(LogError, match="is a log of EVAL_ONLY or MERGE, which train nothing"):
        read_logs(path)


def prefixed(prefix: str, log: list[str]) -> list[str]:
    """The lines of a log, two seconds apart, each after the prefix of its time."""
    start = datetime.datetime(2026, 3, 9, 23, 59, 40)
    lines = []
    for i, line in enumerate(log):
        at = start + datetime.timedelta(seconds=2 * i)
        text = prefix.replace("{at.timestamp:.0f}", str(1773100780 + 2 * i))
        lines.append(text.format(at=at, n=7 * i**2) + line)
    return lines


def write(path: Path, log: list[str]) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in log).encode())
    return path


def lines(path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_run_leaves_configuration_evaluations_and_summary(training, tmp_path):
    log = succeeded(training(USE_LORA="True", LORA_RANK="3"))
    first, *evaluations, last = lines(tmp_path / "out" / "lora-metrics.jsonl")
    assert first["config"]["lora_rank"] == 3 and first["config"]["data"] == "text.txt"
    assert first["run"]["checksum"] in log and first["run"]["base_checkpoint"] is None
    assert f"Trainable (LoRA): {first['run']['parameters']['trainable']:,}" in log
    assert [e["step"] for e in evaluations] == [0, 3, 6]
    assert evaluations[0]["train_loss"] is None
    for e in evaluations:
        assert f"val loss {e['val_loss']:.4f} +- {e['val_error']:.4f}" in log
    summary = last["summary"]
    assert f"Final validation loss: {summary['final_val_loss']:.4f}" in log
    size = (tmp_path / "out" / "lora.pt").stat().st_size
    assert summary["files"]["out/lora.pt"] == size


def test_a_resumed_run_keeps_the_evaluations_before_it(training, tmp_path):
    path = tmp_path / "out" / "full-metrics.jsonl"
    succeeded(training())
    before = lines(path)
    succeeded(training(RESUME="True", MAX_STEPS="9"))
    after = lines(path)
    assert after[0]["config"]["max_steps"] == 9
    assert after[1:4] == before[1:4]
    assert [line.get("step") for line in after[4:]] == [9, None]
    succeeded(training())
    assert [line.get("step") for line in lines(path)] == [None, 0, 3, 6, None]


def test_what_json_lacks_is_null_and_what_is_broken_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, {"run": {"loss": math.inf}}, -1)
    metrics.write({"step": 1, "loss": math.nan})
    assert lines(path) == [{"run": {"loss": None}}, {"step": 1, "loss": None}]
    with path.open("a") as file:
        file.write('[]\n{"step": 2}\n{"step": 5}\n{"ste')
    metrics = Metrics(path, {}, 4)
    metrics.write({"step": 0})
    assert path.read_text().endswith('{"ste')  # until there is something to take its place
    metrics.write({"step": 4})
    found = [{}, {"step": 1, "loss": None}, {"step": 2}, {"step": 0}, {"step": 4}]
    assert lines(path) == found
