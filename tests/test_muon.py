"""Muon: against float64, against torch's own, and its state; and the rules of trainer/recipe.py."""

import math

import pytest
import torch

from data import open_corpus
from models import GPT2
from models.checkpoint import meta_model
from trainer import muon, recipe
from trainer.muon import Muon, orthogonalized, working_bytes
from trainer.optimization import learning_rate, make_optimizer
from trainer.settings import Config

SHAPES = [(3, 8, 8), (2, 24, 40), (2, 16, 64), (1, 1, 5), (4, 33, 132)]


def exactly(matrix: torch.Tensor) -> torch.Tensor:
    """What the five iterations make of the singular values, in float64."""
    a, b, c = muon.COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.norm() * muon.HEADROOM)
    for _ in range(muon.ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_what_the_polynomial_says(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None, None]
    expected = torch.stack([exactly(m) for m in matrices])
    torch.testing.assert_close(
        orthogonalized(matrices, torch.float32).double(), expected, rtol=0, atol=2e-4
    )
    rounded = orthogonalized(matrices, torch.bfloat16).double()
    assert (rounded - expected).norm() < 0.05 * expected.norm()


def test_a_matrix_of_zeros_or_of_rank_one_stays_finite():
    for dtype in (torch.float32, torch.bfloat16):
        assert orthogonalized(torch.zeros(2, 4, 16), dtype).eq(0).all()
        one = torch.ones(1, 4, 16) * 1e15
        assert orthogonalized(one, dtype).float().norm() == pytest.approx(1, abs=0.35)


def parameters_and_gradients(steps: int):
    torch.manual_seed(1)
    shapes = {"square": (12, 12), "wide": (8, 32), "tall": (32, 8), "table": (20, 8), "bias": (12,)}
    start = {name: torch.randn(shape) for name, shape in shapes.items()}
    gradients = [{n: torch.randn(s) for n, s in shapes.items()} for _ in range(steps)]
    return start, gradients


def groups_of(parameters):
    hidden = [parameters[name] for name in ("square", "wide", "tall")]
    rest = [parameters[name] for name in ("table", "bias")]
    return [
        {"params": hidden, "orthogonal": True, "weight_decay": 0.1},
        {"params": rest, "orthogonal": False, "weight_decay": 0.0},
    ]


def after(optimizer, parameters, gradients):
    for each in gradients:
        for name, p in parameters.items():
            p.grad = each[name].clone()
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("together", [1, 2**24])
def test_steps_are_those_of_an_independent_computation(together, monkeypatch):
    monkeypatch.setattr(muon, "TOGETHER", together)
    start, gradients = parameters_and_gradients(4)
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    found = after(Muon(groups_of(parameters), lr=0.02), parameters, gradients)
    for name in ("square", "wide", "tall"):
        p, mean = start[name].double(), 0.0
        for each in gradients:
            g = each[name].double()
            mean = muon.MOMENTUM * mean + (1 - muon.MOMENTUM) * g
            ahead = muon.MOMENTUM * mean + (1 - muon.MOMENTUM) * g
            p = p * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(max(p.shape)) * exactly(ahead)
        torch.testing.assert_close(found[name].double(), p, rtol=0, atol=2e-5)
    alone = {name: torch.nn.Parameter(start[name].clone()) for name in ("table", "bias")}
    adamw = torch.optim.AdamW(
        alone.values(), lr=0.02, betas=(0.9, 0.99), weight_decay=0, fused=True
    )
    expected = after(adamw, alone, gradients)
    assert all(torch.equal(found[name], expected[name]) for name in alone)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_steps_are_torchs_up_to_its_rounding_to_bfloat16():
    start, gradients = parameters_and_gradients(3)
    ours = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: torch.nn.Parameter(start[name].clone()) for name in ("square", "wide", "tall")}
    found = after(Muon(groups_of(ours), lr=0.02), ours, gradients)
    options = {"momentum": muon.MOMENTUM, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    expected = after(torch.optim.Muon(theirs.values(), lr=0.02, **options), theirs, gradients)
    for name, value in expected.items():
        change, theirs_change = found[name] - start[name], value - start[name]
        assert (change - theirs_change).norm() < 0.06 * theirs_change.norm()


def test_what_a_step_works_with_is_bounded():
    matrices = [torch.empty(768, 768, device="meta")] * 48
    matrices += [torch.empty(3072, 768, device="meta")] * 24
    assert working_bytes(matrices, torch.float32) == 20 * muon.TOGETHER
    assert working_bytes(matrices[:2], torch.bfloat16) == 12 * 2 * 768**2
    assert working_bytes([torch.empty(4096, 14336, device="meta")], torch.float32) > 2**30
    assert working_bytes([], torch.float32) == 0


def test_a_restored_state_goes_on_to_the_bit():
    start, gradients = parameters_and_gradients(6)
    straight = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    expected = after(Muon(groups_of(straight), lr=0.02), straight, gradients)
    first = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = Muon(groups_of(first), lr=0.02)
    after(optimizer, first, gradients[:3])
    second = {name: torch.nn.Parameter(p.detach().clone()) for name, p in first.items()}
    resumed = Muon(groups_of(second), lr=0.02)
    resumed.load_state_dict(optimizer.state_dict())
    found = after(resumed, second, gradients[3:])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_matrices_of_the_blocks_take_muon_and_the_rest_adamw():
    sizes = GPT2.sizes(vocab_size=16, n_embd=8, block_size=4, n_head=2, n_layer=2)
    model = meta_model(GPT2, sizes, 0.0)
    optimizer = make_optimizer(Config(learning_rate=0.1), model, torch.float32)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for g in optimizer.param_groups if g["orthogonal"] for p in g["params"]}
    matrices = {n for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2}
    assert taken == matrices and len(taken) == 12
    assert all(g["weight_decay"] == (0.1 if g["params"][0].dim() == 2 else 0.0)
               for g in optimizer.param_groups)  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "halfway", "last"),
    [("linear", 0.6, 0.2), ("cosine", 0.6, 0.2), ("constant", 1, 1)],
)
def test_the_schedule_warms_up_and_falls_to_its_minimum(schedule, halfway, last):
    config = Config(
        max_steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.2, schedule=schedule
    )
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == rates[10] == 1.0
    assert (rates[60], rates[110]) == pytest.approx((halfway, last))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert math.isfinite(learning_rate(Config(max_steps=1, warmup_steps=50, learning_rate=1.0), 1))


def test_the_lowest_rate_that_is_not_set():
    rates = {"linear": 0.0, "cosine": 0.1}
    for schedule, lowest in rates.items():
        config = Config(max_steps=10, learning_rate=1.0, schedule=schedule)
        assert learning_rate(config, 10) == pytest.approx(lowest)


def test_the_rate_follows_width_rank_and_tokens_of_a_step():
    def rate(width=256, has_base=True, **settings):
        return recipe.learning_rate(Config(**settings), width, has_base)

    assert rate(has_base=False) == 1e-2
    assert rate(has_base=False, optimizer="adamw", batch_size=1) == 3e-3
    assert rate() == 1e-3 and rate(use_lora=True, lora_rank=16) == 2e-3
    assert rate(use_lora=True, lora_rank=64) == 1e-3
    assert rate(batch_size=8) == 5e-4 and rate(batch_size=4, grad_accum_steps=2) == 5e-4
    assert rate(batch_size=64) == 1e-3  # more tokens do not raise it
    assert rate(width=2048) == pytest.approx(1e-3 * 8**-0.8, rel=0.01)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_bytes(b"to be or not to be, " * 500)  # 9,000 bytes train
    return open_corpus(str(folder / "text.txt"), folder / "none")


def test_steps_and_dropout_follow_the_passes_over_the_data(corpus):
    def chosen(has_base=False, **settings):
        config = Config(batch_size=10, block_size=100, **settings)  # 9 steps are a pass
        found = recipe.for_data(config, corpus, has_base)
        return found.max_steps, found.eval_interval, found.patience, found.dropout

    assert chosen() == (400, 40, 0, 0.1)
    assert chosen(max_steps=325) == (325, 32, 0, 0.0)
    assert chosen(max_steps=326) == (326, 32, 0, 0.1)
    assert chosen(has_base=True, dropout=0.0) == (27, 2, 2, 0.0)
    assert chosen(use_lora=True, dropout=0.0) == (27, 2, 2, 0.0)
    assert chosen(has_base=True, dropout=0.3, max_steps=5, eval_interval=3) == (5, 3, 0, 0.3)
    assert chosen(has_base=True, dropout=0.0, patience=4) == (27, 2, 4, 0.0)


def test_a_new_model_has_dropout_where_many_passes_make_it_pay():
    """In the runs of `benchmarks/recipe.py --questions dropout` these were best, or within 0.07."""
    best = {27_000: {16: 0.0, 32: 0.1}, 90_000: {8: 0.0, 16: 0.1, 32: 0.2}}
    best[900_000] = {4: 0.0, 8: 0.1}
    for tokens, found in best.items():
        assert {passes: recipe.dropout_for(passes, tokens) for passes in found} == found
    assert recipe.dropout_for(6, 10**9) == 0.1 and recipe.dropout_for(5, 10**9) == 0.0
