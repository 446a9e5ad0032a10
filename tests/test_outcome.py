"""What came of a run: which file to use, and where PATIENCE ends it, also when it was resumed."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEXT, TINY, start_group, start_script, succeeded
from test_resume import assert_same, files_of
from test_training import losses

from trainer.log_reader import read_logs

# The text ends in other letters, so that validation gets worse with every step after the first few.
OVERFITS = TINY | {
    "MAX_STEPS": "60", "EVAL_INTERVAL": "2", "PATIENCE": "3", "LEARNING_RATE": "1e-2",
    "DROPOUT": "0.1", "DEVICE": "cpu",
}  # fmt: skip
STOPPED = re.compile(
    r"^Stopped at step (\d+): 3 evaluations in a row without a better validation loss than (\S+), "
    r"of \S+/full-best\.pt \(PATIENCE=3\)$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text, and in `whole` a run that PATIENCE ended."""
    folder = tmp_path_factory.mktemp("patience")
    cut = len(TEXT) * 9 // 10
    (folder / "text.txt").write_text(TEXT[:cut] + TEXT[cut:].upper())
    log = succeeded(start_script(folder, **OVERFITS, OUT_DIR="whole"))
    (folder / "log.txt").write_text(log)
    return folder


def test_a_run_ends_at_the_third_evaluation_without_a_better_loss(folder):
    log = (folder / "log.txt").read_text()
    found = [(int(step), float(loss)) for step, _, loss, _ in losses(log)][1:]
    best = min(found, key=lambda pair: pair[1])
    after = [step for step, _ in found if step > best[0]]
    assert len(after) == 3 and after[-1] < 60
    ((step, loss),) = STOPPED.findall(log)
    assert (int(step), float(loss)) == (after[-1], best[1])
    # And it ends as any other run does.
    assert f"Best validation loss: {best[1]:.4f}" in log and "Sample (" in log
    assert "Wrote whole/full-best.pt" in log and "Wrote whole/full-resume.pt" in log
    for name, step in (("full-best.pt", best[0]), ("full.pt", after[-1])):
        assert torch.load(folder / "whole" / name)["metadata"]["step"] == step
    (read,) = read_logs(folder / "log.txt")
    assert read.is_finished and read.progress == f"{after[-1]} of 60 steps (PATIENCE)"


def test_without_it_all_steps_are_taken(folder):
    log = succeeded(start_script(folder, **OVERFITS | {"PATIENCE": "0", "OUT_DIR": "never"}))
    assert losses(log)[-1][0] == "60" and not STOPPED.search(log)


def test_an_interrupted_run_ends_at_the_same_step(folder):
    """Interrupted where the count is 1, as a kill before the next evaluation would."""
    whole = (folder / "log.txt").read_text()
    last = int(losses(whole)[-1][0])
    variables = OVERFITS | {"OUT_DIR": "parts", "MIN_LEARNING_RATE": "1e-2"}
    succeeded(start_script(folder, **variables | {"OUT_DIR": "constant"}))
    (folder / "parts").mkdir()
    first = succeeded(start_script(folder, **variables | {"MAX_STEPS": str(last - 4)}))
    state = torch.load(folder / "parts" / "full-resume.pt", weights_only=True)
    assert not STOPPED.search(first) and state["progress"]["since_best"] > 0
    succeeded(start_script(folder, **variables, RESUME="True"))
    assert_same(files_of(folder / "parts", "full"), files_of(folder / "constant", "full"))


def test_a_run_that_it_ended_is_not_trained_further(folder):
    shutil.copytree(folder / "whole", folder / "again")
    before = {path: path.read_bytes() for path in (folder / "again").glob("full*.pt")}
    variables = OVERFITS | {"OUT_DIR": "again", "RESUME": "True"}
    log = succeeded(start_script(folder, **variables))
    assert STOPPED.search(log) and losses(log) == []
    assert {path: path.read_bytes() for path in before} == before
    assert "Median step time" in succeeded(start_script(folder, **variables | {"BATCH_SIZE": "2"}))
    further = succeeded(start_script(folder, **variables | {"PATIENCE": "5"}))
    assert "PATIENCE 3 -> 5" in further and len(losses(further)) >= 1


def test_two_processes_end_at_one_step(folder):
    alone = OVERFITS | {"DROPOUT": "0", "DTYPE": "float32"}
    expected = STOPPED.findall(succeeded(start_script(folder, **alone, OUT_DIR="alone")))
    first, second = start_group(folder, **alone, OUT_DIR="both")
    assert second.returncode == 0, second.stderr
    assert [step for step, _ in STOPPED.findall(succeeded(first))] == [s for s, _ in expected]


def test_the_log_says_which_file_to_use(folder):
    log = (folder / "log.txt").read_text()
    best, last = (re.search(rf"^{name} validation loss: (.*)", log, re.MULTILINE)[1]
                  for name in ("Best", "Final"))  # fmt: skip
    assert (
        f"Note: use whole/full-best.pt: its validation loss {best} is lower than {last}, that of "
        "whole/full.pt\n"
    ) in log
    first = OVERFITS | {"MAX_STEPS": "2", "OUT_DIR": "short"}  # its last evaluation is its best
    assert "Note: use" not in succeeded(start_script(folder, **first))


def test_a_run_that_does_not_beat_its_start_says_so(folder):
    """Also when it goes on after an interruption, which does not evaluate at step 0 again."""
    base = {"BASE_CHECKPOINT": "whole/full-best.pt", "OUT_DIR": "worse", "EVAL_INTERVAL": "1"}
    variables = OVERFITS | base | {"MAX_STEPS": "2", "LEARNING_RATE": "0.3", "PATIENCE": "0"}
    log = succeeded(start_script(folder, **variables))
    start, *after = (loss for _, _, loss, _ in losses(log))
    line = (
        f"Note: training did not beat its start: validation loss {start} before the first step, "
        f"{min(after, key=float)} at best after it; what the run started from is better than what "
        "it wrote\n"
    )
    assert line in log and "Note: use" not in log
    assert line in succeeded(start_script(folder, **variables, RESUME="True"))
