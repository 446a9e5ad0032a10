"""The documents are true: their commands and snippets run, and their tables match the code."""

import re
import shlex
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, TEXT, needs_posix, start_group, start_script, succeeded

from benchmarks import curves, parameters, report, results
from data import load_records
from data.forms import LAYOUTS
from trainer.settings import Config, GenerateConfig, option_fields

DOCUMENTS = ["README.md", "LORA_USAGE.md"]
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.sh"))
BASES = ("SmolLM2-135M", "SmolLM2-135M-Instruct", "Llama-3.2-1B-Instruct")  # which they name
# The smallest budget, and the smallest model where no published base gives it.
BUDGET = {"MAX_STEPS": "1", "EVAL_BATCHES": "1", "BATCH_SIZE": "2", "SAMPLE_TOKENS": "5"}
SIZES = {"N_EMBD": "16", "N_HEAD": "2", "N_LAYER": "1"}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """The commands of a document's blocks, or of a script."""
    is_script = document.endswith(".sh")
    text = (ROOT / document).read_text() if is_script else "\n".join(blocks(document, "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "set "))]


def split(command: str) -> tuple[dict[str, str], list[str], str | None]:
    """The variables, words and redirection of one simple command."""
    words = shlex.split(command.rpartition("&&")[2])
    target = None
    if ">" in words:
        target = words[words.index(">") + 1]
        words = words[: words.index(">")]
    variables = {}
    while words and "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words, target


def write_inputs(folder: Path) -> None:
    """What the documents take for granted: a text, chats, and models of the Llama family."""
    (folder / "my-text.txt").write_text(TEXT * 8)
    chat = '{"messages": [{"role": "user", "content": "%d?"}, '
    chat += '{"role": "assistant", "content": "yes"}]}\n'
    (folder / "chats.jsonl").write_text("".join(chat % i for i in range(20)))
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=299, show_progress=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ends))
    model.to(torch.bfloat16).save_pretrained(folder / BASES[0])
    bpe.save(str(folder / BASES[0] / "tokenizer.json"))
    for name in BASES[1:]:
        (folder / name).symlink_to(folder / BASES[0])


def run_all(document: str, folder: Path) -> int:
    """Run each command of a document with the smallest budget; returns how many there were."""
    exported: dict[str, str] = {}
    ran = 0
    for command in commands(document):
        if command.startswith("export "):
            exported |= split(command.removeprefix("export "))[0]
            continue
        own, words, target = split(command)
        variables = exported | own
        training = variables | BUDGET
        if variables.get("BASE_CHECKPOINT") not in BASES:
            training |= SIZES
        if words[:3] == ["python", "-m", "pytest"]:
            continue
        if words[0] == "torchrun":
            assert words[1:] == ["--standalone", "--nproc_per_node=2", "training.py"]
            log = succeeded(start_group(folder, 2, **training)[0])
        elif words[:3] == ["python", "-m", "lora"]:
            log = succeeded(start_script(folder, *words[3:], script="lora/__main__.py"))
        elif words[1] == "training.py":
            log = succeeded(start_script(folder, *words[2:], **training))
        else:
            assert words[0] == "python" and words[1] in ("generate.py", "compare.py", "export.py")
            short = {"MAX_NEW_TOKENS": "5"} if words[1] == "generate.py" else {}
            process = start_script(folder, *words[2:], script=words[1], **variables, **short)
            log = succeeded(process)
        if target is not None:
            (folder / target).write_text(log)
            assert "Final validation loss: " in log
        ran += 1
    return ran


@needs_posix
@pytest.mark.parametrize("document", ["README.md", *(f"recipes/{name}" for name in RECIPES)])
def test_the_commands_run_in_their_order(document, tmp_path):
    write_inputs(tmp_path)
    assert run_all(document, tmp_path) >= 3


@needs_posix
def test_the_guides_commands_and_snippets_run(tmp_path, monkeypatch, capsys):
    write_inputs(tmp_path)
    assert run_all("LORA_USAGE.md", tmp_path) > 20
    # The snippets are about the default model, and so is the log of its parameters.
    for mode in ("False", "True"):
        variables = {"USE_LORA": mode, "DATA": "my-text.txt", **BUDGET}
        log = succeeded(start_script(tmp_path, **variables))
    (statistics,) = (b for b in blocks("LORA_USAGE.md", "text") if "Parameter Statistics" in b)
    assert statistics in log
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for snippet in blocks("LORA_USAGE.md", "python"):
        exec(compile(snippet, "LORA_USAGE.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert namespace["metadata"]["step"] == 1 and "Trainable: 249,856 (7.19%)" in printed
    assert (namespace["adapted"](ids := namespace["ids"]).logits.shape[:2]) == ids.shape
    assert Path("lora_weights.pt").exists() and isinstance(namespace["tokens"], torch.Tensor)


def test_the_guides_examples_of_records_are_read(tmp_path):
    names = set()
    for number, content in enumerate(blocks("LORA_USAGE.md", "jsonl")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(content)
        corpus = load_records(str(path), 256)
        assert corpus.train.n_records + corpus.validation.n_records == len(content.splitlines())
        assert "ignored" not in corpus.found[path.name]
        names.add(corpus.found[path.name].partition(" (")[0])
    assert names == {"prompts"}


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


def test_no_document_has_a_measured_figure_that_no_script_made():
    for document in DOCUMENTS:
        text = report.BLOCK.sub("", (ROOT / document).read_text())
        text = re.sub(r"^```.*?^```$|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(
            r"\d[\d.,]* ?(?:ms|s|min|minutes|MiB|GiB|nats|tokens/s|%|times)\b", text
        )


def test_documents_are_short_and_name_no_variable_that_there_is_not():
    known = {f.name.upper() for kind in (Config, GenerateConfig) for f in option_fields(kind)}
    others = {"PROCESSES", "HOST", "PYTHONPATH", "RESULTS", "README", "LICENSE", "CHANGELOG"}
    for document, most in (("README.md", 150), ("LORA_USAGE.md", 400)):
        text = (ROOT / document).read_text()
        assert len(text.splitlines()) <= most
        named = set(re.findall(r"`([A-Z][A-Z_]{3,})(?:=[^`]*)?`", text))
        assert named <= known | others, named - known - others


@needs_posix
def test_the_readmes_runs_are_those_that_are_measured():
    assert set(curves.RUNS.values()) <= {c.rpartition("&& ")[2] for c in commands("README.md")}


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


def test_every_link_within_the_project_leads_somewhere():
    def anchors(path: Path) -> set[str]:
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}

    for document in (*DOCUMENTS, "benchmarks/RESULTS.md"):
        path = ROOT / document
        for target, anchor in re.findall(r"\]\(([^)#:]*)#?([\w-]*)\)", path.read_text()):
            linked = path.parent / target if target else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
