"""Adapter and checkpoint files, injection into a model, and what is refused."""

import dataclasses
import pickle
import random

import pytest
import torch
from torch import nn

from files.tensors import fingerprint, read_file, write_file
from lora import (
    BaseMismatch,
    FileError,
    adapter_state,
    add_lora,
    base_state,
    combine_adapters,
    count_parameters,
    load_adapter,
    merge_adapter,
    read_adapter,
    save_adapter,
    switch_adapter,
    take_adapter,
    unmerge_adapter,
    write_adapter,
)
from lora import __main__ as listing
from lora.inject import lora_layers
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.checkpoint import load_base, read_checkpoint, save_checkpoint
from trainer.resuming import read_training_state, restore_training_state, save_training_state

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)

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
    save_checkpoint(tmp_path / "full.pt", make(use_lora=False), {})
    other = BigramLanguageModelLoRA(**SHAPE | {"n_head": 4}, device="cpu", dropout=0.0)
    with pytest.raises(FileError, match="n_head=2, the model has 4"):
        load_base(other, read_checkpoint(tmp_path / "full.pt"))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(tmp_path / "a.pt", make(seed=1), "one", {})
    assert read_adapter(tmp_path / "a.pt", None).base == "one"
    with pytest.raises(BaseMismatch, match="not on two: the weights of the two bases differ"):
        read_adapter(tmp_path / "a.pt", "two")
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
    write_file(tmp_path / "a.pt", content)
    model = make(trained=False)
    before = values(model)
    with pytest.raises(FileError) as refusal:
        load_adapter(tmp_path / "a.pt", model, "base")
    assert "a.pt" in str(refusal.value) and "\n" not in str(refusal.value)
    assert unchanged(model, before)


def test_a_checkpoint_loads_into_models_with_and_without_adapters(tmp_path):
    base = make(use_lora=False)
    save_checkpoint(tmp_path / "full.pt", base, {"step": 7})
    checkpoint = read_checkpoint(tmp_path / "full.pt")
    assert dataclasses.asdict(checkpoint.sizes) == SHAPE | {"gelu": "exact", "tied_head": False}
    assert checkpoint.metadata == {"step": 7}
    for use_lora in (False, True):
        torch.manual_seed(9)
        model = BigramLanguageModelLoRA(**SHAPE, device="cpu", dropout=0.0, use_lora=use_lora)
        load_base(model, checkpoint)
        assert torch.equal(model(IDX)[0], base(IDX)[0])
        assert fingerprint(base_state(model)) == fingerprint(base.state_dict())
        with torch.no_grad():  # what trains is the model's own
            for p in model.parameters():
                if p.requires_grad:
                    p += 1
        assert fingerprint(checkpoint.tensors) == fingerprint(base.state_dict())


def checkpoint_file(path):
    save_checkpoint(path, make(use_lora=False), {})


def adapter_file(path):
    save_adapter(path, make(seed=1), "base", {"step": 3})


def load_checkpoint(path, model):
    load_base(model, read_checkpoint(path))


def load_adapter_file(path, model):
    load_adapter(path, model, "base")


def training_state_file(path):
    model = make(seed=1)
    optimizer = optimizer_of(model)
    model(IDX, IDX)[1].backward()
    optimizer.step()
    save_training_state(path, model, optimizer, NO_SCALER, {}, {})


def load_training_state(path, model):
    restore_training_state(path, read_training_state(path), model, optimizer_of(model), NO_SCALER)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


KINDS = {
    "checkpoint": (checkpoint_file, load_checkpoint),
    "adapter": (adapter_file, load_adapter_file),
    "training state": (training_state_file, load_training_state),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped", "text", "empty", "foreign"])
def test_damaged_files_end_in_one_clear_line(tmp_path, kind, damage):
    path = tmp_path / "file.pt"
    write, read = KINDS[kind]
    write(path)
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    model = make(trained=False)
    before = values(model)
    read(path, model)
    sound = values(model)
    generator = random.Random(0)
    for _ in range(200 if damage in ("truncated", "flipped", "swapped") else 1):
        if damage == "truncated":
            path.write_bytes(whole[: generator.randrange(len(whole))])
        elif damage == "flipped":
            broken = bytearray(whole)
            for _ in range(20):
                broken[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            path.write_bytes(broken)
        elif damage == "swapped":  # also where the shapes agree
            one, two = generator.sample(sorted(content["tensors"]), 2)
            tensors = dict(content["tensors"])
            tensors[one], tensors[two] = tensors[two], tensors[one]
            torch.save(content | {"tensors": tensors}, path)
        elif damage == "text":
            path.write_text("not a checkpoint")
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            torch.save({"format": ["a", "list"]}, path)
        model.load_state_dict(before)
        try:
            read(path, model)
        except FileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            assert unchanged(model, before)
        else:  # the flipped bits lay where nothing depends on them; the swapped tensors were equal
            assert damage in ("flipped", "swapped") and unchanged(model, sound)


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


def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(IDX)[0]


def adapters_of(*options: dict) -> tuple[BigramLanguageModelLoRA, list]:
    """A model on its bare base, the base's own adapter, and a trained one for each of the options,
    with the logits of each."""
    model = make(trained=False)
    found = [(take_adapter(model, "base"), logits(model))]
    for seed, more in enumerate(options, 1):
        trained = make(seed=seed, **more)
        found.append((take_adapter(trained, "base"), logits(trained)))
    return model, found


def test_switching_is_exact_and_so_is_going_back(tmp_path):
    """Among adapters of different ranks and alphas, and to the bare base."""
    model, found = adapters_of({}, {"lora_rank": 3}, {"lora_alpha": 2.0}, {"lora_rank": 17})
    before = values(model)
    generator = random.Random(0)
    for _ in range(20):
        adapter, expected = generator.choice(found)
        switch_adapter(model, adapter)
        assert torch.equal(logits(model), expected)
    switch_adapter(model, found[0][0])
    assert torch.equal(logits(model), logits(make(use_lora=False)))
    assert unchanged(model, before)


def test_a_switch_of_the_same_rank_keeps_the_parameters():
    """An optimizer goes on with them."""
    model, ((_, _), (adapter, _)) = adapters_of({})
    parameters = dict(model.named_parameters())
    switch_adapter(model, adapter)
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_an_adapter_that_does_not_fit_changes_nothing():
    model, (_, (adapter, _)) = adapters_of({})
    before = values(model)
    tensors = dict(adapter.tensors)
    tensors["lm_head.lora_B"] = tensors["lm_head.lora_B"][:5]
    with pytest.raises(FileError, match=r"mine: lm_head\.lora_B has shape"):
        switch_adapter(model, type(adapter)("base", adapter.alpha, tensors), "mine")
    assert unchanged(model, before)


def changes(adapter, bare) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight of the base, in float64."""
    t = {name: tensor.double() for name, tensor in adapter.tensors.items()}
    found = {
        n: adapter.alpha[n] / adapter.ranks[n] * t[f"{n}.lora_B"] @ t[f"{n}.lora_A"]
        for n in adapter.alpha
    }
    return found | {n: t[n] - bare.tensors[n].double() for n in adapter.extras}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5), (2.0, 0.0)])
def test_combining_adds_up_the_weighted_changes(weights):
    model, found = adapters_of({"lora_alpha": 4.0}, {"lora_rank": 3})
    bare, one, two = (adapter for adapter, _ in found)
    combined = combine_adapters([(one, weights[0]), (two, weights[1])], bare)
    assert set(combined.ranks.values()) == {8 + 3}
    first, second = changes(one, bare), changes(two, bare)
    for name, change in changes(combined, bare).items():
        exact = weights[0] * first[name] + weights[1] * second[name]
        assert (change - exact).norm() < 1e-6 * (first[name].norm() + second[name].norm())
    switch_adapter(model, combined)
    assert torch.isfinite(logits(model)).all()


def test_combining_one_alone_or_subtracting_it_is_exact():
    model, ((bare, at_base), (one, expected)) = adapters_of({})
    switch_adapter(model, combine_adapters([(one, 1.0)], bare))
    assert torch.equal(logits(model), expected)
    switch_adapter(model, combine_adapters([(one, 1.0), (one, -1.0)], bare))
    torch.testing.assert_close(logits(model), at_base, rtol=1e-5, atol=1e-6)


def test_reducing_the_rank_is_the_best_there_is_and_says_its_error():
    model, ((bare, _), (one, _), (two, _)) = adapters_of({}, {"lora_rank": 5})
    pair = [(one, 0.7), (two, 0.3)]
    whole = changes(combine_adapters(pair, bare), bare)
    for rank in (1, 4, 13, 20):
        reduced = combine_adapters(pair, bare, rank=rank)
        assert max(reduced.ranks.values()) == min(rank, 13)
        lost = total = best = 0.0
        for name, change in changes(reduced, bare).items():
            if name in bare.alpha:
                lost += (change - whole[name]).square().sum().item()
                total += whole[name].square().sum().item()
                best += torch.linalg.svdvals(whole[name])[rank:].square().sum().item()
        assert lost == pytest.approx(best, rel=1e-4, abs=1e-10 * total)
        stated = reduced.metadata["truncation_error"]
        assert stated == pytest.approx((best / total) ** 0.5, rel=1e-6, abs=1e-6)
    switch_adapter(model, reduced)


def test_combining_nothing_or_unlike_adapters_is_refused():
    _, ((bare, _), (one, _)) = adapters_of({})
    with pytest.raises(ValueError, match="nothing to combine"):
        combine_adapters([], bare)
    with pytest.raises(ValueError, match="rank=0"):
        combine_adapters([(one, 1.0)], bare, rank=0)
    nothing = combine_adapters([(one, 0.0)], bare, rank=2)  # and what it has can train
    for name in one.alpha:
        assert (
            nothing.tensors[f"{name}.lora_A"].any() and not nothing.tensors[f"{name}.lora_B"].any()
        )
    other = type(one)("base", {"lm_head": 1.0}, {})
    with pytest.raises(ValueError, match="different layers"):
        combine_adapters([(one, 1.0), (other, 1.0)], bare)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 3, "lora_alpha": 40.0}])
def test_merging_computes_the_same_and_unmerging_restores_it(tmp_path, options):
    model = make(seed=1, **options)
    before, expected = values(model), logits(model)
    layers = merge_adapter(model)
    merged = logits(model)
    assert (merged - expected).norm() < 1e-5 * expected.norm()
    assert not torch.equal(merged, logits(make(use_lora=False)))
    # It is a plain model now, and its checkpoint a base like any other.
    save_checkpoint(tmp_path / "merged.pt", model, {})
    plain = make(use_lora=False)
    load_base(plain, read_checkpoint(tmp_path / "merged.pt"))
    assert torch.equal(logits(plain), merged)
    unmerge_adapter(model, layers)
    assert unchanged(model, before) and torch.equal(logits(model), expected)


def test_merging_adds_up_in_float32_under_autocast_too():
    model, other = make(seed=1), make(seed=1)
    merge_adapter(model)
    with torch.autocast("cpu", torch.bfloat16):
        merge_adapter(other)
    assert unchanged(other, values(model))


def test_unmerged_layers_are_in_the_mode_that_the_model_has_now():
    model = make(lora_dropout=0.5).eval()
    layers = merge_adapter(model)
    model.train()
    unmerge_adapter(model, layers)
    assert all(module.training for module in model.modules())


def test_a_file_of_another_kind_is_known_without_reading_its_tensors(tmp_path):
    checkpoint_file(tmp_path / "full.pt")
    content = bytearray((tmp_path / "full.pt").read_bytes())
    content[len(content) // 2] ^= 1  # in the tensors, which only reading them shows
    (tmp_path / "full.pt").write_bytes(content)
    with pytest.raises(FileError, match="is a model checkpoint, not a LoRA adapter"):
        read_adapter(tmp_path / "full.pt", None)
    with pytest.raises(FileError, match="damaged"):
        read_checkpoint(tmp_path / "full.pt")


def test_adapters_are_listed(tmp_path, capsys):
    metadata = {"step": 7, "val_loss": 1.25, "data": "python-docs"}
    save_adapter(tmp_path / "a.pt", make(seed=1, lora_rank=4), "base", metadata)
    write_adapter(tmp_path / "b.pt", take_adapter(make(seed=2), "base"))
    checkpoint_file(tmp_path / "full.pt")
    assert listing.main([str(tmp_path)]) == 0
    header, one, two = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["file", "rank", "alpha"]
    assert one.split()[1:6] == ["4", "16", "python-docs", "7", "1.2500"]
    assert two.split()[:3] == [str(tmp_path / "b.pt"), "8", "16"]
    assert listing.main([str(tmp_path / "full.pt")]) == 2
    assert "full.pt is a model checkpoint, not a LoRA adapter" in capsys.readouterr().err


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
