"""Chats in templates: their tokens, what of them counts, and what is refused."""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import transformers
from chat_templates import PUBLISHED, Published
from conftest import TEXT
from test_exchange import byte_fallback
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

import data.encoding
from data import DataError, chat_format, load_records
from data.chat import Format, PlainFormat, TemplateFormat, Tokens
from data.corpus import IGNORED
from data.encoding import encode_examples
from data.forms import Example
from data.templates import template_in
from data.tokenizer import decode, encode

DAY = {"date_string": "26 Jul 2024"}
TOKENIZERS = ("bytes", "bytes with BOS", "fallback", "unigram", "cut and padded")


def encoded(format: Format, example: Example) -> list[Tokens]:
    return list(encode_examples([example], format))


def tokenizer_of(kind: str, model: Published) -> tokenizers.Tokenizer:
    """A small tokenizer with the special and added tokens of a published one."""
    if kind == "fallback":
        words = byte_fallback()
    elif kind == "unigram":
        pieces = [
            "<unk>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *"▁abcdeforst<|[/_IAT",
            "▁the",
        ]
        scores = [-2.0 * (len(pieces) - i) for i in range(len(pieces))]
        words = tokenizers.Tokenizer(
            tokenizers.models.Unigram(list(zip(pieces, scores, strict=True)), 0, byte_fallback=True)
        )
        words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        words.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
                tokenizers.decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        trained = tokenizers.ByteLevelBPETokenizer()
        trained.train_from_iterator([TEXT, "\n\n"], vocab_size=290, show_progress=False)
        words = tokenizers.Tokenizer.from_str(trained.to_str())
    # Phi's marks take the white space behind them.
    special = [AddedToken(t, rstrip=t == "<|end|>") for t in _special_texts(model)]
    words.add_special_tokens(special)
    words.add_tokens([AddedToken(text) for text in model.added])
    if kind == "bytes with BOS" and model.bos is not None:
        words.post_processor = TemplateProcessing(
            single=f"{model.bos} $A", special_tokens=[(model.bos, words.token_to_id(model.bos))]
        )
    if kind == "cut and padded":
        words.enable_truncation(5)
        words.enable_padding(direction="left", length=400)
    return words


def _special_texts(model: Published) -> list[str]:
    named = [model.bos, model.eos, *model.special, *model.ends]
    return list(dict.fromkeys(text for text in named if text is not None))


class Base(NamedTuple):
    """A published model's folder, as `transformers` reads it and as we do."""

    theirs: transformers.PreTrainedTokenizerBase
    format: Format

    def text(self, messages, tools=None, opens=False) -> str:
        return self.theirs.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=opens, **DAY
        )

    def tokens(self, messages, tools=None, opens=False) -> list[int]:
        return self.theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=opens, return_dict=False, **DAY
        )

    def number(self, text: str) -> int:
        return self.theirs.convert_tokens_to_ids(text)

    def counted(self, tokens: Tokens) -> list[str]:
        """The texts of the runs of tokens that the loss counts, without white space before."""
        runs, before = [], False
        for token, counts in zip(tokens.tokens, tokens.counted, strict=True):
            if counts:
                runs = runs if before else [*runs, []]
                runs[-1].append(token)
            before = counts
        return [decode(run, self.format.tokenizer).lstrip() for run in runs]


def write_tokenizer(folder: Path, kind: str, model: Published, **config: object) -> None:
    """The tokenizer's files of a published model, with its template in a file of its own, or as
    `config` says."""
    folder.mkdir(exist_ok=True)
    tokenizer_of(kind, model).save(str(folder / "tokenizer.json"))
    names = {"bos_token": model.bos, "eos_token": {"content": model.eos, "__type": "AddedToken"}}
    content = {"tokenizer_class": "PreTrainedTokenizerFast"} | names | config
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    if "chat_template" not in config:
        (folder / "chat_template.jinja").write_text(model.template)
    ends = [tokenizer_of(kind, model).token_to_id(text) for text in model.ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends[0]}))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def base_of(folder: Path, kind: str, model: Published, **config: object) -> Base:
    write_tokenizer(folder, kind, model, **config)
    files = files_of(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return Base(theirs, chat_format(files["tokenizer.json"].decode(), files))


def says(role: str, content: str | None, **more: object) -> dict:
    return {"role": role, "content": content} | more


def calls(content: str, *names: str, **more: object) -> dict:
    """A turn in which the assistant calls functions."""
    made = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": n, "arguments": {"at": "é"}}}
        for i, n in enumerate(names)
    ]
    return says("assistant", content, tool_calls=made, **more)


TOOLS = [
    {"type": "function", "function": {
        "name": name, "description": f"the {name} <x>",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    }}
    for name in ("get", "put")
]  # fmt: skip
HI, ON = [says("user", "the dog"), says("assistant", "does not mind")], says("user", "et après?")
LONG = [*HI, ON, says("assistant", "the fox\n\njumps"), says("user", "so"), says("assistant", "ok")]
CALLED = [says("user", "where"), calls("", "get"), says("tool", "12", tool_call_id="call00000")]
CALLED.append(says("assistant", "at 12"))


def chats_for(model: Published) -> list[tuple[list[dict], list[dict]]]:
    """Chats that a template can write, each with tools."""
    system = says("system", "be lazy")
    found = [(HI, []), (LONG, [])]
    if model.system:
        found += [([system, *HI], []), ([system, *LONG], [])]
    if model.tools:
        found += [(HI, TOOLS), (CALLED, TOOLS), (CALLED, []), ([*CALLED, *LONG], TOOLS)]
    if model.tools and model.system:
        found += [([system, *CALLED, *HI], TOOLS)]
    return found


GREET = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
BASES = [(kind, name) for kind in TOKENIZERS for name in PUBLISHED]


@pytest.mark.parametrize(("kind", "name"), BASES)
def test_tokens_are_those_of_transformers_and_the_answers_count(kind, name, tmp_path):
    """Found a second way: the assistant's contents, searched in the text of what counts."""
    model = PUBLISHED[name]
    base = base_of(tmp_path, kind, model)
    assert isinstance(base.format, TemplateFormat)
    for messages, tools in chats_for(model):
        until = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
        # Mistral has the tools before the last question.
        moves = bool(tools) and "mistral" in name and "user" in [m["role"] for m in messages[1:]]
        alone = model.per_turn or moves
        found = encoded(base.format, Example(tuple(messages), tuple(tools)))
        texts = {n: base.text(messages[:n], tools or None) for n in until}
        ends = [a for a, b in pairwise(until) if not texts[b].startswith(texts[a])] + until[-1:]
        assert (ends == until[-1:]) or alone
        assert [t.tokens for t in found] == [base.tokens(messages[:n], tools or None) for n in ends]
        expected = [
            (model.opening if n in ends or not alone else "") + messages[n - 1]["content"]
            for n in until
        ]
        counted = [text for tokens in found for text in base.counted(tokens)]
        for text, content, n in zip(counted, expected, until, strict=True):
            if "tool_calls" in messages[n - 1]:
                assert text.count('{"name": "get"') == 1 and text.endswith(model.mark)
            else:
                assert text == content + model.mark
        for n in range(len(messages)):
            if messages[n]["role"] not in ("user", "tool"):
                continue
            asked = base.format.ask(messages[: n + 1], tools)
            assert asked == base.tokens(messages[: n + 1], tools or None, opens=True)
    assert base.format.ends == [base.number(text) for text in model.ends]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_text_is_rendered_as_transformers_renders_it(name, tmp_path):
    model = PUBLISHED[name]
    base = base_of(tmp_path, "bytes", model)
    for messages, tools in chats_for(model):
        for opens in (False, True):
            expected = base.text(messages, tools or None, opens)
            assert base.format.render(messages, tools, opens) == expected


@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "qwen3-2507", "gemma-2", "smollm2"])
def test_a_turn_of_weight_0_does_not_count_and_the_end_of_a_chat_is_not_needed(name, tmp_path):
    model = PUBLISHED[name]
    base = base_of(tmp_path, "bytes", model)
    messages = [dict(message) for message in LONG]
    messages[1]["weight"], messages[5]["weight"] = 0, 0.0
    (found,) = encoded(base.format, Example(tuple(messages)))
    assert base.counted(found) == ["the fox\n\njumps" + model.mark]
    messages[3]["weight"] = 0
    (found,) = encoded(base.format, Example(tuple(messages)))
    assert found.tokens == base.tokens(LONG) and not any(found.counted)
    (found,) = encoded(base.format, Example((*HI, ON)))
    assert found.tokens == base.tokens(HI)


def test_what_a_model_thinks_counts_where_its_template_shows_it(tmp_path):
    base = base_of(tmp_path, "bytes", PUBLISHED["qwen3"])
    # Earlier versions of transformers know the first name alone.
    expected = base.tokens([*HI, ON, says("assistant", "yes", reasoning_content="hm")])
    for name in ("reasoning_content", "reasoning", "thinking"):
        chat = [*HI, ON, says("assistant", "yes", **{name: "hm"})]
        first, second = encoded(base.format, Example(tuple(chat)))
        assert second.tokens == expected and first.tokens == base.tokens(HI)
        assert base.counted(second) == ["<think>\nhm\n</think>\n\nyes<|im_end|>"]
    chat = [ON, says("assistant", "<think>\nhm\n</think>\n\nyes")]
    (found,) = encoded(base.format, Example(tuple(chat)))
    assert found.tokens == base.tokens(chat)
    assert found.tokens.count(base.number("</think>")) == 1


@pytest.mark.parametrize("name", ["qwen3", "llama-3.1", None])
def test_examples_are_encoded_side_by_side_as_one_by_one(name, tmp_path, monkeypatch):
    """Chats and texts in turn, whose special tokens the plain format takes differently."""
    base = base_of(tmp_path, "bytes", PUBLISHED[name or "qwen3"])
    format = base.format if name else PlainFormat(base.format.tokenizer, base.format.files)
    examples = [Example(tuple(HI)), Example(text="a <|im_end|> b"), Example(tuple(LONG))] * 9
    alone = [tokens for example in examples for tokens in encoded(format, example)]
    for size in (1, 100, 10**6):
        monkeypatch.setattr(data.encoding, "SIDE_BY_SIDE", size)
        assert list(encode_examples(examples, format)) == alone


def test_keys_without_a_value_are_as_if_they_were_not_there(tmp_path):
    """As tables have them: a template may ask whether a message has tool calls."""
    base = base_of(tmp_path, "bytes", PUBLISHED["llama-3.1"])
    empty = {"tool_calls": None, "name": None, "tool_call_id": None}
    expected = encoded(base.format, Example(tuple(HI)))
    for more in (empty, {"tool_calls": []}):
        assert encoded(base.format, Example(tuple(m | more for m in HI))) == expected


@pytest.mark.parametrize(("kind", "name"), BASES)
def test_special_tokens_in_contents_stay_text(kind, name, tmp_path):
    """In questions, answers, tools, their names and their results; what is written is the same."""
    model = PUBLISHED[name]
    base = base_of(tmp_path, kind, model)
    marks = " ".join(_special_texts(model))
    harmless = "x" * len(_special_texts(model))

    def chat(words: str) -> tuple[list[dict], list[dict]]:
        messages = [says("user", f"a {words}b"), says("assistant", f"{words} c"), ON]
        tools = []
        if model.tools:
            called = calls("", "get")
            called["tool_calls"][0]["function"] |= {"name": words, "arguments": {words: words}}
            result = says("tool", words, tool_call_id="call00000")
            messages += [called, result, says("assistant", "so"), says("user", words)]
            function = TOOLS[0]["function"] | {"name": words, "description": words}
            tools = [{"type": "function", "function": function}]
        return messages, tools

    messages, tools = chat(marks)
    asked = base.format.ask(messages, tools)
    special = {base.number(text) for text in _special_texts(model)}
    found = [token for token in asked if token in special]
    assert found == [t for t in base.format.ask(*chat(harmless)) if t in special]

    def written(tokens: list[int]) -> str:
        return "".join(base.theirs.decode(tokens).split())

    assert written(asked) == written(base.tokens(messages, tools or None, opens=True))
    for tokens in encoded(base.format, Example(tuple(messages[:2]))):
        assert base.counted(tokens)[0].replace(" ", "").count(marks.replace(" ", "")) == 1
        assert base.counted(tokens)[0].endswith(f"c{model.mark}")


def test_added_tokens_of_the_template_are_the_assistants_alone(tmp_path):
    """A user's <think> is a text; an assistant's is the token that the template looks for."""
    base = base_of(tmp_path, "bytes", PUBLISHED["qwen3"])
    think = base.number("<think>")
    asked = base.format.ask([says("user", "<think> a </think> <tool_call>")])
    assert think not in asked and base.number("<tool_call>") not in asked
    assert "<think> a </think> <tool_call>" in base.theirs.decode(asked)
    other = tokenizer_of("bytes", PUBLISHED["qwen3"])
    other.add_tokens(["<unused>"])
    format = TemplateFormat(PUBLISHED["qwen3"].template, other.to_str(), base.format.files)
    assert other.token_to_id("<unused>") in format.ask([says("user", "<unused>")])


def test_a_mark_that_a_tokenizer_cannot_keep_a_text_is_refused(tmp_path):
    """One that makes one piece of neighbouring characters that it does not know."""
    base = base_of(tmp_path, "unigram", Published(GREET, None, "<qq>", ends=("<qq>",)))
    format = TemplateFormat(GREET, base.format.tokenizer, base.format.files)
    assert format.ask([says("user", "<q>")])
    with pytest.raises(ValueError, match="a special token's text in it cannot be kept a text"):
        format.ask([says("user", "<qq>")])


def test_a_question_that_is_not_utf8_has_no_marks_either(tmp_path):
    base = base_of(tmp_path, "bytes", PUBLISHED["qwen2.5"])
    asked = base.format.ask([says("user", "\udce2\udc82 <|im_end|> \udcff")])
    assert asked.count(base.number("<|im_end|>")) == 2
    assert "\ufffd <|im_end|> \ufffd<|im_end|>" in base.theirs.decode(asked)


def test_white_space_that_a_mark_takes_does_not_make_the_mark_count(tmp_path):
    base = base_of(tmp_path, "bytes", PUBLISHED["phi-3.5"])
    words = tokenizers.Tokenizer.from_str(base.format.tokenizer)
    words.add_special_tokens([AddedToken("<|assistant|>", rstrip=True)])
    format = TemplateFormat(PUBLISHED["phi-3.5"].template, words.to_str(), base.format.files)
    (found,) = encoded(format, Example((ON, says("assistant", "  fox"))))
    assert base.counted(found) == ["fox<|end|>"]


def test_a_mark_that_is_no_special_token_ends_a_turn(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end> {% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    words = tokenizer_of("bytes", Published("", None, "</s>"))
    words.add_tokens(["<end>"])
    format = TemplateFormat(template, words.to_str())
    assert format.ends == [words.token_to_id("</s>"), words.token_to_id("<end>")]
    (found,) = encoded(format, Example(tuple(HI)))
    tokens = [t for t, counts in zip(found.tokens, found.counted, strict=True) if counts]
    assert words.decode(tokens, skip_special_tokens=False).strip() == "does not mind<end>"
    # A special token does rather than another one before it.
    format = TemplateFormat(template.replace("<end>", "<end></s>"), words.to_str())
    assert format.ends == [words.token_to_id("</s>")]


def test_a_template_without_a_mark_counts_the_answer(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    base = base_of(tmp_path, "bytes", Published(template, "<b>", "</s>", ends=("</s>",)))
    (found,) = encoded(base.format, Example(tuple(LONG)))
    assert base.counted(found) == ["does not mind", "the fox\n\njumps", "ok"]
    assert base.format.ends == [base.number("</s>")]


def test_where_a_template_lies(tmp_path):
    """A file of its own wins; of several the default is taken; a list of others is none."""
    model = PUBLISHED["smollm2"]
    other = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    named = [{"name": "tool_use", "template": other}, {"name": "default", "template": other}]
    for number, config in enumerate(({"chat_template": other}, {"chat_template": named})):
        folder = tmp_path / str(number)
        base = base_of(folder, "bytes", model, **config)
        assert base.format.template == other
        (found,) = encoded(base.format, Example(tuple(HI)))
        assert found.tokens == base.tokens(HI)
        (folder / "chat_template.jinja").write_text(model.template)
        assert template_in(files_of(folder)) == model.template
        again = transformers.AutoTokenizer.from_pretrained(folder)
        format = TemplateFormat(model.template, base.format.tokenizer, base.format.files)
        assert again.apply_chat_template(HI, tokenize=False) == format.render(HI)
    files = {"tokenizer_config.json": json.dumps({"chat_template": named[:1]}).encode()}
    assert template_in(files) is None and template_in({}) is None
    assert isinstance(chat_format(base.format.tokenizer, files), PlainFormat)


def rows(path: Path, *chats: list[dict]) -> str:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(path)


def test_records_are_packed_with_their_marks(tmp_path):
    """And every turn of a hybrid model's chat is an example of its own."""
    name = rows(tmp_path / "a.jsonl", *[LONG] * 4)
    for model, n in (("qwen3", 9), ("qwen3-2507", 3), ("gemma-2", 3)):
        base = base_of(tmp_path / model, "bytes", PUBLISHED[model])
        corpus = load_records(name, 256, format=base.format)
        assert (corpus.train.n_records, corpus.train.n_cut, corpus.train.n_masked) == (n, 0, 0)
        expected = encoded(base.format, Example(tuple(LONG)))
        counted = [t for e in expected for t, c in zip(e.tokens, e.counted, strict=True) if c]
        assert sorted(corpus.train.counted.tolist()) == sorted(counted * 3)
        assert (corpus.train.targets == IGNORED).any()
        assert corpus.opening()[1] == [base.number(text) for text in PUBLISHED[model].ends]
        n_tokens, n_bytes = corpus.count_predicted()
        text = sum(
            len(text.removesuffix(PUBLISHED[model].mark))
            for e in expected
            for text in base.counted(e)
        )
        assert (n_tokens, n_bytes) == (len(counted), text + 3)


def test_a_chat_that_a_template_refuses_is_named(tmp_path):
    base = base_of(tmp_path / "base", "bytes", PUBLISHED["gemma-2"])
    name = rows(tmp_path / "a.jsonl", HI, [says("system", "s"), *HI])
    with pytest.raises(DataError) as error:
        load_records(name, 256, format=base.format)
    reason = "line 2: the chat template refuses it: System role not supported"
    assert str(error.value) == f"{name}, {reason}"
    nemo = base_of(tmp_path / "nemo", "bytes", PUBLISHED["mistral-nemo"])
    with pytest.raises(DataError, match="line 2: the chat template does not show which part of"):
        load_records(name, 256, format=nemo.format)


def test_what_a_template_or_a_text_may_not_hold_is_named(tmp_path):
    base = base_of(tmp_path / "base", "bytes", PUBLISHED["qwen2.5"])
    late = "{% if messages[0].content == 'late' %}{{ '\\ud83d' }}{% endif %}"
    name = rows(tmp_path / "a.jsonl", HI, HI, [says("user", "late"), HI[1]])
    format = TemplateFormat(base.format.template + late, base.format.tokenizer, base.format.files)
    with pytest.raises(DataError, match=r"line 3: the chat template writes half of a surrogate"):
        load_records(name, 256, format=format)
    name = rows(tmp_path / "b.jsonl", HI, HI, [says("user", "\ufdd0"), HI[1]])
    with pytest.raises(DataError, match=r"line 3: it has U\+FDD0, which stands for no character"):
        load_records(name, 256, format=base.format)


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.1", "gemma-2", "qwen3"])
def test_with_prompts_all_of_a_chat_counts_and_has_its_end(name, tmp_path):
    """Also the turns after the last one that would count."""
    base = base_of(tmp_path / "base", "bytes", PUBLISHED[name])
    chat = [*LONG, says("user", "more"), says("assistant", "no", weight=0)]
    (whole,) = encode_examples([Example(tuple(chat))], base.format, whole=True)
    assert whole.tokens == base.tokens(chat) and all(whole.counted)
    corpus = load_records(rows(tmp_path / "a.jsonl", chat, chat), 512, True, base.format)
    assert (corpus.train.n_records, corpus.train.n_endless, corpus.train.n_lost) == (1, 0, 0)


def test_chats_of_empty_answers_are_counted(tmp_path):
    base = base_of(tmp_path / "base", "bytes", PUBLISHED["qwen2.5"])
    silent = [says("user", "a"), says("assistant", ""), ON, says("assistant", "")] * 3
    corpus = load_records(rows(tmp_path / "a.jsonl", silent, HI, HI), 512, format=base.format)
    assert corpus.train.n_empty == 1


RANGE = "{% for x in range(99999) %}"
BROKEN = {
    "{% for m in messages %}": "it is no template: Unexpected end of template",
    "{{ messages | no_such_filter }}": "it is no template: No filter named 'no_such_filter'",
    "{% if x %}" * 200 + "{% endif %}" * 200: "it is no template: ",
    "{{ 1 / 0 }}": "refuses it: division by zero",
    "{{ messages[0].content.x.y }}": "refuses it: 'str object' has no attribute 'x'",
    "{{ messages.append(1) }}": "refuses it: ",
    "{{ ''.__class__.__mro__ }}": "refuses it: ",
    "{{ 'a'.index('b') }}": "refuses it: substring not found",
    "{{ raise_exception('not\nthis') }}": "refuses it: not",
    RANGE * 3 + "{% endfor %}" * 3: "it does not end within 200,000 steps",
    RANGE + "{% for y in range(99999) if false %}{% endfor %}{% endfor %}": "does not end within",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}":
        "does not end within",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "refuses it: ",
    "{{ range(10 ** 9) }}": "refuses it: Range too big",
    "{% set n = namespace(s='a' * 9999) %}{{ n.s * 10 ** 16 }}": "refuses it: ",
    "{{ 'a' * 10 ** 7 }}": "makes 10,000,000 characters of it",
    "{{ ([0] * 10 ** 6) | length }}": "it does not write what the assistant says",  # fast
    "": "it does not write what the assistant says",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "it does not write",
}  # fmt: skip


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_cannot_be_used_is_refused(template, tmp_path):
    words = tokenizer_of("bytes", PUBLISHED["smollm2"]).to_str()
    path = tmp_path / "a.jinja"
    path.write_text(template)
    with pytest.raises(DataError) as error:
        chat_format(words, asked=str(path))
    start = f"CHAT_TEMPLATE={path}: chat template: "
    assert str(error.value).startswith(start) and BROKEN[template] in str(error.value)
    assert str(error.value).endswith("; CHAT_TEMPLATE=none goes on without it")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_template_in_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    words = tokenizer_of("bytes", PUBLISHED["smollm2"]).to_str()
    with pytest.raises(DataError, match="pipe: it is no regular file; accepted: a file, or none"):
        chat_format(words, asked=str(tmp_path / "pipe"))


def test_what_is_nested_too_deeply_for_a_template_is_named_with_its_place(tmp_path):
    depth = 700 if sys.version_info < (3, 12) else 980  # which reads JSON more deeply, and walks it
    deep = json.loads("[" * depth + "]" * depth)
    name = rows(tmp_path / "a.jsonl", [*HI, ON | {"x": deep}], HI)
    words = tokenizer_of("bytes", PUBLISHED["smollm2"]).to_str()
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: it is nested too deeply"):
        load_records(name, 64, format=TemplateFormat(GREET, words))


def test_records_in_other_tokens_are_other_data(tmp_path):
    name = rows(tmp_path / "a.jsonl", HI, HI)
    words = tokenizer_of("bytes", PUBLISHED["smollm2"])
    lower = tokenizers.Tokenizer.from_str(words.to_str())
    lower.normalizer = tokenizers.normalizers.Lowercase()
    ends = {"generation_config.json": b'{"eos_token_id": 5}'}
    formats = [TemplateFormat(GREET, w.to_str()) for w in (words, lower)]
    formats += [TemplateFormat(GREET, words.to_str(), ends), PlainFormat(words.to_str())]
    sums = [load_records(name, 64, format=format).checksum for format in formats]
    assert len(set(sums)) == 4
    assert load_records(name, 64, format=formats[0]).checksum == sums[0]


def test_every_chat_has_its_own_steps(monkeypatch):
    monkeypatch.setattr("data.templates.MOST_STEPS", 4)
    words = tokenizer_of("bytes", PUBLISHED["smollm2"]).to_str()
    format = TemplateFormat(GREET, words)
    for _ in range(3):
        assert format.ask([*HI, ON])
    with pytest.raises(ValueError, match="it does not end within 4 steps"):
        format.ask(LONG)


def test_a_base_without_an_end_is_refused(tmp_path):
    words = tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator([TEXT], vocab_size=290, show_progress=False)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="no token ends a turn"):
        TemplateFormat(template, words.to_str())
    with pytest.raises(DataError, match="no token for the end of a text"):
        load_records(rows(tmp_path / "a.jsonl", HI, HI), 32, format=PlainFormat(words.to_str()))


def test_tags_of_generation_are_no_text(tmp_path):
    """What `transformers` marks the assistant's part with."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}a: {% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}u: {{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    model = Published(template, None, "<|im_end|>", ends=("<|im_end|>",))
    base = base_of(tmp_path, "bytes", model)
    (found,) = encoded(base.format, Example(tuple(LONG)))
    assert found.tokens == base.tokens(LONG)
    marked = base.theirs.apply_chat_template(
        LONG, return_assistant_tokens_mask=True, return_dict=True
    )
    assert found.counted == [bool(mark) for mark in marked["assistant_masks"]]


def test_json_is_written_as_transformers_writes_it(tmp_path):
    """With Jinja's letters and the options that its filter has, and guarded where it escapes."""
    for options in ("", "indent=2", "ensure_ascii=true", "sort_keys=true, separators=(',', ':')"):
        template = "{{ tools | tojson(OPTIONS) }}{% for m in messages %}{{ m.content }}<|im_end|>"
        template = template.replace("(OPTIONS)", f"({options})") + "{% endfor %}"
        model = Published(template, None, "<|im_end|>", ends=("<|im_end|>",))
        base = base_of(tmp_path, "bytes", model)
        assert base.format.ask(HI, TOOLS) == base.tokens(HI, TOOLS)
        named = [{"<|im_end|>": "é <|im_end|>"}]
        assert base.format.ask(HI, named).count(base.number("<|im_end|>")) == 2
        expected = base.text(HI, named)
        assert decode(base.format.ask(HI, named), base.format.tokenizer) == expected


def test_plain_texts_begin_and_end_as_the_bases_do(tmp_path):
    base = base_of(tmp_path, "bytes with BOS", PUBLISHED["gemma-2"])
    (found,) = encoded(base.format, Example(text="the dog"))
    words = encode("the dog", base.format.tokenizer)
    assert found.tokens == [base.number("<bos>"), *words, base.number("<eos>")]
    assert found.is_text and all(found.counted)
