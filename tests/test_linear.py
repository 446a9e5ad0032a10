"""LoRALinear against float64, over shapes, dtypes, forms of input and what needs gradients."""

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora import LoRALinear, grouped_linear
from lora import linear as module
from lora.linear import base_weight, lora_reference, stacking_pays
from ops import dropout as dropout_module
from ops import products
from ops.dropout import draw_numbers, mask_of

# Relative to the norm of what float64 gives: about twice an input's rounding in the low precisions.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2.5e-3,
}

FORMS = ("merged", "two paths")


@contextmanager
def form(name: str):
    """Have every layer take one form of the arithmetic, whatever its shape."""
    with patch.object(module, "merging_pays", lambda tokens, layer, dtype: name == "merged"):
        yield


def make(out_features=7, in_features=5, rank=3, bias=True, alpha=16.0, dtype=torch.float32):
    """An adapter whose B is not zero, on a base of this dtype."""
    layer = LoRALinear(nn.Linear(in_features, out_features, bias=bias, dtype=dtype), rank, alpha)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def reference(layer: LoRALinear, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of lora_reference in float64."""
    x = x.detach().double().requires_grad_()
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    bias = None if layer.bias is None else layer.bias.detach().double()
    W = layer.weight.detach().double()
    y = lora_reference(x, W, bias, A, B, layer.alpha / layer.rank)
    y.backward(g.double())
    return {"y": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_agrees(layer: LoRALinear, x: torch.Tensor, dtype: torch.dtype, autocast: bool) -> None:
    x = x.requires_grad_()
    with torch.autocast(x.device.type, dtype if autocast else None, enabled=autocast):
        y = layer(x)
    assert y.dtype == dtype and y.shape == (*x.shape[:-1], layer.out_features)
    g = torch.randn_like(y)
    y.backward(g)
    exact = reference(layer, x, g)
    found = {"y": y, "x": x.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad}
    size = {name: value.norm() for name, value in exact.items()}
    if dtype == torch.bfloat16:
        # A sum of few terms may cancel, and then no bfloat16 is near it in relation: measure
        # against a quarter of the sum of the terms' magnitudes where that is larger.
        positive = copy.deepcopy(layer)
        for parameter in positive.parameters():
            parameter.data.abs_()
        for name, value in reference(positive, x.abs(), g.abs()).items():
            size[name] = torch.maximum(size[name], value.norm() / 4)
    kinds = {"y": dtype, "x": x.dtype, "A": layer.lora_A.dtype, "B": layer.lora_B.dtype}
    for name, value in found.items():
        assert value.dtype == kinds[name]
        error = (value.double() - exact[name]).norm() / size[name].clamp_min(1e-30)
        assert error < TOLERANCE[dtype], name


@contextmanager
def drawn_masks() -> Iterator[list[torch.Tensor]]:
    """The masks of dropout that are drawn within, in float64 and scaled by 1 / (1 - p)."""
    masks = []
    real = dropout_module.draw_numbers

    def draw(x, p, bits=16):
        numbers, lowest, kept = real(x, p, bits)
        masks.append(mask_of(numbers, lowest, out=numbers.double()) / kept)
        return numbers, lowest, kept

    with (
        patch.object(dropout_module, "draw_numbers", draw),
        patch.object(module, "draw_numbers", draw),
    ):
        yield masks


def test_the_reference_is_the_formula():
    """By hand: y = x W^T + b + s (x A^T) B^T."""
    x, W, b, A, B = (
        torch.tensor(t) for t in ([[2.0, 3.0]], [[5.0, 7.0]], [11.0], [[1.0, -2.0]], [[4.0]])
    )
    assert lora_reference(x, W, b, A, B, 0.5).item() == 2 * 5 + 3 * 7 + 11 + 0.5 * (2 - 6) * 4
    assert lora_reference(x, W, None, A, B, 0.5).item() == 2 * 5 + 3 * 7 + 0.5 * (2 - 6) * 4


MODES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOKENS = [1, 7, 64, 600, 1024, 2 * module.SLICE + 3]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", MODES)
@pytest.mark.parametrize(
    ("widths", "bias"),
    [((40,), True), ((16,), False), ((24, 24, 24), True), ((40, 16, 16), True), ((48, 8), False)],
)
@pytest.mark.parametrize("which", [*FORMS, "dropout", "trainable base"])
def test_every_fast_form_computes_the_reference(which, widths, bias, dtype, tokens):
    """One layer, and groups of equal and unequal widths as one product.

    In the low precisions the base is stored in them, but merged it is float32 under autocast.
    """
    torch.manual_seed(0)
    autocast = which == "merged" and dtype.itemsize == 2
    stored = torch.float32 if autocast else dtype
    layers = [make(n_out, 24, 4, bias, dtype=stored) for n_out in widths]
    for layer in layers:
        layer.dropout = 0.3 if which == "dropout" else 0.0
        layer.weight.requires_grad_(which == "trainable base")
    x = torch.randn(tokens, 24).to(stored).requires_grad_()
    one_product = patch.object(LoRALinear, "forward") if len(layers) > 1 else nullcontext()
    with (
        form(which),
        drawn_masks() as masks,
        patch.object(module, "stacking_pays", lambda tokens, layers: True),
        torch.autocast("cpu", dtype, enabled=autocast),
        one_product as called,
    ):
        found = grouped_linear(x, layers) if called else [layers[0](x)]
    assert not (called and called.called)
    assert [y.shape for y in found] == [(tokens, n_out) for n_out in widths]
    assert {y.dtype for y in found} == {dtype} and len(masks) == (which == "dropout")
    gradients = [torch.randn_like(y) for y in found]
    torch.autograd.backward(found, gradients)

    mask = masks[0] if masks else torch.ones_like(x).double()
    exact_x = x.detach().double().requires_grad_()
    exact_parameters = []
    pairs = []
    for layer, y, g in zip(layers, found, gradients, strict=True):
        W, A, B = (p.detach().double() for p in (layer.weight, layer.lora_A, layer.lora_B))
        b = layer.bias.detach().double() if bias else None
        exact_parameters.append((W.requires_grad_(), A.requires_grad_(), B.requires_grad_()))
        base = lora_reference(exact_x, W, b, A, torch.zeros_like(B), 1.0)
        update = lora_reference(exact_x * mask, torch.zeros_like(W), None, A, B, 16 / 4)
        (base + update).backward(g.double())
        pairs.append((y, (base + update).detach()))
    pairs.append((x.grad, exact_x.grad))
    for layer, (W, A, B) in zip(layers, exact_parameters, strict=True):
        pairs += [(layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)]
        if which == "trainable base":
            pairs.append((layer.weight.grad, W.grad))
    for value, exact in pairs:
        assert relative_error(value, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("which", [*FORMS, "dropout", "trainable base"])
@pytest.mark.parametrize("small_batch", [0, module.SMALL_BATCH])
def test_every_form_takes_its_base_from_base_weight(which, small_batch):
    """In forward and in backward: with another weight there, all is that of the other weight."""
    torch.manual_seed(0)
    layer, x = make(), torch.randn(6, 5, requires_grad=True)
    layer.bias.requires_grad_(which == "trainable base")
    layer.dropout = 1e-9 if which == "dropout" else 0.0  # which is 1/256 there

    def tripled(W, dtype, copy=False):
        return base_weight([3 * w for w in W], dtype, copy)

    with (
        form(which),
        drawn_masks() as masks,
        patch.object(module, "base_weight", tripled),
        patch.object(products, "base_weight", tripled),
        patch.object(module, "SMALL_BATCH", small_batch),
    ):
        y = layer(x)
        g = torch.randn_like(y)
        y.backward(g)
    assert all(mask.all() for mask in masks)  # with this seed
    layer.weight.data *= 3
    exact = reference(layer, x, g)
    found = {"y": y, "x": x.grad, "A": layer.lora_A.grad, "B": layer.lora_B.grad}
    tolerance = 1e-2 if masks else 1e-5
    assert all(relative_error(found[name], exact[name]) < tolerance for name in found)


def test_a_base_weight_is_the_layers_own_unless_a_copy_is_asked_for():
    one, two = torch.randn(4, 3), torch.randn(2, 3)
    assert base_weight([one], torch.float32) is one
    copied = base_weight([one], torch.float32, copy=True)
    assert torch.equal(copied, one) and copied.data_ptr() != one.data_ptr()
    both = base_weight([one, two.bfloat16()], torch.bfloat16)
    assert both.dtype == torch.bfloat16
    assert torch.equal(both, torch.cat([one, two]).bfloat16())


@settings(max_examples=150)
@given(
    dims=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    rank=st.integers(1, 64),
    bias=st.booleans(),
    mode=st.sampled_from(["float64", "float32", "bfloat16", "autocast"]),
    contiguous=st.booleans(),
    which=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_agree_with_float64(
    dims, sizes, rank, bias, mode, contiguous, which, seed
):
    torch.manual_seed(seed)
    kind = torch.float32 if mode == "autocast" else getattr(torch, mode)
    layer = make(*sizes, rank, bias, alpha=rank * 1.5, dtype=kind)
    if mode == "bfloat16":
        which = "two paths"  # a base in a lower precision than its adapter is never merged
    x = torch.randn(*dims, sizes[1]).to(kind)
    if not contiguous:
        x = torch.randn(*dims, sizes[1], 2).to(kind)[..., 0]
    out = torch.bfloat16 if mode == "autocast" else kind
    with form(which):
        assert_agrees(layer, x.detach(), out, mode == "autocast")


@pytest.mark.parametrize(
    "mode", ["float32", "bfloat16", "autocast to bfloat16", "autocast to float16"]
)
@pytest.mark.parametrize("shape", [(1024, 64, 96), (2048, 256, 512), (1030, 48, 48), (16, 256, 96)])
@pytest.mark.parametrize("device", DEVICES)
def test_every_form_of_the_products_agrees_with_float64(device, mode, shape):
    """Shapes on both sides of each rule of lora/linear.py: in parts or not, merged or two paths."""
    torch.manual_seed(0)
    tokens, in_features, out_features = shape
    autocast, _, name = mode.rpartition(" to ")
    dtype = getattr(torch, name)
    kind = torch.float32 if autocast else dtype
    layer = make(out_features, in_features, 8, dtype=kind).to(device)
    x = torch.randn(tokens, in_features).to(device, kind)
    assert_agrees(layer, x, dtype, bool(autocast))


def test_it_starts_equal_to_the_linear_to_the_bit():
    linear = nn.Linear(12, 9)
    x = torch.randn(4, 12)
    expected = linear(x)
    assert torch.equal(LoRALinear(linear, 4)(x), expected)


def test_an_empty_batch_gives_empty_output_and_zero_gradients():
    layer = make()
    x = torch.zeros(0, 4, 5, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 4, 7)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not layer.lora_A.grad.any() and not layer.lora_B.grad.any()


def test_gradients_accumulate():
    layer, x = make(), torch.randn(6, 5)
    layer(x).sum().backward()
    once = layer.lora_B.grad.clone()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.lora_B.grad, 2 * once)


@pytest.mark.parametrize("needs", ["x", "lora_A", "lora_B", "none"])
def test_only_what_needs_a_gradient_gets_one(needs):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(6, 5)
    tensors = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == needs)
    y = layer(x)
    assert y.requires_grad == (needs != "none")
    if needs != "none":
        g = torch.randn_like(y)
        y.backward(g)
        exact = reference(layer, x, g)[needs.removeprefix("lora_")]
        assert relative_error(tensors[needs].grad, exact) < 1e-5
    assert all(t.grad is None for name, t in tensors.items() if name != needs)
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_base_that_is_made_trainable_gets_its_gradient(which):
    layer, x = make(), torch.randn(6, 5)
    getattr(layer, which).requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    expected = g.T @ x if which == "weight" else g.sum(0)
    torch.testing.assert_close(getattr(layer, which).grad, expected)
    exact = reference(layer, x, g)
    assert relative_error(layer.lora_A.grad, exact["A"]) < 1e-5
    assert relative_error(layer.lora_B.grad, exact["B"]) < 1e-5


@pytest.mark.parametrize("which", [*FORMS, "trainable base"])
def test_gradcheck_passes_in_float64(which):
    torch.manual_seed(0)
    layer = make(dtype=torch.float64)
    layer.bias.requires_grad_(which == "trainable base")
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def function(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    inputs = (x, layer.lora_A, layer.lora_B)
    with form(which):
        assert torch.autograd.gradcheck(function, inputs)
        if which == "trainable base":
            assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("which", ["merged", "two paths"])
def test_double_backward_is_refused_clearly(which):
    """Also where the incoming gradient is constant, for which torch would leave out a part."""
    layer, x = make(), torch.randn(4, 5, requires_grad=True)
    for loss in (torch.sum, lambda y: y.square().sum()):
        with form(which), pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(loss(layer(x)), x, create_graph=True)


def test_dtypes_of_the_input_are_taken_as_a_linear_takes_them():
    layer = make()
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        layer(torch.ones(3, 5, dtype=torch.int64))
    layer, x = make(dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
        assert relative_error(layer(x), reference(layer, x, torch.ones(3, 7))["y"]) < 1e-12


@pytest.mark.parametrize("tokens", [module.SLICE, module.SLICE + 1, 2 * module.SLICE + 3])
def test_with_dropout_too_it_starts_as_its_base_to_the_bit(tokens):
    linears, x = [nn.Linear(128, 128) for _ in range(3)], torch.randn(tokens, 128)
    layers = [LoRALinear(linear, dropout=0.1) for linear in linears]
    assert torch.equal(layers[0](x), linears[0](x))
    for y, base in zip(grouped_linear(x, layers), grouped_linear(x, linears), strict=True):
        assert torch.equal(y, base)


@pytest.mark.parametrize(
    ("device", "which"), [("cpu", "trainable base"), *((name, "two paths") for name in DEVICES)]
)
@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_dropout_acts_on_the_adapters_input_with_one_mask(device, which, mode):
    """Values and gradients against float64 with the very mask that the layer drew."""
    torch.manual_seed(0)
    layer = make(9, 20, rank=4).to(device)
    layer.dropout = 0.3
    layer.bias.requires_grad_(which == "trainable base")
    x = torch.randn(3, 50, 20, device=device, requires_grad=True)
    autocast = torch.autocast(device, torch.bfloat16, enabled=mode == "autocast")
    with drawn_masks() as masks, autocast:
        y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    mask = masks.pop().view(x.shape)
    assert masks == []
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / 0.7, rel=0.01)]

    exact_x, A, B = (t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    base = nn.functional.linear(exact_x, layer.weight.double(), layer.bias.detach().double())
    exact = base + layer.scaling * (exact_x * mask) @ A.T @ B.T
    exact.backward(g.double())
    tolerance = TOLERANCE[y.dtype]
    pairs = [(y, exact), (x.grad, exact_x.grad)]
    pairs += [(layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)]
    assert all(relative_error(found, wanted) < tolerance for found, wanted in pairs)
    layer.eval()  # and none at all outside of training
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    assert relative_error(layer(x), reference(layer, x, torch.ones_like(y))["y"]) < 1e-5


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.99999])
def test_masks_of_few_bits_keep_their_rate_and_the_mean(p):
    torch.manual_seed(0)
    x = torch.empty(1000, 1001)
    numbers, lowest, kept = draw_numbers(x, p, bits=8)
    mask = mask_of(numbers, lowest, out=numbers.float())
    assert kept == pytest.approx(min(max(1 - p, 1 / 256), 255 / 256), abs=1 / 512)
    deviation = math.sqrt(kept * (1 - kept) / x.numel())
    assert abs(mask.mean().item() - kept) < 4 * deviation
    # Neighbours, which come from one random number, are independent.
    both = (mask[:, 1:] * mask[:, :-1]).mean().item()
    assert abs(both - kept**2) < 8 * deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [50, module.ENOUGH_TOKENS])
@pytest.mark.parametrize("widths", [(24, 24, 24), (40, 16, 16)])
@pytest.mark.parametrize("which", [*FORMS, "plain"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_group_gives_what_its_layers_give(device, which, widths, tokens, dtype):
    torch.manual_seed(0)
    layers = [make(n_out, 24, rank=4).to(device) for n_out in widths]
    if which == "plain":
        layers = [nn.Linear(24, n_out, bias=False, device=device) for n_out in widths]
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    x = torch.randn(3, tokens, 24, device=device)
    factors = torch.arange(1, 73, device=device).split(widths)
    found = []
    for run in (grouped_linear, lambda x, layers: [layer(x) for layer in layers]):
        leaf = x.clone().requires_grad_()
        with form(which), torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = run(leaf, layers)
        loss = sum((y.float() * f).square().sum() for y, f in zip(outputs, factors, strict=True))
        found.append([*outputs, *torch.autograd.grad(loss, [leaf, *trained])])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b.double()) < TOLERANCE[dtype]


def test_a_group_of_unlike_layers_falls_back_to_each():
    x = torch.randn(module.FEW_TOKENS, 5)
    for layers in (
        [make(rank=2), make(rank=3)],
        [make(alpha=8.0), make(alpha=16.0)],
        [make(), make(bias=False)],
        [make(bias=False), make()],
        [make(), nn.Linear(5, 4)],
        [nn.Linear(5, 4), nn.Linear(5, 4, bias=False)],
        [nn.Linear(5, 4), nn.Linear(5, 4)],
        [nn.Sequential(nn.Linear(5, 4)), nn.Identity()],
        [make()],
    ):
        for found, layer in zip(grouped_linear(x, layers), layers, strict=True):
            torch.testing.assert_close(found, layer(x))
    layers = [make(), make().eval()]  # of which the second drops nothing
    for layer in layers:
        layer.dropout = 0.5
    torch.testing.assert_close(grouped_linear(x, layers)[1], layers[1](x))
    layers[1].train().dropout = 0.0
    torch.testing.assert_close(grouped_linear(x, layers)[1], layers[1](x))


def test_a_group_may_have_some_weights_stored_in_the_dtype_of_the_product():
    """As store_base leaves queries beside fewer keys, which merge at fewer tokens."""
    torch.manual_seed(0)
    layers = [make(40, 24, dtype=torch.bfloat16), make(16, 24)]
    x = torch.randn(600, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), patch.object(LoRALinear, "forward") as called:
        found = grouped_linear(x, layers)
    assert not called.called
    gradients = [torch.randn_like(y) for y in found]
    torch.autograd.backward(found, gradients)
    exact = [reference(layer, x, g) for layer, g in zip(layers, gradients, strict=True)]
    for layer, y, wanted in zip(layers, found, exact, strict=True):
        for name, value in {"y": y, "A": layer.lora_A.grad, "B": layer.lora_B.grad}.items():
            assert relative_error(value, wanted[name]) < TOLERANCE[torch.bfloat16]
    assert relative_error(x.grad, exact[0]["x"] + exact[1]["x"]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("small", [True, False])
def test_the_merged_weight_of_a_group_is_kept_where_all_its_layers_are_small(small):
    kept = []
    layers, x = [make(8, 16, bias=False), make(24, 16, bias=False)], torch.randn(100, 16)
    with (
        form("merged"),
        patch.object(module, "SMALL_WEIGHT", 24 * 16 if small else 24 * 16 - 1),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        grouped_linear(x, layers)
    assert ((32, 16) in {t.shape for t in kept}) == small


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("adapted", [True, False])
def test_hooks_of_a_layer_in_a_group_run(adapted, hook):
    layers = [make(8, 8) if adapted else nn.Linear(8, 8) for _ in range(3)]
    x = torch.randn(module.FEW_TOKENS, 8, requires_grad=True)
    with patch.object(type(layers[0]), "forward") as called:  # without it they are one product
        grouped_linear(x, layers)
    assert not called.called
    calls = []
    getattr(layers[1], hook)(lambda *_: calls.append(hook))
    sum(y.sum() for y in grouped_linear(x, layers)).backward()
    assert calls == [hook]


@pytest.mark.parametrize(
    ("tokens", "n_in", "widths", "adapted", "bias", "expected"),
    [
        (1, 128, (128, 128, 128), True, True, False),  # a token of generation
        (16, 128, (128, 128, 128), True, True, True),
        (16, 768, (768, 768, 768), False, True, True),
        (512, 768, (768, 768, 768), False, False, False),
        (512, 256, (256, 256, 256), False, False, True),
        (64, 576, (576, 192, 192), True, False, False),
        (128, 576, (576, 192, 192), True, False, True),
        (256, 2048, (2048, 512, 512), True, True, False),
        (512, 2048, (2048, 512, 512), True, True, True),
        (1024, 2048, (2048, 512, 512), False, True, False),
        (512, 896, (896, 128, 128), False, True, True),
        (1024, 576, (1536, 1536), True, False, False),  # gate and up
    ],
)
def test_layers_are_one_product_where_that_is_faster(tokens, n_in, widths, adapted, bias, expected):
    with torch.device("meta"):
        layers = [nn.Linear(n_in, n_out, bias) for n_out in widths]
        if adapted:
            layers = [LoRALinear(layer) for layer in layers]
    assert stacking_pays(tokens, layers) == expected
    with patch.object(module, "stacking_pays", lambda *_: expected):
        x = torch.empty(tokens, n_in, device="meta")
        with patch.object(type(layers[0]), "forward") as called:
            grouped_linear(x, layers)
    assert called.called != expected


def test_small_updates_survive_bfloat16():
    """W + s B A is added up in float32: updates below bfloat16's resolution of B add up."""
    layer = make(4, 4, rank=1, bias=False)
    with torch.no_grad():
        layer.lora_B.fill_(1.0)
        for _ in range(100):
            layer.lora_B.add_(1e-4)  # a bfloat16 at 1.0 would not move
    assert layer.lora_B.dtype == torch.float32
    assert layer.lora_B.mean().item() == pytest.approx(1.01, rel=1e-5)


def test_the_merged_weight_is_rounded_once():
    """Under autocast the output is that of the float32 sum W + s B A rounded to bfloat16, as full
    fine-tuning rounds its float32 weight, and not that of a sum of rounded terms."""
    torch.manual_seed(0)
    layer, x = make(64, 64, rank=8), torch.randn(2048, 64)
    merged = torch.addmm(layer.weight, layer.lora_B, layer.lora_A, alpha=layer.scaling)
    with form("merged"), torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        expected = nn.functional.linear(x, merged, layer.bias)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("which", FORMS)
@pytest.mark.parametrize(
    ("tokens", "n_in"),
    [(100, 32), (module.SMALL_BATCH + 1, 32), (100, module.SMALL_WEIGHT // 64 + 1)],
)
def test_only_the_input_and_a_small_merged_weight_are_kept_for_backward(which, tokens, n_in):
    """Beside parameters."""
    kept = []
    layer, x = make(64, n_in, bias=False), torch.randn(tokens, n_in, requires_grad=True)
    with (
        form(which),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        layer(x)
    known = {p.data_ptr() for p in (*layer.parameters(), x)}
    extra = [t.shape for t in kept if t.data_ptr() not in known]
    is_small = (tokens, n_in) == (100, 32)
    assert extra == ([layer.weight.shape] if which == "merged" and is_small else [])
    assert x.data_ptr() in {t.data_ptr() for t in kept}


def test_with_dropout_what_is_left_of_the_input_and_a_byte_an_element_are_kept_for_backward():
    kept = []
    layer, x = make(64, 32), torch.randn(100, 32, requires_grad=True)
    layer.dropout = 0.1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    known = {p.data_ptr() for p in layer.parameters()}
    extra = [(t.shape, t.dtype) for t in kept if t.data_ptr() not in known]
    assert sorted(extra, key=str) == [(x.shape, torch.float32), (x.shape, torch.int8)]


@pytest.mark.parametrize(
    ("tokens", "dtype", "dims"),
    [
        (module.ENOUGH_TOKENS, torch.float32, {3}),
        (module.ENOUGH_TOKENS - module.PARTS, torch.float32, {2}),
        (module.ENOUGH_TOKENS + 1, torch.float32, {2}),
        (module.ENOUGH_TOKENS, torch.float64, {2}),
    ],
)
def test_products_are_in_parts_where_that_is_faster(tokens, dtype, dims):
    found = []
    layer, x = make(dtype=dtype), torch.randn(tokens, 5, dtype=dtype)

    def product(s, a, b):
        found.append(a.dim())
        return module_product(s, a, b)

    module_product = module.scaled_product
    with form("merged"), patch.object(module, "scaled_product", product):
        layer(x).sum().backward()
    assert set(found) == dims


def test_it_survives_copying_pickling_moving_and_state_dicts():
    layer, x = make(), torch.randn(3, 5)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    other = make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    torch.testing.assert_close(layer.to(torch.float64)(x.double()).float(), y)


def test_eval_no_grad_and_inference_mode_give_the_same_output():
    layer, x = make().eval(), torch.randn(3, 5)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("which", FORMS)
def test_it_can_be_traced_by_torch_compile(which):
    """Traced and differentiated ahead of time; code generation is left out, for it takes long."""
    layer, x = make(16, 24), torch.randn(10, 24, requires_grad=True)
    with form(which):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager")
        y = compiled(x)
        y.sum().backward()
        found = [y, x.grad, layer.lora_A.grad, layer.lora_B.grad]
    exact = reference(layer, x, torch.ones_like(y))
    for value, wanted in zip(found, exact.values(), strict=True):
        assert relative_error(value, wanted) < 1e-5


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2, "dropout": 1.0}, {"dropout": -0.1}])
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options)) if len(options) == 1 else "dropout"):
        LoRALinear(nn.Linear(3, 3), **options)


def test_initialization_is_kaiming_and_zero():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 300), rank=64)
    assert not layer.lora_B.any()
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(400)
    assert layer.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert "rank=64" in repr(layer) and module.__doc__
