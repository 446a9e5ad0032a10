"""Chats as a model reads them: in the chat template of its base, or in the plain format.

A format turns an `Example` into tokens with what the loss counts, and a question into the tokens
that ask it. The loss counts what the assistant says and the mark that ends its turn.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from data.corpus import DataError, printable
from data.forms import Example
from data.templates import (
    BREAK,
    TODAY,
    any_of,
    compile_template,
    guard,
    template_in,
    with_reasoning,
)
from data.tokenizer import (
    NO_FILES,
    Encoded,
    begun,
    characters,
    count_unread,
    encode,
    encode_all,
    end_tokens,
    json_file,
    load_tokenizer,
    special_text,
    start_tokens,
)

Message = Mapping[str, Any]

# The plain format: how a turn is written, and the words after which the assistant's turn follows.
# The same words inside a content look like a heading, so contents should not have them.
TURN = "{role}: {content}\n"
OPENING = "assistant: "
PROMPT_FORMAT = TURN.format(role="user", content="{prompt}") + OPENING
TEXT_FORMAT = "{prompt}"  # of models that continue a text

# The plain format as a chat template, with the texts of a base's tokens for START and END.
PLAIN_TEMPLATE = """{{ START }}{% for message in messages %}
{{ message.role + ': ' + message.content + (END if message.role == 'assistant' else '\\n') }}
{%- endfor %}
{{ 'assistant: ' if add_generation_prompt }}"""

# What a model's metadata has that say how it is asked; of a text it has only the first.
SAYS = {"data", "prompt_format", "chat_template"}

# How many characters a template may write of a chat that has not a tenth as many.
MOST_CHARACTERS = 10**6


class Tokens(NamedTuple):
    """An example's tokens, and whether the loss counts each; a text may be cut into pieces.

    `n_unread` is how many of its characters no token stands for.
    """

    tokens: Sequence[int]
    counted: Sequence[bool]
    is_text: bool = False
    n_unread: int = 0


class Written(NamedTuple):
    """An example as texts, each to be encoded by itself, and what makes its tokens of theirs.

    Unless `special`, the text of a special token in them is a text like any other. `join` raises
    ValueError where it cannot tell what the loss counts.
    """

    texts: list[str]
    special: bool
    join: Callable[[list[Encoded]], Tokens]


@dataclass(frozen=True)
class PlainFormat:
    """The format of models without a chat template: `user: ...` and `assistant: ...` in lines.

    Attributes:
        tokenizer: the content of a tokenizer.json; None where tokens are bytes.
        files: those beside the base's weights, which say what begins and ends a text.
        prompt_format: how to ask, with "{prompt}" in it.
    """

    tokenizer: str | None = field(default=None, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    prompt_format: str = PROMPT_FORMAT

    @functools.cached_property
    def ends(self) -> list[int]:
        """The tokens that end what the model writes; the first one ends records."""
        return end_tokens(self.tokenizer, self.files)

    @functools.cached_property
    def start(self) -> list[int]:
        """The tokens that every record begins with."""
        return start_tokens(self.tokenizer, self.files)

    def write(self, example: Example, whole: bool = False) -> list[Written]:
        """The texts of an example, always `whole`. Raises ValueError for what the format cannot
        say."""
        return [_text(example, self) or self._chat(example)]

    def _chat(self, example: Example) -> Written:
        if example.tools:
            raise ValueError("tools need a base with a chat template")
        return self._turns(example.messages)

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a chat that the assistant is to continue.

        Raises ValueError for what the format cannot say.
        """
        if self.prompt_format != PROMPT_FORMAT:  # of records without turns
            text = self.prompt_format.replace("{prompt}", messages[-1]["content"])
            return begun(encode(text, self.tokenizer), self.start)
        turns = self._turns(messages, opens=True)
        return list(turns.join(list(encode_all(turns.texts, self.tokenizer, special=False))).tokens)

    def _turns(self, messages: Sequence[Message], opens: bool = False) -> Written:
        """Turns in pieces of which the loss counts all or none."""
        parts: list[tuple[str | None, bool]] = []  # a text, or None for the end
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "tool" or message.get("tool_calls"):
                raise ValueError(f"{role} turns of tools need a base with a chat template")
            if self.tokenizer is None:
                refuse_end(content)
            if role == "assistant":
                counts = is_learned(message)
                parts += [(OPENING, False), (content, counts), (None, counts)]
            else:
                parts.append((TURN.format(role=role, content=content), False))
        if opens:
            parts.append((OPENING, False))
        # Neighbouring parts are encoded as one text: a tokenizer may join the end of one part with
        # the beginning of the next.
        pieces = [
            (None if ends else "".join(text for text, _ in group), counts)
            for (ends, counts), group in itertools.groupby(parts, lambda p: (p[0] is None, p[1]))
        ]

        def join(encoded: list[Encoded]) -> Tokens:
            tokens, counted, rest = list(self.start), [False] * len(self.start), iter(encoded)
            for text, counts in pieces:
                new = self.ends[:1] if text is None else next(rest).ids.tolist()
                tokens += new
                counted += [counts] * len(new)
            return Tokens(tokens, counted, n_unread=sum(part.n_unread for part in encoded))

        return Written([text for text, _ in pieces if text is not None], False, join)

    def of_texts(self) -> "PlainFormat":
        """The format of data that has texts alone, which a model continues."""
        return dataclasses.replace(self, prompt_format=TEXT_FORMAT)

    def metadata(self) -> dict[str, str]:
        """What a model's file says of how to ask it."""
        return {"prompt_format": self.prompt_format}

    def as_template(self) -> str | None:
        """The chat template that writes the same, for other programs; None for other formats, and
        where tokens have no end."""
        if self.prompt_format != PROMPT_FORMAT or not self.ends:
            return None
        text_of = chr if self.tokenizer is None else load_tokenizer(self.tokenizer).id_to_token
        start = json.dumps("".join(map(text_of, self.start)))
        return PLAIN_TEMPLATE.replace("START", start).replace(
            "END", json.dumps(text_of(self.ends[0]))
        )

    def describe(self) -> str:
        """How a question is asked, on one line."""
        return json.dumps(self.prompt_format)


@dataclass(frozen=True)
class TemplateFormat:
    """The format of a chat template, rendered as `transformers` renders it.

    A template may write earlier turns differently from the last one, such as those that drop a
    model's reasoning. Then each of the assistant's turns is an example of its own, but for turns
    that are written the same in a later example.

    Attributes:
        template: Jinja's source text.
        tokenizer, files: those of the base.
        origin: where the template is from, for the log.
    """

    template: str = field(repr=False)
    tokenizer: str = field(repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    origin: str = "the base's"

    def __post_init__(self) -> None:
        """Raises DataError for a template that cannot be read or writes no chat, and for a base
        that has no end."""
        try:
            ends = self.ends
        except ValueError as error:
            raise DataError(
                f"{self.origin} chat template: {error}; CHAT_TEMPLATE=none goes on without it"
            ) from error
        if not ends:
            raise DataError(f"{self.origin} chat template: no token ends a turn")

    @functools.cached_property
    def start(self) -> list[int]:
        """The tokens that a text begins with; the template writes a chat's own."""
        return start_tokens(self.tokenizer, self.files)

    @functools.cached_property
    def ends(self) -> list[int]:
        """The tokens that end what the model writes; the first one ends texts.

        They are those that the base states, and the mark that the template puts after an answer.
        """
        stated = end_tokens(self.tokenizer, self.files)
        words = "This is the answer."
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": words}
        _, found, after = self.render([question, answer]).rpartition(words)
        if not found:
            raise ValueError("it does not write what the assistant says")
        behind = encode(after, self.tokenizer)
        marks = [t for t in behind if t in self._special] + [t for t in behind if t in self._added]
        return list(dict.fromkeys(stated + marks[:1]))

    @functools.cached_property
    def _added(self) -> Mapping[int, Any]:
        """The tokens that the tokenizer takes out of a text before all others, by number."""
        return load_tokenizer(self.tokenizer).get_added_tokens_decoder()

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        """The texts of the tokens that no content may make, by number."""
        return {number: t.content for number, t in self._added.items() if t.special}

    @functools.cached_property
    def _guards(self) -> dict[bool, re.Pattern | None]:
        """What must stay a text: in an assistant's message (True) special tokens, in others also
        the added tokens that the template itself writes, such as <think>."""
        written = [t.content for t in self._added.values() if t.content in self.template]
        special = list(self._special.values())
        return {True: any_of(special), False: any_of(special + written)}

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """The special tokens that a template may write by name."""
        keys = ("bos_token", "eos_token", "unk_token", "pad_token")
        names = {key: special_text(self.files, key) for key in keys}
        if "tokenizer.json" not in self.files:  # older folders leave them to the tokenizer's class
            stated = json_file(self.files, "config.json")
            numbers = {key: stated.get(f"{key}_id") for key in keys if names[key] is None}
            names |= {key: self._special.get(number) for key, number in numbers.items()}
        return {key: name for key, name in names.items() if name is not None}

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), opens: bool = False
    ) -> str:
        """The text of a chat; with `opens` up to where the assistant's turn begins.

        Raises ValueError with the template's own reason where it refuses the chat, and for a text
        of far more characters than the chat has.
        """
        render = compile_template(self.template)
        try:
            text = render(
                messages=[with_reasoning(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=opens,
                date_string=TODAY.strftime("%d %b %Y"),
                **self._names,
            )
        except Exception as error:  # a template is a program, which may raise any
            reason = str(error) or type(error).__name__
            raise ValueError(f"the chat template refuses it: {reason}") from error
        if len(text) > MOST_CHARACTERS and len(text) > 10 * len(str([messages, tools])):
            raise ValueError(f"the chat template makes {len(text):,} characters of it")
        try:
            text.encode("utf-8", "surrogateescape")  # which stand for bytes that are no UTF-8
        except UnicodeEncodeError as error:
            raise ValueError("the chat template writes half of a surrogate pair") from error
        return text

    def write(self, example: Example, whole: bool = False) -> list[Written]:
        """The text of an example up to the last turn that the loss counts, or the `whole` text; or
        the text of each of these turns.

        Raises ValueError where the template refuses it, and where it does not show which part of
        the text is the assistant's.
        """
        text = _text(example, self)
        if text is not None:
            return [text]
        messages = [self._guarded(message) for message in example.messages]
        tools = guard(list(example.tools), self._guards[False])
        learned = [i for i, message in enumerate(messages) if is_learned(message)]
        if whole or not learned:
            return [self._written(self.render(messages, tools), [])]
        texts: list[str] = []  # up to a learned turn, without those that a later one begins with
        spans: list[list[tuple[int, int]]] = []  # of the learned turns in each
        for i in learned:
            before = self.render(messages[:i], tools, opens=True)
            until = self.render(messages[: i + 1], tools)
            if not until.startswith(before):
                raise ValueError(
                    f"the chat template does not show which part of turn {i + 1} is the assistant's"
                )
            span = (len(before), len(until))
            if texts and until.startswith(texts[-1]):
                texts[-1] = until
                spans[-1].append(span)
            else:
                texts.append(until)
                spans.append([span])
        return [self._written(text, part) for text, part in zip(texts, spans, strict=True)]

    def ask(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The tokens of a chat that the assistant is to continue; see `PlainFormat.ask`."""
        guarded = [self._guarded(message) for message in messages]
        tools = guard(list(tools), self._guards[False])
        text = characters(self.render(guarded, tools, opens=True))
        (encoded,) = encode_all([text], self.tokenizer)
        return list(self._counted(encoded, text, []).tokens)

    def _written(self, text: str, spans: Sequence[tuple[int, int]]) -> Written:
        return Written([text], True, lambda found: self._counted(found[0], text, spans))

    def _counted(self, found: Encoded, text: str, spans: Sequence[tuple[int, int]]) -> Tokens:
        """The tokens of a rendered text; of each span (start, end) the loss counts those up to the
        mark that ends a turn, or where it has none, all but white space at its end."""
        ids, places, n_unread = found
        if BREAK in text:
            parts = [text[a:b] for a, b in places.tolist()]
            kept = np.array([part != BREAK for part in parts], bool)
            if any(BREAK in part for part in itertools.compress(parts, kept)):
                raise ValueError("a special token's text in it cannot be kept a text")
            ids, places = ids[kept], places[kept]
            n_unread = count_unread(ids, places, len(text), self.tokenizer) - text.count(BREAK)
        counted = np.zeros(len(ids), bool)
        ends = np.isin(ids, self.ends) if spans else counted
        for start, end in spans:
            end = start + len(text[start:end].rstrip())
            inside = (places[:, 0] >= start) & (places[:, 0] < end)
            # A token may begin in the line break before the span; an added one that does has only
            # taken white space of it.
            (across,) = np.nonzero((places[:, 0] < start) & (places[:, 1] > start))
            inside[[i for i in across if start < end and ids[i] not in self._added]] = True
            (marks,) = np.nonzero(inside & ends)
            inside[marks[0] + 1 if len(marks) else len(ids) :] = False
            counted |= inside
        return Tokens(ids.tolist(), counted.tolist(), n_unread=n_unread)

    def _guarded(self, message: Message) -> dict[str, Any]:
        """The message with its texts guarded, without keys that have nothing to say: a template may
        ask whether they are there."""
        guarded = guard(message, self._guards[message["role"] == "assistant"])
        return {key: v for key, v in guarded.items() if key == "content" or v not in (None, [])}

    def of_texts(self) -> PlainFormat:
        """The format of data that has texts alone, which a model continues."""
        return PlainFormat(self.tokenizer, self.files, TEXT_FORMAT)

    def metadata(self) -> dict[str, str]:
        """What a model's file says of how to ask it."""
        return {"chat_template": self.template}

    def as_template(self) -> str:
        """The chat template, for other programs."""
        return self.template

    def describe(self) -> str:
        """How a question is asked, on one line."""
        asked = self.render([{"role": "user", "content": "{prompt}"}], opens=True)
        return f"{json.dumps(asked)}, in {self.origin} chat template"


Format = PlainFormat | TemplateFormat


def chat_format(
    tokenizer: str | None,
    files: Mapping[str, bytes] = NO_FILES,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    asked: str | None = None,
) -> Format:
    """How chats are written for a model.

    Args:
        tokenizer, files: those of the base.
        metadata: of the model's file, which may state the format that the model was trained in.
        asked: CHAT_TEMPLATE: a file, or `none` for the plain format. It decides where it is given,
            else the metadata, else the base's own template. A model without one has the plain one.

    Raises DataError for a template that cannot be used.
    """
    if asked is not None and asked.lower() == "none":
        return PlainFormat(tokenizer, files)
    if asked is not None:
        if tokenizer is None:
            raise DataError("CHAT_TEMPLATE needs a base with a tokenizer; accepted here: none")
        try:
            if os.path.exists(asked) and not os.path.isfile(asked):  # a pipe would be waited for
                raise ValueError("it is no regular file")
            template = Path(asked).read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, UnicodeError):
                reason = "it is not UTF-8"
            raise DataError(
                f"CHAT_TEMPLATE={printable(asked)}: {reason}; accepted: a file, or none"
            ) from error
        return TemplateFormat(template, tokenizer, files, f"CHAT_TEMPLATE={printable(asked)}:")
    template, prompt_format = metadata.get("chat_template"), metadata.get("prompt_format")
    if isinstance(template, str) and tokenizer is not None:
        return TemplateFormat(template, tokenizer, files, "the trained model's")
    if isinstance(prompt_format, str) and prompt_format != TEXT_FORMAT:
        return PlainFormat(tokenizer, files, prompt_format)
    template = template_in(files)
    if template is not None and tokenizer is not None:
        return TemplateFormat(template, tokenizer, files)
    return PlainFormat(tokenizer, files)


def text_format(tokenizer: str | None, files: Mapping[str, bytes] = NO_FILES) -> Format:
    """The format of a model that continues a text: the text as it is."""
    return PlainFormat(tokenizer, files, TEXT_FORMAT)


def continues_text(files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> bool:
    """Whether a model was trained on text and no chats, as far as its files tell."""
    if "chat_template" in metadata:
        return False
    if "prompt_format" in metadata:
        return metadata["prompt_format"] == TEXT_FORMAT
    return "data" in metadata or template_in(files) is None


def ends_of(format: Format, files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> list[int]:
    """The tokens at which a model stops. One of bytes has an end where it was trained on records,
    which its metadata says, or else the files beside its weights."""
    if format.tokenizer is not None or (SAYS - {"data"}) & metadata.keys():
        return format.ends
    named = ("generation_config.json", "config.json")
    is_stated = any(json_file(files, name).get("eos_token_id") in format.ends for name in named)
    return format.ends if is_stated and not SAYS & metadata.keys() else []


def is_learned(message: Message) -> bool:
    """Whether the loss counts a turn: it is the assistant's, and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _text(example: Example, format: Format) -> Written | None:
    """A text alone, which begins and ends as the base's texts do; None for a chat."""
    if example.text is None:
        return None
    if format.tokenizer is None:
        refuse_end(example.text)

    def join(found: list[Encoded]) -> Tokens:
        tokens, end = begun(found[0].ids.tolist(), format.start), format.ends[0]
        if tokens[-1:] != [end]:
            tokens = [*tokens, end]
        return Tokens(tokens, [True] * len(tokens), True, found[0].n_unread)

    return Written([example.text], True, join)


def refuse_end(text: str) -> None:
    """Raise ValueError for a text of bytes with the byte that ends records."""
    if "\0" in text:
        raise ValueError("it has '\\0', the mark that ends a record")
