"""Records to blocks: packs the tokens of whole records with little padding.

T is the block size: a block is T tokens and the one that follows them.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.chat import Tokens
from data.corpus import IGNORED

AFTER_END = 3  # tokens among which an end is, where the loss counts what a template writes after it


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed records, a row for each block.

    Attributes:
        inputs: (n, T) unsigned integers.
        targets: (n, T) int32, the tokens that follow, IGNORED where the loss does not count them.
        segments: (n, T) uint16, 1, 2, ... for the tokens of a block's records and 0 for padding.
        n_used: how many tokens of `inputs` are no padding.
        n_counted: how many of `targets` the loss counts.
        n_records: how many records there were; a template may make several of one chat.
        n_cut: how many of them were longer than T + 1 tokens.
        fits: the block sizes that would cut a tenth of the records, and none of them.
        n_lost: how many tokens of these are in no block; a long text loses none.
        n_masked: how many were left out, because the loss would count no token of what was left.
        n_unread: how many characters of them no token of the tokenizer stands for.
        n_empty: how many have nothing to learn but the end.
        n_endless: how many do not end with the mark of an end, so that a model learns none.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    n_used: int
    n_counted: int
    n_records: int
    n_cut: int
    fits: tuple[int, int]
    n_lost: int
    n_masked: int
    n_unread: int
    n_empty: int
    n_endless: int

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def counted(self) -> np.ndarray:
        """The targets that the loss counts: (n_counted,) int32."""
        return self.targets[self.targets != IGNORED]


def pack(examples: Sequence[Tokens], block_size: int, n_tokens: int, ends: Sequence[int]) -> Blocks:
    """Put examples into blocks, each whole in one block (best fit decreasing; Johnson et al. 1974).

    Blocks are shuffled, so that their order says nothing of the examples' lengths. A text of more
    than block_size + 1 tokens becomes several pieces, and a chat loses its end.

    Args:
        examples: the tokens of each example, and which of them the loss counts.
        block_size: T.
        n_tokens: the size of the vocabulary.
        ends: the tokens that end a text or a turn; the first one fills the rest of a block.
    """
    size = block_size + 1
    kept, n_cut, n_lost, n_masked, n_empty, n_endless = [], 0, 0, 0, 0, 0
    for tokens, counted, is_text, _ in examples:
        tokens, counted = np.asarray(tokens), np.asarray(counted)
        n_cut += len(tokens) > size
        # The last token of a piece is the first of the next one, so that each is predicted once.
        starts = range(0, max(1, len(tokens) - 1), block_size) if is_text else [0]
        pieces = [(tokens[i : i + size], counted[i : i + size]) for i in starts]
        pieces = [piece for piece in pieces if piece[1][1:].any()]
        n_masked += not pieces
        learned = np.isin(tokens[counted], ends)  # whether each is an end
        n_empty += bool(learned.size and learned.all())
        n_endless += bool(learned.size and not learned[-AFTER_END:].any())
        n_lost += 0 if is_text else len(tokens[size:])
        kept += pieces
    lengths = [len(example.tokens) for example in examples]
    fits = np.quantile(lengths, (0.9, 1.0), method="higher") - 1 if lengths else (0, 0)
    blocks = best_fit([len(tokens) for tokens, _ in kept], size)
    np.random.default_rng(0).shuffle(blocks)
    tokens = np.full((len(blocks), size), ends[0], np.min_scalar_type(n_tokens - 1))
    targets = np.full((len(blocks), size), IGNORED, np.int32)  # a token's own, shifted below
    segments = np.zeros((len(blocks), size), np.uint16)
    for row, block in enumerate(blocks):
        first = 0
        for segment, i in enumerate(block, start=1):
            ids, counted = kept[i]
            stop = first + len(ids)
            tokens[row, first:stop] = ids
            targets[row, first + 1 : stop] = np.where(counted, ids, IGNORED)[1:]
            segments[row, first:stop] = segment
            first = stop
    parts = (tokens[:, :-1], targets[:, 1:], segments[:, :-1])
    inputs, targets, segments = map(np.ascontiguousarray, parts)
    return Blocks(
        inputs=inputs,
        targets=targets,
        segments=segments,
        n_used=int((segments > 0).sum()),
        n_counted=int((targets != IGNORED).sum()),
        n_records=len(examples),
        n_cut=n_cut,
        fits=tuple(map(int, fits)),
        n_lost=n_lost,
        n_masked=n_masked,
        n_unread=sum(example.n_unread for example in examples),
        n_empty=n_empty,
        n_endless=n_endless,
    )


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
