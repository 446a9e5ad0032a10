"""Adapter and checkpoint files, injection into a model, and what is refused."""

import pickle
import random

import pytest
import torch
from torch import nn

from checkpoint import base_state, load_base, read_checkpoint, save_checkpoint
from lora import FileError, adapter_state, add_lora, count_parameters, load_adapter, save_adapter
from lora.files import fingerprint, read_file, write_file
from lora.inject import lora_layers
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

SHAPE = {"vocab_size": 256, "n_embd": 32, "block_size": 16, "n_head": 2, "n_layer": 2}
IDX = torch.arange(32).view(2, 16)


def make(seed=0, use_lora=True, trained=True, **options) -> BigramLanguageModelLoRA:
    torch.manual_seed(0)
    model = BigramLanguageModelLoRA(
        **SHAPE, device="cpu", dropout=0.0, use_lora=use_lora, **options
    )
    if use_lora and trained:
        torch.manual_seed(seed)
        for tensor in adapter_state(model).values():
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loaded_adapter_gives_the_same_logits_to_the_bit(tmp_path):
    model = make(seed=1)
    size = save_adapter(tmp_path / "a.pt", model, "base", {"step": 3, "val_loss": 1.5})
    assert size == (tmp_path / "a.pt").stat().st_size
    other = make(trained=False)
    assert not torch.equal(other(IDX)[0], model(IDX)[0])
    assert load_adapter(tmp_path / "a.pt", other, "base") == {"step": 3, "val_loss": 1.5}
    assert torch.equal(other(IDX)[0], model(IDX)[0])


def test_an_adapter_brings_its_alpha(tmp_path):
    model = make(seed=1, lora_alpha=32.0)
    save_adapter(tmp_path / "a.pt", model, "base", {})
    other = make(trained=False, lora_alpha=16.0)
    load_adapter(tmp_path / "a.pt", other, "base")
    assert torch.equal(other(IDX)[0], model(IDX)[0])


def test_a_base_of_other_heads_is_refused(tmp_path):
    """No tensor shows the number of heads."""
    save_checkpoint(tmp_path / "full.pt", make(use_lora=False), SHAPE, {})
    other = BigramLanguageModelLoRA(**SHAPE | {"n_head": 4}, device="cpu", dropout=0.0)
    with pytest.raises(FileError, match="n_head=2, the model has 4"):
        load_base(other, read_checkpoint(tmp_path / "full.pt"))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(tmp_path / "a.pt", make(seed=1), "one", {})
    model = make(trained=False)
    before = values(model)
    with pytest.raises(FileError, match="trained on base one, not on two"):
        load_adapter(tmp_path / "a.pt", model, "two")
    assert unchanged(model, before)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "nan", "integers", "text"])
def test_a_wrong_tensor_is_refused_and_the_model_is_as_it_was(tmp_path, damage):
    save_adapter(tmp_path / "a.pt", make(seed=1), "base", {})
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    tensors, name = content["tensors"], "lm_head.lora_A"
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["lm_head.lora_C"] = torch.zeros(1)
    elif damage == "shape":
        tensors[name] = tensors[name].T
    elif damage == "nan":
        tensors[name][0, 0] = float("nan")
    elif damage == "integers":
        tensors[name] = tensors[name].int()
    else:
        tensors[name] = "not a tensor"
    torch.save(content, tmp_path / "a.pt")
    model = make(trained=False)
    before = values(model)
    with pytest.raises(FileError) as refusal:
        load_adapter(tmp_path / "a.pt", model, "base")
    assert "a.pt" in str(refusal.value) and "\n" not in str(refusal.value)
    assert unchanged(model, before)


def test_a_checkpoint_loads_into_models_with_and_without_adapters(tmp_path):
    base = make(use_lora=False)
    save_checkpoint(tmp_path / "full.pt", base, SHAPE, {"step": 7})
    checkpoint = read_checkpoint(tmp_path / "full.pt")
    assert checkpoint.shape == SHAPE and checkpoint.metadata == {"step": 7}
    for use_lora in (False, True):
        torch.manual_seed(9)
        model = BigramLanguageModelLoRA(**SHAPE, device="cpu", dropout=0.0, use_lora=use_lora)
        load_base(model, checkpoint)
        assert torch.equal(model(IDX)[0], base(IDX)[0])
        assert fingerprint(base_state(model)) == fingerprint(base.state_dict())


@pytest.mark.parametrize("kind", ["truncated", "flipped", "text", "empty", "other format"])
def test_damaged_files_end_in_one_clear_line(tmp_path, kind):
    path = tmp_path / "full.pt"
    save_checkpoint(path, make(use_lora=False), SHAPE, {})
    whole = path.read_bytes()
    generator = random.Random(0)
    for _ in range(1 if kind in ("text", "empty", "other format") else 40):
        if kind == "truncated":
            path.write_bytes(whole[: generator.randrange(len(whole))])
        elif kind == "flipped":
            broken = bytearray(whole)
            for _ in range(20):
                broken[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            path.write_bytes(broken)
        elif kind == "text":
            path.write_text("not a checkpoint")
        elif kind == "empty":
            path.write_bytes(b"")
        else:
            torch.save({"format": ["a", "list"]}, path)
        model = make(use_lora=False)
        before = values(model)
        try:
            load_base(model, read_checkpoint(path))
        except FileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            assert unchanged(model, before)
        else:  # the flipped bits lay in padding or names that no tensor depends on
            assert kind == "flipped" and unchanged(model, before)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "trap"), "w")

    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"format": "model checkpoint", "code": Trap()}, tmp_path / "zip.pt")
    (tmp_path / "trap").unlink(missing_ok=True)
    for name in ("pickle.pt", "zip.pt"):
        with pytest.raises(FileError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "trap").exists()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    write_file(path, {"format": "x", "version": 1, "n": 1})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(FileError, match="No space left"):
        write_file(path, {"format": "x", "version": 1, "n": 2})
    assert read_file(path, "x", 1)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file.pt"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))

    def forward(self, x):
        return self.inner(self.query(x) + self.value(x))


def test_lora_goes_into_any_module_by_name_or_suffix():
    model = nn.ModuleDict({"a": Attention(), "b": Attention()})
    assert add_lora(model, rank=2, targets=["query", "b.inner.0"]) == [
        "a.query", "b.query", "b.inner.0",
    ]  # fmt: skip
    counts = count_parameters(model)
    assert counts["lora"] == counts["trainable"] == 2 * 2 * (8 + 8) + 2 * (8 + 4)
    assert len(lora_layers(model)) == 3

    model = Attention()
    x = torch.randn(3, 8)
    expected = model(x)
    assert len(add_lora(model)) == 4
    assert torch.equal(model(x), expected)


def test_adapters_added_later_leave_the_first_ones_training():
    model = Attention().eval()
    add_lora(model, rank=2, targets=["query"])
    add_lora(model, rank=3, targets=["value"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{m}" for n in ("query", "value") for m in "AB"}
    assert not model.query.training
    with pytest.raises(ValueError, match="rank=0"):
        add_lora(model, rank=0)
    assert len(lora_layers(model)) == 2


def test_a_target_that_matches_nothing_lists_what_would():
    with pytest.raises(ValueError, match=r"'qeury' matches no linear; these would: 0, 2, query, v"):
        add_lora(Attention(), targets=["query", "qeury"])


def test_fingerprints_tell_bases_apart():
    one, two = make(use_lora=False).state_dict(), make(use_lora=False).state_dict()
    assert fingerprint(one) == fingerprint(two)
    two["ln_f.bias"][3] += 1e-6
    assert fingerprint(one) != fingerprint(two)
