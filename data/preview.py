"""Examples as a model sees them, with what the loss counts marked, to look at before training."""

import itertools
from collections.abc import Iterable

from data.corpus import Corpus
from data.tokenizer import decode

MARKS = ("[[", "]]")  # around what the loss counts
COLOURS = ("\x1b[32m", "\x1b[0m")  # the same on a terminal: green
END_TOKENS = 12  # how many tokens of an example's end the log shows


def preview_lines(corpus: Corpus, n: int, block_size: int, colour: bool = False) -> list[str]:
    """The first `n` examples of the training data, each below a heading, with marks or colours."""
    lines = []
    for i, (tokens, counted) in enumerate(corpus.examples(n, block_size), start=1):
        share = f"{sum(counted):,} of {len(tokens):,} tokens counted"
        lines += [f"Example {i}: {share}", *marked(tokens, counted, corpus, colour).split("\n"), ""]
    return lines


def marked(
    tokens: Iterable[int], counted: Iterable[bool], corpus: Corpus, colour: bool = False
) -> str:
    """The text of tokens, where marks or colours stand around what the loss counts.

    A control character, which a terminal would obey, is escaped, but for a line break.
    """
    before, after = COLOURS if colour else MARKS
    text = ""
    for counts, group in itertools.groupby(zip(tokens, counted, strict=True), lambda pair: pair[1]):
        part = decode([token for token, _ in group], corpus.tokenizer)
        part = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in part)
        text += f"{before}{part}{after}" if counts else part
    return text
