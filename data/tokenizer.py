"""Text to tokens and back: bytes, or the tokenizer that came with a base.

A tokenizer is given as the content of its tokenizer.json, None for bytes, and needs the package
`tokenizers` only where it is not None.
"""

import codecs
import functools
from collections.abc import Callable, Iterable
from typing import Any

from data.corpus import DataError

ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|im_end|>")  # what tokenizers call the end of a text
N_BYTES = 256  # the vocabulary of a model whose tokens are bytes


def encode(text: str, tokenizer: str | None) -> list[int]:
    """The tokens of a text. Bytes that are no UTF-8, as the system hands them on, stay as they are
    where tokens are bytes, and become U+FFFD for a tokenizer."""
    if tokenizer is None:
        return list(text.encode("utf-8", "surrogateescape"))
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", errors="replace")
    return load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids


def decode(tokens: Iterable[int], tokenizer: str | None) -> str:
    """The text of tokens; U+FFFD where they are none."""
    if tokenizer is None:
        return bytes(tokens).decode("utf-8", errors="replace")
    return load_tokenizer(tokenizer).decode(list(tokens), skip_special_tokens=False)


def stream_decoder(tokenizer: str | None) -> Callable[[int | None], str]:
    """A function that takes the tokens of a text one by one, and None at its end, and returns what
    text each completes: nothing while a character lacks bytes."""
    if tokenizer is None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(
            b"" if token is None else bytes([token]), final=token is None
        )
    loaded = load_tokenizer(tokenizer)
    from tokenizers.decoders import DecodeStream

    stream, tokens, written = DecodeStream(skip_special_tokens=False), [], 0

    def write(token: int | None) -> str:
        nonlocal written
        if token is None:  # what the stream holds back, such as the first bytes of a character
            return decode(tokens, tokenizer)[written:]
        tokens.append(token)
        text = stream.step(loaded, token) or ""
        written += len(text)
        return text

    return write


@functools.lru_cache(maxsize=2)
def vocabulary_size(tokenizer: str | None) -> int:
    """How many tokens there are, or one more than the largest where numbers are left out."""
    if tokenizer is None:
        return N_BYTES
    return max(load_tokenizer(tokenizer).get_vocab().values(), default=-1) + 1


def end_mark(tokenizer: str | None) -> str:
    """The text of the token that ends a record: byte 0, or the tokenizer's own.

    Raises DataError when the tokenizer has none.
    """
    if tokenizer is None:
        return "\0"
    for name in ENDS:
        if load_tokenizer(tokenizer).token_to_id(name) is not None:
            return name
    raise DataError(f"the base's tokenizer has no token for the end of a text ({ENDS[0]})")


def end_token(tokenizer: str | None) -> int:
    """The token that ends a record. Raises DataError as `end_mark` does."""
    mark = end_mark(tokenizer)
    return 0 if tokenizer is None else load_tokenizer(tokenizer).token_to_id(mark)


@functools.lru_cache(maxsize=1)
def load_tokenizer(content: str) -> Any:  # a tokenizers.Tokenizer, which is optional
    """The Tokenizer of the package `tokenizers` for the content of a tokenizer.json.

    Raises DataError when the package is missing or the content is not a tokenizer.
    """
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
