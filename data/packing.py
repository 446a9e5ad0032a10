"""Records to blocks: their tokens, packed so that each is whole and little room is lost.

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
    """Packed records: row for row inputs, targets, and which record of its block a token is of.

    Attributes:
        inputs: (n, T) unsigned integers.
        targets: (n, T) int32, the tokens that follow, IGNORED where the loss does not count them.
        segments: (n, T) uint16, 1, 2, ... for a block's records and 0 for padding.
        n_records, n_cut, n_dropped: how many records there were; how many of them were cut to T + 1
            tokens, and how many were left out since then nothing is left to count.
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
    """The tokens of a record, and whether the loss counts each. It begins with the tokens `start`;
    `end` is the token for its ends."""
    tokens: list[int] = []
    counted: list[bool] = []
    # Neighbours are encoded as one, as generate.py encodes a prompt in its format: a tokenizer may
    # join the end of one with the beginning of the next.
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
    """Put records into blocks, each whole and in one of them, with little padding (best fit
    decreasing; Johnson et al. 1974), in an order of blocks that says nothing of their length.
    `files` are those beside the base's weights, which say what begins and ends a record.
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
    targets = np.full((len(blocks), size), IGNORED, np.int32)  # of the tokens themselves
    segments = np.zeros((len(blocks), size), np.uint16)
    for row, block in enumerate(blocks):
        start = 0
        for segment, i in enumerate(block, start=1):
            ids, counted = map(np.array, encoded[i])
            stop = start + len(ids)
            tokens[row, start:stop] = ids
            targets[row, start + 1 : stop] = np.where(counted, ids, IGNORED)[1:]
            segments[row, start:stop] = segment
            start = stop
    parts = (tokens[:, :-1], targets[:, 1:], segments[:, :-1])
    return Blocks(*map(np.ascontiguousarray, parts), len(records), n_cut, n_dropped)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which of the pieces with these lengths go into each of the blocks of `size`: the longest
    first, each into the block with the least room that it fits into, or else into a new one."""
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
