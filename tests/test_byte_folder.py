"""Folders of models whose tokens are bytes: what `transformers` makes of them, and the way back."""

import json
import shutil

import hypothesis
import pytest
import tokenizers
import torch
import transformers
from conftest import TEXT, TINY, refused, start_script, succeeded
from hypothesis import strategies

import export
from data.chat import PROMPT_FORMAT
from generate import load_writer
from models import GPT2
from models.byte_tokenizer import byte_tokenizer, is_of_bytes
from models.checkpoint import save_checkpoint
from models.huggingface import read_base
from trainer.loading import build_model
from trainer.settings import GenerateConfig

WORDS = tokenizers.Tokenizer.from_str(json.dumps(byte_tokenizer()))


@hypothesis.given(strategies.text())
@hypothesis.example("a\0b\u0100\u00a0\u20ac \r\n\t<|endoftext|> 's  x\U0001f600")
def test_a_text_is_its_bytes_and_comes_back(text):
    assert WORDS.encode(text).ids == list(text.encode())
    assert WORDS.decode(list(text.encode()), skip_special_tokens=False) == text


@hypothesis.given(strategies.binary())
@hypothesis.example(bytes(range(256)))
@hypothesis.example(b"\xf0\x9f\x98\xe2\x82a\xc3")
def test_bytes_that_are_no_text_become_ufffd(content):
    expected = content.decode(errors="replace")
    assert WORDS.decode(list(content), skip_special_tokens=False) == expected


def test_another_tokenizer_is_not_of_bytes():
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=256, show_progress=False)
    assert not is_of_bytes(json.loads(trained.to_str()))
    for change in ({"added_tokens": []}, {"model": None}, {"added_tokens": None}):
        assert is_of_bytes(byte_tokenizer()) and not is_of_bytes(byte_tokenizer() | change)
    merged = byte_tokenizer()
    merged["model"]["merges"] = [["t", "h"]]
    assert not is_of_bytes(merged)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model of text, `text`, one of records, `records`, and both exported."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    record = {"prompt": "the dog", "completion": "does not m\u00efnd"}
    (folder / "one.jsonl").write_text((json.dumps(record) + "\n") * 40)
    for name, options in (("text", {}), ("records", {"DATA": "one.jsonl", "BLOCK_SIZE": "48"})):
        options |= {
            "MAX_STEPS": "40",
            "EVAL_INTERVAL": "40",
            "LEARNING_RATE": "0.02",
            "OUT_DIR": name,
        }
        succeeded(start_script(folder, **TINY | options))
        succeeded(start_script(folder, f"{name}/full.pt", f"{name}-folder", script="export.py"))
    return folder


def test_transformers_reads_the_tokenizer_of_bytes(trained):
    for name, end in (("text", None), ("records", "\0")):
        words = transformers.AutoTokenizer.from_pretrained(trained / f"{name}-folder")
        text = "na\u00efve \0\u0100 \u20ac\n"
        assert words(text).input_ids == list(text.encode()) and words.eos_token == end
        assert words.decode(list(text.encode())) == text
        assert words.decode([200, 97]) == "\ufffda" and len(words) == 256
        model = transformers.AutoModelForCausalLM.from_pretrained(trained / f"{name}-folder")
        assert model.generation_config.eos_token_id == (None if end is None else 0)


def test_transformers_answers_as_the_model_learned(trained):
    words = transformers.AutoTokenizer.from_pretrained(trained / "records-folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "records-folder")
    asked = {"BASE_CHECKPOINT": "records/full.pt", "PROMPT": "the dog", "TEMPERATURE": "0"}
    answer = succeeded(
        start_script(trained, script="generate.py", DTYPE="float32", **asked)
    ).strip()
    prompt = read_base(trained / "records/full.pt").metadata["prompt_format"]
    ids = words(prompt.replace("{prompt}", "the dog"), return_tensors="pt").input_ids
    asked = [{"role": "user", "content": "the dog"}]
    chat = words.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert chat == ids[0].tolist()
    whole = words.apply_chat_template([*asked, {"role": "assistant", "content": "\u00ef"}])
    assert whole["input_ids"] == [*chat, 0xC3, 0xAF, 0]
    written = model.generate(ids, do_sample=False, max_new_tokens=30, pad_token_id=0)[0]
    found = words.decode(written[ids.shape[1] :], skip_special_tokens=True)
    assert found.strip() == answer


def test_the_folder_of_a_model_of_chats_answers_as_its_checkpoint_does(trained):
    asked = {"PROMPT": "the dog", "TEMPERATURE": "0", "DTYPE": "float32"}
    answers = {
        succeeded(start_script(trained, script="generate.py", BASE_CHECKPOINT=base, **asked))
        for base in ("records/full.pt", "records-folder")
    }
    assert answers == {"does not m\u00efnd\n"}


TAUGHT = {
    "text": ({"data": "a.txt"}, []),
    "texts of records": ({"data": "a.jsonl", "prompt_format": "{prompt}"}, [0]),
    "chats": ({"data": "a.jsonl", "prompt_format": PROMPT_FORMAT}, [0]),
}


@pytest.mark.parametrize("kind", TAUGHT)
def test_an_end_is_stated_where_generate_stops(kind, trained, tmp_path):
    """Also in the folder, which has no metadata."""
    metadata, ends = TAUGHT[kind]
    base = read_base(trained / "text/full.pt")
    save_checkpoint(tmp_path / "full.pt", build_model(GPT2, base.sizes, base, "cpu"), metadata)
    assert export.main([str(tmp_path / "full.pt"), str(tmp_path / "folder")]) == 0
    config = json.loads((tmp_path / "folder/config.json").read_text())
    assert config["eos_token_id"] == (0 if ends else None)
    assert (tmp_path / "folder/chat_template.jinja").exists() == (kind == "chats")
    for path in ("full.pt", "folder"):
        found = GenerateConfig.from_environment({"BASE_CHECKPOINT": str(tmp_path / path)})
        writer = load_writer(found, torch.device("cpu"))
        assert writer.ends == ends and writer.answers == (kind == "chats")


@pytest.mark.parametrize("options", [{}, {"USE_LORA": "True"}, {"DATA": "one.jsonl"}])
def test_the_folder_is_a_base_as_its_checkpoint_is(options, trained):
    base = read_base(trained / "text-folder")
    assert base.tokenizer is None and base.sizes == read_base(trained / "text/full.pt").sizes
    logs = []
    for name in ("text/full.pt", "text-folder"):
        run = TINY | {"BLOCK_SIZE": "32", "BASE_CHECKPOINT": name, "OUT_DIR": "again"} | options
        for size in ("N_EMBD", "N_HEAD", "N_LAYER"):
            del run[size]
        shutil.rmtree(trained / "again", ignore_errors=True)
        log = succeeded(start_script(trained, **run))
        lines = [
            line.partition(" | lr")[0] for line in log.splitlines() if line.startswith("step ")
        ]
        logs.append(lines + [line for line in log.splitlines() if "fingerprint" in line][1:])
    assert logs[0] == logs[1] and len(logs[0]) >= 3
    if not options.get("USE_LORA"):  # and out again, with an end where records taught one
        succeeded(start_script(trained, "again/full.pt", "again/folder", script="export.py"))
        words = transformers.AutoTokenizer.from_pretrained(trained / "again/folder")
        assert words("\u00ef\0").input_ids == [0xC3, 0xAF, 0]
        assert words.eos_token == ("\0" if "DATA" in options else None)
        tensors = read_base(trained / "again/folder").tensors
        original = read_base(trained / "again/full.pt").tensors
        assert all(torch.equal(tensors[name], tensor) for name, tensor in original.items())


def test_a_tokenizer_of_bytes_needs_a_vocabulary_of_256(trained, tmp_path):
    shutil.copytree(trained / "text-folder", tmp_path / "base")
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, n_embd=16, n_head=2, n_layer=1, n_positions=32)
    ).save_pretrained(tmp_path / "base")
    refusal = refused(start_script(tmp_path, script="generate.py", BASE_CHECKPOINT="base"))
    assert "base has vocab_size=300, but bytes are 256" in refusal
