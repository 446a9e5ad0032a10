"""The log warns of leaps of the loss and of the gradient's norm, once each, and of nothing else."""

import json
import random
import re
import statistics
from pathlib import Path

import pytest
import torch
from conftest import TINY, start_group, start_script, succeeded

from trainer.watch import Watch

WARNING = re.compile(r"^Warning: (.*) (\S+) in step (\d+), more than 10 times (\S+), the median of "
                     r"the (\d+) steps before$", re.MULTILINE)  # fmt: skip


def warned(values: list[float]) -> list[tuple[int, float, float, int]]:
    """Step, value, median and number of steps of each warning, when all are read at the end."""
    watch = Watch({})
    for step, value in enumerate(values, start=1):
        watch.add(step, gradient_norm=torch.tensor(value))
    found = [WARNING.fullmatch(line).groups() for line in watch.leaps()]
    assert all(name == "gradient norm" for name, *_ in found) and watch.leaps() == []
    return [(int(step), float(v), float(m), int(n)) for _, v, step, m, n in found]


def test_a_leap_is_more_than_ten_times_the_median_of_the_steps_before():
    calm = [1.0, 2.0, 3.0] * 20
    assert warned([*calm, 20.0, 2.0, 20.5, 2.0]) == [(63, 20.5, 2.0, 50)]


def test_leaps_in_a_row_are_one_event_and_later_ones_are_another():
    assert [step for step, *_ in warned([1.0] * 20 + [50.0] * 3 + [1.0] * 5 + [50.0])] == [21, 29]


def test_the_first_ten_steps_are_no_measure():
    assert warned([1.0] * 9 + [100.0]) == []
    assert warned([1.0] * 10 + [100.0]) == [(11, 100.0, 1.0, 10)]


def test_a_new_level_is_the_measure_after_so_many_steps():
    assert [step for step, *_ in warned([1.0] * 60 + [20.0] * 60 + [100.0, 201.0])] == [61, 122]


def test_what_is_no_number_and_a_median_of_zero_are_no_leaps():
    assert warned([1.0] * 20 + [float("inf"), float("nan")]) == []
    assert warned([0.0] * 20 + [1.0]) == []


# Nearly all of the text is one letter, which is soon learnt; a window elsewhere is a leap.
STEPS = 120
RARE = TINY | {
    "MAX_STEPS": str(STEPS), "BATCH_SIZE": "2", "DROPOUT": "0", "EVAL_BATCHES": "1",
    "LEARNING_RATE": "1e-2", "MIN_LEARNING_RATE": "1e-2", "DTYPE": "float32", "DEVICE": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaps")
    letters = "".join(random.Random(0).choices("bcdefghij", k=40))
    (folder / "text.txt").write_text("a" * 2000 + letters + "a" * 2000)
    return folder


def test_a_run_warns_of_its_leaps_whenever_it_looks(folder):
    """Evaluated at each step, where metrics.jsonl has its values; at few; interrupted; in two."""
    log = succeeded(start_script(folder, **RARE | {"EVAL_INTERVAL": "1", "OUT_DIR": "each"}))
    lines = (folder / "each" / "full-metrics.jsonl").read_text().splitlines()
    evaluations = list(map(json.loads, lines))[2:-1]
    expected = []
    for name, key in (("training loss", "train_loss"), ("gradient norm", "gradient_norm")):
        values = [e[key] for e in evaluations]
        leaps = [
            i >= 10 and values[i] > 10 * statistics.median(values[max(0, i - 50) : i])
            for i in range(STEPS)
        ]
        expected += [
            (name, f"{values[i]:.4g}", str(i + 1))
            for i in range(STEPS)
            if leaps[i] and not leaps[i - 1]
        ]
    assert {name for name, *_ in expected} == {"training loss", "gradient norm"}
    assert sorted(words[:3] for words in WARNING.findall(log)) == sorted(expected)
    # After the line of the evaluation before the step, and before that of the one after it.
    (_, _, step), *_ = expected
    assert re.search(rf"step {int(step) - 1} \|.*\nWarning: (.*\n)+step {step} \|", log)

    few = succeeded(start_script(folder, **RARE | {"EVAL_INTERVAL": "1000", "OUT_DIR": "few"}))
    assert sorted(WARNING.findall(few)) == sorted(WARNING.findall(log))
    parts = RARE | {"EVAL_INTERVAL": "1000", "OUT_DIR": "parts"}
    first = succeeded(start_script(folder, **parts | {"MAX_STEPS": "73"}))
    second = succeeded(start_script(folder, **parts, RESUME="True"))
    assert WARNING.findall(first + second) == WARNING.findall(few)
    main, other = start_group(folder, **RARE | {"EVAL_INTERVAL": "1000", "OUT_DIR": "two"})
    assert "Warning" not in other.stdout
    steps = [words[2] for words in WARNING.findall(succeeded(main))]
    assert steps == [words[2] for words in WARNING.findall(few)]


def test_a_calm_run_is_not_warned_of(folder):
    (folder / "calm.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 90)
    log = succeeded(start_script(folder, **RARE | {"DATA": "calm.txt", "OUT_DIR": "calm"}))
    assert "Warning" not in log
