"""metrics.jsonl: what it holds while a run goes on, at its end, and after it is resumed."""

import json
import math

from conftest import succeeded

from metrics import Metrics


def lines(path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_run_leaves_configuration_evaluations_and_summary(training, tmp_path):
    record = succeeded(training(USE_LORA="True", LORA_RANK="3"))
    first, *evaluations, last = lines(tmp_path / "out" / "lora-metrics.jsonl")
    assert first["config"]["lora_rank"] == 3 and first["config"]["data"] == "text.txt"
    assert first["run"]["checksum"] in record and first["run"]["base_checkpoint"] is None
    assert f"Trainable (LoRA): {first['run']['parameters']['trainable']:,}" in record
    assert [e["step"] for e in evaluations] == [0, 3, 6]
    assert evaluations[0]["train_loss"] is None
    for e in evaluations:
        assert f"val loss {e['val_loss']:.4f} +- {e['val_error']:.4f}" in record
    summary = last["summary"]
    assert f"Final validation loss: {summary['final_val_loss']:.4f}" in record
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
