"""The Llama family in Hugging Face's folders, against `transformers`' own models."""

import copy
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import FileError, base_state, lora_layers
from models import LLAMA, llama
from models.checkpoint import checked_sizes, read_checkpoint, save_checkpoint
from models.huggingface import read_model, write_model
from models.llama import Llama, rope_frequencies
from ops.activations import swiglu
from trainer.loading import LoraOptions, build_model

CONTEXT = 64
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-3, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

LLAMA3 = {"factor": 7.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 3.3, "original_max_position_embeddings": 16}
YARN_SCALED = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 1.0, "beta_slow": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama of as many key heads": {"model_type": "llama", "num_key_value_heads": 4},
    "llama of one key head": {"model_type": "llama", "num_key_value_heads": 1},
    "llama with biases": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "linear": {"model_type": "llama", "rope": {"rope_type": "linear", "factor": 2.5}},
    "dynamic": {"model_type": "llama", "rope": {"rope_type": "dynamic", "factor": 2.5}},
    "llama3": {
        "model_type": "llama", "head_dim": 16,
        "rope": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3,
                 "original_max_position_embeddings": 32},
    },
    "yarn": {"model_type": "llama", "head_dim": 16, "rope": {"rope_type": "yarn", **YARN}},
    "yarn with mscale": {
        "model_type": "llama", "head_dim": 16, "rope": {"rope_type": "yarn", **YARN_SCALED},
    },
    "yarn with its factor": {
        "model_type": "qwen2", "head_dim": 16,
        "rope": {"rope_type": "yarn", **YARN, "truncate": False, "attention_factor": 1.7},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 16, "head_dim": 12},
    "mistral without window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "rope": {"rope_theta": 1e6}},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 with a window in upper layers": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen2 with a window in no layer": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
        "max_window_layers": 3,
    },
    "qwen2 with a window that is off": {
        "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16,
        "max_window_layers": 0,
    },
    "qwen2 with a window in listed layers": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "rope": {"rope_theta": 1e6}},
    "qwen3 with biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
}  # fmt: skip
WINDOWED = [
    "mistral", "qwen2 with a window in upper layers", "qwen2 with a window in listed layers",
]  # fmt: skip


def theirs(variant: str, **changes: object) -> transformers.PreTrainedModel:
    """A random model of transformers' in which every rule shows."""
    options = SIZES | VARIANTS[variant] | changes
    rope = {"rope_type": "default", "rope_theta": 100.0} | options.pop("rope", {})
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**options, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(1.0, 0.3)
            else:
                p.normal_(0.0, 0.2)
    return model


def save(model: transformers.PreTrainedModel, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    pieces.save(str(folder / "tokenizer.json"))
    return folder


def save_in(dtype: torch.dtype, model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Save in a lower precision, whose values become those of `model` in float32."""
    for p in model.parameters():  # and not the frequencies of rope, as model.to(dtype) would
        p.data = p.data.to(dtype).float()
    return save(copy.deepcopy(model).to(dtype), folder)


def change_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def make_old(folder: Path) -> None:
    """Write config.json as transformers 4 did."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    change_config(
        folder,
        rope_parameters=...,
        rope_theta=theta,
        rope_scaling=None if kind == "default" else rope | {"type": kind},
        torch_dtype=config["dtype"],
        dtype=...,
    )


def make_bin(folder: Path) -> None:
    """Write the weights as torch's own files, in as many shards as there are."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    for path in folder.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Set tensors of model.safetensors, whose names have `__` for a dot; None removes one."""
    path = folder / "model.safetensors"
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {n: t.clone() for n, t in (load_file(path) | changes).items() if t is not None}
    save_file(tensors, path)


def ours(folder: Path, lora: LoraOptions | None = None, **sizes: object) -> Llama:
    """Our model of a folder, of other `sizes` than config.json states where they are given."""
    base = read_model(folder)
    base = dataclasses.replace(base, sizes=dataclasses.replace(base.sizes, **sizes))
    return build_model(base.family, base.sizes, base, "cpu", lora=lora).eval()


def tokens(n: int, rows: int = 2) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (rows, n), generator=torch.manual_seed(1))


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def train_adapters(model: Llama) -> None:
    """Make B of every adapter other than 0."""
    torch.manual_seed(2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)


def mean_loss(logits: Tensor, idx: Tensor) -> Tensor:
    """Of each token given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())


# ---- logits


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_transformers_in_every_form_of_folder(variant, tmp_path):
    model = theirs(variant)
    new, old = tmp_path / "new", tmp_path / "old"
    save(model, new)
    save(model, old, max_shard_size="40KB")
    assert (old / "model.safetensors.index.json").exists()
    make_old(old)
    if "listed" in variant:
        change_config(old, layer_types=VARIANTS[variant]["layer_types"])
    idx = tokens(16 if variant in WINDOWED else CONTEXT)
    read = [ours(new), ours(old)]
    make_bin(new)
    make_bin(old)
    read += [ours(new), ours(old), ours(new, LoraOptions())]
    expected = model(idx).logits
    if variant.startswith("qwen2 with a window in"):
        assert read[0].block_size == (CONTEXT if "no layer" in variant else 16)
    for other in read:
        # 1e-5 for logits of size 1: attention in torch 2.8 rounds one variant 1.3e-5 apart.
        assert difference(other(idx)[0], expected) < 1e-5 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("variant", ["llama3", "yarn with mscale", "qwen3"])
@torch.no_grad()
def test_the_older_form_of_the_tests_is_read_by_transformers_too(variant, tmp_path):
    """Else the comparison above would show nothing."""
    model, idx = theirs(variant), tokens(CONTEXT)
    make_old(save(model, tmp_path))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(idx).logits, model(idx).logits)


def without_biases(*names: str):
    def change(model: Llama) -> None:
        for name, module in model.named_modules():
            if name.endswith(names):
                module.bias.zero_()

    return change


def without_qk_norm(model: Llama) -> None:
    for block in model.blocks:
        block.self_attn.q_norm = block.self_attn.k_norm = None


def with_one_norm_for_two(model: Llama) -> None:
    for block in model.blocks:
        block.self_attn.k_norm = block.self_attn.q_norm


def with_other_key_heads(model: Llama) -> None:
    """As if query head i read key head i % K, by putting the heads of queries in another order."""
    H, K = model.sizes.n_head, model.sizes.n_kv_head
    order = [i % K * (H // K) + i // K for i in range(H)]
    for block in model.blocks:
        q, o = block.self_attn.q_proj.weight, block.self_attn.o_proj.weight
        q.copy_(q.unflatten(0, (H, -1))[order].flatten(0, 1))
        o.copy_(o.unflatten(1, (H, -1))[:, order].flatten(1, 2))


WRONG = [  # sizes, numbers of the table of rope, or a change of the model
    ("llama", {"rope_theta": 1e4}),
    ("llama", {"norm_eps": 1e-6}),
    ("llama", with_other_key_heads),
    ("llama with biases", without_biases("q_proj")),
    ("llama with biases", without_biases("k_proj")),
    ("llama with biases", without_biases("v_proj")),
    ("llama with biases", without_biases("o_proj")),
    ("llama with biases", without_biases("gate_proj")),
    ("llama with biases", without_biases("up_proj")),
    ("llama with biases", without_biases("down_proj")),
    ("qwen2", without_biases("q_proj", "k_proj", "v_proj")),
    ("qwen3 with biases", without_biases("o_proj")),
    ("qwen3", without_qk_norm),
    ("qwen3", with_one_norm_for_two),
    ("linear", {"factor": 2.0}),
    ("linear", {"rope_type": "default"}),
    ("llama3", {"factor": 8.0}),
    ("llama3", {"low_freq_factor": 2.0}),
    ("llama3", {"high_freq_factor": 5.0}),
    ("llama3", {"original_max_position_embeddings": 64}),
    ("llama3", {"rope_type": "default"}),
    ("yarn", {"factor": 4.0}),
    ("yarn", {"original_max_position_embeddings": 64}),
    ("yarn", {"rope_type": "default"}),
    ("yarn", {"rope_type": "linear"}),
    ("yarn", {"attention_factor": 1.0}),
    ("yarn with mscale", {"mscale": 1.0}),
    ("yarn with mscale", {"mscale_all_dim": None}),
    ("yarn with mscale", {"beta_fast": None}),
    ("yarn with mscale", {"beta_slow": None}),
    ("yarn with its factor", {"attention_factor": None}),
    ("yarn with its factor", {"truncate": True}),
    *((name, {"block_size": CONTEXT}) for name in WINDOWED),
]


@pytest.mark.parametrize(("variant", "change"), WRONG)
@torch.no_grad()
def test_each_wrong_setting_would_show(variant, change, tmp_path):
    model = theirs(variant)
    save(model, tmp_path)
    right, idx = ours(tmp_path), tokens(CONTEXT)
    seen = idx[:, : right.block_size]
    assert difference(right(seen)[0], model(seen).logits) < 1e-5
    if callable(change):
        wrong = right
        change(wrong)
    else:
        names = {size.name for size in dataclasses.fields(LLAMA.sizes)}
        rope = right.sizes.rope | {n: value for n, value in change.items() if n not in names}
        sizes = {n: value for n, value in change.items() if n in names}
        wrong = ours(tmp_path, rope=rope, **sizes)
    seen = idx[:, : wrong.block_size]
    assert difference(wrong(seen)[0], model(seen).logits) > 1e-3


ODD_KEYS = [
    {"num_key_value_heads": ...},
    {"num_key_value_heads": None},
    {"head_dim": ...},
    {"rope_parameters": ...},
    {"rope_parameters": {}, "rope_theta": 300.0},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 300.0},
    {"rope_parameters": {"rope_theta": 200.0}, "rope_theta": 300.0},
    {"rope_parameters": {"rope_theta": 200.0}, "rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2}, "rope_theta": 300.0},
    {
        "rope_scaling": {"type": "yarn", **YARN},
        "rope_parameters": ...,
        "original_max_position_embeddings": 32,
    },
    {"tie_word_embeddings": ...},
    {"sliding_window": ...},
    {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 0},
    {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": ...},
    {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (kind, change)
        for kind in ("llama", "mistral", "qwen2", "qwen3")
        for change in ODD_KEYS
        if (kind, change) != ("mistral", {"num_key_value_heads": None})  # which it refuses
    ],
    ids=str,
)
def test_absent_and_doubled_keys_mean_what_they_mean_to_transformers(kind, change, tmp_path):
    config = SIZES | {"model_type": kind, "num_attention_heads": 64, "hidden_size": 256}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    config |= {"rms_norm_eps": 1e-3, "attention_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    change_config(tmp_path, **change)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    sizes = LLAMA.read_config(json.loads((tmp_path / "config.json").read_text()))
    assert sizes.n_kv_head == read.num_key_value_heads
    assert sizes.head_dim == getattr(read, "head_dim", 256 // 64)
    assert sizes.tied_head == read.tie_word_embeddings
    window = None if kind == "llama" else read.sliding_window
    if kind.startswith("qwen") and "sliding_attention" not in read.layer_types:
        window = None
    assert sizes.block_size == (window if window == 16 else CONTEXT)
    rope = rope_of(read)
    frequencies, factor = rope_frequencies(sizes)
    assert torch.allclose(frequencies, rope.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(rope.attention_scaling)


def rope_of(config: transformers.PreTrainedConfig) -> nn.Module:
    """The rope of transformers' model of this config."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    return type(model.rotary_emb)(config)


# ---- generation, cache, packed rows


@pytest.mark.parametrize(
    "variant", ["llama3", "mistral", "qwen2 with a window in upper layers", "qwen3"]
)
@torch.no_grad()
def test_greedy_text_is_that_of_transformers_with_and_without_cache(variant, tmp_path):
    """`generate` of transformers takes a token in the prompt that is its padding's for padding,
    unless it gets the mask."""
    model, prompt = theirs(variant), tokens(4)
    save(model, tmp_path)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(prompt)
    expected = model.generate(prompt, max_new_tokens=12, **options)  # 16 in all, as the window
    assert len(expected.unique()) > 6
    read = ours(tmp_path)
    for use_cache in (True, False):
        found = read.generate(prompt, 12, temperature=0, use_cache=use_cache)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", ["llama with biases", "yarn", "mistral", "qwen3"])
@pytest.mark.parametrize("lora", [None, LoraOptions()])
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(variant, lora, tmp_path):
    save(theirs(variant), tmp_path)
    model = ours(tmp_path, lora)
    train_adapters(model)
    idx, caches = tokens(16), model.new_caches()
    steps = [idx[:, :5], *idx[:, 5:].split(1, 1)]
    found = torch.cat([model(step, caches=caches)[0] for step in steps], 1)
    assert difference(found, model(idx)[0]) < 1e-5
    assert caches[0].keys.shape[1] == model.sizes.n_kv_head


@pytest.mark.parametrize("variant", ["llama of one key head", "llama3", "qwen2", "qwen3"])
@torch.no_grad()
def test_texts_in_one_row_are_as_each_alone(variant, tmp_path):
    model = theirs(variant)
    save(model, tmp_path)
    lengths = [7, 1, 19, 5]
    idx = tokens(sum(lengths))
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    found = ours(tmp_path)(idx, segments=segments)[0]
    alone = torch.cat([model(part).logits for part in idx.split(lengths, 1)], 1)
    assert difference(found, alone) < 1e-5
    assert difference(found, model(idx).logits) > 1e-2


# ---- gradients

TRAINED = ["llama with biases", "yarn", "mistral", "qwen2, tied", "qwen3"]


@pytest.mark.parametrize("variant", TRAINED)
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_gradients_of_full_fine_tuning_are_those_of_transformers(
    variant, grad_checkpoint, tmp_path
):
    model, idx = theirs(variant), tokens(16)
    save(model, tmp_path)
    mean_loss(model(idx).logits, idx).backward()
    read = ours(tmp_path)
    read.grad_checkpoint = grad_checkpoint
    mean_loss(read(idx)[0], idx).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in read.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert relative_error(grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("variant", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_gradients_of_adapters_are_those_of_autograd_on_transformers_model(
    variant, dtype, grad_checkpoint, tmp_path
):
    """There each linear's weight is W + s B A, made by autograd's own operations."""
    model, idx = theirs(variant), tokens(16)
    save_in(dtype, model, tmp_path)
    read = ours(tmp_path, LoraOptions(rank=3, alpha=5.0))
    train_adapters(read)
    read.grad_checkpoint = grad_checkpoint
    logits = read(idx)[0]
    mean_loss(logits, idx).backward()

    # Tied, the head is W of the embedding before it trained, and an adapter.
    weights = {n: p.detach().clone() for n, p in model.state_dict(keep_vars=True).items()}
    leaves = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"].requires_grad_()}
    for name, layer in lora_layers(read).items():
        A, B = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B))
        leaves |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        weights[f"{name}.weight"] = weights[f"{name}.weight"].detach() + layer.scaling * B @ A
    expected = torch.func.functional_call(model, weights, (idx,), tie_weights=False).logits
    assert difference(logits, expected) < 3e-5
    mean_loss(expected, idx).backward()
    found = {name: p.grad for name, p in read.named_parameters() if p.requires_grad}
    assert found.keys() == leaves.keys()
    for name, grad in found.items():
        assert relative_error(grad, leaves[name].grad) < 1e-4, name


def test_the_gradient_of_swiglu_is_autograds():
    gate, up = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    grad = torch.randn(3, 5, 7, dtype=torch.float64)
    found = torch.autograd.grad(swiglu(gate, up), [gate, up], grad)
    expected = torch.autograd.grad(F.silu(gate) * up, [gate, up], grad)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)


# ---- precision


@pytest.mark.parametrize("variant", ["llama with biases", "mistral", "qwen2, tied", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_to_bfloat16_is_close_to_float32(variant, dtype, tmp_path):
    """Of 8 bits of precision: logits within 3%, gradients of A and B within 10%."""
    save_in(dtype, theirs(variant), tmp_path)
    model, idx = ours(tmp_path, LoraOptions()), tokens(16)
    train_adapters(model)
    results = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            logits = model(idx)[0]
        mean_loss(logits.float(), idx).backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        results.append((logits, torch.cat([p.grad.flatten() for p in trained.values()])))
        model.zero_grad()
    (logits, gradients), (rough, rough_gradients) = results
    assert rough.dtype == torch.bfloat16 and not torch.equal(rough, logits)
    assert relative_error(rough, logits) < 0.03
    assert relative_error(rough_gradients, gradients) < 0.1


def test_normalized_queries_and_keys_stay_in_the_dtype_of_the_product(tmp_path, monkeypatch):
    """Else attention in bfloat16 would take float32, at twice the memory."""
    save(theirs("qwen3"), tmp_path)
    seen = []
    attention = llama.causal_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> Tensor:
        seen.extend([q.dtype, k.dtype, v.dtype])
        return attention(q, k, v, *rest, **options)

    monkeypatch.setattr(llama, "causal_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        ours(tmp_path)(tokens(8))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("llama with biases", torch.float32),
        ("llama with biases", torch.bfloat16),
        ("mistral", torch.float16),
        ("qwen2, tied", torch.bfloat16),
        ("qwen3", torch.float32),
        ("qwen3", torch.bfloat16),
    ],
)
@torch.no_grad()
def test_the_adapted_model_is_its_base_to_the_bit_before_the_first_step(variant, dtype, tmp_path):
    """Also where some of the linears that share an input are adapted and some not. The MLP is a
    multiple of 32 wide, as published ones are: of others torch's silu rounds a view's otherwise."""
    model = theirs(variant)
    save_in(dtype, model, tmp_path)
    base = ours(tmp_path)
    for targets in (None, ["q_proj", "up_proj"], ["o_proj"], ["lm_head"]):
        options = LoraOptions(targets=targets, train_embeddings=targets is None)
        adapted = ours(tmp_path, options)
        for n in (1, 5, 16):
            logits = adapted(tokens(n))[0]
            assert torch.equal(logits, base(tokens(n))[0])
            assert difference(logits, model(tokens(n)).logits) < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_frozen_lies_in_the_mapped_file_in_its_dtype(kind, dtype, tmp_path):
    save(theirs("llama").to(dtype), tmp_path, max_shard_size="40KB")
    if kind == "bin":
        make_bin(tmp_path)
    model = ours(tmp_path, LoraOptions(train_embeddings=False))
    model(tokens(8))[0].sum().backward()
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if kind in line]
    for name, p in model.named_parameters():
        mapped = any(start <= p.data_ptr() < end for start, end in ranges)
        assert mapped != p.requires_grad, name
        assert p.dtype == (torch.float32 if p.requires_grad else dtype), name


def test_training_what_lies_in_a_mapped_file_leaves_the_file_as_it_is(tmp_path):
    path = save(theirs("llama"), tmp_path) / "model.safetensors"
    before = path.read_bytes()
    model = ours(tmp_path, LoraOptions())
    model.model.embed_tokens.weight.data.fill_(1.0)
    assert path.read_bytes() == before


def test_full_fine_tuning_of_a_bfloat16_folder_trains_float32(tmp_path):
    save_in(torch.bfloat16, theirs("qwen2, tied"), tmp_path)
    model = ours(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters()) and model.tied_head


@pytest.mark.parametrize("targets", [None, ["o_proj"], ["q_proj", "v_proj"]])
@pytest.mark.parametrize("variant", ["llama with biases", "qwen3"])
def test_no_float32_copy_of_a_frozen_weight_is_kept_for_backward(variant, targets, tmp_path):
    save_in(torch.bfloat16, theirs(variant), tmp_path)
    model = ours(tmp_path, LoraOptions(targets=targets, train_embeddings=False))
    frozen = {p.shape for p in model.parameters() if not p.requires_grad and p.dim() == 2}
    frozen |= {torch.Size(reversed(shape)) for shape in frozen}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(tokens(7))[0].sum().backward()
    assert any(t.shape in frozen for t in kept)
    assert not [t.shape for t in kept if t.dtype == torch.float32 and t.shape in frozen]


# ---- what a folder may have


@torch.no_grad()
def test_names_without_prefix_and_rope_of_old_files_are_read(tmp_path):
    model, idx = theirs("llama"), tokens(CONTEXT)
    path = save(model, tmp_path) / "model.safetensors"
    tensors = {name.removeprefix("model."): t for name, t in load_file(path).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path)
    assert difference(ours(tmp_path)(idx)[0], model(idx).logits) < 1e-5


@pytest.mark.parametrize("prefix", ["model.", ""])
@torch.no_grad()
def test_a_head_beside_a_tied_config_is_tied_only_where_it_is_the_embedding(prefix, tmp_path):
    model, idx = theirs("qwen2, tied"), tokens(CONTEXT)
    save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    plain = {prefix + name.removeprefix("model."): t for name, t in load_file(path).items()}
    embedding = plain[f"{prefix}embed_tokens.weight"]

    save_file(plain | {"lm_head.weight": embedding.clone()}, path)
    base = read_model(tmp_path)
    assert base.sizes.tied_head and ours(tmp_path).tied_head
    assert difference(ours(tmp_path)(idx)[0], model(idx).logits) < 1e-5

    save_file(plain | {"lm_head.weight": embedding.flip(0)}, path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    apart = ours(tmp_path)
    assert not apart.tied_head and not apart.sizes.tied_head
    assert difference(apart(idx)[0], read(idx).logits) < 1e-5
    assert difference(apart(idx)[0], model(idx).logits) > 1e-2
    write_model(tmp_path / "out", read_model(tmp_path))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


CONFIGS = [
    *(({"model_type": kind}, rf"model_type '?{kind}'? is not supported; supported are .*qwen3")
      for kind in ("gemma", "gemma2", "phi3", "mixtral", "qwen3_moe", "llama4", None)),
    ({"model_type": ...}, "model_type None is not supported"),
    ({"model_type": ["llama"]}, "model_type .* is not supported"),
    ({"quantization_config": {"quant_method": "awq"}},
     "quantization_config .* accepted: weights in float32, bfloat16 or float16"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ({"hidden_act": ["silu"]}, "hidden_act .* is not supported, only 'silu'"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
     "rope of type 'longrope' is not supported, only default, linear, dynamic, llama3, yarn"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2]}}, "rope of type 'mrope'"),
    ({"rope_scaling": {"type": "default", "mrope_section": [2, 2]}}, "mrope_section, supported"),
    ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope of type \['linear'\]"),
    ({"rope_parameters": {"rope_type": {"a": 1}}}, "table for each kind of layer"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor, supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor, supported"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
     "rope has a table for each kind of layer, supported is one for all"),
    ({"rope_parameters": [1]}, r"parameters of rope are \[1\], not a table"),
    ({"rope_scaling": "linear"}, "parameters of rope are 'linear', not a table"),
    ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta of rope is '10000', not a number"),
    *(({"rope_parameters": {"rope_theta": theta}}, "rope_theta of rope is .*, not a number above 1")
      for theta in (0, -5.0, 1, True, float("nan"), float("inf"), 10**400, [1])),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor of rope is None, not a number above 0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor of rope is 0, not a"),
    ({"rope_parameters": {"rope_type": "llama3", **LLAMA3}},
     "original_max_position_embeddings of rope is None"),
    ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0,
                          "original_max_position_embeddings": 16}},
     "low_freq_factor of rope is not below high_freq_factor"),
    *(({"rope_parameters": {"rope_type": "yarn", **YARN, name: "1"}}, f"{name} of rope is '1'")
      for name in ("factor", "original_max_position_embeddings", "attention_factor", "mscale",
                   "mscale_all_dim", "beta_fast", "beta_slow", "truncate")),
    *(({name: ...}, f"{name} is None, not a ")
      for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                   "num_attention_heads", "max_position_embeddings", "rms_norm_eps")),
    *(({name: value}, f"{name} is .*, not a whole number from 1 to 16777216")
      for name in ("vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim",
                   "num_key_value_heads", "max_position_embeddings")
      for value in ("8", 0, -1, 8.0, True, [8], 10**9, 10**400)),
    *(({"rms_norm_eps": value}, "rms_norm_eps is .*, not a number between 0 and 1")
      for value in ("1e-5", 0.0, -1e-5, 1, True, float("nan"))),
    ({"num_attention_heads": 6, "head_dim": None}, "hidden_size is not a multiple of"),
    ({"num_key_value_heads": 3}, "4 heads do not share 3 of keys evenly"),
    ({"head_dim": 7}, "head_dim=7 is odd"),
    ({"num_attention_heads": 2**20, "head_dim": 2**20, "num_key_value_heads": 1},
     "num_attention_heads . head_dim is 1099511627776, not"),
    *(({name: 1}, f"{name} is 1, neither true nor false")
      for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")),
    ({"model_type": "mistral", "sliding_window": "16"}, "sliding_window is '16', not"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, not"),
    ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window is 'no', neither"),
    ({"model_type": "qwen2", "max_window_layers": "1"}, "max_window_layers is '1', not"),
    ({"model_type": "qwen2", "layer_types": 3}, "layer_types is 3, supported are full_att"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"] * 90},
     "layer_types is .*, supported are full_attention, sliding_attention"),
    ({"num_hidden_layers": 2**24}, "30 tensors are too few for 16777216 layers"),
    ({"vocab_size": 2**24, "hidden_size": 2**24}, "weight has shape .*16777216, 16777216"),
]  # fmt: skip


def read_refused(folder: Path) -> str:
    """The error of a folder that must be refused, in one line."""
    with pytest.raises(FileError) as error:
        build_model(LLAMA, (base := read_model(folder)).sizes, base, "cpu")
    message = str(error.value)
    assert str(folder) in message and "\n" not in message and len(message) < 400
    return message


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    return save(theirs("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama_folder, tmp_path) -> Path:
    """A copy of a Llama's folder."""
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=lambda value: str(value)[:60])
def test_a_config_that_is_not_supported_is_refused_by_name(change, message, folder):
    change_config(folder, **change)
    assert re.search(message, read_refused(folder))


ATTENTION = "model__layers__0__self_attn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__norm__weight": None}, "lacks tensor model.norm.weight$"),
        ({"lm_head__weight": None}, "lacks tensor lm_head.weight$"),
        ({f"{ATTENTION}__q_proj__bias": torch.ones(32)}, "unexpected tensor .*q_proj.bias$"),
        ({f"{ATTENTION}__q_norm__weight": torch.ones(8)}, "unexpected tensor .*q_norm.weight$"),
        ({"norm__weight": torch.ones(32)}, "unexpected tensor norm.weight$"),
        ({f"{ATTENTION}__k_proj__weight": torch.ones(32, 32)}, r"\(32, 32\), the model's .*\(16"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int32)}, "is torch.int32, not float"),
        ({"model__norm__weight": torch.full((32,), torch.nan)}, "norm.weight holds numbers that"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_missing_left_over_and_wrong_tensors_are_refused_by_name(change, message, folder):
    change_tensors(folder, **change)
    assert re.search(message, read_refused(folder))


NAME = "model.norm.weight"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {NAME: "../x.safetensors"}}, "'../x.safetensors', which is no file of wei"),
        ({"weight_map": {NAME: "/etc/x.safetensors"}}, "'/etc/x.safetensors', which is no file of"),
        ({"weight_map": {NAME: "config.json"}}, "'config.json', which is no file of weights"),
        ({"weight_map": {NAME: "none.safetensors"}}, "'none.safetensors', which is not in the fol"),
        ({"weight_map": {NAME: "a\nb.safetensors"}}, "which is not in the folder"),
        ({"weight_map": {"a\nb": "part.safetensors"}}, "which its file lacks"),
        ({"weight_map": {NAME: "part.safetensors"}}, "1 tensors are too few for 3 layers"),
        ({"weight_map": {NAME: 3}}, "no weight_map from tensors to files"),
        ({"weight_map": [NAME]}, "no weight_map from tensors to files"),
        ({"weight_map": {}}, "0 tensors are too few for 3 layers"),
        ({}, "no weight_map from tensors to files"),
        ([], "holds no JSON object"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_index_that_names_what_is_not_in_the_folder_is_refused(index, message, folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder.parent / "x.safetensors").write_bytes((folder / "part.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in read_refused(folder)


def test_a_tensor_is_of_the_file_that_the_index_names(folder):
    """Whatever other files of the folder have under its name, the first of them and the last."""
    whole = folder / "model.safetensors"
    expected = load_file(whole)
    whole.unlink()
    weight_map = {name: f"{'abc'[i % 3]}.safetensors" for i, name in enumerate(sorted(expected))}
    for file in set(weight_map.values()):
        mine = {n: t if weight_map[n] == file else t + 1 for n, t in expected.items()}
        save_file(mine, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = read_model(folder).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# ---- checkpoint files


def test_a_checkpoint_file_keeps_sizes_and_weights(tmp_path):
    save(theirs("yarn"), tmp_path)
    model = ours(tmp_path)
    save_checkpoint(tmp_path / "file.pt", model, {}, read_model(tmp_path))
    base = read_checkpoint(tmp_path / "file.pt")
    assert base.sizes == model.sizes and base.family is LLAMA
    read = build_model(LLAMA, base.sizes, base, "cpu")
    for name, tensor in base_state(read).items():
        assert torch.equal(tensor, base_state(model)[name])


@pytest.mark.parametrize(
    "change",
    [
        {"rope": {}}, {"rope": {"rope_type": "longrope", "rope_theta": 1e4}},
        {"rope": {"rope_type": "linear", "rope_theta": 1e4}}, {"norm_eps": 2.0}, {"head_dim": 3},
        {"n_kv_head": 3}, {"n_layer": 0}, {"tied_head": 1}, {"rope": None},
    ],
)  # fmt: skip
def test_sizes_of_a_damaged_checkpoint_are_refused(change, llama_folder):
    values = dataclasses.asdict(read_model(llama_folder).sizes)
    checked_sizes(LLAMA, values)
    with pytest.raises((TypeError, ValueError)):
        checked_sizes(LLAMA, values | change)
