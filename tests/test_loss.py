"""The loss without logits, norms and gated activations, beside plain operations in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES

from ops import loss as module
from ops.activations import swiglu
from ops.loss import linear_cross_entropy, linear_losses
from ops.norms import rms_norm

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCES)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def check(function, plain, tensors: list[torch.Tensor], tolerance: float) -> None:
    """The function's value and gradients are those of `plain` in float64, for inputs alike."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected, found = plain(*wide), function(*[t.requires_grad_() for t in tensors])
    assert error(found, expected) < tolerance
    grad = torch.randn(found.shape, device=found.device, dtype=found.dtype)
    gradients = torch.autograd.grad(found, tensors, grad)
    for one, two in zip(gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert error(one, two) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_a_time", [1, 500, 10**9])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(1, 8, 5), (37, 16, 101), (64, 32, 7)])
def test_the_loss_without_logits_is_that_with_them(
    monkeypatch, device, dtype, at_a_time, tokens, width, vocabulary
):
    monkeypatch.setattr(module, "LOGITS", at_a_time)
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    W = torch.randn(vocabulary, width, device=device, dtype=dtype)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    targets[1::3] = -100

    def plain(x):
        return F.cross_entropy(x @ W.double().t(), targets)

    check(lambda x: linear_cross_entropy(x, W, targets), plain, [x], TOLERANCES[dtype])
    each = F.cross_entropy(x.double() @ W.double().t(), targets, reduction="none")
    assert error(linear_losses(x.detach(), W, targets), each) < TOLERANCES[dtype]


def test_a_head_in_lower_precision_is_taken_as_it_is():
    torch.manual_seed(0)
    W, targets = torch.randn(50, 16).bfloat16(), torch.randint(50, (9,))
    check(
        lambda x: linear_cross_entropy(x, W, targets),
        lambda x: F.cross_entropy(x @ W.double().t(), targets),
        [torch.randn(9, 16)],
        1e-6,
    )


def test_a_loss_over_no_tokens_is_not_a_number():
    loss = linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.full((3,), -100))
    assert loss.isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 64), (3, 2, 4, 16)])
def test_norms_and_gates_are_the_plain_ones(device, dtype, shape):
    torch.manual_seed(0)
    x, gate = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device, dtype=dtype)

    def plain(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    check(lambda x, w: rms_norm(x, w, 1e-5), plain, [x, weight], TOLERANCES[dtype])
    check(swiglu, lambda g, u: g * torch.sigmoid(g) * u, [gate, x.detach()], TOLERANCES[dtype])
