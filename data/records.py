"""Records: chats and texts of dataset files, in blocks where no record sees another."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batches import even_spread, on_device
from data.chat import Format, PlainFormat, Tokens
from data.corpus import IGNORED, Batch, Corpus, DataError, aligned, printable
from data.encoding import encode_examples
from data.forms import NO_COLUMNS, Example
from data.packed import Packed, kept_in
from data.packing import Blocks, pack
from data.preview import END_TOKENS, marked
from data.record_files import find_records, read_splits
from data.text import n_bytes_of
from data.tokenizer import end_token, vocabulary_size


@dataclass(frozen=True, eq=False)
class RecordCorpus(Corpus):
    """Records for training and validation. A window is a block, and has the block's number.

    Attributes:
        name, checksum, tokenizer: see `Corpus`.
        train, validation: the packed records of either split.
        format: how chats are written, and how to ask a model that was trained on them.
        found: for the log, by the file's name: its layout, how many rows, and what was ignored.
    """

    name: str
    checksum: str
    train: Blocks = field(repr=False)
    validation: Blocks = field(repr=False)
    format: Format
    tokenizer: str | None = field(default=None, repr=False)
    found: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> list[str]:
        rows = {"name": printable(self.name), "checksum": self.checksum}
        for name, blocks in (("train", self.train), ("validation", self.validation)):
            used, counted = blocks.n_used, blocks.n_counted
            rows[name] = (
                f"{blocks.n_records:,} records, {used:,} tokens ({counted:,} counted, "
                f"{counted / used:.1%}) in {len(blocks):,} blocks, "
                f"{1 - used / blocks.segments.size:.1%} padding"
            )
            if blocks.n_cut:
                rows[name] += (
                    f"; {blocks.n_cut:,} longer than a block, {blocks.n_lost:,} tokens lost"
                )
            if blocks.n_lost:
                tenth, none = blocks.fits
                rows[name] += f": BLOCK_SIZE={tenth} would cut a tenth, {none} none"
            if blocks.n_empty:
                rows[name] += f"; {blocks.n_empty:,} with an empty answer"
            if blocks.n_endless:
                rows[name] += f"; {blocks.n_endless:,} without the mark of an end"
            if blocks.n_unread:
                rows[name] += f"; {blocks.n_unread:,} characters without a token"
            if blocks.n_masked:
                rows[name] += f"; {blocks.n_masked:,} left out, of which nothing would be counted"
        rows["prompt"] = self.format.describe()
        ((tokens, counted),) = self.examples(1, self.train.inputs.shape[1])
        end = json.dumps(marked(tokens[-END_TOKENS:], counted[-END_TOKENS:], self))
        rows["end"] = f"{end}, of the first record, with what the loss counts in brackets"
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
        written = predicted[~np.isin(predicted, self.format.ends)]
        n_ends = n_tokens - len(written)
        return n_tokens, n_ends + n_bytes_of(written, self.tokenizer)

    def examples(self, n: int, block_size: int) -> list[tuple[list[int], list[bool]]]:
        """Records, whole or cut as they are trained on."""
        found, blocks = [], self.train
        for row, segments in enumerate(blocks.segments):
            for segment in range(1, int(segments.max()) + 1):
                if len(found) == n:
                    return found
                (places,) = np.nonzero(segments == segment)
                targets = blocks.targets[row, places]
                tokens, counted = blocks.inputs[row, places].tolist(), (targets != IGNORED).tolist()
                if counted[-1]:  # the last token of a full block is a target alone
                    tokens.append(int(targets[-1]))
                found.append((tokens, [False, *counted][: len(tokens)]))
        return found

    def opening(self) -> tuple[list[int], list[int]]:
        """The first record to validate on, up to what the loss counts, and an answer's ends."""
        first_counted = np.argmax(self.validation.targets[0] != IGNORED)
        opening = self.validation.inputs[0, : first_counted + 1].tolist()
        return opening, self.format.ends

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

    def metadata(self) -> dict[str, str]:
        return super().metadata() | self.format.metadata()


def load_records(
    name: str,
    block_size: int,
    count_prompts: bool = False,
    format: Format | None = None,
    columns: Mapping[str, str] = NO_COLUMNS,
    folder: Path | None = None,
) -> RecordCorpus:
    """Read and pack the records that DATA=`name` stands for; see `find_records`.

    Chats are written in `format`, by default that of models of bytes. `columns` are what the files
    call the columns of a layout. In a tokenizer's tokens they are kept in a file in `folder`.

    Raises DataError for a file that cannot be read or has no records, for a row that is no record,
    and for a tokenizer without an end.
    """
    format = PlainFormat() if format is None else format
    if not format.ends:
        end_token(format.tokenizer, format.files)  # which says so
    files = find_records(name)
    checksum = files.checksum()

    def make() -> Packed:
        splits = read_splits(files, columns)
        blocks = []
        for examples in (splits.train, splits.validation):
            encoded = list(_encode(examples, format, count_prompts))
            n_tokens = vocabulary_size(format.tokenizer)
            blocks.append(pack(encoded, block_size, n_tokens, format.ends))
            if len(blocks[-1]) == 0:
                raise DataError(
                    f"DATA={printable(name)}: the loss would count no token of {len(examples):,} "
                    f"records, as their prompts fill BLOCK_SIZE={block_size} or their answers are "
                    "empty"
                )
        texts = [example.text is not None for example in splits.train + splits.validation]
        return Packed(*blocks, all(texts), splits.found)

    if format.tokenizer is None:
        packed = make()
    else:  # other tokens are other data
        said = [checksum, format.tokenizer, format.metadata(), format.start, format.ends]
        checksum = f"sha256:{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"
        beside = {file: content.hex() for file, content in format.files.items()}
        shown = [list(map(files.shown, split)) for split in (files.train, files.validation)]
        identity = [said, beside, shown, files.left_out, dict(columns), block_size, count_prompts]
        packed = make() if folder is None else kept_in(folder, identity, make)
    if packed.are_texts:
        format = format.of_texts()
    blocks = (packed.train, packed.validation)
    return RecordCorpus(name, checksum, *blocks, format, format.tokenizer, packed.found)


def _encode(examples: Sequence[Example], format: Format, count_prompts: bool) -> Iterator[Tokens]:
    """The tokens of examples, in arrays, which take far less memory than lists."""
    for found in encode_examples(examples, format, whole=count_prompts):
        tokens, counted = np.array(found.tokens, np.uint32), np.array(found.counted, bool)
        yield found._replace(tokens=tokens, counted=counted)


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
