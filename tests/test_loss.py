"""Head and cross-entropy together: what logits and their loss give, for every kind of head."""

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES
from test_ops import kept_by
from torch import Tensor, nn

import hardware
from lora import LoRALinear, lora_layers
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.language_model import LanguageModel
from models.llama import Llama
from ops import loss as loss_module
from ops import products
from ops.loss import linear_cross_entropy, linear_losses
from training import accumulate

# Norm of the difference over the norm of what float64 gives for the same inputs. bfloat16 rounds
# the factors of every product to 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}

HEADS = ["frozen", "frozen in bfloat16", "trained", "adapted", "adapted and trained"]
V, C, N = 23, 6, 11


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def make_head(kind: str, device: str = "cpu") -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    """W, A, B and scaling, with logits that are far from alike."""
    W = (3 * torch.randn(V, C)).bfloat16().to(device)  # exact in every dtype
    A, B = (torch.randn(shape).bfloat16().float().to(device) for shape in ((2, C), (V, 2)))
    if kind != "frozen in bfloat16":
        W = W.float().requires_grad_("trained" in kind)
    if "adapted" not in kind:
        return W, None, None, 1.0
    return W, A.requires_grad_(), B.requires_grad_(), 0.7


def plain_losses(x, targets, W, A=None, B=None, scaling=1.0) -> Tensor:
    logits = x @ W.t() if A is None else x @ W.t() + scaling * (x @ A.t()) @ B.t()
    return F.cross_entropy(logits, targets.where(targets >= 0, -100), reduction="none")


def leaves_of(*tensors: object) -> list[Tensor]:
    return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]


@pytest.mark.parametrize("at_a_time", [2 * V, 4 * V, 10**6])  # the logits of 2 tokens, of 4, of all
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_are_those_of_the_logits(device, dtype, head, at_a_time, monkeypatch):
    """In bfloat16 by autocast."""
    monkeypatch.setattr(loss_module, "LOGITS", at_a_time)
    for module, name in ((loss_module, "CAST"), (loss_module, "GPU_CAST"), (products, "CAST")):
        monkeypatch.setattr(module, name, 4 * C)  # rows of W that are cast at a time
    torch.manual_seed(0)
    factors = make_head(head, device)
    x = torch.randn(N, C).bfloat16().to(device)
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    targets[2], targets[5] = -100, -1
    wide = [t.detach().double() if isinstance(t, Tensor) else t for t in (x, *factors)]
    for t, own in zip(wide, (x, *factors), strict=True):
        if isinstance(t, Tensor):
            t.requires_grad_(own.requires_grad)
    each = plain_losses(wide[0], targets, *wide[1:])
    exact = each.sum() / (targets >= 0).sum()

    if dtype == torch.float64:  # whose products are its own under autocast too
        factors = tuple(
            t.detach().double().requires_grad_(t.requires_grad)
            if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in factors
        )  # fmt: skip
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = linear_cross_entropy(x, targets, *factors)
        found = linear_losses(x, targets, *factors)
        with torch.no_grad():
            evaluated = linear_cross_entropy(x, targets, *factors)
    assert loss.dtype == found.dtype == x.dtype
    assert relative_error(loss, exact) <= TOLERANCE[dtype]
    assert relative_error(found, each) <= TOLERANCE[dtype]
    assert not found[targets < 0].any()
    assert not evaluated.requires_grad and relative_error(evaluated, loss) <= 1e-6
    (3 * loss).backward()
    (3 * exact).backward()
    pairs = list(zip(leaves_of(x, *factors), leaves_of(*wide), strict=True))
    assert len(pairs) == 1 + ("trained" in head) + 2 * ("adapted" in head)
    for own, one in pairs:
        assert own.grad.dtype == own.dtype
        assert relative_error(own.grad, one.grad) <= TOLERANCE[dtype]
    assert not x.grad[2].any() and not x.grad[5].any()


@pytest.mark.parametrize("head", HEADS)
def test_nothing_but_gradients_is_kept(head):
    factors = make_head(head)
    x, targets = torch.randn(N, C, requires_grad=True), torch.randint(V, (N,))
    wanted = sum(t.numel() for t in leaves_of(x, *factors))
    assert kept_by(linear_cross_entropy, x, targets, *factors) == wanted + 1  # and their scale


def test_tokens_that_do_not_count_are_left_out_before_the_head():
    """Their x is not multiplied by anything: not even nan in it has an effect."""
    factors = make_head("adapted and trained")
    x, targets = torch.randn(N, C), torch.randint(V, (N,))
    targets[::2] = -100
    expected = linear_cross_entropy(x[1::2].requires_grad_(), targets[1::2], *factors)
    kept = leaves_of(*factors)
    gradients = torch.autograd.grad(expected, kept)
    x = x.detach().clone()
    x[::2] = torch.nan
    x.requires_grad_()
    loss = linear_cross_entropy(x, targets, *factors)
    found = torch.autograd.grad(loss, [x, *kept])
    assert torch.equal(loss, expected) and not found[0][::2].any() and found[0][1::2].all()
    assert all(torch.equal(a, b) for a, b in zip(found[1:], gradients, strict=True))
    assert not linear_losses(x, targets, *factors)[::2].any()


@pytest.mark.parametrize("head", HEADS)
def test_a_compiled_graph_whose_shapes_are_fixed_computes_the_same(head):
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    factors = make_head(head)
    x, targets = torch.randn(N, C, requires_grad=True), torch.randint(V, (N,))
    targets[3] = -100
    found = []
    for function in (linear_cross_entropy, compiled):
        loss = function(x, targets, *factors)
        found.append([loss, *torch.autograd.grad(loss, leaves_of(x, *factors))])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) <= 1e-6


def test_a_loss_over_no_tokens_is_not_a_number():
    x = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(x, torch.full((3,), -100), torch.randn(5, 4))
    assert loss.isnan()
    assert linear_losses(x, torch.full((3,), -100), torch.randn(5, 4)).tolist() == [0, 0, 0]


def test_logits_that_would_overflow_are_taken():
    x = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    loss = linear_cross_entropy(x, torch.tensor([2]), torch.eye(3))
    loss.backward()
    assert loss.item() == 2000 and x.grad.tolist() == [[1, 0, -1]]


# ---- in the models


def gpt2(**options: object) -> BigramLanguageModelLoRA:
    return BigramLanguageModelLoRA(50, 16, 12, "cpu", 0.0, n_head=2, n_layer=2, **options)


def llama(**options: object) -> Llama:
    return Llama(
        vocab_size=50, n_embd=16, block_size=12, n_head=2, n_layer=2, n_kv_head=1, head_dim=8,
        n_inner=24, max_positions=12, device="cpu", **options,
    )  # fmt: skip


def adapted(model: LanguageModel, targets: list[str], dropout: float = 0.0) -> LanguageModel:
    model.adapt(4, 8.0, dropout, targets, train_embeddings=False)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


MODELS: dict[str, Callable[[], LanguageModel]] = {
    "GPT-2's, trained": gpt2,
    "GPT-2's, tied": lambda: gpt2(tied_head=True),
    "GPT-2's, frozen copy of a trained embedding": lambda: gpt2(
        tied_head=True, use_lora=True, lora_targets=["query"]
    ),
    "GPT-2's, adapted": lambda: adapted(gpt2(), ["query", "lm_head"]),
    "Llama's, trained": llama,
    "Llama's, tied": lambda: llama(tied_head=True),
    "Llama's, frozen and tied": lambda: adapted(llama(tied_head=True), ["q_proj"]),
    "Llama's, adapted and tied": lambda: adapted(llama(tied_head=True), ["q_proj", "lm_head"]),
    "Llama's, adapted alone": lambda: adapted(llama(), ["lm_head"]),
}


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two of packed records, of which other numbers of tokens count."""
    torch.manual_seed(1)
    idx, targets = torch.randint(50, (2, 2, 3, 12)).unbind()
    targets[0, :, :5], targets[1, 1, 2:] = -100, -100
    segments = (torch.arange(12) > 6).long().expand_as(idx)
    return list(zip(idx, targets, segments, strict=True))


def stepped(model: LanguageModel, autocast) -> list[Tensor]:
    """The loss of a step of two batches, all gradients in one, and each of the head's."""
    counted = torch.tensor([(targets >= 0).sum() for _, targets, _ in batches()])
    loss = accumulate(model, batches(), counted / counted.sum(), autocast)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    found = [loss, gradients, *(p.grad for p in model.lm_head.parameters() if p.requires_grad)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_plain_form(name, grad_checkpoint, dtype, monkeypatch):
    """Of two batches, whose gradients add up: within 2e-6 in float32, and 3% under autocast."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.grad_checkpoint = grad_checkpoint

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)

    expected, losses = stepped(model, autocast), []
    idx, targets, segments = batches()[0]
    monkeypatch.setattr(loss_module, "LOGITS", 400)
    for most in (50, 49):  # the plain form, and head and loss together
        monkeypatch.setattr(loss_module, "PLAIN_VOCABULARY", most)
        with torch.no_grad(), autocast():
            logits, found = model(idx, targets, segments, reduction="none")
        assert (logits is None) == (most == 49)
        losses.append(found)
    assert losses[0].shape == targets.shape
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    for found, exact in zip(stepped(model, autocast), expected, strict=True):
        assert relative_error(found, exact) <= tolerance
    assert relative_error(losses[1], losses[0]) <= tolerance


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_head_that_does_more_than_its_factors_say_takes_the_plain_form(make, monkeypatch):
    """Dropout on its adapter while it trains, and hooks, which have to run."""
    monkeypatch.setattr(loss_module, "PLAIN_VOCABULARY", 0)
    idx, targets, _ = batches()[0]
    model = adapted(make(), ["lm_head"], dropout=0.5)
    assert isinstance(model.lm_head, LoRALinear)
    assert model(idx, targets)[0] is not None
    assert model.eval()(idx, targets)[0] is None
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    assert model(idx, targets)[0] is not None and seen


def test_small_vocabularies_keep_the_plain_form():
    idx, targets, _ = batches()[0]
    model = BigramLanguageModelLoRA(256, 16, 12, "cpu", 0.0, n_head=2, n_layer=1)
    logits, loss = model(idx, targets)
    known = targets.flatten()
    assert torch.equal(loss, F.cross_entropy(logits.flatten(0, -2), known))
    assert loss_module.fusing_pays(32_000) and not loss_module.fusing_pays(256)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_in_cuda_graphs_it_computes_the_same(name, dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "PLAIN_VOCABULARY", 0)
    torch.manual_seed(0)
    model = MODELS[name]().cuda()
    trained = [p for p in model.parameters() if p.requires_grad]
    on_device = [tuple(t.cuda() for t in batch) for batch in batches()]
    graphed = hardware.in_cuda_graphs(model, on_device[0], dtype)
    for batch in on_device:
        found = []
        for function in (model, graphed):
            with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
                loss = function(*batch)[-1]
            gradients = torch.autograd.grad(loss, trained)
            found.append([t.detach().clone() for t in (loss, *gradients)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_gradients_of_many_tokens_are_not_lost_in_float16():
    """A token's part of the mean is below float16's least number, but not times GradScaler's 2**16,
    which itself is above the largest."""
    torch.manual_seed(0)
    x, weight = torch.randn(4096, 16).half().requires_grad_(), (0.05 * torch.randn(50, 16)).half()
    targets = torch.randint(50, (4096,))
    exact = x.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.double().t(), targets).backward()
    (2.0**16 * linear_cross_entropy(x, targets, weight)).backward()
    error = (x.grad.double() - 2**16 * exact.grad).norm() / (2**16 * exact.grad.norm())
    assert error < 2e-3
