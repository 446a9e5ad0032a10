"""Records: their forms, what is refused, how they are packed, and the whole way to an answer."""

import dataclasses
import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ON_CPU, ROOT, TINY, needs_posix, refused, start_script, succeeded
from hypothesis import given
from hypothesis import strategies as st
from test_chat import encoded
from test_training import losses

from data import DataError, RecordCorpus, open_corpus
from data import records as data_records
from data.chat import OPENING, PROMPT_FORMAT, TURN, PlainFormat, Tokens
from data.corpus import IGNORED
from data.encoding import encode_examples
from data.forms import NO_COLUMNS, Example
from data.packed import ARRAYS, MOST_FILES
from data.packing import Blocks, pack
from data.record_files import is_records
from data.records import load_records
from data.tokenizer import decode, encode, end_tokens, vocabulary_size
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.checkpoint import read_checkpoint

ASKED = {"prompt": "2 + 2?", "completion": "4"}


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def packed(
    examples: list[Example], block_size: int, tokenizer: str | None = None, prompts: bool = False
) -> Blocks:
    """The blocks of examples in the plain format."""
    format = PlainFormat(tokenizer)
    found = list(encode_examples(examples, format))
    if prompts:
        found = [tokens._replace(counted=[True] * len(tokens.tokens)) for tokens in found]
    return pack(found, block_size, vocabulary_size(tokenizer), format.ends)


def asked(prompt: str, completion: str) -> Example:
    turns = (("user", prompt), ("assistant", completion))
    return Example(tuple({"role": role, "content": content} for role, content in turns))


def of_bytes(*parts: tuple[str, bool]) -> Tokens:
    """Tokens that are bytes, of texts and whether the loss counts them."""
    return Tokens(
        list("".join(text for text, _ in parts).encode()),
        [counts for text, counts in parts for _ in text.encode()],
    )


def test_a_prompt_and_a_completion_are_two_turns_of_which_the_second_counts():
    question = TURN.format(role="user", content="2 + 2?")
    (tokens,) = encoded(PlainFormat(), asked("2 + 2?", "4"))
    assert tokens == of_bytes((question, False), (OPENING, False), ("4\0", True))
    (tokens,) = encoded(PlainFormat(), Example(text="four"))
    assert tokens == of_bytes(("four\0", True))._replace(is_text=True)
    assert PROMPT_FORMAT.replace("{prompt}", "2 + 2?") == question + OPENING
    question = [{"role": "user", "content": "2 + 2?"}]
    assert bytes(PlainFormat().ask(question)).decode() == PROMPT_FORMAT.replace(
        "{prompt}", "2 + 2?"
    )


def test_of_a_conversation_all_turns_of_the_assistant_count():
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": role[0]} for role in roles]
    messages[2]["weight"] = 0
    (tokens,) = encoded(PlainFormat(), Example(tuple(messages)))
    assert bytes(np.array(tokens.tokens)[tokens.counted].tolist()) == b"a\0"
    del messages[2]["weight"]
    (tokens,) = encoded(PlainFormat(), Example(tuple(messages)))
    assert bytes(np.array(tokens.tokens)[tokens.counted].tolist()) == b"a\0a\0"


@pytest.mark.parametrize(
    "example",
    [
        asked("a\0b", "c"),
        asked("a", "b\0"),
        Example(text="\0"),
        Example(({"role": "assistant", "content": "\0"},)),
    ],
)
def test_a_content_cannot_forge_the_end_of_a_record(example, bpe):
    """Where tokens are bytes it is refused, and where they are not its text stays a text."""
    with pytest.raises(ValueError, match="the mark that ends a record"):
        encoded(PlainFormat(), example)
    mark = json.dumps(dataclasses.asdict(example)).replace("\\u0000", "<|endoftext|>")
    (tokens,) = encoded(PlainFormat(bpe), Example(**json.loads(mark)))
    end = end_tokens(bpe)[0]
    assert tokens.tokens.count(end) == 1 and tokens.tokens[-1] == end


def test_records_in_tokens_are_kept_in_a_file(tmp_path, bpe, monkeypatch):
    """It is made once, again where it is not whole, and another one for other data or formats."""
    file, out = tmp_path / "train.jsonl", tmp_path / "out"
    file.write_bytes(
        lines(*[{"prompt": f"{i} + {i}?", "completion": str(2 * i)} for i in range(40)])
    )
    plain = PlainFormat(bpe)

    def blocks(prompts=False, format=plain, columns=NO_COLUMNS, size=32, folder=out) -> list:
        found = load_records(str(file), size, prompts, format, columns, folder)
        arrays = [getattr(s, n) for s in (found.train, found.validation) for n in ARRAYS]
        return [a.tolist() for a in arrays] + [found.describe(), found.passes(1), found.checksum]

    expected = blocks(folder=None)
    assert blocks() == expected
    (kept,) = out.glob("records-*.bin")
    with monkeypatch.context() as patched:
        patched.setattr(data_records, "pack", lambda *_: pytest.fail("it is packed again"))
        assert blocks() == expected
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    half, cut = whole[len(whole) // 2 :], whole[:-1]
    for damaged in (b"", cut, whole + b"x", b"{}\n" + whole, half, flipped, b"[" * 10**6):
        kept.write_bytes(damaged)
        assert blocks() == expected and kept.read_bytes() == whole
    others = [{"prompts": True}, {"format": PlainFormat(bpe, {"config.json": b"{}"})}, {"size": 33}]
    others.append({"columns": {"prompt": "prompt", "completion": "completion"}})
    for n, other in enumerate(others, start=2):
        assert blocks(**other) == blocks(folder=None, **other)
        assert len(list(out.glob("records-*.bin"))) == n
    file.write_bytes(file.read_bytes().replace(b"39 + 39", b"39+39"))
    assert blocks() == blocks(folder=None) != expected
    assert blocks(folder=file) == blocks(folder=None)  # where no file can be
    for size in range(34, 44):
        blocks(size=size)
    assert len(list(out.glob("records-*.bin"))) == MOST_FILES


@pytest.mark.parametrize("prompt", ["a", "a ", "a\n", "a\n\n", " a  \n "])
def test_a_prompt_has_the_tokens_that_generate_gives_it(prompt):
    """Also where a tokenizer joins the end of a turn with the beginning of the next."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    sample = "user: a\n\nassistant: b\nuser:  a \n\n\nassistant: \n \n" * 50
    bpe.train_from_iterator([sample], vocab_size=400, show_progress=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    whole = encode(PROMPT_FORMAT.replace("{prompt}", prompt), bpe.to_str())
    blocks = packed([asked(prompt, "b")], 64, bpe.to_str())
    assert blocks.inputs[0, : len(whole)].tolist() == whole
    assert PlainFormat(bpe.to_str()).ask([{"role": "user", "content": prompt}]) == whole


@needs_posix
def test_paths_are_those_of_any_data(tmp_path, monkeypatch):
    """A home folder is found, one that is not there is an error, and a pipe is not waited for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.jsonl").write_bytes(lines(ASKED, ASKED))
    assert is_records("~") and load_records("~", 32).train.n_records == 1
    assert load_records("~/train.jsonl", 32).train.n_records == 1
    with pytest.raises(DataError, match=r"nosuchuser/x\.jsonl: cannot be read"):
        load_records("~nosuchuser/x.jsonl", 32)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: not a regular file"):
        load_records(str(tmp_path / "pipe.jsonl"), 32)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=60),
    st.integers(2, 70),
    st.booleans(),
)
def test_packing_loses_nothing_but_what_it_says(lengths, block_size, count_prompts):
    """Every record is whole, in one block, and in one piece, or cut to a block, or left out; what
    counts is the completion and the end, each predicted from the token before it."""
    records = [
        of_bytes((chr(97 + i % 26) * prompt, count_prompts), ("A" * answer + "\0", True))
        for i, (prompt, answer) in enumerate(lengths)
    ]
    blocks = pack(records, block_size, 256, [0])
    size = block_size + 1
    expected, n_cut, n_lost, n_masked = [], 0, 0, 0
    for tokens, counted, _, _ in records:
        n_cut += len(tokens) > size
        n_lost += max(0, len(tokens) - size)
        pairs = list(zip(tokens[:-1], tokens[1:], counted[1:], strict=True))[: size - 1]
        if any(c for _, _, c in pairs):
            expected.append([(a, b if c else IGNORED) for a, b, c in pairs])
        else:
            n_masked += 1
    found = []
    for row in range(len(blocks)):
        segments = blocks.segments[row]
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            assert list(places) == list(range(places[0], places[-1] + 1))
            pairs = zip(blocks.inputs[row, places], blocks.targets[row, places], strict=True)
            pairs = [(int(a), int(b)) for a, b in pairs]
            # The last token of a record stands before another's, unless its block is full.
            found.append(pairs[:-1] if pairs[-1][1] == IGNORED and pairs[-1][0] == 0 else pairs)
        assert (blocks.targets[row, segments == 0] == IGNORED).all()
    assert sorted(found) == sorted(expected)
    said = (blocks.n_records, blocks.n_cut, blocks.n_lost, blocks.n_masked)
    assert said == (len(records), n_cut, n_lost, n_masked)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=20), st.integers(2, 40))
def test_a_long_text_becomes_pieces_and_each_token_is_predicted_once(lengths, block_size):
    texts = [Example(text=chr(97 + i) * n) for i, n in enumerate(lengths)]
    blocks = packed(texts, block_size)
    assert (blocks.n_lost, blocks.n_masked) == (0, 0)
    assert blocks.n_cut == sum(n + 1 > block_size + 1 for n in lengths)
    expected = sorted(token for e in texts for token in [*e.text[1:].encode(), 0])
    assert sorted(blocks.counted.tolist()) == expected


def test_what_could_teach_nothing_is_left_out():
    """A text of white space, which a tokenizer may leave out, is the mark of its end alone."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    blocks = packed([Example(text=" "), Example(text="a")], 4, words.to_str())
    assert (len(blocks), blocks.n_cut, blocks.n_masked) == (1, 0, 1)
    described = RecordCorpus("x", "sha256:0", blocks, blocks, PlainFormat()).describe()
    assert described[2].endswith("; 1 left out, of which nothing would be counted")


def test_the_order_of_blocks_says_nothing_of_their_length():
    """Packing takes the longest first, so in its order a run would begin with all of them."""
    blocks = pack([of_bytes(("a" * n, True)) for n in range(33, 65)], 64, 256, [0])
    lengths = (blocks.segments > 0).sum(1)
    assert len(blocks) == 32
    assert abs(np.corrcoef(np.arange(32), lengths)[0, 1]) < 0.5


def test_a_description_counts_records_tokens_and_padding():
    train = pack([of_bytes(("qqq", False), ("a\0", True))] * 2, 9, 256, [0])
    long = [of_bytes(("q" * 30, False), ("a", True)), of_bytes(("a" + "q" * 30, True))]
    validation = pack(long, 9, 256, [0])
    format = PlainFormat(prompt_format="{prompt}\n")
    described = RecordCorpus("caf\u00e9", "sha256:0", train, validation, format).describe()
    assert described == [
        r"name:       caf\xe9",
        "checksum:   sha256:0",
        # 10 tokens in a block of 9 and the one that follows them, which is no input
        "train:      2 records, 9 tokens (4 counted, 44.4%) in 1 blocks, 0.0% padding",
        "validation: 2 records, 9 tokens (9 counted, 100.0%) in 1 blocks, 0.0% padding; "
        "2 longer than a block, 42 tokens lost: BLOCK_SIZE=30 would cut a tenth, 30 none; "
        "2 without the mark of an end; "
        "1 left out, of which nothing would be counted",
        r'prompt:     "{prompt}\n"',
        r'end:        "qqq[[a\\x00]]", of the first record, with what the loss counts in brackets',
    ]
    half = pack([of_bytes(("a" * 5, True))], 9, 256, [0])
    described = RecordCorpus("x", "sha256:0", half, half, PlainFormat()).describe()
    assert "1 records, 5 tokens (4 counted, 80.0%) in 1 blocks, 44.4% padding" in described[2]


def test_a_hundred_thousand_records_are_packed_in_seconds_with_little_padding():
    choose = random.Random(0)
    records = [of_bytes(("q" * choose.randint(5, 300), False), ("a", True)) for _ in range(100_000)]
    started = time.perf_counter()
    blocks = pack(records, 512, 256, [0])
    assert time.perf_counter() - started < 30
    assert (blocks.segments == 0).mean() < 0.01


def test_every_block_is_trained_on_once_in_a_pass_and_in_another_order_in_the_next():
    records = [of_bytes(("q" * 20, False), (f"{i:03}", True)) for i in range(50)]
    blocks = pack(records, 24, 256, [0])
    n, size = len(blocks), 7
    assert n == 50
    draw = RecordCorpus("x", "sha256:0", blocks, blocks, PlainFormat()).training_batch
    rows = [draw(size, 24, seed=3, number=i)[0] for i in range(2 * n)]
    rows = torch.cat(rows).tolist()
    passes = [rows[i * n : (i + 1) * n] for i in range(2 * size)]
    for one in passes:
        assert sorted(one) == sorted(blocks.inputs.tolist())
    assert passes[0] != passes[1]
    whole = draw(60, 24, seed=3, number=0)[0].tolist()  # more than a pass
    assert whole == rows[:60]
    parts = [draw(60, 24, 3, 0, share=(i, 2))[0].tolist() for i in range(2)]
    assert parts == [whole[0::2], whole[1::2]]


def test_accumulated_batches_weigh_as_one(tmp_path):
    """Blocks count different numbers of tokens, so a mean of the batches' means is another."""
    lengths = (3, 50, 8, 20, 61, 5, 33, 12)
    (tmp_path / "say.jsonl").write_bytes(
        lines(*({"prompt": "say a", "completion": "a" * n} for n in lengths * 8))
    )
    variables = TINY | {"DATA": "say.jsonl", "BLOCK_SIZE": "96", "DROPOUT": "0", "SEED": "5"}
    variables |= {"DTYPE": "float32"} | ON_CPU  # a GPU multiplies in TF32
    one, two = (
        losses(succeeded(start_script(tmp_path, **variables | sizes)))
        for sizes in ({"BATCH_SIZE": "8"}, {"BATCH_SIZE": "2", "GRAD_ACCUM_STEPS": "4"})
    )
    for a, b in zip(one[1:], two[1:], strict=True):
        assert [float(x) for x in a[1:3]] == pytest.approx([float(x) for x in b[1:3]], abs=2e-4)


def test_an_evaluation_is_the_mean_over_the_tokens_that_count(tmp_path):
    """As EVAL_ONLY has it, where all windows are evaluated: not the mean of the windows' means."""
    letters = (3, 50, 8, 20, 61, 5, 33, 12)
    records = [{"prompt": "say it", "completion": "abc"[i % 3] * n} for i, n in enumerate(letters)]
    (tmp_path / "train.jsonl").write_bytes(lines(*records * 4))
    (tmp_path / "valid.jsonl").write_bytes(lines(*records))
    variables = TINY | {"DATA": "train.jsonl", "BLOCK_SIZE": "96", "EVAL_BATCHES": "50"}
    variables |= {"DTYPE": "float32", "LEARNING_RATE": "0.01"}
    trained = losses(succeeded(start_script(tmp_path, **variables)))
    log = succeeded(start_script(tmp_path, **variables | {"EVAL_ONLY": "True"}))
    found = re.search(r"^Validation loss: (\S+) nats", log, re.M)[1]
    assert float(trained[-1][2]) == pytest.approx(float(found), abs=2e-4)


def test_texts_are_continued_and_end(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(*[{"text": "one two"}] * 8))
    variables = TINY | {"DATA": "train.jsonl", "DROPOUT": "0", "LEARNING_RATE": "0.01"}
    log = succeeded(
        start_script(tmp_path, **variables | {"MAX_STEPS": "100", "EVAL_INTERVAL": "100"})
    )
    assert 'prompt:     "{prompt}"' in log
    assert re.search(r"^Passes: (\S+) over the training data", log, re.M)
    for raw in ("True", "False"):
        ask = {"script": "generate.py", "TEMPERATURE": "0", "PROMPT": "one", "RAW_PROMPT": raw}
        assert succeeded(start_script(tmp_path, **ask)) == "one two\n"


def test_validation_is_valid_jsonl_or_every_tenth_record(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(*({"text": f"record {i}"} for i in range(25))))
    corpus = load_records(str(path), 32)
    assert (corpus.train.n_records, corpus.validation.n_records) == (23, 2)
    (tmp_path / "valid.jsonl").write_bytes(lines(ASKED))
    both = load_records(str(tmp_path), 32)
    assert (both.train.n_records, both.validation.n_records) == (25, 1)
    assert both.checksum != corpus.checksum
    path.write_bytes(lines({"text": "another"}))
    assert load_records(str(tmp_path), 32).checksum not in (both.checksum, corpus.checksum)
    path.write_bytes(lines(ASKED))
    with pytest.raises(DataError, match="one record is too few"):
        load_records(str(path), 32)
    with pytest.raises(DataError, match="would count no token of 1 records"):
        load_records(str(tmp_path), 4)


@pytest.fixture(scope="module")
def bpe() -> str:
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["user: assistant: \u20ac" * 50], 400, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    return trained.to_str()


@pytest.mark.parametrize("count_prompts", [False, True])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_records_have_what_every_corpus_has(tmp_path, bpe, with_tokenizer, count_prompts):
    tokenizer = bpe if with_tokenizer else None
    asked = [{"prompt": f"{i}?", "completion": "\u20ac" * i} for i in range(1, 9)]
    (tmp_path / "train.jsonl").write_bytes(lines(*asked))
    (tmp_path / "valid.jsonl").write_bytes(lines(*asked[2:5]))
    corpus = open_corpus(str(tmp_path), Path(), tokenizer, 64, count_prompts)
    assert corpus.passes(2 * 64 * len(corpus.train)) == 2.0
    assert corpus.metadata() == {
        "data": str(tmp_path), "checksum": corpus.checksum, "prompt_format": PROMPT_FORMAT
    }  # fmt: skip

    ((windows, length),) = corpus.all_validation_windows(64)
    batch = corpus.validation_batch(windows, length)
    assert np.array_equal(batch[0], corpus.validation.inputs) and len(batch) == 3
    completions = sum(len(encode("\u20ac" * i, tokenizer)) for i in (3, 4, 5))
    prompts = [PROMPT_FORMAT.replace("{prompt}", f"{i}?") for i in (3, 4, 5)]
    n_tokens, n_bytes = completions + 3, 3 * (3 + 4 + 5) + 3  # with three ends
    if count_prompts:  # all but a first token, which nothing predicts; here it is one byte
        n_tokens += sum(len(encode(prompt, tokenizer)) - 1 for prompt in prompts)
        firsts = [decode(encode(prompt, tokenizer)[:1], tokenizer) for prompt in prompts]
        n_bytes += sum(map(len, prompts)) - sum(map(len, firsts))
    assert corpus.counted(batch).sum() == n_tokens
    assert corpus.count_predicted() == (n_tokens, n_bytes)

    first = decode(corpus.validation.inputs[0].tolist(), tokenizer)
    opening, ends = corpus.opening()
    assert ends == end_tokens(tokenizer)
    if count_prompts:
        assert len(opening) == 1 and first.startswith(decode(opening, tokenizer))
    else:
        assert decode(opening, tokenizer) == first[: first.index(OPENING) + len(OPENING)]
    with pytest.raises(ValueError, match="block_size is 32, but the blocks have 64"):
        corpus.training_batch(4, 32, seed=0, number=0)


@pytest.mark.parametrize("n_windows", [1, 2, 7, 20, 99])
def test_validation_blocks_are_evenly_spaced(n_windows):
    records = [of_bytes(("q" * 20, False), (f"{i:03}", True)) for i in range(50)]
    blocks = pack(records[:20], 24, 256, [0])
    train = pack(records, 24, 256, [0])
    corpus = RecordCorpus("x", "sha256:0", train, blocks, PlainFormat())
    windows = corpus.validation_windows(n_windows, 24)
    assert windows.dtype == np.int64 and len(windows) == min(n_windows, 20)
    assert windows[0] == 0 and (len(windows) == 1 or windows[-1] == 19)
    gaps = np.diff(windows)
    assert len(windows) < 3 or (gaps.min() > 0 and gaps.max() - gaps.min() <= 1)
    x, _, _ = corpus.validation_batch(windows, 24)
    assert np.array_equal(x, blocks.inputs[windows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [24, 300])  # with a mask, and without
def test_no_record_sees_another(dtype, block_size):
    """Logits and losses of a block are those of its records alone."""
    torch.manual_seed(0)
    model = BigramLanguageModelLoRA(256, 32, block_size, "cpu", 0.0, n_head=2, n_layer=2).eval()
    records = [of_bytes(("q" * n, False), ("ab" * n + "\0", True)) for n in (1, 2, 3)]
    blocks = pack(records, block_size, 256, [0])
    assert len(blocks) == 1
    parts = (blocks.inputs, blocks.targets, blocks.segments)
    idx, targets, segments = (torch.from_numpy(part.astype(np.int64)) for part in parts)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        packed, loss = model(idx, targets, segments)
        total, counted = 0.0, 0
        for segment in range(1, 4):
            of = segments[0] == segment
            alone, _ = model(idx[:, of])
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(packed[:, of], alone, atol=tolerance, rtol=tolerance)
            alone_loss = torch.nn.functional.cross_entropy(
                alone[0].float(), targets[0, of], reduction="sum"
            )
            total, counted = total + alone_loss.item(), counted + (targets[0, of] >= 0).sum().item()
    assert loss.item() == pytest.approx(
        total / counted, rel=1e-5 if dtype == torch.float32 else 2e-2
    )


def test_the_instruction_set_parses_and_has_no_doubles():
    corpus = load_records("python-instructions", 128)
    assert corpus.train.n_records > 300 and corpus.validation.n_records > 30
    prompts = [
        json.loads(line)["prompt"]
        for path in (ROOT / "data" / "python-instructions").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(prompts) == len(set(prompts))


def test_train_ask_and_get_an_answer_that_ends(tmp_path):
    """By heart: a tiny model learns two answers, stops after them, and needs the format for it."""
    pairs = [{"prompt": "one?", "completion": "uno"}, {"prompt": "two?", "completion": "dos"}]
    (tmp_path / "train.jsonl").write_bytes(lines(*pairs * 4))
    (tmp_path / "valid.jsonl").write_bytes(lines(*pairs))
    variables = TINY | {"DATA": "train.jsonl", "BLOCK_SIZE": "64", "DROPOUT": "0"}
    log = succeeded(
        start_script(tmp_path, **variables | {"MAX_STEPS": "150", "EVAL_INTERVAL": "150"})
    )
    assert "7 records" in log and "1 records" in log
    assert r'prompt:     "user: {prompt}\nassistant: "' in log
    assert read_checkpoint(tmp_path / "out" / "full.pt").metadata["prompt_format"] == PROMPT_FORMAT
    ask = {"script": "generate.py", "TEMPERATURE": "0", "NUM_THREADS": "1"}
    for question, answer in (("one?", "uno\n"), ("two?", "dos\n")):
        assert succeeded(start_script(tmp_path, PROMPT=question, **ask)) == answer
    raw = succeeded(start_script(tmp_path, PROMPT="one?", RAW_PROMPT="True", **ask))
    assert raw.startswith("one?")
    whole = PROMPT_FORMAT.replace("{prompt}", "one?")
    raw = succeeded(start_script(tmp_path, PROMPT=whole, RAW_PROMPT="True", **ask))
    assert raw == whole + "uno\n"  # and it ends there

    tuned = {"DATA": ".", "USE_LORA": "True", "SAMPLE_TOKENS": "9"}
    budget = {"BATCH_SIZE": "4", "MAX_STEPS": "4", "EVAL_INTERVAL": "2", "NUM_THREADS": "1"}
    # The base knows the answers. At the default rate four steps may spoil them, and whether they do
    # depends on the dtype that DTYPE=auto finds; this test is of the way to an answer alone.
    budget["LEARNING_RATE"] = "1e-4"
    log = succeeded(start_script(tmp_path, **tuned | budget))
    assert "user: one?" in log.rpartition("Sample")[2]
    everything = succeeded(start_script(tmp_path, LOSS_ON_PROMPT="True", **tuned | budget))
    assert "(8 counted, " in log and "(8 counted)" not in everything
    answered = start_script(
        tmp_path, PROMPT="two?", ADAPTERS="out/lora.pt:0.5,out/lora.pt:0.5", **ask
    )
    assert succeeded(answered) == "dos\n"
    merge = {"MERGE": "True", "ADAPTERS": "out/lora.pt", "OUT_DIR": "merged", "NUM_THREADS": "1"}
    succeeded(start_script(tmp_path, BASE_CHECKPOINT="out/full.pt", **merge))
    merged = start_script(tmp_path, PROMPT="two?", BASE_CHECKPOINT="merged/merged.pt", **ask)
    assert succeeded(merged) == "dos\n"  # a merged checkpoint is asked as the adapter is
    evaluated = succeeded(start_script(tmp_path, DATA=".", EVAL_ONLY="True", NUM_THREADS="1"))
    assert "Bytes evaluated: 8" in evaluated
    (tmp_path / "train.jsonl").write_bytes(lines(*pairs) + b"{\n")
    assert "train.jsonl, line 3: " in refused(start_script(tmp_path, **tuned | budget))
