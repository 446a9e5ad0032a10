"""Chats from records to answers: training, asking, merging, handing on, and a terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from chat_templates import PUBLISHED
from conftest import ROOT, environment_of, needs_posix, refused, start_script, succeeded
from test_chat import base_of, encoded, files_of, rows, says, tokenizer_of, write_tokenizer

from data import chat_format, decode, vocabulary_size
from data.chat import TemplateFormat
from data.forms import Example
from lora import read_adapter
from models.checkpoint import read_checkpoint
from models.huggingface import read_base
from trainer.loading import build_model

RUN = {
    "BASE_CHECKPOINT": "base", "DATA": "chats.jsonl", "NUM_THREADS": "1", "DTYPE": "float32",
    "BLOCK_SIZE": "192", "BATCH_SIZE": "4", "MAX_STEPS": "60", "EVAL_INTERVAL": "60",
    "EVAL_BATCHES": "1", "LEARNING_RATE": "0.01", "SAMPLE_TOKENS": "0", "DEVICE": "cpu",
}  # fmt: skip
LORA = RUN | {"USE_LORA": "True", "LORA_RANK": "16", "MAX_STEPS": "120", "EVAL_INTERVAL": "120"}
CHAT = [
    says("user", "the dog"),
    says("assistant", "does not mind"),
    says("user", "the fox"),
    says("assistant", "jumps over"),
]
ASKED = {"PROMPT": "the dog", "TEMPERATURE": "0", "MAX_NEW_TOKENS": "30", "NUM_THREADS": "1"}
ASKED |= {"DTYPE": "float32", "DEVICE": "cpu"}


def published(folder: Path, name: str, kind: str = "bytes", **config: object) -> None:
    """A random model with the tokenizer and template of a published one; rows to train it on."""
    model = PUBLISHED[name]
    write_tokenizer(folder, kind, model)
    words = tokenizer_of(kind, model)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": words.get_vocab_size() + 3, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 192, "eos_token_id": words.token_to_id(model.ends[0]),
    }  # fmt: skip
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | config))
    for p in made.parameters():
        p.data += 0.2 * torch.randn_like(p)
    made.save_pretrained(folder)
    write_tokenizer(folder, kind, model)  # with the generation_config.json of the publisher
    rows(folder.parent / "chats.jsonl", *[CHAT] * 20)


def generate(folder: Path, **variables: str) -> str:
    return succeeded(start_script(folder, script="generate.py", **ASKED | variables))


def answered(model, folder: Path, question: str = "the dog") -> str:
    """What `transformers` answers, up to where it stops by itself."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    asked = words.apply_chat_template(
        [says("user", question)], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = model.eval().generate(**asked, max_new_tokens=30, do_sample=False, pad_token_id=0)[0]
    new = found[asked["input_ids"].shape[1] :].tolist()
    assert len(new) < 30
    return words.decode(new[:-1]) + "\n"


def loaded(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("name", ["gemma-2", "qwen3"])
def test_the_whole_way_of_a_chat(name, tmp_path):
    """Gemma's mark is in its template alone, and in no file that states ends."""
    published(tmp_path / "base", name)
    template = PUBLISHED[name].template
    log = succeeded(start_script(tmp_path, **LORA))
    assert "in the base's chat template" in log
    adapter = read_adapter(tmp_path / "out" / "lora.pt")
    assert adapter.metadata["chat_template"] == template
    answer = PUBLISHED[name].opening + "does not mind\n"
    assert generate(tmp_path, BASE_CHECKPOINT="base", ADAPTERS="out/lora.pt") == answer
    assert generate(tmp_path, BASE_CHECKPOINT="base") != answer
    succeeded(start_script(tmp_path, MERGE="True", ADAPTERS="out/lora.pt", **RUN))
    merged = read_checkpoint(tmp_path / "out" / "merged.pt")
    assert merged.metadata["chat_template"] == template
    assert generate(tmp_path, BASE_CHECKPOINT="out/merged.pt") == answer
    succeeded(start_script(tmp_path, "out/merged.pt", "merged", script="export.py"))
    succeeded(start_script(tmp_path, "out/lora.pt", "peft", script="export.py"))
    for folder in ("merged", "peft"):
        assert (tmp_path / folder / "chat_template.jinja").read_text() == template
    assert generate(tmp_path, BASE_CHECKPOINT="merged") == answer
    assert generate(tmp_path, BASE_CHECKPOINT="base", ADAPTERS="peft") == answer
    theirs = loaded(tmp_path / "merged")
    assert answered(theirs, tmp_path / "merged") == answer
    adapted = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "peft")
    adapted.generation_config.eos_token_id = theirs.generation_config.eos_token_id
    assert answered(adapted, tmp_path / "merged") == answer


def test_another_template_travels_and_is_kept(tmp_path):
    """CHAT_TEMPLATE's file may change or go after the run; `none` is the plain format."""
    published(tmp_path / "base", "gemma-2")
    own = (
        "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\\n' + m.content }}"
        "<end_of_turn>{% endfor %}"
        "{{ '<start_of_turn>assistant\\n' if add_generation_prompt }}"
    )
    (tmp_path / "own.jinja").write_text(own)
    log = succeeded(start_script(tmp_path, **LORA | {"CHAT_TEMPLATE": "own.jinja"}))
    assert "in CHAT_TEMPLATE=own.jinja: chat template" in log
    (tmp_path / "own.jinja").unlink()
    base = {"BASE_CHECKPOINT": "base", "ADAPTERS": "out/lora.pt"}
    assert generate(tmp_path, **base) == "does not mind\n"
    assert generate(tmp_path, CHAT_TEMPLATE="base/chat_template.jinja", **base) != "does not mind\n"
    more = LORA | {"ADAPTERS": "out/lora.pt", "OUT_DIR": "more", "MAX_STEPS": "2"}
    more["LEARNING_RATE"] = "1e-5"
    log = succeeded(start_script(tmp_path, **more))
    assert "in the trained model's chat template" in log
    assert read_adapter(tmp_path / "more" / "lora.pt").metadata["chat_template"] == own
    succeeded(start_script(tmp_path, MERGE="True", ADAPTERS="more/lora.pt", **RUN))
    succeeded(start_script(tmp_path, "out/merged.pt", "merged", script="export.py"))
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == own
    assert answered(loaded(tmp_path / "merged"), tmp_path / "merged") == "does not mind\n"
    missing = refused(start_script(tmp_path, **LORA | {"CHAT_TEMPLATE": "own.jinja"}))
    assert missing == (
        "error: CHAT_TEMPLATE=own.jinja: No such file or directory; accepted: a file, or none"
    )


@pytest.mark.parametrize("kind", ["bytes", "bytes with BOS"])
def test_the_plain_format_goes_out_as_a_template(kind, tmp_path):
    """CHAT_TEMPLATE=none on a base with a template: `transformers` asks as we do."""
    published(tmp_path / "base", "gemma-2", kind)
    plain = RUN | {"CHAT_TEMPLATE": "none", "OUT_DIR": "tuned"}
    log = succeeded(start_script(tmp_path, **plain))
    assert "chat template" not in log
    assert generate(tmp_path, BASE_CHECKPOINT="tuned/full.pt") == "does not mind\n"
    succeeded(start_script(tmp_path, "tuned/full.pt", "full", script="export.py"))
    assert answered(loaded(tmp_path / "full"), tmp_path / "full") == "does not mind\n"
    files = files_of(tmp_path / "full")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "full")
    ours = chat_format(files["tokenizer.json"].decode(), files, {"prompt_format": None}, "none")
    asked = theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    assert asked == ours.ask(CHAT[:1])
    written = theirs.apply_chat_template(CHAT, tokenize=False)
    (found,) = encoded(ours, Example(tuple(CHAT)))
    assert written == decode(found.tokens, ours.tokenizer)


def test_a_model_that_continued_text_still_does_after_merging(tmp_path):
    published(tmp_path / "base", "gemma-2")
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 400)
    run = LORA | {"DATA": "text.txt", "MAX_STEPS": "2", "EVAL_INTERVAL": "2"}
    succeeded(start_script(tmp_path, **run))
    succeeded(start_script(tmp_path, MERGE="True", ADAPTERS="out/lora.pt", **RUN))
    expected = generate(tmp_path, BASE_CHECKPOINT="base", ADAPTERS="out/lora.pt")
    assert expected.startswith("the dog")
    assert generate(tmp_path, BASE_CHECKPOINT="out/merged.pt") == expected


def test_a_changed_template_is_other_data(tmp_path):
    published(tmp_path / "base", "gemma-2")
    run = LORA | {"CHAT_TEMPLATE": "own.jinja", "MAX_STEPS": "4", "EVAL_INTERVAL": "2"}
    (tmp_path / "own.jinja").write_text(PUBLISHED["gemma-2"].template)
    succeeded(start_script(tmp_path, **run))
    (tmp_path / "own.jinja").write_text(PUBLISHED["gemma-2"].template.replace("\\n", " "))
    again = run | {"RESUME": "True"}
    assert "checksum" in refused(start_script(tmp_path, **again))


def test_a_question_is_refused_in_one_line(tmp_path):
    published(tmp_path / "base", "gemma-2")
    asked = ASKED | {"BASE_CHECKPOINT": "base"}
    del asked["PROMPT"]

    def error_of(**variables: str) -> str:
        process = start_script(tmp_path, script="generate.py", **asked | variables)
        assert process.returncode == 2 and process.stdout == ""
        return process.stderr.removeprefix("Base: base\n").removesuffix("\n")

    error = error_of(PROMPT="the dog", SYSTEM_PROMPT="s")
    assert error.endswith("the chat template refuses it: System role not supported")
    error = error_of(PROMPT="x" * 500)
    assert "tokens in the model's format; accepted: up to 191" in error
    (tmp_path / "base" / "chat_template.jinja").write_text("{% for m in messages %}")
    error = error_of(PROMPT="the dog")
    assert (
        "\n" not in error
        and "the base's chat template: it is no template: Unexpected end of template." in error
    )
    assert generate(tmp_path, BASE_CHECKPOINT="base", CHAT_TEMPLATE="none")


def test_it_stops_at_every_end_of_the_base(tmp_path):
    """Those of generation_config.json, here the model's own fifth token."""
    published(tmp_path / "base", "gemma-2")
    long = generate(tmp_path, BASE_CHECKPOINT="base")
    base = base_of(tmp_path / "words", "bytes", PUBLISHED["gemma-2"])
    read = read_base(tmp_path / "base")
    model = build_model(read.family, read.sizes, read, "cpu").eval()
    asked = base.format.ask([says("user", "the dog")])
    known = vocabulary_size(read.tokenizer)
    written = model.generate(torch.tensor([asked]), 5, temperature=0, n_tokens=known)
    written = written[0, len(asked) :].tolist()
    assert written[-1] not in written[:-1]
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1, written[-1]]}))
    short = generate(tmp_path, BASE_CHECKPOINT="base")
    assert long.startswith(short[:-1]) and len(short) < len(long)
    assert short == shown(decode(written[:-1], base.format.tokenizer)) + "\n"


def shown(text: str) -> str:
    """As a terminal shows it: without control characters, which random models write."""
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 0xFF else "\ufffd" for c in text)


def on_a_terminal(folder: Path, typed: bytes, **variables: str) -> tuple[str, str]:
    """What generate.py writes to stdout and stderr when this is typed."""
    import pty
    import termios

    ours, its = pty.openpty()
    mode = termios.tcgetattr(its)
    mode[1] &= ~termios.OPOST  # line breaks as they are written
    mode[3] &= ~termios.ECHO
    termios.tcsetattr(its, termios.TCSANOW, mode)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py")],
        cwd=folder, env=environment_of(variables), stdin=its, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    os.write(ours, typed)
    out, err = process.communicate(timeout=120)
    os.close(its)
    os.close(ours)
    assert process.returncode == 0, err.decode()
    return out.decode(), err.decode()


class Chat:
    """A chat without a cache: every answer from all tokens again."""

    def __init__(self, folder: Path, length: int, system: str | None = None) -> None:
        base = read_base(folder)
        self.model = build_model(base.family, base.sizes, base, "cpu").eval()
        self.format = chat_format(base.tokenizer, base.files)
        assert isinstance(self.format, TemplateFormat)
        self.length = length
        self.system = [] if system is None else [says("system", system)]

    def answer(self, turns: list[dict]) -> str:
        asked = self.format.ask(self.system + turns)
        n = min(self.length, self.model.block_size - len(asked))
        known = vocabulary_size(self.format.tokenizer)
        tokens = self.model.generate(
            torch.tensor([asked]), n, temperature=0, use_cache=False, n_tokens=known
        )
        new = tokens[0, len(asked) :].tolist()
        ends = [i for i, token in enumerate(new) if token in self.format.ends]
        text = decode(new[: ends[0]] if ends else new, self.format.tokenizer)
        turns.append(says("assistant", text))
        return shown(text) + "\n"


@needs_posix
def test_a_chat_on_a_terminal_keeps_its_turns(tmp_path):
    """With the cache it is what it is without; /reset begins anew, and an empty line is nothing."""
    published(tmp_path / "base", "smollm2")
    variables = ASKED | {"BASE_CHECKPOINT": "base", "MAX_NEW_TOKENS": "6", "SYSTEM_PROMPT": "s"}
    del variables["PROMPT"]
    typed = b"the dog\nthe fox\n\nthe dog\n/reset\nthe fox\n\x04"
    out, err = on_a_terminal(tmp_path, typed, **variables)
    chat, turns, expected = Chat(tmp_path / "base", 6, "s"), [], []
    for line in ("the dog", "the fox", "the dog"):
        turns.append(says("user", line))
        expected.append(chat.answer(turns))
    expected.append(chat.answer([says("user", "the fox")]))
    assert expected[0] != expected[2] and expected[1] != expected[3]
    prompts = ["> ", "> ", "> > ", "> > "]
    assert out == "".join(p + e for p, e in zip(prompts, expected, strict=True)) + "> \n"
    assert err.splitlines()[-1] == "/reset begins anew, Ctrl-D ends"


@needs_posix
def test_a_full_context_forgets_the_oldest_turns_and_says_so(tmp_path):
    published(tmp_path / "base", "smollm2")
    variables = ASKED | {"BASE_CHECKPOINT": "base", "MAX_NEW_TOKENS": "12", "SYSTEM_PROMPT": "s"}
    del variables["PROMPT"]
    lines = [f"{word} quick brown fox" for word in ("the", "one", "two", "six", "ten", "any")]
    typed = "\n".join(["x" * 300, *lines, "y" * 300, "the dog"]) + "\n\x04"
    out, err = on_a_terminal(tmp_path, typed.encode(), **variables)
    chat, turns, expected, forgotten = Chat(tmp_path / "base", 12, "s"), [], [], []
    for line in [*lines, "the dog"]:
        turns.append(says("user", line))
        n = 0
        while len(chat.format.ask(chat.system + turns)) > 192 - 12:
            del turns[:2]
            n += 2
        forgotten += [n] if n else []
        expected.append(chat.answer(turns))
    said = [line for line in err.splitlines() if "forgotten" in line]
    assert len(forgotten) > 1 and said == [
        f"the oldest {n} turns are forgotten: the context is 192 tokens" for n in forgotten
    ]
    long = [line for line in err.splitlines() if line.startswith("that has ")]
    assert len(long) == 2 and all(line.endswith("accepted: up to 191") for line in long)
    assert out.replace("> ", "") == ("".join(expected) + "\n").replace("> ", "")


@needs_posix
def test_an_answer_that_the_context_cuts_is_said_and_bytes_that_are_no_text_are_taken(tmp_path):
    published(tmp_path / "base", "smollm2")
    variables = ASKED | {"BASE_CHECKPOINT": "base", "MAX_NEW_TOKENS": "500", "SYSTEM_PROMPT": "s"}
    del variables["PROMPT"]
    out, err = on_a_terminal(tmp_path, b"the \xff dog\n\x04", **variables)
    chat = Chat(tmp_path / "base", 500, "s")
    assert out == "> " + chat.answer([says("user", "the \udcff dog")]) + "> \n"
    assert err.splitlines()[-1] == "the answer is cut: the context is 192 tokens"
