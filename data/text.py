"""Text: every token follows the one before it; the first 90% train, and the last 10% validate."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.batches import training_batch, validation_windows, windows_batch
from data.corpus import Batch, Corpus, DataError, aligned, printable
from data.text_files import find_text
from data.tokenizer import decode, encode

DECODED = 2**20  # tokens that are decoded at once


@dataclass(frozen=True, eq=False)
class TextCorpus(Corpus):
    """A text as tokens. A window of it is numbered by the place of its first token in the split.

    Attributes:
        name, checksum, tokenizer: see `Corpus`.
        tokens: (n_tokens,), read-only, in mapped memory: uint8, one for each byte of the text, or
            what a tokenizer made of it (see tokenized.py).
        n_files, n_skipped, n_records: see `Text`.
        n_bytes: bytes of the text; None where tokens are bytes.
        n_unread: characters of the text that no token of the tokenizer stands for.
    """

    name: str
    tokens: np.ndarray = field(repr=False)
    checksum: str
    n_files: int
    n_skipped: int
    n_records: int = 0
    n_bytes: int | None = None
    n_unread: int = 0
    tokenizer: str | None = field(default=None, repr=False)

    @property
    def n_train(self) -> int:
        """Tokens in the training split: 90% of all, rounded down."""
        return len(self.tokens) * 9 // 10

    @property
    def train(self) -> np.ndarray:
        """The first 90% of the tokens: (n_train,), a view."""
        return self.tokens[: self.n_train]

    @property
    def validation(self) -> np.ndarray:
        """The last 10% of the tokens: (n_tokens - n_train,), a view."""
        return self.tokens[self.n_train :]

    def describe(self) -> list[str]:
        n_validation = len(self.tokens) - self.n_train
        unit = "bytes" if self.n_bytes is None else "tokens"
        rows = {
            "name": printable(self.name),
            "bytes": f"{self.n_bytes or len(self.tokens):,}",
            "tokens": f"{len(self.tokens):,} ({self.tokens.dtype})",
            "unread": f"{self.n_unread:,} characters, for which the tokenizer has no token",
            "files": f"{self.n_files:,}",
            "records": f"{self.n_records:,} of the files by their names, read as text as others "
            "lie beside them; as train.jsonl, or in a folder of their own, they would be records",
            "skipped": f"{self.n_skipped:,} (not text)",
            "checksum": self.checksum,
            "split": f"first 90% train ({self.n_train:,} {unit}), "
            f"last 10% validation ({n_validation:,} {unit})",
        }
        if self.n_bytes is None:
            del rows["tokens"]
        if self.n_unread == 0:
            del rows["unread"]
        for name, n in (("skipped", self.n_skipped), ("records", self.n_records)):
            if n == 0:
                del rows[name]
        return aligned(rows)

    def passes(self, n_tokens: int) -> float:
        return n_tokens / self.n_train

    def training_batch(
        self,
        batch_size: int,
        block_size: int,
        seed: int,
        number: int,
        device: str | torch.device = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> Batch:
        return training_batch(self.train, batch_size, block_size, seed, number, device, share)

    def validation_windows(self, n_windows: int, block_size: int) -> np.ndarray:
        return validation_windows(self.validation, n_windows, block_size)

    def validation_batch(
        self, windows: np.ndarray, block_size: int, device: str | torch.device = "cpu"
    ) -> Batch:
        return windows_batch(self.validation, windows, block_size, device)

    def all_validation_windows(self, block_size: int) -> list[tuple[np.ndarray, int]]:
        """Full windows side by side, then one window for the rest of the split.

        The first token of the split follows nothing, so no window predicts it.
        """
        n_predicted = len(self.validation) - 1
        full = np.arange(0, n_predicted - block_size + 1, block_size)
        rest = n_predicted - len(full) * block_size
        last = [(np.array([n_predicted - rest]), rest)] if rest > 0 else []
        return [(full, block_size), *last]

    def count_predicted(self) -> tuple[int, int]:
        predicted = self.validation[1:]
        n_tokens = len(predicted)
        if self.tokenizer is None:
            return n_tokens, n_tokens
        return n_tokens, n_bytes_of(predicted, self.tokenizer)

    def examples(self, n: int, block_size: int) -> list[tuple[list[int], list[bool]]]:
        """Windows side by side; the loss counts all tokens but the first, which follows none."""
        starts = range(0, min(n * block_size, self.n_train - block_size), block_size)
        rows = [self.train[start : start + block_size + 1].tolist() for start in starts]
        return [(row, [i > 0 for i in range(len(row))]) for row in rows]

    def opening(self) -> tuple[list[int], list[int]]:
        """A line break; the first token to validate on where a tokenizer drops line breaks.

        No token ends a text.
        """
        return encode("\n", self.tokenizer) or self.validation[:1].tolist(), []


def n_bytes_of(tokens: np.ndarray, tokenizer: str) -> int:
    """How many bytes of UTF-8 the tokens (n,) stand for."""
    chunks = (tokens[i : i + DECODED].tolist() for i in range(0, len(tokens), DECODED))
    return sum(len(decode(chunk, tokenizer).encode()) for chunk in chunks)


def load_corpus(name: str | None, default_path: Path) -> TextCorpus:
    """The text that DATA=`name` stands for, each byte a token; see `find_text`.

    Raises:
        DataError: nothing there, nothing in it, not readable, or neither a file nor a folder.
    """
    return TextCorpus(*find_text(name, default_path))


def check_length(corpus: TextCorpus, block_size: int) -> None:
    """Check that each split holds a window of block_size tokens and the token that follows it.

    Raises:
        DataError: a split is shorter; says how many tokens the corpus has and needs.
    """
    if min(corpus.n_train, len(corpus.tokens) - corpus.n_train) >= block_size + 1:
        return
    # The validation split decides: it has ceil(n / 10) tokens, and more than block_size from here.
    needed = 10 * block_size + 1
    unit = "bytes" if corpus.n_bytes is None else "tokens"
    raise DataError(
        f"DATA={printable(corpus.name)}: the corpus has {len(corpus.tokens):,} {unit}, but "
        f"BLOCK_SIZE={block_size} needs at least {needed:,} (a tenth is kept for validation); "
        "accepted: a longer text or a smaller BLOCK_SIZE"
    )
