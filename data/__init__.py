"""Text for training: a corpus by name or path, as bytes, and batches drawn from it.

corpus = load_corpus(os.environ.get("DATA"), default_path=Path("data/input.txt"))
check_length(corpus, block_size=128)
x, y = training_batch(corpus.train, batch_size=32, block_size=128, seed=1337, step=0)
"""

from data.batches import training_batch, validation_windows, windows_batch
from data.corpora import BUILT_IN, Corpus, DataError, check_length, load_corpus

__all__ = [
    "BUILT_IN",
    "Corpus",
    "DataError",
    "check_length",
    "load_corpus",
    "training_batch",
    "validation_windows",
    "windows_batch",
]
