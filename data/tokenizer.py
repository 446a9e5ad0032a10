"""Text to tokens and back: bytes, or the tokenizer that came with a base.

A tokenizer is given as the content of its tokenizer.json, None for bytes, and needs the package
`tokenizers` only where it is not None.
"""

import codecs
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from data.corpus import DataError

ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")  # of texts, by name
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")  # of turns: Qwen's and SmolLM's, Llama 3's
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # a byte, where a tokenizer falls back on them
NO_FILES: Mapping[str, bytes] = MappingProxyType({})
N_BYTES = 256  # the vocabulary of a model whose tokens are bytes


def encode(text: str, tokenizer: str | None) -> list[int]:
    """The tokens of a text.

    The system hands on bytes that are not UTF-8 as surrogates. They stay as they are where tokens
    are bytes, and become U+FFFD for a tokenizer.
    """
    if tokenizer is None:
        return list(text.encode("utf-8", "surrogateescape"))
    return load_tokenizer(tokenizer).encode(characters(text), add_special_tokens=False).ids


class Encoded(NamedTuple):
    """A text in tokens.

    Attributes:
        ids: (n,) int64.
        places: (n, 2) int64, the first character of each token and the one after its last; empty
            where tokens are bytes.
        n_unread: how many characters no token stands for, or the unknown one.
    """

    ids: np.ndarray
    places: np.ndarray
    n_unread: int


def encode_all(
    texts: Sequence[str], tokenizer: str | None, special: bool = True
) -> Iterator[Encoded]:
    """Texts in tokens, which all cores encode side by side.

    Unless `special`, the text of a special token is a text like any other.
    """
    if tokenizer is None:
        for text in texts:
            yield Encoded(np.array(encode(text, None), np.int64), np.empty((0, 2), np.int64), 0)
        return
    loaded = load_tokenizer(tokenizer)
    loaded.encode_special_tokens = not special
    try:
        found = loaded.encode_batch(list(map(characters, texts)), add_special_tokens=False)
    finally:
        loaded.encode_special_tokens = False
    for text, encoding in zip(texts, found, strict=True):
        ids = np.array(encoding.ids, np.int64)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        yield Encoded(ids, places, count_unread(ids, places, len(text), tokenizer))


@functools.lru_cache(maxsize=1)
def unknown_token(tokenizer: str) -> int | None:
    """The token that stands for whatever a tokenizer does not know, if it has one."""
    model = load_tokenizer(tokenizer).model
    name = getattr(model, "unk_token", None)
    return load_tokenizer(tokenizer).token_to_id(name) if name else getattr(model, "unk_id", None)


def count_unread(
    ids: np.ndarray, places: np.ndarray, stop: int, tokenizer: str, start: int = 0
) -> int:
    """How many characters of a text from `start` to `stop` no token stands for, or the unknown one;
    `ids` and `places` are those of its tokens, as in `Encoded`."""
    ends = np.maximum.accumulate(np.concatenate([[start], places[:, 1]]))
    gaps = np.concatenate([places[:, 0], [stop]]) - ends
    unknown = np.diff(places[ids == unknown_token(tokenizer)])
    return int(gaps.clip(min=0).sum() + unknown.sum())


def characters(text: str) -> str:
    """The text with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", errors="replace")


def decode(tokens: Iterable[int], tokenizer: str | None) -> str:
    """The text of tokens, with U+FFFD for bytes that are not UTF-8."""
    if tokenizer is None:
        return bytes(tokens).decode("utf-8", errors="replace")
    return load_tokenizer(tokenizer).decode(list(tokens), skip_special_tokens=False)


def stream_decoder(tokenizer: str | None) -> Callable[[int | None], str]:
    """A function that decodes the tokens of a text one by one; None is its end.

    It returns the text that the token completes, which is empty while a character lacks bytes. The
    texts joined are what `decode` makes of all tokens.
    """
    if tokenizer is None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(
            b"" if token is None else bytes([token]), final=token is None
        )
    loaded = load_tokenizer(tokenizer)
    # Tokens from `start` to `stop` made the last text. They are decoded again with the tokens that
    # follow, since some decoders treat the first token differently.
    tokens: list[int] = []
    start = stop = 0

    def write(token: int | None) -> str:
        nonlocal start, stop
        if token is not None:
            tokens.append(token)
            # A later byte may turn all bytes beside it into U+FFFD.
            if BYTE_TOKEN.fullmatch(loaded.id_to_token(token) or ""):
                return ""
        text = decode(tokens[start:], tokenizer)
        new = text[len(decode(tokens[start:stop], tokenizer)) :]
        if token is not None and (not new or new.endswith("\ufffd")):
            return ""
        start, stop = stop, len(tokens)
        return new

    return write


@functools.lru_cache(maxsize=2)
def vocabulary_size(tokenizer: str | None) -> int:
    """One more than the largest token: how many tokens there are, unless numbers are left out."""
    if tokenizer is None:
        return N_BYTES
    return max(load_tokenizer(tokenizer).get_vocab().values(), default=-1) + 1


def end_token(tokenizer: str | None, files: Mapping[str, bytes] = NO_FILES) -> int:
    """The token that ends a record: the first of `end_tokens`.

    Raises DataError when the tokenizer has none.
    """
    ends = end_tokens(tokenizer, files)
    if not ends:
        raise DataError(f"the base's tokenizer has no token for the end of a text ({ENDS[0]})")
    return ends[0]


def end_tokens(tokenizer: str | None, files: Mapping[str, bytes] = NO_FILES) -> list[int]:
    """Every token that ends a text or a turn, the base's `eos_token` first.

    `files` are those beside the base's weights, by name. They state ends as `eos_token` in
    tokenizer_config.json and `eos_token_id` in generation_config.json and config.json. Where no
    file states one, a usual name is taken. A usual end of turns counts in any case: a base that was
    not made for chats has it in its tokenizer, and in no other file.
    """
    if tokenizer is None:
        return [0]
    loaded = load_tokenizer(tokenizer)
    found = [_special_token(loaded, files, "eos_token")]
    for name in ("generation_config.json", "config.json"):
        stated = json_file(files, name).get("eos_token_id")
        found += stated if isinstance(stated, list) else [stated]
    ends = [end for end in found if type(end) is int and 0 <= end < vocabulary_size(tokenizer)]
    ends = [end for end in ends if loaded.id_to_token(end) is not None]
    if not ends:
        named = (loaded.token_to_id(name) for name in ENDS)
        ends = [end for end in named if end is not None][:1]
    ends += [end for end in map(loaded.token_to_id, TURN_ENDS) if end is not None]
    return list(dict.fromkeys(ends))


def start_tokens(tokenizer: str | None, files: Mapping[str, bytes] = NO_FILES) -> list[int]:
    """The tokens that a tokenizer puts before every text: its BOS, or none.

    Its own post-processor says so, or `add_bos_token` in tokenizer_config.json, which is among the
    `files` beside the base's weights.
    """
    if tokenizer is None:
        return []
    loaded = load_tokenizer(tokenizer)
    whole = _read_tokenizer(tokenizer)
    whole.no_truncation()
    whole.no_padding()  # which may be on the left
    framed = whole.encode("a", add_special_tokens=True)
    added = itertools.takewhile(
        lambda pair: pair[1], zip(framed.ids, framed.special_tokens_mask, strict=True)
    )
    starts = [token for token, _ in added]
    if not starts and json_file(files, "tokenizer_config.json").get("add_bos_token") is True:
        starts = [_special_token(loaded, files, "bos_token")]
    return [token for token in starts if token is not None]


def begun(tokens: list[int], start: list[int]) -> list[int]:
    """A text's tokens after the tokens `start`, unless the text brought these with it."""
    return tokens if tokens[: len(start)] == start else start + tokens


def _special_token(loaded: Any, files: Mapping[str, bytes], key: str) -> int | None:
    """The token whose text `special_text` gives, if the tokenizer has it."""
    text = special_text(files, key)
    return None if text is None else loaded.token_to_id(text)


def special_text(files: Mapping[str, bytes], key: str) -> str | None:
    """The text of a token that tokenizer_config.json has as a text, or as a table with its content,
    or else special_tokens_map.json; None where neither has one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        stated = json_file(files, name).get(key)
        if isinstance(stated, dict):
            stated = stated.get("content")
        if isinstance(stated, str):
            return stated
    return None


def json_file(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The table in a file of JSON; empty where it is missing or no table."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@functools.lru_cache(maxsize=1)
def load_tokenizer(content: str) -> Any:  # a tokenizers.Tokenizer, which is optional
    """The Tokenizer of the package `tokenizers` for the content of a tokenizer.json.

    It is without the truncation, the padding and the dropout that are stored there, and without
    what only frames a text and trims the offsets of its tokens.

    Raises DataError when the package is missing or the content is not a tokenizer.
    """
    loaded = _read_tokenizer(content)
    loaded.no_truncation()
    loaded.no_padding()
    loaded.post_processor = None
    if getattr(loaded.model, "dropout", None):  # BPE's, with which tokens would be random
        loaded.model.dropout = None
    return loaded


def _read_tokenizer(content: str) -> Any:
    """The Tokenizer as its file has it; see `load_tokenizer`."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            "this base has a tokenizer, which needs the package tokenizers: pip install tokenizers"
        ) from error
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the package has no type of its own for it
        raise DataError(f"the base's tokenizer cannot be used: {error}") from error
