"""The model: the guide's constructor and snippets, parameter counts, causality, dropout."""

import importlib
import math

import pytest
import torch
from conftest import DEVICES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora import LoRALinear, lora_layers, store_base
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.language_model import sample
from models.llama import Llama
from ops.dropout import dropout

SHAPES = [(256, 32, 16, 2, 2), (65, 48, 8, 3, 1), (300, 64, 20, 4, 3)]


def make(shape=SHAPES[0], **options) -> BigramLanguageModelLoRA:
    vocab_size, n_embd, block_size, n_head, n_layer = shape
    torch.manual_seed(0)
    options = {"dropout": 0.0, "device": "cpu"} | options
    return BigramLanguageModelLoRA(
        vocab_size=vocab_size, n_embd=n_embd, block_size=block_size, n_head=n_head,
        n_layer=n_layer, **options,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 13])
def test_parameter_counts_are_those_of_the_shapes(shape, rank):
    V, C, T, _, L = shape
    linears = 4 * (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C)
    base = L * (linears + 4 * C) + 2 * C + V * C
    embedding = (V + T) * C
    adapters = L * rank * (4 * 2 * C + 2 * 5 * C) + rank * (C + V)

    info = make(shape, use_lora=True, lora_rank=rank).get_parameter_info()
    assert info["lora"] == adapters and info["embedding"] == embedding
    assert info["trainable"] == adapters + embedding and info["frozen"] == base
    assert info["total"] == info["trainable"] + info["frozen"]
    assert info["lora_percentage"] == pytest.approx(100 * info["trainable"] / info["total"])

    info = make(shape).get_parameter_info()
    assert info["total"] == info["trainable"] == base + embedding
    assert info["frozen"] == info["lora"] == 0 and info["lora_percentage"] == 100.0


def test_the_default_model_has_3_3_million_parameters():
    assert 3.2e6 < make((256, 256, 128, 4, 4)).get_parameter_info()["total"] < 3.4e6


def test_every_linear_is_adapted_and_only_adapters_and_embeddings_train():
    model = make(use_lora=True)
    names = {name.rpartition(".")[2] for name in lora_layers(model)}
    assert names == {"key", "query", "value", "proj", "fc_in", "fc_out", "lm_head"}
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert linears == [] and len(lora_layers(model)) == 2 * 6 + 1
    for name, parameter in model.named_parameters():
        trains = name.endswith(("lora_A", "lora_B")) or "embedding_table" in name
        assert parameter.requires_grad == trains, name


@pytest.mark.parametrize("targets", [["query", "value"], ["lm_head"], "fc_in"])
@pytest.mark.parametrize("train_embeddings", [True, False])
def test_layers_and_embeddings_to_train_can_be_chosen(targets, train_embeddings):
    model = make(use_lora=True, lora_targets=targets, train_embeddings=train_embeddings)
    named = [targets] if isinstance(targets, str) else targets
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == set(named)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tables = {name for name in trained if "embedding_table" in name}
    assert len(tables) == (2 if train_embeddings else 0)
    assert trained - tables == {
        f"{name}.{part}" for name in lora_layers(model) for part in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_never_merged_are_kept_in_bfloat16_and_change_nothing(tied):
    """Frozen linears too that have no adapter, unless the embedding, which trains, is the same."""
    before, after = (
        make((256, 64, 16, 2, 2), use_lora=True, lora_targets=["query"], tied_head=tied)
        for _ in range(2)
    )
    if tied:
        for model in (before, after):
            model.lm_head.weight = model.token_embedding_table.weight
    store_base(after, torch.bfloat16, tokens=32)
    kept = {name for name, m in after.named_modules() if getattr(m, "weight", None) is not None
            and m.weight.dtype == torch.bfloat16}  # fmt: skip
    assert {"blocks.0.attn.key", "blocks.1.mlp.fc_out"} < kept
    assert ("lm_head" in kept) != tied and "token_embedding_table" not in kept
    idx = torch.randint(256, (2, 16))
    losses = []
    for model in (before, after):
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = model(idx, idx)
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_a_weight_that_was_cast_leaves_the_memory_of_its_file(monkeypatch):
    released = []
    monkeypatch.setattr("lora.inject.release", released.append)
    model = make(use_lora=True)
    before = {layer.weight.data_ptr() for layer in lora_layers(model).values()}
    store_base(model, torch.bfloat16, 4)
    assert {tensor.data_ptr() for tensor in released} == before and before
    store_base(model, torch.bfloat16, 4)
    assert len(released) == len(before)


def test_an_adapted_model_starts_as_its_base_to_the_bit():
    base, adapted = make(), make(use_lora=True)
    adapted.load_state_dict(base.state_dict(), strict=False)
    idx = torch.randint(256, (2, 16))
    assert torch.equal(base(idx)[0], adapted(idx)[0])


def test_the_guides_snippets_run(tmp_path):
    model = make(use_lora=True, lora_rank=8, lora_alpha=16.0)
    info = model.get_parameter_info()
    assert f"{info['trainable']:,} ({info['lora_percentage']:.2f}%)" == "20,224 (37.53%)"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    lora_state = {
        name: param
        for name, param in model.named_parameters()
        if "lora" in name and param.requires_grad
    }
    torch.save(lora_state, tmp_path / "lora_weights.pt")
    other = make(use_lora=True, lora_rank=8, lora_alpha=16.0)
    lora_state = torch.load(tmp_path / "lora_weights.pt")
    result = other.load_state_dict(lora_state, strict=False)
    assert result.unexpected_keys == []
    idx = torch.randint(256, (2, 16))
    assert torch.equal(model(idx)[0], other(idx)[0])


def test_loss_is_the_mean_cross_entropy():
    model, idx = make(), torch.randint(256, (3, 16))
    targets = torch.randint(256, (3, 16))
    logits, loss = model(idx, targets)
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert logits.shape == (3, 16, 256)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model(idx)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_position_sees_a_later_one(dtype):
    model = make().eval()
    a = torch.randint(256, (1, 16))
    b = a.clone()
    b[0, 9:] = (b[0, 9:] + 1) % 256
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        first, second = model(a)[0], model(b)[0]
    assert torch.equal(first[0, :9], second[0, :9])
    assert not torch.equal(first[0, 9], second[0, 9])


def test_generate_continues_and_restores_the_mode():
    model = make(dropout=0.5).train()
    idx = torch.randint(256, (2, 3))
    out = model.generate(idx, max_new_tokens=30, temperature=0.0, top_k=None)
    assert out.shape == (2, 33) and torch.equal(out[:, :3], idx) and model.training
    expected = idx
    model.eval()
    seen = idx
    for _ in range(30):  # the likeliest next token, again and again
        seen = seen[:, -8:] if seen.shape[1] > 16 else seen  # full: on from the last half
        new = model(seen)[0][:, -1].argmax(-1, keepdim=True)
        seen, expected = torch.cat([seen, new], 1), torch.cat([expected, new], 1)
    assert torch.equal(out, expected)
    assert torch.equal(model.generate(idx, 30, temperature=0.0, use_cache=False), expected)
    assert torch.equal(model.generate(idx, 5, temperature=1.0, top_k=1), expected[:, :8])
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(idx[:, :0], 1)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "weights"),
    [
        (1.0, None, None, [4, 3, 2, 1]),
        (0.5, None, None, [16, 9, 4, 1]),
        (1.0, 2, None, [4, 3, 0, 0]),
        (1.0, 9, None, [4, 3, 2, 1]),  # more than there are
        (1.0, None, 0.39, [4, 0, 0, 0]),
        (1.0, None, 0.41, [4, 3, 0, 0]),  # the fewest that have as much together
        (1.0, None, 0.71, [4, 3, 2, 0]),
        (1.0, 3, 0.75, [4, 3, 0, 0]),  # top_p of what top_k leaves
    ],
)
def test_tokens_are_sampled_at_their_rates(temperature, top_k, top_p, weights):
    """Within 4.5 standard errors, and never where the rate is 0; the likeliest is not the first."""
    torch.manual_seed(2)
    n, order = 4000, [2, 0, 3, 1]
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[order].expand(n, 4)
    found = sample(logits, temperature, top_k, top_p).flatten().bincount(minlength=4) / n
    for rate, i in zip(found.tolist(), order, strict=True):
        expected = weights[i] / sum(weights)
        assert abs(rate - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_training_in_low_precision_follows_float32(device, use_lora, low):
    """Losses of 100 steps from the same start on the same batches, averaged over 20 steps, differ
    by less than 0.03 nats all along, while they fall by more than a nat."""
    curves = []
    for dtype in (torch.float32, low):
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        model = make((64, 64, 32, 4, 1), use_lora=use_lora, lora_rank=16, device=device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(64, (60,), generator=generator).repeat(9)  # 60 tokens by heart
        losses = []
        for _ in range(100):
            starts = torch.randint(len(text) - 33, (6,), generator=generator)
            batch = torch.stack([text[i : i + 33] for i in starts]).to(device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                _, loss = model(batch[:, :-1], batch[:, 1:])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses).view(-1, 20).mean(1))
    assert curves[0][0] - curves[0][-1] > 1.0
    assert (curves[0] - curves[1]).abs().max() < 0.03


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd=32 is not divisible by n_head=5"):
        make((256, 32, 16, 5, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("device", DEVICES)
def test_dropout_keeps_elements_at_its_rate_independently(device, dtype, p):
    """Keep rate and pairwise agreement of neighbours within 4.5 standard errors."""
    torch.manual_seed(1)
    n = 2**20
    kept = dropout(torch.ones(n, dtype=dtype, device=device), p, training=True) != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 4.5 * math.sqrt(p * (1 - p) / n)
    for lag in (1, 2, 3, 4, 7, 64):
        both = (kept[lag:] & kept[:-lag]).double().mean().item()
        q = (1 - p) ** 2
        assert abs(both - q) < 4.5 * math.sqrt(q * (1 - q) / n), lag
    x = torch.randn(n, dtype=dtype, device=device)
    scaled = dropout(x, p, training=True)
    survivors = scaled != 0
    expected = x[survivors].float() / (1 - p)
    torch.testing.assert_close(scaled[survivors].float(), expected, rtol=2**-7, atol=0)


def test_dropout_is_seeded_differentiable_and_off_in_eval():
    x = torch.randn(5, 7, 3, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(x, 0.4, training=True)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.4, training=True))
    assert not torch.equal(first, dropout(x, 0.4, training=True))
    first.sum().backward()
    expected = torch.where(first != 0, 1 / 0.6, 0.0)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=0)  # p is exact to 1/65536
    assert dropout(x, 0.4, training=False) is x
    assert dropout(x, 0.9999999, training=True).isfinite().all()  # the rarest that 16 bits hold
    assert dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_is_where_the_model_says(kind, p, monkeypatch):
    """On the attention's weights, on what each half of a block adds, and on GPT-2's embeddings:
    zeros at the rate p, within 4.5 standard errors. Elsewhere there are none."""
    if kind == "gpt2":
        model = make((256, 64, 16, 2, 1), dropout=p)
        norms = [model.blocks[0].ln_1, model.blocks[0].ln_2, model.ln_f]
    else:
        sizes = {"vocab_size": 256, "n_embd": 64, "block_size": 16, "n_head": 2, "n_layer": 1}
        sizes |= {"n_kv_head": 1, "head_dim": 16, "n_inner": 64, "max_positions": 16}
        torch.manual_seed(0)
        model = Llama(**sizes, device="cpu", dropout=p)
        block = model.blocks[0]
        norms = [block.input_layernorm, block.post_attention_layernorm, model.model.norm]
    stream, rates = [], []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, x: stream.append(x[0]))
    module = importlib.import_module(type(model).__module__)
    attention = module.causal_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, rate: float, training: bool, *rest, **options):
        rates.append((rate, training))
        return attention(q, k, v, rate, training, *rest, **options)

    monkeypatch.setattr(module, "causal_attention", recorded)
    idx = torch.randint(256, (8, 16))
    for training in (True, False):
        stream.clear()
        model.train(training)(idx)
        assert rates.pop() == (p, training)
        entered, between, left = stream
        for i, added in enumerate((entered, between - entered, left - between)):
            expected = p if training and (kind == "gpt2" or i > 0) else 0.0
            n = added.numel()
            found = (added == 0).double().mean().item()
            assert abs(found - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / n) + 1e-3


def test_weights_start_as_gpt2s():
    """Normal with a deviation of 0.02, by depth less where a block ends; and zero biases."""
    model = make((256, 128, 64, 2, 3))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            ends = name.endswith(("attn.proj.weight", "mlp.fc_out.weight"))
            expected = 0.02 / math.sqrt(2 * 3) if ends else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_a_copied_head_stays_as_it_is_where_the_embedding_trains():
    model = make(use_lora=True, tied_head=True)
    head = model.lm_head.weight.clone()
    assert torch.equal(head, model.token_embedding_table.weight) and model.copied_head
    with torch.no_grad():
        model.token_embedding_table.weight += 1
    assert torch.equal(model.lm_head.weight, head)


def test_lora_linear_is_importable_from_lora():
    assert LoRALinear.__module__ == "lora.linear"


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_cached_logits_are_those_without_a_cache(device, use_lora):
    """Within 1e-5 of the largest logit, in float32, at every length."""
    model = make(use_lora=use_lora, device=device).eval()
    idx = torch.randint(256, (2, 16), device=device)
    with torch.no_grad():
        whole, _ = model(idx)
        for prompt, step in ((1, 1), (5, 1), (1, 5)):
            caches = model.new_caches()
            parts = [model(idx[:, :prompt], caches=caches)[0]]
            starts = range(prompt, 16, step)
            parts += [model(idx[:, i : i + step], caches=caches)[0] for i in starts]
            assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
        with pytest.raises(ValueError, match="more than block_size"):
            model(idx[:, :1], caches=caches)
        for cache in caches:
            cache.truncate(3)
        again = model(idx[:, 3:], caches=caches)[0]
        assert (again - whole[:, 3:]).abs().max() < 1e-5 * whole.abs().max()
        last = model(idx, last=True)[0]
        assert last.shape == (2, 1, 256)
        assert (last - whole[:, -1:]).abs().max() < 1e-5 * whole.abs().max()


def test_gradients_of_norms_are_not_added_up_in_bfloat16():
    """Within 2% of float32's: torch's sums of so many tokens in bfloat16 are up to 14% off."""
    model = make((256, 32, 64, 2, 2))
    idx = torch.randint(256, (64, 64))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, loss = model(idx, idx.roll(-1, 1))
        norms = [p for n, p in model.named_parameters() if "ln_" in n]
        found.append(torch.autograd.grad(loss, norms))
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"use_lora": True, "lora_dropout": 0.1}])
def test_a_model_with_dropout_compiles_as_one_graph(options):
    """Traced and differentiated ahead of time; code generation is left out, for it takes long."""
    model = make((256, 32, 16, 2, 1), dropout=0.2, **options)
    torch._dynamo.reset()
    idx = torch.randint(256, (2, 16))
    _, loss = torch.compile(model, backend="aot_eager", fullgraph=True)(idx, idx)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class ProductsWith(TorchDispatchMode):
    """Counts the matrix products that have any of these weights as a factor."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.n = {weight.data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        factors = [t.data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)]
        self.n += "mm" in function.__name__ and not self.weights.isdisjoint(factors)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [8, 1100])  # in two paths, and merged
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_computes_all_but_a_blocks_last_product_again(family, tokens):
    torch.manual_seed(0)
    if family == "gpt2":
        model, first, last = make((256, 32, 1100, 2, 2), use_lora=True), "proj", "fc_out"
    else:
        model = Llama(
            vocab_size=64, n_embd=32, block_size=1100, n_head=2, n_layer=2, n_kv_head=1,
            head_dim=16, n_inner=64, max_positions=1100, device="cpu",
        )  # fmt: skip
        model.adapt(8, 16.0, 0.0, None, train_embeddings=False)
        first, last = "o_proj", "down_proj"
    layers = lora_layers(model)
    idx = torch.randint(64, (1, tokens))
    found = {}
    for model.grad_checkpoint in (False, True):
        for name in (first, last):
            chosen = [layer for full, layer in layers.items() if full.endswith(name)]
            model.zero_grad()
            # A merged weight is a new tensor, but made of the adapter.
            with ProductsWith([t for m in chosen for t in (m.weight, m.lora_B)]) as products:
                model(idx, idx)[1].backward()
            found[model.grad_checkpoint, name] = products.n
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found[model.grad_checkpoint, "gradients"] = gradients
    assert found[True, last] == found[False, last] > 0
    assert found[True, first] > found[False, first]
    for ours, plain in zip(found[True, "gradients"], found[False, "gradients"], strict=True):
        assert torch.equal(ours, plain)
