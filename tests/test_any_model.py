"""LoRA on models that are not ours: transformers' architectures, shared and tied linears."""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from files.tensors import fingerprint
from lora import (
    FileError,
    LoRALinear,
    add_lora,
    combine_adapters,
    load_adapter,
    lora_layers,
    merge_adapter,
    read_adapter,
    save_adapter,
    switch_adapter,
    take_adapter,
    unmerge_adapter,
    write_peft,
)

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16,
}  # fmt: skip
DECODER = TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": False}
IDS = torch.arange(32).view(2, 16)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
LABELS = torch.tensor([0, 1])


def test_lora_ops_and_files_are_all_that_another_project_needs(tmp_path):
    packages = ("lora", "ops", "files")
    for package in packages:
        shutil.copytree(ROOT / package, tmp_path / package)
    code = "import lora, ops, files; print(lora.__file__, ops.__file__, files.__file__)"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    paths = [str(tmp_path / package / "__init__.py") for package in packages]
    assert process.stdout.split() == paths, process.stderr


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DECODER | options))


def qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**DECODER))


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TEXT))


def vit():
    torch.manual_seed(0)
    config = {n: v for n, v in TEXT.items() if n not in ("vocab_size", "max_position_embeddings")}
    return ViTForImageClassification(ViTConfig(**config, image_size=16, patch_size=8))


# The model, its inputs, the modules to adapt (None: every linear), and one that is trained whole.
DECODERS = {"input_ids": IDS, "labels": IDS}
MODELS = {
    "llama": (llama, DECODERS, None, "model.embed_tokens"),
    "qwen2": (qwen2, DECODERS, ["q_proj", "v_proj", "model.layers.1.mlp.up_proj"], "model.norm"),
    "bert": (bert, {"input_ids": IDS, "labels": LABELS}, ["query", "value"], "classifier"),
    "vit": (vit, {"pixel_values": PIXELS, "labels": LABELS}, None, None),
}


def train(model, inputs, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def alike(one: torch.Tensor, two: torch.Tensor, tolerance=1e-5) -> bool:
    return ((one - two).norm() < tolerance * two.norm()).item()


def into_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers'
        return PeftModel.from_pretrained(model, str(folder))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_trains_saves_and_goes_to_peft(tmp_path, name):
    build, inputs, targets, whole = MODELS[name]
    model = build()
    base, plain = fingerprint(model.state_dict()), logits(model, inputs)
    names = add_lora(model, rank=4, alpha=8.0, targets=targets)
    assert names and torch.equal(logits(model, inputs), plain)
    if whole is not None:
        model.get_submodule(whole).requires_grad_(True)
    train(model.train(), inputs)
    expected = logits(model, inputs)
    assert not alike(expected, plain, 1e-2)

    save_adapter(tmp_path / "a.pt", model, base, {"step": 3})
    again = build()
    add_lora(again, rank=2, targets=targets)
    if whole is not None:
        again.get_submodule(whole).requires_grad_(True)
    load_adapter(tmp_path / "a.pt", again, base)
    assert torch.equal(logits(again, inputs), expected)

    task = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "bert": "SEQ_CLS"}.get(name)
    write_peft(tmp_path / "peft", read_adapter(tmp_path / "a.pt"), task_type=task)
    assert alike(logits(into_peft(build(), tmp_path / "peft"), inputs), expected)

    layers = merge_adapter(model)
    assert alike(logits(model, inputs), expected)
    unmerge_adapter(model, layers)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = llama()
        torch.manual_seed(1)
        add_lora(model, targets=["q_proj", "down_proj"], dropout=0.1)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.1)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**DECODERS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 8
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_a_base_in_bfloat16_trains_float32_adapters_and_merges_to_bfloat16():
    model = llama().to(torch.bfloat16)
    plain = logits(model, DECODERS)
    add_lora(model, rank=4)
    assert torch.equal(logits(model, DECODERS), plain)
    train(model.train(), DECODERS)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.weight.dtype, layer.lora_B.dtype) == (torch.bfloat16, torch.float32)
    assert layer.lora_B.any()
    expected = logits(model, DECODERS)
    merge_adapter(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert alike(logits(model, DECODERS), expected, 2e-2) and not alike(plain, expected, 0.1)


def test_a_model_converted_afterwards_computes_the_same_in_its_dtype():
    model = llama()
    add_lora(model, rank=4)
    train(model.train(), DECODERS)
    expected = logits(model, DECODERS)
    assert alike(logits(model.to(torch.float64), DECODERS), expected)
    assert alike(logits(model.to(torch.bfloat16), DECODERS), expected, 5e-2)


def test_targets_that_are_no_linear_are_named():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=1)
    )
    for target, message in (
        ("c_attn", r"transformer\.h\.0\.attn\.c_attn is of Conv1D, not a plain nn\.Linear"),
        ("wte", r"transformer\.wte is of Embedding, not"),
        ("mlp", r"transformer\.h\.0\.mlp is of GPT2MLP, not"),
        ("q_proj", r"'q_proj' matches no linear; these would: lm_head"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(gpt2, targets=[target])
    assert add_lora(gpt2, targets="lm_head") == ["lm_head"]  # one string is one target


def test_a_subclass_of_linear_is_neither_skipped_nor_replaced():
    """The output of nn.MultiheadAttention is never called: its weight is read."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    for targets in (None, ["out_proj"]):
        with pytest.raises(ValueError, match=r"attention\.out_proj is of NonDyn.*, not a plain"):
            add_lora(model, targets=targets)
    assert add_lora(model, targets=["out"]) == ["out"]


def test_a_layer_whose_fast_path_passes_adapters_by_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"layers\.0\.linear1 is in an nn.TransformerEncoderLayer"):
        add_lora(model, targets=["linear1"])
    assert not lora_layers(model)


def test_a_layer_with_hooks_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="1 has hooks, which its adapted layer would lose"):
        add_lora(model)
    assert not lora_layers(model)
    assert add_lora(model, targets=["0"]) == ["0"]


class Shared(nn.Module):
    """One linear in two places, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(self.first, nn.Tanh()), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, idx):
        x = self.first(self.embedding(idx))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def step(model):
    """A step of plain gradient descent that shows."""
    loss = model(torch.arange(10)).logsumexp(-1).square().mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.3)
                p.grad = None


@pytest.mark.parametrize("target", ["first", "blocks.0.0"])
def test_a_linear_in_two_places_has_one_adapter_in_both(tmp_path, target):
    model, idx = Shared(), torch.arange(10)
    plain = model(idx)
    assert add_lora(model, rank=2, targets=[target]) == ["first"]
    assert model.first is model.blocks[0][0] and isinstance(model.first, LoRALinear)
    assert torch.equal(model(idx), plain)
    step(model), step(model)
    expected = model(idx)
    save_adapter(tmp_path / "a.pt", model, "base", {})
    again = Shared()
    add_lora(again, rank=2, targets=[target])
    load_adapter(tmp_path / "a.pt", again, "base")
    assert torch.equal(again(idx), expected) and not torch.allclose(expected, plain)
    # PEFT adapts the first place only.
    peft = get_peft_model(Shared(), LoraConfig(target_modules=["first"])).base_model.model
    assert peft.first is not peft.blocks[0][0]
    with pytest.raises(FileError, match=r"first\.lora_A is also blocks\.0\.0\.lora_A, which PEFT"):
        write_peft(tmp_path / "peft", take_adapter(model, "base"))
    layers = merge_adapter(model)
    assert type(model.first) is nn.Linear and model.first is model.blocks[0][0]
    torch.testing.assert_close(model(idx), expected)
    unmerge_adapter(model, layers)
    assert model.first is model.blocks[0][0] and torch.equal(model(idx), expected)


@pytest.mark.parametrize("embedding_trains", [False, True])
def test_a_tied_head_is_adapted_alone_and_merging_leaves_the_embedding(tmp_path, embedding_trains):
    model, idx = Shared(), torch.arange(10)
    add_lora(model, rank=2, targets=["head"])
    model.embedding.weight.requires_grad_(embedding_trains)
    before = model.embedding.weight.detach().clone()
    step(model), step(model)
    assert model.head.weight is model.embedding.weight and model.head.lora_B.any()
    assert torch.equal(model.embedding.weight, before) != embedding_trains
    expected = model(idx)

    adapter = take_adapter(model, "base")
    save_adapter(tmp_path / "a.pt", model, "base", {})
    again = Shared()
    add_lora(again, rank=2, targets=["head"])
    again.embedding.weight.requires_grad_(embedding_trains)
    load_adapter(tmp_path / "a.pt", again, "base")
    assert torch.equal(again(idx), expected)
    if embedding_trains:  # PEFT would train a copy, and so would an untied model
        with pytest.raises(FileError, match=r"embedding\.weight is also head\.weight, which"):
            write_peft(tmp_path / "peft", adapter)
        bare = take_adapter(again, "base")
        switch_adapter(again, combine_adapters([(adapter, 0.7), (adapter, 0.3)], bare))
        torch.testing.assert_close(again(idx), expected)
        again.head.weight = nn.Parameter(again.head.weight.detach().clone(), requires_grad=False)
        with pytest.raises(FileError, match="differ in tied tensors"):
            switch_adapter(again, adapter)

    embedding = model.embedding.weight.detach().clone()
    layers = merge_adapter(model)
    assert torch.equal(model.embedding.weight, embedding)
    torch.testing.assert_close(model(idx), expected)
    unmerge_adapter(model, layers)
    assert model.head.weight is model.embedding.weight and torch.equal(model(idx), expected)


def test_an_adapter_of_a_tied_head_goes_to_peft(tmp_path):
    model = llama(tie_word_embeddings=True)
    assert "lm_head" in add_lora(model, rank=4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    train(model.train(), DECODERS)
    write_peft(tmp_path / "peft", take_adapter(model, "base"), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merging would touch both
        peft = PeftModel.from_pretrained(llama(tie_word_embeddings=True), str(tmp_path / "peft"))
    assert alike(logits(peft, DECODERS), logits(model, DECODERS))


def test_a_trained_copy_of_a_tied_embedding_is_refused(tmp_path):
    """PEFT's head keeps the old weights, which a tied model cannot."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(llama(tie_word_embeddings=True), config)
        peft.save_pretrained(str(tmp_path / "peft"))
    for tied in (True, False):
        model = llama(tie_word_embeddings=tied)
        add_lora(model, targets=["q_proj"])
        model.model.embed_tokens.requires_grad_(True)
        if tied:
            with pytest.raises(FileError, match=r"differ in tied tensors.*lm_head\.weight"):
                load_adapter(tmp_path / "peft", model, None)
        else:
            load_adapter(tmp_path / "peft", model, None)
