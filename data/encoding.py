"""Examples to tokens, a batch of them at a time, which all cores encode side by side."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data.chat import Format, Tokens, Written
from data.corpus import DataError, printable
from data.forms import Example
from data.tokenizer import encode_all
from files.streams import one_line

SIDE_BY_SIDE = 2**20  # characters of examples that are encoded at a time


def encode_examples(
    examples: Sequence[Example], format: Format, whole: bool = False
) -> Iterator[Tokens]:
    """The tokens of examples, of which a template may make several each. If they are to be `whole`,
    the loss counts all of them.

    Raises DataError, with the example's place, for what the format cannot say.
    """
    batch: list[tuple[Example, Written]] = []
    size = 0
    for example in examples:
        for written in _at(example, format.write, example, whole):
            batch.append((example, written))
            size += sum(map(len, written.texts))
        if size >= SIDE_BY_SIDE:
            yield from _joined(batch, format, whole)
            batch, size = [], 0
    yield from _joined(batch, format, whole)


def _joined(
    batch: Sequence[tuple[Example, Written]], format: Format, whole: bool
) -> Iterator[Tokens]:
    """The tokens of what is written of examples."""
    for special, group in itertools.groupby(batch, lambda pair: pair[1].special):
        alike = list(group)
        texts = [text for _, written in alike for text in written.texts]
        encoded = encode_all(texts, format.tokenizer, special)
        for example, written in alike:
            parts = list(itertools.islice(encoded, len(written.texts)))
            tokens = _at(example, written.join, parts)
            yield tokens._replace(counted=[True] * len(tokens.tokens)) if whole else tokens


def _at(example: Example, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments). Raises its ValueError as a DataError with the example's place."""
    try:
        return function(*arguments)
    except ValueError as error:
        reason = one_line(str(error))
        raise DataError(f"{printable(example.place)}: {reason}") from error
    except RecursionError as error:
        raise DataError(f"{printable(example.place)}: it is nested too deeply") from error
