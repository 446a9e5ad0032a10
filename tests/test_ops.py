"""What the kernels below models and LoRA keep for backward, and weights that are cast in slices."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES
from torch import nn

from lora import LoRALinear, grouped_linear
from lora.linear import apply_linear, made
from ops import products
from ops.activations import swiglu
from ops.attention import causal_attention
from ops.norms import rms_norm
from ops.products import base_slices
from ops.rope import rotated

TOLERANCE = {
    torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3,
}  # fmt: skip


def same(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than the dtype of the first rounds."""
    error = (found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
    return error.item() <= TOLERANCE[found.dtype]


def kept_by(function, *arguments) -> int:
    """The numbers that autograd keeps of a call, but for those of its arguments."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, torch.Tensor)}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*arguments)
    return sum(kept.values())


def test_rms_norm_keeps_its_input_and_a_number_for_each_row():
    x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(8)
    assert kept_by(rms_norm, x, weight, 0.1) == 15


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 64), (3, 2, 4, 16)])
def test_norms_and_gates_are_the_plain_ones(device, dtype, shape):
    torch.manual_seed(0)
    x, gate, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weight = torch.randn(shape[-1], device=device).to(dtype)

    def rms_plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def swiglu_plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate * torch.sigmoid(gate) * up

    for function, plain, tensors in (
        (lambda x, w: rms_norm(x, w, 1e-5), rms_plain, (x, weight)),
        (swiglu, swiglu_plain, (gate, x)),
    ):
        own, exact = (
            [t.detach().to(kind).requires_grad_() for t in tensors]
            for kind in (dtype, torch.float64)
        )
        found, expected = function(*own), plain(*exact)
        found.backward(grad)
        expected.backward(grad.double())
        assert same(found, expected)
        assert all(same(one.grad, two.grad) for one, two in zip(own, exact, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (2, 5, 3, 8), (1, 7, 9, 64)])
def test_heads_are_turned_by_their_angles_and_gradients_back(device, dtype, shape):
    """As complex numbers are by a product, from rows that are not contiguous."""
    torch.manual_seed(0)
    B, T, _, D = shape
    angles = 6 * torch.rand(B, T, 1, D // 2, dtype=torch.float64, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    x, grad = torch.randn(2, *shape[:-1], D + 2, device=device).to(dtype)[..., :D]
    x.requires_grad_()

    def exact(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        one, two = x.detach().double().chunk(2, -1)
        found = torch.complex(one, two) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([found.real, found.imag], -1)

    found = rotated(x, cos, sin)
    found.backward(grad)
    assert found.dtype == dtype and same(found, exact(x, angles))
    assert same(x.grad, exact(grad, -angles))
    assert kept_by(lambda: rotated(x, cos, sin)) == cos.numel() + sin.numel()
    with torch.no_grad():
        assert torch.equal(rotated(x, cos, sin), found)


def test_base_slices_are_the_weights_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(products, "CAST", 10)
    one, two = torch.randn(5, 4).bfloat16(), torch.randn(2, 4).bfloat16()
    slices = list(base_slices([one, two], torch.float32))
    assert [len(weight) for _, weight in slices] == [2, 2, 1, 2]
    whole = torch.zeros(7, 4)
    for outputs, weight in slices:
        whole[outputs] += weight
    assert torch.equal(whole, torch.cat([one, two]).float())
    ((outputs, weight),) = base_slices([one], torch.bfloat16)
    assert weight is one and outputs == slice(None)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_a_base_that_is_cast_in_slices_computes_as_one_in_float32(dropout, bias, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(6, 5, requires_grad=True)
    layers = [LoRALinear(nn.Linear(5, n, bias=bias), 3, dropout=dropout) for n in (7, 4)]
    plain = nn.Linear(5, 7, bias=bias).requires_grad_(False)
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    monkeypatch.setattr(products, "CAST", 10)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for layer in (*layers, plain):
            layer.weight.data = layer.weight.data.to(dtype)
        torch.manual_seed(1)
        outputs = [*grouped_linear(x, layers), apply_linear(plain, x)]
        sum(y.square().sum() for y in outputs).backward()
        found.append([*outputs, x.grad, *(layer.lora_A.grad for layer in layers)])
        x.grad = None
        for layer in layers:
            layer.zero_grad()
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    assert same(outputs[-1], F.linear(x, plain.weight.float(), plain.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_made_is_made_again_in_backward(dtype):
    """The gradients are those of a kept input, which is not kept."""
    torch.manual_seed(0)
    gate, up = (torch.randn(6, 5).to(dtype).requires_grad_() for _ in range(2))
    layer = LoRALinear(nn.Linear(5, 7, dtype=torch.bfloat16), 3)
    nn.init.normal_(layer.lora_B)
    found, kept = [], []
    for make in (made, lambda function, *tensors: function(*tensors)):
        calls = []

        def product(gate, up, calls=calls):
            calls.append(torch.is_grad_enabled())
            return swiglu(gate, up)

        def run(gate, up, make=make, product=product):
            (y,) = grouped_linear(make(product, gate, up), [layer])
            return y

        kept.append(kept_by(run, gate, up))
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = run(gate, up)
        y.square().sum().backward()
        assert calls == ([True, False] if make is made else [True])
        found.append([y, gate.grad, up.grad, layer.lora_A.grad, layer.lora_B.grad])
        gate.grad = up.grad = None
        layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] - kept[0] == gate.numel()


def test_dropout_keeps_what_is_left_of_an_input_that_was_made():
    gate, up = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    layer = LoRALinear(nn.Linear(5, 7), 3, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    grads = []
    for make in (made, lambda function, *tensors: function(*tensors)):
        torch.manual_seed(0)
        grouped_linear(make(swiglu, gate, up), [layer])[0].square().sum().backward()
        grads.append([gate.grad, layer.lora_A.grad])
        gate.grad = up.grad = None
        layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_attention_that_saves_memory_keeps_no_weights():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 130, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.zeros(2, 1, 130, 130).masked_fill_(~torch.rand(2, 1, 130, 130).gt(0.3), -1e9)
    mask = mask.masked_fill(torch.ones(130, 130).triu(1).bool(), -torch.inf)
    g = torch.randn(2, 130, 32)
    for some in (None, mask):
        found = []
        for saves in (True, False):
            y = causal_attention(q, k, v, 0.0, True, some, saves_memory=saves)
            found.append([y, *torch.autograd.grad(y, (q, k, v), g)])
        assert all(same(a, b) for a, b in zip(*found, strict=True))

    def attend(*tensors):
        return causal_attention(*tensors, 0.0, True, saves_memory=True)

    assert kept_by(attend, q, k, v) == q.numel() + k.numel() + v.numel()  # in their order
