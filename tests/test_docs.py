"""The documents are true: their commands and snippets run, and their tables match the code."""

import re
import shlex
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, TEXT, needs_posix, start_group, start_script, succeeded

from benchmarks import parameters, report, results
from data import load_records
from data.forms import LAYOUTS
from trainer.settings import Config, GenerateConfig, help_table

DOCUMENTS = ["README.md", "LORA_USAGE.md"]
# The smallest budget for the default model, which some snippets load.
BUDGET = {"MAX_STEPS": "1", "EVAL_BATCHES": "1", "BATCH_SIZE": "2", "SAMPLE_TOKENS": "5"}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    lines = "\n".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def split(command: str) -> tuple[dict[str, str], list[str], str | None]:
    """The variables, words and redirection of one simple command."""
    words = shlex.split(command.rpartition("&&")[2])
    target = None
    if ">" in words:
        target = words[words.index(">") + 1]
        words = words[: words.index(">")]
    variables = {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words, target


def small_llama(folder: Path) -> None:
    """A model of the Llama family with its tokenizer, as the documents have one."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, show_progress=False)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ends = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ends))
    model.to(torch.bfloat16).save_pretrained(folder)
    bpe.save(str(folder / "tokenizer.json"))


@needs_posix
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_run_in_their_order(document, tmp_path):
    """Each command of a document, with the smallest budget; `pip install` and pytest are CI's."""
    small_llama(tmp_path / "SmolLM2-135M")
    ran = 0
    for command in commands(document):
        variables, words, target = split(command)
        if words[:3] == ["python", "-m", "pytest"]:
            continue
        if words[:3] == ["torchrun", "--standalone", "--nproc_per_node=2"]:
            assert words[3:] == ["training.py"]
            succeeded(start_group(tmp_path, 2, **variables | BUDGET)[0])
            ran += 1
            continue
        assert words[0] == "python", command
        if words[1] in ("export.py", "compare.py"):
            process = start_script(tmp_path, *words[2:], script=words[1], **variables)
        elif words[1] == "-m":
            assert words[2] == "lora"
            process = start_script(tmp_path, *words[3:], script="lora/__main__.py", **variables)
        elif words[1] == "generate.py":
            process = start_script(tmp_path, script=words[1], MAX_NEW_TOKENS="5", **variables)
        else:
            process = start_script(tmp_path, *words[2:], script=words[1], **variables | BUDGET)
        log = succeeded(process)
        if target is not None:
            (tmp_path / target).write_text(log)
            assert "Final validation loss: " in log
        ran += 1
    assert ran >= 4


def test_the_guides_datasets_are_read_and_each_layout_has_one(tmp_path):
    names = set()
    for ending in ("jsonl", "csv"):
        for number, content in enumerate(blocks("LORA_USAGE.md", ending)):
            path = tmp_path / f"{number}.{ending}"
            path.write_text(content)
            corpus = load_records(str(path), 256)
            assert corpus.train.n_records + corpus.validation.n_records >= 3
            assert len(content.splitlines()) == 5 and "ignored" not in corpus.found[path.name]
            names.add(corpus.found[path.name].partition(" (")[0])
    assert names == {layout.name for layout in LAYOUTS}


def test_the_guides_table_of_layouts_is_that_of_the_code():
    text = (ROOT / "LORA_USAGE.md").read_text()
    table = text.partition("| layout | columns |")[2].partition("\n\n")[0]
    rows = {row.split(" | ")[0][2:]: row for row in table.splitlines()[2:]}
    for layout in LAYOUTS:
        assert set(layout.columns) <= set(re.findall(r"`(\w+)`", rows[layout.name]))
    assert rows.keys() == {layout.name for layout in LAYOUTS}


def test_the_installed_files_exist():
    for document in DOCUMENTS:
        for requirements in re.findall(r"pip install -r (\S+)", (ROOT / document).read_text()):
            assert (ROOT / requirements).is_file()


def test_the_snippets_of_the_guide_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    for mode in ("False", "True"):  # what the guide's commands leave behind
        succeeded(start_script(tmp_path, USE_LORA=mode, DATA="text.txt", **BUDGET))
    small_llama(tmp_path / "SmolLM2-135M")
    base = {"BASE_CHECKPOINT": "SmolLM2-135M", "OUT_DIR": "out-smol", "DATA": "text.txt"}
    succeeded(start_script(tmp_path, USE_LORA="True", BLOCK_SIZE="32", **base, **BUDGET))
    succeeded(start_script(tmp_path, MERGE="True", ADAPTERS="out-smol/lora.pt", **base))
    for source, folder in (("lora.pt", "smol-peft"), ("merged.pt", "smol-merged")):
        succeeded(start_script(tmp_path, f"out-smol/{source}", folder, script="export.py"))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for snippet in blocks("LORA_USAGE.md", "python"):
        exec(compile(snippet, "LORA_USAGE.md", "exec"), namespace)
    assert namespace["metadata"]["step"] == 1
    assert "Trainable: 249,856 (7.19%)" in capsys.readouterr().out
    assert (namespace["adapted"](ids := namespace["ids"]).logits.shape[:2]) == ids.shape
    assert Path("lora_weights.pt").exists() and isinstance(namespace["tokens"], torch.Tensor)


@pytest.mark.parametrize(
    ("document", "kind"), [("README.md", Config), ("LORA_USAGE.md", GenerateConfig)]
)
def test_the_tables_of_variables_are_those_of_the_help(document, kind):
    text = (ROOT / document).read_text()
    tables = re.findall(r"(?:^\| `\w+` \| .*? \| .*? \|\n)+", text, re.MULTILINE)
    expected = [
        f"| `{name}` | {f'`{default}`' if default else ''} | {text} |\n"
        for name, default, text in help_table(kind)
    ]
    assert "".join(expected) in tables


def test_the_guides_parameter_counts_are_those_of_the_script(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    variables = {"USE_LORA": "True", "DATA": "text.txt", **BUDGET}
    log = succeeded(start_script(tmp_path, **variables))
    (statistics,) = (b for b in blocks("LORA_USAGE.md", "text") if "Parameter Statistics" in b)
    assert statistics in log


def test_the_reports_parameters_are_those_of_the_models():
    found = next(f for f in report.newest(results.read()) if f.benchmark == "parameters")
    assert found.rows == parameters.rows(True) + parameters.rows(False)


def test_the_documents_hold_what_the_results_say():
    """`python benchmarks/report.py` makes it so."""
    for path, text in report.documents().items():
        assert path.read_text() == text, path.name
    found = report.newest(results.read())
    for name, (benchmark, _) in report.PICTURES.items():
        places = [place for place in found if place.benchmark == benchmark]
        if places:
            assert report.digest(places) in (report.PLOTS / name).read_text(), name


def test_every_linked_file_exists():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#\w+)?\)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), target
