"""PEFT's folders: what PEFT reads of ours, what we read of PEFT's, and what is refused."""

import json
import os
import random
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, TINY, needs_dev_full, refused, start_script, succeeded
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from files import OtherKind
from files.tensors import fingerprint
from lora import (
    Adapter,
    FileError,
    combine_adapters,
    complete_adapter,
    load_adapter,
    read_adapter,
    switch_adapter,
    take_adapter,
    write_adapter,
    write_peft,
)
from lora import __main__ as command
from lora.peft_format import HARMLESS, REQUIRED, SUPPORTED
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.checkpoint import save_checkpoint

SHAPE = {"vocab_size": 256, "n_embd": 32, "block_size": 16, "n_head": 2, "n_layer": 2}
IDX = torch.arange(32).view(2, 16)
LINEARS = ["key", "query", "value", "proj", "fc_in", "fc_out", "lm_head"]
EMBEDDINGS = ["token_embedding_table", "position_embedding_table"]


def make(use_lora=True, **options) -> BigramLanguageModelLoRA:
    torch.manual_seed(0)
    return BigramLanguageModelLoRA(**SHAPE, device="cpu", dropout=0.0, use_lora=use_lora, **options)


def train(model, steps=3):
    """A few steps at a rate that shows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        model(IDX, IDX.roll(-1, 1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model) -> torch.Tensor:
    return model.eval()(IDX)[0].detach()


def alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    return ((one - two).norm() < 1e-5 * two.norm()).item()


BASE = make(use_lora=False)
BASE_ID = fingerprint(BASE.state_dict())
OURS = train(make(lora_rank=4, lora_alpha=12.0))
METADATA = {"step": 3, "val_loss": 1.25, "dropout": 0.1, "shape": SHAPE, "none": None}
ADAPTER = take_adapter(OURS, BASE_ID, METADATA)


def peft_adapter(folder, targets=LINEARS, saved=None, **options):
    """A folder that PEFT wrote after training, and the logits of PEFT's model."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, modules_to_save=saved, **options)
    torch.manual_seed(1)
    model = train(get_peft_model(make(use_lora=False), config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for transformers' embeddings
        model.save_pretrained(str(folder))
    return logits(model)


def into_peft(folder):
    """PEFT's model of the base with this folder's adapter, loaded without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PeftModel.from_pretrained(make(use_lora=False), str(folder))


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder, change):
    """Rewrite the tensors as `change` of the table, without our entry in the header."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    """Our adapter in PEFT's format, without our entry in the header, as PEFT would write it."""
    write_peft(tmp_path / "ours", ADAPTER)
    edit_tensors(tmp_path / "ours", dict)
    return tmp_path / "ours"


def test_peft_reads_what_we_write(tmp_path):
    size = write_peft(tmp_path / "ours", ADAPTER, task_type="CAUSAL_LM", base_model="a/b")
    assert size == sum(f.stat().st_size for f in (tmp_path / "ours").iterdir())
    config = LoraConfig.from_pretrained(str(tmp_path / "ours"))
    assert config.task_type == "CAUSAL_LM" and config.base_model_name_or_path == "a/b"
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12.0, 0.1)
    write_peft(tmp_path / "plain", ADAPTER)  # a model of no known task
    model = into_peft(tmp_path / "plain")
    assert alike(logits(model), logits(OURS)) and not alike(logits(model), logits(BASE))


def test_a_round_trip_returns_the_same_bits(tmp_path):
    write_peft(tmp_path / "ours", ADAPTER)
    again = read_adapter(tmp_path / "ours", BASE_ID)
    assert (again.base, again.alpha, again.metadata) == (BASE_ID, ADAPTER.alpha, METADATA)
    assert again.tensors.keys() == ADAPTER.tensors.keys()
    assert all(torch.equal(again.tensors[name], t) for name, t in ADAPTER.tensors.items())
    with pytest.raises(FileError, match="not on other: the weights of the two bases differ"):
        read_adapter(tmp_path / "ours", "other")


def test_peft_reads_ranks_and_alphas_that_differ_from_layer_to_layer(tmp_path):
    """As patterns that match their layer alone, and not `blocks.0.attn.key` as an ending too."""
    model = make()
    generator = random.Random(0)
    bare = take_adapter(model, BASE_ID)
    tensors, alpha = dict(bare.tensors), {}
    for name in bare.alpha:
        rank, alpha[name] = generator.choice([2, 3, 5]), generator.choice([1.0, 2.5, 7.0])
        for part, dim in (("lora_A", 0), ("lora_B", 1)):
            shape = list(tensors[f"{name}.{part}"].shape)
            shape[dim] = rank
            tensors[f"{name}.{part}"] = torch.randn(shape) * 0.1
    adapter = Adapter(BASE_ID, alpha, tensors)
    write_peft(tmp_path / "ours", adapter)
    switch_adapter(model, adapter)
    assert alike(logits(into_peft(tmp_path / "ours")), logits(model))
    again = read_adapter(tmp_path / "ours")
    assert again.alpha == alpha and again.ranks == adapter.ranks


@pytest.mark.parametrize("targets", [LINEARS, ["query", "value"], r".*\.1\..*\.fc_in"])
@pytest.mark.parametrize("saved", [None, EMBEDDINGS])
def test_we_read_what_peft_writes(tmp_path, targets, saved):
    expected = peft_adapter(tmp_path / "peft", targets, saved)
    model = make()
    metadata = load_adapter(tmp_path / "peft", model, BASE_ID)
    assert alike(logits(model), expected) and not alike(expected, logits(BASE))
    assert metadata["dropout"] == 0.0 and read_adapter(tmp_path / "peft").base is None
    # And back: what was filled in changes nothing there either.
    bare = take_adapter(make(), BASE_ID)
    write_peft(tmp_path / "back", complete_adapter(read_adapter(tmp_path / "peft"), bare))
    assert alike(logits(into_peft(tmp_path / "back")), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_are_read_by_pefts_rule(tmp_path, use_rslora):
    patterns = {
        "rank_pattern": {"value": 2, r".*\.1\..*fc_in": 5},
        "alpha_pattern": {"^blocks.0.attn.query": 3, "key": 9, r".*\.mlp\..*fc_(in|out)": 2},
    }
    expected = peft_adapter(tmp_path / "peft", use_rslora=use_rslora, **patterns)
    model = make()
    load_adapter(tmp_path / "peft", model, BASE_ID)
    assert alike(logits(model), expected)


HOSTILE = ["(a+)+", "(a|a)(a|a)(a|a)(a|a)", "a*b", ".*.*.*.*x", "(a|b){9}", "(a", "x" * 300, "a|*"]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_an_expression_that_may_never_end_is_refused(folder, pattern):
    edit_config(folder, alpha_pattern={pattern: 3})
    with pytest.raises(OtherKind, match=r"alpha_pattern .* is no name or simple pattern"):
        read_adapter(folder)


def test_an_adapter_in_a_subfolder_is_pointed_to(folder):
    with pytest.raises(OtherKind, match=r"without adapter_config\.json; did you mean .*ours\?"):
        read_adapter(folder.parent)


def test_layers_that_were_filled_in_can_train(tmp_path):
    peft_adapter(tmp_path / "peft", ["query"])
    model = make()
    load_adapter(tmp_path / "peft", model, BASE_ID)
    before = read_adapter(tmp_path / "peft")
    train(model)
    assert model.lm_head.rank == 4 and model.lm_head.alpha == 6.0
    assert model.lm_head.lora_B.any() and before.ranks.keys() != take_adapter(model, "").ranks


def test_a_model_without_the_bases_embeddings_refuses_an_adapter_that_lacks_them(tmp_path):
    peft_adapter(tmp_path / "peft", ["query"])
    model = make()
    switch_adapter(model, ADAPTER)
    with pytest.raises(FileError, match=r"lacks tensor position_embedding_table.weight, and the m"):
        load_adapter(tmp_path / "peft", model, BASE_ID)
    with pytest.raises(FileError, match="lacks tensor"):  # an exact switch needs all of it
        switch_adapter(model, read_adapter(tmp_path / "peft"))


def test_a_model_without_lora_refuses_an_adapter(folder):
    with pytest.raises(FileError, match="unexpected tensor"):
        load_adapter(folder, make(use_lora=False).requires_grad_(False), None)


def test_peft_adapters_are_combined_with_ours(tmp_path):
    peft_adapter(tmp_path / "peft", ["query"])
    model = make()
    bare = take_adapter(model, BASE_ID)
    foreign = complete_adapter(read_adapter(tmp_path / "peft"), bare)
    combined = combine_adapters([(foreign, 1.0), (ADAPTER, 0.0)], bare)
    assert combined.base is None
    switch_adapter(model, combined)
    assert alike(logits(model), logits(into_peft(tmp_path / "peft")))
    write_adapter(tmp_path / "combined.pt", combined)
    assert read_adapter(tmp_path / "combined.pt", BASE_ID).base is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_become_float32_exactly(folder, dtype):
    stored = load_file(folder / "adapter_model.safetensors")
    edit_tensors(folder, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    found = read_adapter(folder).tensors["lm_head.lora_B"]
    assert found.dtype == torch.float32
    assert torch.equal(found, stored["base_model.model.lm_head.lora_B.weight"].to(dtype).float())


def test_a_file_of_torch_is_read_too(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert torch.equal(read_adapter(folder).tensors["lm_head.lora_B"], OURS.lm_head.lora_B)
    (folder / "adapter_model.bin").write_bytes(b"PK, but no zip")
    with pytest.raises(FileError, match=r"adapter_model\.bin holds no tensors, or it is damaged"):
        read_adapter(folder)


def test_code_in_a_file_of_torch_does_not_run(folder):
    class Trap:
        def __reduce__(self):
            return open, (str(folder / "trap"), "w")

    torch.save({"base_model.model.x": Trap()}, folder / "adapter_model.bin")
    (folder / "trap").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match=r"adapter_model\.bin holds no tensors"):
        read_adapter(folder)
    assert not (folder / "trap").exists()


def test_every_option_of_peft_has_been_considered():
    """A newer PEFT may bring more, which are then refused by name unless they are off."""
    config = LoraConfig(target_modules=["query"]).to_dict()
    assert set(config) - SUPPORTED - HARMLESS - set(REQUIRED) == set()
    assert all(config[name] == value for name, value in REQUIRED.items())


FEATURES = {
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "layer_replication": [[0, 4], [2, 5]],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.gate_up_proj"],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "kasa_config": {"gamma": 1},
    "monteclora_config": {"num_samples": 8},
    "arrow_config": {"top_k": 3},
    "ensure_weight_tying": True,
    "option_of_the_future": 1,
    "peft_type": "LOHA",
    "alpha_pattern": {"(.*a)*key": 3},
    "init_lora_weights": "pissa",
}


@pytest.mark.parametrize("name", FEATURES)
def test_what_we_have_not_is_refused_by_name(folder, name):
    edit_config(folder, **{name: FEATURES[name]})
    with pytest.raises(OtherKind, match=name) as refusal:
        read_adapter(folder)
    assert "adapter_config.json" in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_refused_features_are_all_that_must_have_one_value():
    assert set(REQUIRED) < set(FEATURES)


@pytest.mark.parametrize("start", ["pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga"])
def test_initializations_that_change_the_base_are_refused(folder, start):
    edit_config(folder, init_lora_weights=start)
    with pytest.raises(OtherKind, match=rf"init_lora_weights='{start}', which changes the base's"):
        read_adapter(folder)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_other_initializations_are_accepted(folder, start):
    edit_config(folder, init_lora_weights=start, eva_config=None, layers_to_transform=[0])
    assert read_adapter(folder).alpha == ADAPTER.alpha


def test_saved_magnitudes_or_embedding_adapters_are_refused(folder):
    key = "base_model.model.token_embedding_table.lora_embedding_A"
    edit_tensors(folder, lambda tensors: tensors | {key: torch.zeros(4, 256)})
    with pytest.raises(OtherKind, match=f"{key} is no lora_A or lora_B of a linear"):
        read_adapter(folder)


A = "base_model.model.lm_head.lora_A.weight"
B = "base_model.model.lm_head.lora_B.weight"
WRONG_TENSORS = {
    "nan": ({A: torch.full((4, 32), torch.nan)}, r"lm_head\.lora_A holds numbers that are not fin"),
    "integers": ({A: torch.ones(4, 32).int()}, r"lm_head\.lora_A is torch\.int32, not floating-po"),
    "rank": ({A: torch.ones(5, 32)}, r"lm_head has rank \[5\], adapter_config\.json has 4"),
    "ranks": ({B: torch.ones(256, 5)}, r"lora_A and lora_B of lm_head are of different ranks"),
    "width": ({A: torch.ones(4, 33)}, r"lm_head\.lora_A has shape \(4, 33\), the model"),
    "vector": ({A: torch.ones(4)}, r"lacks the matrix lm_head\.lora_A"),
    "convolution": ({B: torch.ones(256, 4, 1, 1)}, r"lacks the matrix lm_head\.lora_B"),
    "prefix": ({"lm_head.lora_A.weight": torch.ones(4, 32)}, r"does not begin with base_model\."),
    "layer": (
        {"base_model.model.x.lora_A.weight": torch.ones(4, 32),
         "base_model.model.x.lora_B.weight": torch.ones(32, 4)},
        r"unexpected tensor x\.lora_A",
    ),
    "half": ({"base_model.model.x.lora_B.weight": torch.ones(32, 4)}, r"lacks the other matrix"),
    "whole": ({"base_model.model.ln_f.weight": torch.ones(32)}, r"unexpected tensor ln_f\.weight"),
    "line": ({"base_model.model.a\nb": torch.ones(2)}, "holds no tensors, or it is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_wrong_tensors_are_refused_in_one_line(folder, wrong):
    tensors, message = WRONG_TENSORS[wrong]
    edit_tensors(folder, lambda stored: stored | tensors)
    model = make()
    before = logits(model)
    with pytest.raises(FileError, match=message) as refusal:
        load_adapter(folder, model, None)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged: it is not JSON"),
        ("{", "is damaged: it is not JSON"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        ("[1]", "has no peft_type"),
        ('{"r": 4}', "has no peft_type"),
        ('{"peft_type": "LORA", "lora_alpha": 4}', "r is None, not a number"),
        ('{"peft_type": "LORA", "r": "4", "lora_alpha": 4}', "r is '4', not a number"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "lora_alpha is nan, not a number"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": true}', "lora_alpha is True, not a number"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": 1%s}' % ("0" * 400), "lora_alpha is 1000"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "rank_pattern": 5}', "5, not a table"),
        ('{"peft_type": "LORA", "a\\nb": 4}', r"uses a\\nb=4"),
        (
            '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+": 1}}',
            "is no name or simple pattern",
        ),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_rslora": "no"}', "not true or false"),
    ],
)
def test_a_damaged_configuration_is_refused_in_one_line(folder, text, message):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(FileError, match=message) as refusal:
        read_adapter(folder)
    assert "adapter_config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_files_end_in_one_clear_line(tmp_path, own, name, damage):
    write_peft(tmp_path / "ours", ADAPTER)
    if not own:
        edit_tensors(tmp_path / "ours", dict)
    path = tmp_path / "ours" / name
    if name == "adapter_model.bin":
        stored = tmp_path / "ours" / "adapter_model.safetensors"
        torch.save(load_file(stored), path)
        stored.unlink()
    whole, generator = path.read_bytes(), random.Random(0)
    model = make()
    refusals = 0
    for i in range(100):
        if damage == "truncated":
            path.write_bytes(whole[: generator.randrange(len(whole))].rstrip())
        else:  # half of them in the first bytes, where the header is
            broken = bytearray(whole)
            end = 2000 if i % 2 else len(whole)
            for _ in range(5):
                broken[generator.randrange(min(end, len(whole)))] ^= 1 << generator.randrange(8)
            path.write_bytes(broken)
        try:
            load_adapter(tmp_path / "ours", model, None)
        except FileError as error:
            refusals += 1
            assert str(tmp_path / "ours") in str(error) and "\n" not in str(error)
    if damage == "truncated" or (own and name == "adapter_model.safetensors"):  # has a digest
        assert refusals == 100
    else:  # a file of torch has checksums, but not of its padding
        assert refusals > (90 if name == "adapter_model.bin" else 25)


def test_what_the_format_cannot_hold_is_not_written(tmp_path):
    for more, message in (
        ({"ln_f.bias": torch.ones(32)}, r"whole modules and cannot hold ln_f\.bias alone"),
        ({"scale": torch.ones(1)}, "whole modules and cannot hold scale alone"),
        ({"lm_head.bias": torch.ones(256)}, r"cannot hold lm_head\.bias alone"),
        ({"blocks.0.weight": torch.ones(1)}, r"cannot hold blocks\.0\.weight alone"),
    ):
        adapter = Adapter(None, ADAPTER.alpha, ADAPTER.tensors | more)
        with pytest.raises(FileError, match=message):
            write_peft(tmp_path / "ours", adapter)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_whole_and_replaces_nothing(tmp_path, monkeypatch):
    write_peft(tmp_path / "ours", ADAPTER)
    with pytest.raises(FileError, match="ours exists already"):
        write_peft(tmp_path / "ours", ADAPTER)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("os.fsync", full_disk)
    for name in ("new", "empty"):
        with pytest.raises(FileError, match=f"{name} cannot be written: No space left"):
            write_peft(tmp_path / name, ADAPTER)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "ours"]
    monkeypatch.undo()
    write_peft(tmp_path / "empty", ADAPTER)
    assert read_adapter(tmp_path / "empty").base == BASE_ID


def test_without_safetensors_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for use in (lambda: read_adapter(folder), lambda: write_peft(folder.parent / "new", ADAPTER)):
        with pytest.raises(FileError, match="needs the package safetensors: pip install safetens"):
            use()


@needs_dev_full
def test_a_list_that_cannot_be_written_ends_in_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lora", str(tmp_path)],
            cwd=ROOT, env={"PATH": os.environ["PATH"]},
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr == "error: stdout: No space left on device\n"


def test_folders_are_listed_and_exchanged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_adapter("lora.pt", ADAPTER)
    peft_adapter(tmp_path / "peft", ["query"])
    assert command.main(["export", "lora.pt", "ours"]) == 0
    assert command.main(["import", "ours", "again.pt"]) == 0
    again = read_adapter("again.pt")
    assert again.metadata == METADATA and again.alpha == ADAPTER.alpha
    shutil.copytree("ours", "dora")
    edit_config(tmp_path / "dora", use_dora=True)
    capsys.readouterr()
    assert command.main([]) == 0
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [row[0] for row in rows] == ["again.pt", "lora.pt", "ours", "peft"]  # and no DoRA
    assert [row[6] for row in rows] == [BASE_ID] * 3 + ["-"]
    assert command.main(["--help"]) == 0
    assert "python -m lora export out/lora.pt folder" in capsys.readouterr().out
    for arguments, message in (
        (["dora"], "uses use_dora=True, which is not supported"),
        (["export", "lora.pt"], "export takes two names"),
        (["export", "lora.pt", "ours"], "ours exists already"),
        (["export", "ours", "x"], "ours is not a file"),
        (["import", "ours", "lora.pt"], "lora.pt exists already"),
        (["import", "lora.pt", "x.pt"], "lora.pt is not a folder"),
        (["import", ".", "x.pt"], ". is a folder without adapter_config.json; did you mean dora?"),
        (["nothing"], "nothing cannot be read"),
    ):
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_folder_is_an_adapter_for_the_scripts(tmp_path):
    """As a user does it: train on, evaluate a sum, and generate with one that is damaged."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 60)
    (tmp_path / "out").mkdir()
    save_checkpoint(tmp_path / "out/full.pt", BASE, {"step": 1})
    write_peft(tmp_path / "ours", ADAPTER)
    peft_adapter(tmp_path / "peft", ["query", "value"])
    tiny = {n: v for n, v in TINY.items() if not n.startswith(("N_", "BLOCK_"))}
    tiny |= {"BASE_CHECKPOINT": "out/full.pt", "NUM_THREADS": "1"}

    more = {"USE_LORA": "True", "OUT_DIR": "more", "ADAPTERS": "peft"}
    log = succeeded(start_script(tmp_path, **tiny | more))
    assert "Base of the adapter: not recorded in its file, so not checked" in log
    tuned = read_adapter(tmp_path / "more/lora.pt", BASE_ID)
    assert tuned.base == BASE_ID and set(tuned.ranks.values()) == {4}

    evaluation = {"EVAL_ONLY": "True", "ADAPTERS": "ours:0.5,peft:0.5"}
    log = succeeded(start_script(tmp_path, **tiny | evaluation))
    assert "Adapter: ours, weight 0.5" in log and "Validation loss: " in log

    (tmp_path / "peft/adapter_config.json").write_text("{")
    error = refused(start_script(tmp_path, script="generate.py", ADAPTERS="peft"))
    assert error.endswith("adapter_config.json is damaged: it is not JSON")
