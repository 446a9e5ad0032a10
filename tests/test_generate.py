"""generate.py, EVAL_ONLY and MERGE, started as a user starts them."""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ON_CPU,
    ROOT,
    TEXT,
    TINY,
    environment_of,
    needs_posix,
    refused,
    start_script,
    succeeded,
)

from data import load_corpus
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.checkpoint import load_base, read_checkpoint

GENERATE = {"MAX_NEW_TOKENS": "50", "NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base in `out`, and adapters for two texts in `one` and `two`."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "text.txt").write_text(TEXT)
    (folder / "upper.txt").write_text(TEXT.upper())
    succeeded(start_script(folder, **TINY | {"MAX_STEPS": "30", "EVAL_INTERVAL": "30"}))
    lora = TINY | {"USE_LORA": "True", "BASE_CHECKPOINT": "out/full.pt"}
    succeeded(start_script(folder, **lora | {"OUT_DIR": "one", "LORA_RANK": "4"}))
    succeeded(start_script(folder, **lora | {"OUT_DIR": "two", "DATA": "upper.txt"}))
    succeeded(start_script(folder, **TINY | {"OUT_DIR": "other", "SEED": "9"}))
    return folder


def generate(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    return start_script(folder, script="generate.py", **ON_CPU | GENERATE | variables)


def model_of(path: Path) -> BigramLanguageModelLoRA:
    base = read_checkpoint(path)
    model = BigramLanguageModelLoRA(**dataclasses.asdict(base.sizes), device="cpu", dropout=0.0)
    load_base(model, base)
    return model


@needs_posix
def test_a_prompt_comes_from_stdin_where_that_is_asked_for(folder):
    """Else what waits there is not read, and the show says so."""

    def from_stdin(text: bytes, **variables: str) -> subprocess.CompletedProcess:
        environment = environment_of(ON_CPU | GENERATE | {"TEMPERATURE": "0"} | variables)
        command = [sys.executable, str(ROOT / "generate.py")]
        return subprocess.run(command, cwd=folder, env=environment, input=text, capture_output=True)

    asked = from_stdin("the caf\u00e9\n".encode(), PROMPT="-")
    expected = generate(folder, PROMPT="the caf\u00e9", TEMPERATURE="0")
    assert asked.stdout.decode() == succeeded(expected).replace("\r", "")
    ignored = from_stdin(b"the quick")
    assert b"stdin is not read: PROMPT=- takes the prompt from it" in ignored.stderr
    assert ignored.returncode == 0 and b"the quick" not in ignored.stdout[:9]
    empty = from_stdin(b"", PROMPT="-")
    assert (empty.returncode, empty.stderr.splitlines()[-1]) == (2, b"error: stdin is empty")


def test_it_writes_what_the_model_generates(folder):
    model = model_of(folder / "out" / "full.pt")
    torch.manual_seed(3)
    tokens = model.generate(torch.tensor([list(b"the ")]), 50, 0.8, 20, 0.9)
    expected = bytes(tokens[0].tolist()).decode(errors="replace") + "\n"
    process = generate(folder, PROMPT="the ", SEED="3", TOP_K="20", TOP_P="0.9")
    assert succeeded(process) == expected
    assert "Base: out/full.pt" in process.stderr and "50 tokens in " in process.stderr


def test_seeds_and_temperature(folder):
    first = succeeded(generate(folder))
    assert first == succeeded(generate(folder))
    assert first != succeeded(generate(folder, SEED="2"))
    greedy = succeeded(generate(folder, TEMPERATURE="0"))
    assert greedy == succeeded(generate(folder, TEMPERATURE="0", SEED="2"))
    assert greedy == succeeded(generate(folder, TOP_K="1"))
    assert greedy == succeeded(generate(folder, TOP_P="1e-9"))
    assert greedy == succeeded(generate(folder, TEMPERATURE="1e-300"))
    assert greedy == succeeded(generate(folder, TOP_P="1e-300"))
    assert succeeded(generate(folder, TEMPERATURE="1e300", TOP_K="5"))


def test_text_is_valid_utf8_whatever_the_bytes(folder):
    for prompt in ("caf\u00e9 \u4f60\u597d", " spaces count ", "\x1b[31mred"):
        process = start_script(
            folder, script="generate.py", PROMPT=prompt, PYTHONIOENCODING="ascii",
            TEMPERATURE="50", **GENERATE,
        )  # fmt: skip
        written = succeeded(process)
        assert written.startswith(prompt.replace("\x1b", "\ufffd"))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", written)


def test_adapters_change_the_text_and_combine(folder):
    bare = succeeded(generate(folder))
    one, two = "one/lora.pt", "two/lora.pt"
    texts = {spec: succeeded(generate(folder, ADAPTERS=spec)) for spec in (one, two)}
    assert len({bare, *texts.values()}) == 3
    assert succeeded(generate(folder, ADAPTERS=f"{one}:1,{two}:0")) == texts[one]
    assert succeeded(generate(folder, ADAPTERS=f"{one}:0")) == bare
    process = generate(folder, ADAPTERS=f"{one}:0.7, {two}:-0.3", LORA_RANK="2")
    assert succeeded(process) not in (bare, *texts.values())
    assert "Adapter: two/lora.pt, weight -0.3" in process.stderr
    assert re.search(r"Reduced to rank 2: relative error \d\.\d\de", process.stderr)


@needs_posix
def test_without_stderr_stdout_has_the_text_alone(folder):
    command = f'exec "{sys.executable}" "{ROOT}/generate.py" 2>&-'
    environment = {"PATH": os.environ["PATH"]} | ON_CPU | GENERATE
    process = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert succeeded(process) == succeeded(generate(folder))


def test_a_reader_that_goes_ends_in_one_line(folder):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py")],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "MAX_NEW_TOKENS": "100000", "NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(10)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == 2
    assert error.splitlines()[-1] == "error: stdout: Broken pipe"


def number(log: str, label: str) -> float:
    return float(re.search(rf"^{label}: ([\d.,]+)", log, re.MULTILINE).group(1).replace(",", ""))


@pytest.mark.parametrize("adapters", [None, "two/lora.pt"])
def test_evaluation_covers_all_of_the_validation_data(folder, adapters):
    """Against a plain computation, one window at a time."""
    variables = TINY | {"EVAL_ONLY": "True", "DATA": "upper.txt", "DTYPE": "float32"}
    if adapters:
        variables["ADAPTERS"] = adapters
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    log = succeeded(start_script(folder, **variables))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    model = model_of(folder / "out" / "full.pt").eval()
    if adapters:
        merged = TINY | {"MERGE": "True", "ADAPTERS": adapters, "OUT_DIR": "for-evaluation"}
        succeeded(start_script(folder, **merged, BASE_CHECKPOINT="out/full.pt"))
        model = model_of(folder / "for-evaluation" / "merged.pt").eval()
        shutil.rmtree(folder / "for-evaluation")
    text = TEXT.upper().encode()
    tokens = torch.tensor(list(text[len(text) * 9 // 10 :]))
    total = 0.0
    for start in range(0, len(tokens) - 1, 32):
        x, y = tokens[start : start + 33][:-1], tokens[start + 1 : start + 33]
        with torch.no_grad():
            total += model(x[None], y[None])[1].double().item() * len(y)
    loss = total / (len(tokens) - 1)
    assert number(log, "Bytes evaluated") == len(tokens) - 1
    assert number(log, "Validation loss") == pytest.approx(loss, abs=2e-4)
    assert number(log, "Perplexity") == pytest.approx(math.exp(loss), rel=2e-4)
    assert number(log, "Bits per byte") == pytest.approx(loss / math.log(2), abs=2e-4)


def test_losses_at_several_weights_of_an_adapter(folder):
    """Against models whose every weight has that part of the change."""
    variables = TINY | {"DATA": "upper.txt", "OLD_DATA": "text.txt", "ADAPTERS": "two/lora.pt"}
    log = succeeded(start_script(folder, **variables, EVAL_ONLY="True", DTYPE="float32"))
    rows = re.findall(r"^   (\d\.\d\d) +(\S+) \+- \S+ +(\S+) \+- \S+$", log, re.MULTILINE)
    assert [row[0] for row in rows] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    merged = TINY | {"MERGE": "True", "ADAPTERS": "two/lora.pt", "OUT_DIR": "for-weights"}
    succeeded(start_script(folder, **merged, BASE_CHECKPOINT="out/full.pt"))
    whole = model_of(folder / "for-weights" / "merged.pt").state_dict()
    model = model_of(folder / "out" / "full.pt").eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for weight, *found in rows:
        model.load_state_dict({n: base[n].lerp(whole[n], float(weight)) for n in base})
        for loss, name in zip(found, ("upper.txt", "text.txt"), strict=True):
            corpus = load_corpus(str(folder / name), folder)
            windows = corpus.validation_windows(8, 32)
            with torch.no_grad():
                expected = model(*corpus.validation_batch(windows, 32))[1].item()
            assert float(loss) == pytest.approx(expected, abs=2e-4)


def test_a_merged_checkpoint_is_a_base_like_any_other(folder):
    merge = TINY | {"MERGE": "True", "ADAPTERS": "two/lora.pt", "OUT_DIR": "merged"}
    log = succeeded(start_script(folder, **merge, BASE_CHECKPOINT="out/full.pt"))
    assert "Wrote merged/merged.pt: " in log
    base = {"BASE_CHECKPOINT": "merged/merged.pt"}
    assert succeeded(generate(folder, **base)) == succeeded(
        generate(folder, ADAPTERS="two/lora.pt")
    )
    for mode in ("False", "True"):
        log = succeeded(start_script(folder, **TINY | base, USE_LORA=mode, OUT_DIR="tuned"))
        assert "merged from out/full.pt with two/lora.pt" in log
    evaluations = [
        succeeded(start_script(folder, **TINY | more, EVAL_ONLY="True", DTYPE="float32"))
        for more in (base, {"ADAPTERS": "two/lora.pt"})
    ]
    one, two = (number(log, "Validation loss") for log in evaluations)
    assert one == pytest.approx(two, abs=1e-4)
    assert "MERGE" not in refused(generate(folder, BASE_CHECKPOINT="two/lora.pt"))


def test_training_goes_on_from_an_adapter(folder):
    variables = TINY | {"USE_LORA": "True", "BASE_CHECKPOINT": "out/full.pt", "DATA": "upper.txt"}
    error = refused(start_script(folder, **variables, ADAPTERS="two/lora.pt", OUT_DIR="two"))
    assert "ADAPTERS=two/lora.pt is a file that this run would replace" in error
    log = succeeded(start_script(folder, **variables, ADAPTERS="two/lora.pt", OUT_DIR="more"))
    reached = torch.load(folder / "two" / "lora.pt", weights_only=True)["metadata"]["val_loss"]
    at_start = float(re.search(r"step 0 .* val loss (\S+)", log).group(1))
    assert at_start == pytest.approx(reached, abs=1e-3)
    assert number(log, "Final validation loss") < at_start
    # A combination of ranks 4 and 8 trains on with rank 12, or with the rank that one asks for.
    both = {"ADAPTERS": "one/lora.pt:0.5,two/lora.pt:0.5", "OUT_DIR": "both"}
    assert "LoRA rank: 12, alpha: 12.0" in succeeded(start_script(folder, **variables | both))
    three = succeeded(start_script(folder, **variables | both, LORA_RANK="3"))
    assert "LoRA rank: 3, alpha: 3.0" in three and "Reduced to rank 3: relative error" in three


def test_another_base_is_refused_unless_one_insists(folder):
    variables = {"BASE_CHECKPOINT": "other/full.pt", "ADAPTERS": "one/lora.pt"}
    error = refused(generate(folder, **variables))
    assert "one/lora.pt was trained on base" in error and "(out/full.pt)" in error
    assert "ANY_BASE=True insists" in error
    succeeded(generate(folder, **variables, ANY_BASE="True"))


BAD_INPUT = {
    "no base": ({"OUT_DIR": "nowhere"}, "nowhere/full.pt cannot be read"),
    "no adapter": ({"ADAPTERS": "nowhere.pt"}, "nowhere.pt cannot be read"),
    "a folder": ({"ADAPTERS": "one"}, "one is a folder without adapter_config.json, not a"),
    "a checkpoint": ({"ADAPTERS": "out/full.pt"}, "a model checkpoint, not a LoRA adapter"),
    "a weight that is none": ({"ADAPTERS": "one/lora.pt:nan"}, "ADAPTERS='one/lora.pt:nan'"),
    "an empty part": ({"ADAPTERS": "one/lora.pt,"}, "neither a file nor a file with its weight"),
    "top_p": ({"TOP_P": "1.5"}, "TOP_P=1.5 is not a number above 0 and at most 1"),
    "top_k": ({"TOP_K": "0"}, "TOP_K=0"),
    "misspelt": ({"TEMPERTURE": "1"}, "did you mean TEMPERATURE?"),
    "empty prompt": ({"PROMPT": ""}, "PROMPT is set to nothing"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_clear_line(folder, case):
    variables, named = BAD_INPUT[case]
    process = generate(folder, **variables)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.splitlines()[-1].startswith("error: ") and named in process.stderr
    assert "Traceback" not in process.stderr


TRAINING_INPUT = {
    "adapters without lora": ({"ADAPTERS": "one/lora.pt"}, "ADAPTERS needs USE_LORA=True"),
    "old data of a run": ({"OLD_DATA": "text.txt"}, "OLD_DATA needs EVAL_ONLY=True and ADAPTERS"),
    "old data that is not there": (
        {"OLD_DATA": "nowhere.txt", "EVAL_ONLY": "True", "ADAPTERS": "one/lora.pt"},
        "OLD_DATA: DATA=nowhere.txt: no such file or folder",
    ),
    "merge of nothing": ({"MERGE": "True"}, "MERGE=True needs ADAPTERS"),
    "an adapter that is not there": (
        {"EVAL_ONLY": "True", "USE_LORA": "True"},
        "there is no out/lora.pt: set ADAPTERS",
    ),
    "a rate that never falls": (
        {"SCHEDULE": "constant", "MIN_LEARNING_RATE": "0.1"},
        "SCHEDULE=constant and MIN_LEARNING_RATE exclude each other",
    ),
    "two modes": ({"MERGE": "True", "EVAL_ONLY": "True"}, "exclude each other"),
    "nothing to evaluate": ({"EVAL_ONLY": "True", "OUT_DIR": "nowhere"}, "no nowhere/full.pt"),
    "merged over its base": (
        {"MERGE": "1", "ADAPTERS": "one/lora.pt", "BASE_CHECKPOINT": "x/merged.pt", "OUT_DIR": "x"},
        "BASE_CHECKPOINT=x/merged.pt is a file that this run would replace",
    ),
}


@pytest.mark.parametrize("case", TRAINING_INPUT)
def test_bad_combinations_get_one_clear_line(folder, case):
    (folder / "x").mkdir(exist_ok=True)
    shutil.copy(folder / "out" / "full.pt", folder / "x" / "merged.pt")
    variables, named = TRAINING_INPUT[case]
    assert named in refused(start_script(folder, **TINY | variables))


def test_the_adapter_of_out_dir_is_evaluated_where_use_lora_says_so(folder):
    run = TINY | {"EVAL_ONLY": "True", "BASE_CHECKPOINT": "out/full.pt", "OUT_DIR": "one"}
    losses = [
        re.search("^Validation loss: (.*)", succeeded(start_script(folder, **run | asked)), re.M)[1]
        for asked in ({"USE_LORA": "True"}, {"ADAPTERS": "one/lora.pt"}, {})
    ]
    assert losses[0] == losses[1] != losses[2]


def test_help_lists_the_variables(folder):
    assert "TOP_P" in succeeded(start_script(folder, "--help", script="generate.py"))
    assert "PROMPT=" in refused(start_script(folder, "hello", script="generate.py"))


def test_no_tokens_are_written_where_none_are_asked_for(folder):
    process = generate(folder, PROMPT="the ", MAX_NEW_TOKENS="0")
    assert succeeded(process) == "the \n" and "0 tokens in " in process.stderr
