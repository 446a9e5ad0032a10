"""Records: prompts and completions of dataset files, in blocks where no record sees another."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data.batches import even_spread, on_device
from data.corpus import IGNORED, Batch, Corpus, DataError, aligned, printable
from data.forms import NO_COLUMNS, PROMPT_FORMAT, parts_of
from data.packing import Blocks, pack
from data.record_files import read_splits
from data.text import n_bytes_of
from data.tokenizer import NO_FILES, end_mark, end_token


@dataclass(frozen=True, eq=False)
class RecordCorpus(Corpus):
    """Records for training and validation. A window is a block, and has the block's number.

    Attributes:
        name, checksum, tokenizer: see `Corpus`.
        train, validation: the packed records of either split.
        prompt_format: how to ask a model that was trained on them; "{prompt}" for texts alone.
        end: the token that ends a record.
        found: for the log, by the file's name: its layout, how many rows, and what was ignored.
    """

    name: str
    checksum: str
    train: Blocks = field(repr=False)
    validation: Blocks = field(repr=False)
    prompt_format: str
    tokenizer: str | None = field(default=None, repr=False)
    end: int = 0
    found: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> list[str]:
        rows = {"name": printable(self.name), "checksum": self.checksum}
        for name, blocks in (("train", self.train), ("validation", self.validation)):
            used = (blocks.segments > 0).sum()
            rows[name] = (
                f"{blocks.n_records:,} records, {used:,} tokens ({len(blocks.counted):,} counted) "
                f"in {len(blocks):,} blocks, {1 - used / blocks.segments.size:.1%} padding"
            )
            if blocks.n_cut or blocks.n_dropped:
                rows[name] += f"; {blocks.n_cut:,} cut to a block"
                rows[name] += f", {blocks.n_dropped:,} left out, whose prompts fill one"
        rows["prompt"] = json.dumps(self.prompt_format)
        return aligned(rows) + (aligned(self.found) if self.found else [])

    def passes(self, n_tokens: int) -> float:
        return n_tokens / self.train.inputs.size

    def training_batch(
        self,
        batch_size: int,
        block_size: int,
        seed: int,
        number: int,
        device: str | torch.device = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> Batch:
        """Blocks in random order, each once in every pass over all; see `Corpus`."""
        n, first = len(self.train), number * batch_size
        taken = range(first, first + batch_size)
        blocks = np.array([_order(n, seed, i // n)[i % n] for i in taken])
        i, n_shares = share
        return _batch(self.train, blocks[i::n_shares], block_size, device)

    def validation_windows(self, n_windows: int, block_size: int) -> np.ndarray:
        return even_spread(n_windows, len(self.validation), len(self.validation))

    def validation_batch(
        self, windows: np.ndarray, block_size: int, device: str | torch.device = "cpu"
    ) -> Batch:
        return _batch(self.validation, windows, block_size, device)

    def all_validation_windows(self, block_size: int) -> list[tuple[np.ndarray, int]]:
        """All blocks, which predict all tokens that the loss counts."""
        return [(np.arange(len(self.validation)), block_size)]

    def count_predicted(self) -> tuple[int, int]:
        """How many tokens the loss counts, and their bytes; an end of a record is one byte."""
        predicted = self.validation.counted
        n_tokens = len(predicted)
        if self.tokenizer is None:
            return n_tokens, n_tokens
        written = predicted[predicted != self.end]
        n_ends = n_tokens - len(written)
        return n_tokens, n_ends + n_bytes_of(written, self.tokenizer)

    def opening(self) -> tuple[list[int], int]:
        """The first record to validate on, up to what the loss counts, and the end of a record."""
        first_counted = np.argmax(self.validation.targets[0] != IGNORED)
        opening = self.validation.inputs[0, : first_counted + 1].tolist()
        return opening, self.end

    def loss_parts(
        self,
        batches: Sequence[Batch],
        n_processes: int = 1,
        total: Callable[[Tensor], Tensor] = lambda counted: counted,
    ) -> Tensor:
        """A part for each batch, proportional to how many tokens its loss counts; see `Corpus`.

        Returns:
            (len(batches),) float32 on the batches' device.
        """
        counted = torch.stack([self.counted(batch).sum() for batch in batches])
        return counted * n_processes / total(counted.sum())


def load_records(
    name: str,
    tokenizer: str | None,
    block_size: int,
    count_prompts: bool = False,
    files: Mapping[str, bytes] = NO_FILES,
    columns: Mapping[str, str] = NO_COLUMNS,
) -> RecordCorpus:
    """Read and pack the records that DATA=`name` stands for, as `read_splits` reads them.

    `columns` are what the files call the columns of a layout. `files` are those beside the base's
    weights, which say what begins and ends a record.

    Raises DataError for a file that cannot be read or has no records, and for a line that is not a
    record.
    """
    found = read_splits(name, columns)
    mark = end_mark(tokenizer, files)
    splits = [
        [parts_of(example, mark) for example in examples]
        for examples in (found.train, found.validation)
    ]
    train, valid = (
        pack(records, tokenizer, block_size, count_prompts, files) for records in splits
    )
    for blocks in (train, valid):
        if len(blocks) == 0:
            raise DataError(f"DATA={name}: with BLOCK_SIZE={block_size} no completion is left")
    has_prompts = any(
        not counted for records in splits for record in records for _, counted in record
    )
    prompt_format = PROMPT_FORMAT if has_prompts else "{prompt}"
    end = end_token(tokenizer, files)
    return RecordCorpus(
        name, found.checksum, train, valid, prompt_format, tokenizer, end, found.found
    )


def _batch(
    blocks: Blocks, numbers: np.ndarray, block_size: int, device: str | torch.device
) -> Batch:
    """The blocks with these numbers. Raises ValueError unless block_size is their length."""
    if block_size != blocks.inputs.shape[1]:
        raise ValueError(
            f"block_size is {block_size}, but the blocks have {blocks.inputs.shape[1]} tokens"
        )
    parts = (blocks.inputs[numbers], blocks.targets[numbers], blocks.segments[numbers])
    return tuple(on_device(device, torch.from_numpy(part.astype(np.int64))) for part in parts)


@functools.lru_cache(maxsize=2)  # a batch may lie in two passes
def _order(n: int, seed: int, number: int) -> np.ndarray:
    """In what order pass `number` takes n blocks."""
    return np.random.default_rng([seed, number]).permutation(n)
