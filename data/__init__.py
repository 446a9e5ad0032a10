"""Data for training: files to rows, to records, to tokens, to batches.

corpus = open_corpus(os.environ.get("DATA"), default_path=Path("data/input.txt"), block_size=128)
x, y, *segments = corpus.training_batch(batch_size=32, block_size=128, seed=1337, number=0)

    corpus.py       Corpus: the methods that every kind of data has
    opening.py      open_corpus: which kind DATA is
    text.py         text_files.py finds and maps it, tokenized.py has it in a tokenizer's tokens,
                    batches.py draws windows
    records.py      chats and texts: record_files.py finds their files, rows.py reads a file's rows,
                    forms.py makes examples of them, chat.py writes these in a chat template
                    (templates.py) or the plain format, encoding.py has them in tokens, packing.py
                    fills blocks, packed.py keeps them in a file
    preview.py      what a model will see, with what the loss counts marked
    tokenizer.py    text to tokens and back
    make_instructions.py   made the built-in python-instructions
"""

from data.chat import (
    SAYS,
    Format,
    chat_format,
    continues_text,
    ends_of,
    text_format,
)
from data.corpus import Batch, Corpus, DataError
from data.opening import open_corpus
from data.preview import preview_lines
from data.records import RecordCorpus, load_records
from data.templates import TEMPLATE_FILE, template_in
from data.text import TextCorpus, load_corpus
from data.tokenizer import (
    decode,
    end_tokens,
    start_tokens,
    stream_decoder,
    vocabulary_size,
)

__all__ = [
    "SAYS",
    "TEMPLATE_FILE",
    "Batch",
    "Corpus",
    "DataError",
    "Format",
    "RecordCorpus",
    "TextCorpus",
    "chat_format",
    "continues_text",
    "decode",
    "end_tokens",
    "ends_of",
    "load_corpus",
    "load_records",
    "open_corpus",
    "preview_lines",
    "start_tokens",
    "stream_decoder",
    "template_in",
    "text_format",
    "vocabulary_size",
]
