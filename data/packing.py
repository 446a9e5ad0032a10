"""Records to blocks: packs the tokens of whole records with little padding.

T is the block size: a block is T tokens and the one that follows them.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.corpus import IGNORED
from data.forms import Record
from data.tokenizer import NO_FILES, begun, encode, end_token, start_tokens, vocabulary_size


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed records, a row for each block.

    Attributes:
        inputs: (n, T) unsigned integers.
        targets: (n, T) int32, the tokens that follow, IGNORED where the loss does not count them.
        segments: (n, T) uint16, 1, 2, ... for the tokens of a block's records and 0 for padding.
        n_records: how many records there were.
        n_cut: how many of them were cut to T + 1 tokens.
        n_dropped: how many were left out, because the loss would count no token of what was left.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    n_records: int
    n_cut: int
    n_dropped: int

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def counted(self) -> np.ndarray:
        """The targets that the loss counts: (n_counted,) int32."""
        return self.targets[self.targets != IGNORED]


def tokens_of(
    record: Record, tokenizer: str | None, count_prompts: bool, start: list[int], end: int
) -> tuple[list[int], list[bool]]:
    """The tokens of a record, and whether the loss counts each.

    A record begins with the tokens `start`. `end` is the token that ends a text or a turn.
    """
    tokens: list[int] = []
    counted: list[bool] = []
    # Neighbouring parts are encoded as one text, as generate.py encodes a prompt in its format: a
    # tokenizer may join the end of one part with the beginning of the next.
    for (ends, counts), parts in itertools.groupby(record, lambda part: (part[0] is None, part[1])):
        new = [end] if ends else encode("".join(text for text, _ in parts), tokenizer)
        new = new if tokens else begun(new, start)
        tokens += new
        counted += [counts or count_prompts] * len(new)
    return tokens, counted


def pack(
    records: Sequence[Record],
    tokenizer: str | None,
    block_size: int,
    count_prompts: bool = False,
    files: Mapping[str, bytes] = NO_FILES,
) -> Blocks:
    """Put records into blocks, each whole in one block (best fit decreasing; Johnson et al. 1974).

    Blocks are shuffled, so that their order says nothing of the records' lengths. A record of more
    than block_size + 1 tokens is cut. `files` are those beside the base's weights, which say what
    begins and ends a record. Raises DataError when the tokenizer has no token for that end.
    """
    start, end = start_tokens(tokenizer, files), end_token(tokenizer, files)
    size = block_size + 1
    encoded, n_cut, n_dropped = [], 0, 0
    for record in records:
        tokens, counted = tokens_of(record, tokenizer, count_prompts, start, end)
        n_cut += len(tokens) > size
        tokens, counted = tokens[:size], counted[:size]
        if any(counted[1:]):
            encoded.append((tokens, counted))
        else:
            n_dropped += 1
    blocks = best_fit([len(tokens) for tokens, _ in encoded], size)
    np.random.default_rng(0).shuffle(blocks)
    dtype = np.min_scalar_type(vocabulary_size(tokenizer) - 1)
    tokens = np.full((len(blocks), size), end, dtype)
    targets = np.full((len(blocks), size), IGNORED, np.int32)  # a token's own, shifted below
    segments = np.zeros((len(blocks), size), np.uint16)
    for row, block in enumerate(blocks):
        first = 0
        for segment, i in enumerate(block, start=1):
            ids, counted = map(np.array, encoded[i])
            stop = first + len(ids)
            tokens[row, first:stop] = ids
            targets[row, first + 1 : stop] = np.where(counted, ids, IGNORED)[1:]
            segments[row, first:stop] = segment
            first = stop
    parts = (tokens[:, :-1], targets[:, 1:], segments[:, :-1])
    return Blocks(*map(np.ascontiguousarray, parts), len(records), n_cut, n_dropped)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which pieces go into each block of `size`, as indices into `lengths`.

    The longest piece comes first. Each goes into the fullest block that has room for it, or else
    into a new one.
    """
    blocks: list[list[int]] = []
    open_blocks: list[tuple[int, int]] = []  # room and number, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        at = bisect.bisect_left(open_blocks, (length, -1))
        room, number = open_blocks.pop(at) if at < len(open_blocks) else (size, len(blocks))
        if number == len(blocks):
            blocks.append([])
        blocks[number].append(i)
        if room > length + 1:
            bisect.insort(open_blocks, (room - length, number))
    return blocks
