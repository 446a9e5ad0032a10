"""Text for training: a corpus by name or path, its tokens, and batches drawn from them.

corpus = load_corpus(os.environ.get("DATA"), default_path=Path("data/input.txt"))
check_length(corpus, block_size=128)
x, y = training_batch(corpus.train, batch_size=32, block_size=128, seed=1337, number=0)
"""

from data.batches import training_batch, validation_windows, windows_batch
from data.corpora import BUILT_IN, Corpus, DataError, check_length, load_corpus
from data.records import IGNORED, PROMPT_FORMAT, RecordCorpus, is_records, load_records
from data.tokenizer import (
    decode,
    encode,
    end_token,
    stream_decoder,
    tokenize_corpus,
    vocabulary_size,
)

__all__ = [
    "BUILT_IN",
    "IGNORED",
    "PROMPT_FORMAT",
    "Corpus",
    "DataError",
    "RecordCorpus",
    "check_length",
    "decode",
    "encode",
    "end_token",
    "is_records",
    "load_corpus",
    "load_records",
    "stream_decoder",
    "tokenize_corpus",
    "training_batch",
    "validation_windows",
    "vocabulary_size",
    "windows_batch",
]
