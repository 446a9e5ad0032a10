"""A step in several batches, or processes, has the loss and the gradients of one batch."""

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import ON_CPU, TINY, start_group, start_script, succeeded
from test_training import losses
from torch import Tensor, nn

from data import Corpus, TextCorpus, open_corpus
from data.corpus import Batch
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from training import accumulate

BLOCK_SIZE = 48
BATCH_SIZE = 8


@pytest.fixture(params=["text", "records"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    """Random letters; of records, with answers of very different lengths."""
    choose = random.Random(0)

    def letters(n: int) -> str:
        return "".join(choose.choices("abcdefg ", k=n))

    if request.param == "text":
        path = tmp_path / "text.txt"
        path.write_text(letters(4000))
    else:
        path = tmp_path / "say.jsonl"
        records = ({"prompt": letters(3), "completion": letters(n)} for n in (1, 25, 4, 14) * 20)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_corpus(str(path), Path(), block_size=BLOCK_SIZE)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return BigramLanguageModelLoRA(256, 32, BLOCK_SIZE, "cpu", 0.0, n_head=2, n_layer=1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that the model has, which it then has no longer."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def of_one_batch(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of a batch at once."""
    loss = model(*batch)[1]
    loss.backward()
    return loss.detach(), gradients(model)


def share(corpus: Corpus, i: int, n: int) -> Batch:
    return corpus.training_batch(BATCH_SIZE, BLOCK_SIZE, seed=1, number=0, share=(i, n))


def test_accumulated_batches_are_one(corpus, model):
    expected = of_one_batch(model, share(corpus, 0, 1))
    batches = [share(corpus, i, 4) for i in range(4)]
    loss = accumulate(model, batches, corpus.loss_parts(batches), contextlib.nullcontext)
    assert not loss.requires_grad  # or the activations of all steps until an evaluation would stay
    torch.testing.assert_close((loss, gradients(model)), expected, rtol=1e-4, atol=1e-6)


def test_processes_average_to_one_batch(corpus, model):
    """Two processes with two batches each, whose losses and gradients are averaged."""
    expected = of_one_batch(model, share(corpus, 0, 1))
    batches = [[share(corpus, i, 4) for i in mine] for mine in ((0, 2), (1, 3))]
    counted = [sum(corpus.counted(batch).sum() for batch in mine) for mine in batches]

    def total(of_one: Tensor) -> Tensor:
        assert of_one in counted
        return counted[0] + counted[1]

    loss = 0
    for mine in batches:
        parts = corpus.loss_parts(mine, 2, total)
        loss += accumulate(model, mine, parts, contextlib.nullcontext) / 2
    found = {name: gradient / 2 for name, gradient in gradients(model).items()}
    torch.testing.assert_close((loss, found), expected, rtol=1e-4, atol=1e-6)


def test_batches_of_records_count_different_numbers_of_tokens(corpus):
    """So that the tests above would fail if all batches counted as much."""
    counted = {corpus.counted(share(corpus, i, 4)).sum().item() for i in range(4)}
    assert len(counted) == (1 if isinstance(corpus, TextCorpus) else 4)


@pytest.mark.parametrize("kind", ["text", "records"])
def test_a_run_in_small_batches_is_that_in_large_ones(tmp_path, kind):
    """The same windows, losses and weights up to rounding, also in two processes."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefg ", k=choose.randint(1, 40))) for _ in range(200)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    records = (json.dumps({"prompt": "say", "completion": word}) + "\n" for word in words)
    (tmp_path / "say.jsonl").write_text("".join(records))
    variables = TINY | ON_CPU | {"DROPOUT": "0", "DTYPE": "float32", "SAMPLE_TOKENS": "0"}
    variables |= {"DATA": {"text": "text.txt", "records": "say.jsonl"}[kind], "BLOCK_SIZE": "48"}
    small = {"BATCH_SIZE": "2", "GRAD_ACCUM_STEPS": "4", "EVAL_BATCHES": "8"}
    large = {"BATCH_SIZE": "8", "EVAL_BATCHES": "2"}
    one = succeeded(start_script(tmp_path, **variables | large | {"OUT_DIR": "one"}))
    four = succeeded(start_script(tmp_path, **variables | small | {"OUT_DIR": "four"}))
    both, _ = start_group(tmp_path, **variables | small | {"OUT_DIR": "both"})
    for log in (four, succeeded(both)):
        for a, b in zip(losses(one)[1:], losses(log)[1:], strict=True):
            assert list(map(float, b)) == pytest.approx(list(map(float, a)), abs=2e-4)
    weights = [torch.load(tmp_path / out / "full.pt")["tensors"] for out in ("one", "four", "both")]
    for found in weights[1:]:
        torch.testing.assert_close(found, weights[0], rtol=0, atol=1e-4)
