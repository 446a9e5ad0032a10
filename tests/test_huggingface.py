"""GPT-2 in Hugging Face's folders, against `transformers`' and PEFT's own models."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import TEXT, needs_posix, refused, start_script, succeeded
from torch import nn

from data import chat_format
from files.tensors import fingerprint, read_foreign_tensors
from lora import (
    FileError,
    base_state,
    load_adapter,
    lora_layers,
    merge_adapter,
    read_adapter,
    save_adapter,
    switch_adapter,
    take_adapter,
    write_peft,
)
from models import GPT2
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.checkpoint import load_base, read_checkpoint, save_checkpoint
from models.huggingface import (
    adapter_from_folder,
    adapter_to_folder,
    read_base,
    read_model,
    write_model,
)
from trainer.loading import LoraOptions, build_model, read_checked_base

SHAPES = [
    {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    {"n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 40, "activation_function": "gelu"},
    {"n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 33, "tie_word_embeddings": False},
]


def gpt2(vocab_size: int = 300, **shape: object):
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocab_size, **(shape or SHAPES[0]) | ends)
    ).eval()
    for p in model.parameters():  # biases and norms too, so that none can be forgotten
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of 300 tokens, as GPT-2's is."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=299)
    bpe.add_special_tokens(["<|endoftext|>"])
    return bpe


@pytest.fixture
def folder(tmp_path: Path, tokenizer) -> Path:
    """A GPT-2 as `transformers` saves it, with its tokenizer."""
    gpt2().save_pretrained(tmp_path / "gpt2")
    tokenizer.save(str(tmp_path / "gpt2" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "gpt2"


def ours(checkpoint, **options: object) -> BigramLanguageModelLoRA:
    model = BigramLanguageModelLoRA(
        **dataclasses.asdict(checkpoint.sizes), device="cpu", dropout=0.0, **options
    )
    load_base(model, checkpoint)
    return model.eval()


def tokens(shape: dict, vocab_size: int = 300) -> torch.Tensor:
    return torch.randint(vocab_size, (3, shape["n_positions"]), generator=torch.manual_seed(1))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_lora", [False, True])
@torch.no_grad()
def test_logits_are_those_of_transformers(shape, use_lora, tmp_path, tokenizer):
    theirs = gpt2(**shape)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model, idx = ours(read_base(tmp_path), use_lora=use_lora), tokens(shape)
    assert relative_error(model(idx)[0], theirs(idx).logits) < 1e-5


@pytest.mark.parametrize("content", [[], {1: torch.ones(1)}, {"wte.weight": 3}, {"a": None}])
def test_a_file_of_something_else_is_refused(content, folder):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(FileError, match="gpt2"):
        read_model(folder)


def test_flipped_bits_of_a_torch_file_are_seen(folder):
    path = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(gpt2().state_dict(), path)
    read_model(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"pytorch_model\.bin holds no tensors, or it is damaged"):
        read_model(folder)


@torch.no_grad()
def test_files_as_they_are_published_load_too(folder, tokenizer):
    """pytorch_model.bin in half precision, names without prefix, causal masks among the tensors,
    vocab.json and merges.txt in place of tokenizer.json."""
    theirs, idx = gpt2().half().float(), tokens(SHAPES[0])
    state = {n.removeprefix("transformer."): t.half() for n, t in theirs.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    tokenizer.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text()) | {"<|endoftext|>": 299}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    checkpoint = read_model(folder)
    assert relative_error(ours(checkpoint)(idx)[0], theirs(idx).logits) < 1e-5
    loaded = tokenizers.Tokenizer.from_str(checkpoint.tokenizer)
    assert loaded.encode(TEXT).ids == tokenizer.encode(TEXT).ids
    marked = "a<|endoftext|>b"  # which no file says to be special
    assert loaded.encode(marked).ids == tokenizer.encode(marked).ids
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    files = checkpoint.files | {"config.json": b'{"eos_token_id": 299}'}
    files |= {"chat_template.jinja": template.encode()}
    asked = chat_format(checkpoint.tokenizer, files).render([{"role": "user", "content": "a"}])
    assert asked == f"a{tokenizer.id_to_token(299)}" == "a<|endoftext|>"


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_loads_what_is_written_and_reading_it_gives_the_same_bits(
    shape, tmp_path, tokenizer
):
    gpt2(**shape).save_pretrained(tmp_path / "in")
    tokenizer.save(str(tmp_path / "in" / "tokenizer.json"))
    checkpoint = read_base(tmp_path / "in")
    write_model(tmp_path / "out", checkpoint)
    again = read_base(tmp_path / "out")
    assert again.sizes == checkpoint.sizes
    assert fingerprint(again.tensors) == fingerprint(checkpoint.tensors)
    theirs, idx = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out"), tokens(shape)
    assert relative_error(theirs(idx).logits, ours(checkpoint)(idx)[0]) < 1e-5
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids
    assert words.eos_token == "<|endoftext|>"
    with pytest.raises(FileError, match="exists already"):
        write_model(tmp_path / "out", checkpoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_low_precision_is_computed_with_in_float32(dtype, folder, tmp_path):
    """The gradients of adapters are within 1e-5 of those on the same values in float32."""
    gradients = []
    for name, stored in (("low", dtype), ("same", torch.float32)):
        gpt2().to(dtype).to(stored).save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        base = read_base(tmp_path / name)
        bare = build_model(GPT2, base.sizes, base, "cpu", trains=False)
        assert {(p.dtype, p.requires_grad) for p in bare.parameters()} == {(stored, False)}
        lora = LoraOptions(4, 8.0, 0.0, None, train_embeddings=False)
        model = build_model(GPT2, base.sizes, base, "cpu", 0.0, lora)
        assert model.token_embedding_table.weight.dtype == stored
        torch.manual_seed(1)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_A, std=0.1)
            nn.init.normal_(layer.lora_B, std=0.1)
        idx = tokens(SHAPES[0])
        model(idx, idx)[1].backward()
        trained = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        gradients.append(torch.cat(trained))
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_of_a_file_goes_with_every_dtype_of_a_run(stored, tied, folder, tmp_path):
    """The loss is within 2% of that in float32, for texts and packed records."""
    theirs = gpt2(**SHAPES[0], tie_word_embeddings=tied)
    theirs.to(stored).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    idx = tokens(SHAPES[0])
    expected = theirs.float()(input_ids=idx, labels=idx).loss.item()
    segments = torch.arange(64).div(20, rounding_mode="floor").expand(3, -1)
    targets = torch.cat([idx[:, 1:], torch.full((3, 1), -100)], 1)
    base = read_base(tmp_path / "base")
    some = LoraOptions(2, 4.0, 0.0, ["query", "value"], train_embeddings=False)
    for lora in (None, some, dataclasses.replace(some, targets=None)):
        for base_dtype in ("auto", "float32", "bfloat16", "nf4"):
            if stored == torch.float64 and base_dtype == "nf4":
                continue
            options = {"lora": lora, "base_dtype": base_dtype, "trains": lora is not None}
            model = build_model(GPT2, base.sizes, base, "cpu", 0.0, **options)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = model(idx, targets)[1]
                    packed = model(idx, targets, segments)[1]
                if lora is not None:
                    (loss + packed).backward()
                close = 0.1 if base_dtype == "nf4" else 0.02
                assert loss.item() == pytest.approx(expected, rel=close)
                assert packed.isfinite()


def test_a_tied_head_counts_once_stays_tied_in_full_fine_tuning_and_is_apart_under_lora(folder):
    checkpoint = read_base(folder)
    full, lora = ours(checkpoint), ours(checkpoint, use_lora=True)
    n_head = 300 * 32
    assert full.lm_head.weight is full.token_embedding_table.weight
    assert full.get_parameter_info()["total"] == gpt2().num_parameters()
    assert lora.lm_head.weight.data_ptr() != lora.token_embedding_table.weight.data_ptr()
    info = lora.get_parameter_info()
    assert info["total"] == gpt2().num_parameters() + n_head + info["lora"]
    assert not lora.lm_head.weight.requires_grad and lora.token_embedding_table.weight.requires_grad
    for model in (full, lora):
        _, loss = model(tokens(SHAPES[0])[:, :8], tokens(SHAPES[0])[:, 1:9])
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= p.grad
    same = torch.equal(full.lm_head.weight, full.token_embedding_table.weight)
    assert same and not torch.equal(lora.lm_head.weight, lora.token_embedding_table.weight)


def test_a_tied_head_is_no_copy_where_the_embedding_is_frozen_too(folder, tmp_path):
    """And an adapter that was trained so fits a model that has a copy: their bases are one."""
    checkpoint = read_base(folder)
    torch.manual_seed(3)
    frozen = ours(checkpoint, use_lora=True, train_embeddings=False)
    assert frozen.lm_head.weight is frozen.token_embedding_table.weight
    info = frozen.get_parameter_info()
    assert info["total"] == gpt2().num_parameters() + info["lora"]
    base = fingerprint(base_state(frozen))
    copied = ours(checkpoint, use_lora=True)
    assert base == fingerprint(base_state(copied))
    for layer in lora_layers(frozen).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(tmp_path / "lora.pt", frozen, base, {})
    load_adapter(tmp_path / "lora.pt", copied, base)
    idx = tokens(SHAPES[0])[:, :8]
    expected = frozen(idx)[0]
    torch.testing.assert_close(copied(idx)[0], expected, rtol=0, atol=0)
    merge_adapter(frozen)
    torch.testing.assert_close(frozen(idx)[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(frozen.lm_head.weight, frozen.token_embedding_table.weight)


def trained(checkpoint) -> BigramLanguageModelLoRA:
    """A model with an adapter that is not zero anywhere."""
    model = ours(checkpoint, use_lora=True, lora_rank=3, lora_alpha=7.0)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


@torch.no_grad()
def test_an_adapter_gives_pefts_logits_on_transformers_model_and_comes_back_with_its_bits(
    folder, tmp_path
):
    checkpoint = read_base(folder)
    model, idx = trained(checkpoint), tokens(SHAPES[0])
    adapter = take_adapter(model, fingerprint(checkpoint.tensors), {"step": 3})
    write_peft(tmp_path / "peft", adapter_to_folder(adapter, GPT2), "CAUSAL_LM", str(folder))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft").eval()
    assert relative_error(theirs(idx).logits, model(idx)[0]) < 1e-5
    again = adapter_from_folder(read_adapter(tmp_path / "peft"), GPT2)
    assert (again.base, again.alpha, again.metadata) == (
        adapter.base, adapter.alpha, adapter.metadata
    )  # fmt: skip
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(t, adapter.tensors[n]) for n, t in again.tensors.items())


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["c_attn", "c_proj", "lm_head"]])
def test_an_adapter_that_peft_trained_on_gpt2_gives_its_logits_here(targets, folder, tmp_path):
    theirs, idx = gpt2(), tokens(SHAPES[0])
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "peft")  # with the base's weight of an adapted head
    out = succeeded(
        start_script(
            tmp_path, ADAPTERS="peft", BASE_CHECKPOINT="gpt2", MERGE="True", OUT_DIR="out",
            DATA="text.txt", BLOCK_SIZE="32",
        )
    )  # fmt: skip
    assert "merged.pt" in out
    with torch.no_grad():
        merged = ours(read_checkpoint(tmp_path / "out" / "merged.pt"))
        assert relative_error(merged(idx)[0], theirs.eval()(idx).logits) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "'gemma' is not supported; supported are gpt2, llama"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_inner": 64}, "n_inner=64"),
        ({"n_head": 5}, "not divisible"),
        ({"n_embd": "32"}, "n_embd is '32'"),
        ({"n_embd": 64}, "has shape"),
        ({"n_layer": 3}, "lacks tensor transformer.h.2"),
        ({"n_layer": 10**9}, "too few"),
        ({"n_layer": 1}, "unexpected tensor"),
        ({"vocab_size": 299}, "has shape"),
        ({"n_positions": True}, "not a size"),
        ({"tie_word_embeddings": False}, "lacks tensor lm_head.weight"),
    ],
)
def test_another_model_is_refused_by_what_it_has(change, message, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError, match=message):
        read_model(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json"),
        ("config.json", b"{", "not JSON"),
        ("config.json", b"[]", "no JSON object"),
        ("config.json", b"[" * 100_000, "not JSON"),
        ("model.safetensors", None, "neither model.safetensors nor pytorch_model.bin"),
        ("model.safetensors", b"\0" * 64, "damaged"),
        ("tokenizer.json", None, "neither tokenizer.json nor vocab.json"),
        ("tokenizer.json", b"{}", "tokenizer cannot be used"),
    ],
)
def test_missing_and_damaged_files_are_refused(name, content, message, folder):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(FileError, match=f"gpt2.*{message}"):
        read_checked_base(folder)


def test_the_whole_way_from_published_weights_to_peft_and_transformers(folder, tmp_path):
    """Fine-tune with LoRA, ask, export the adapter, merge, export the model, and compare."""
    run = {"BASE_CHECKPOINT": "gpt2", "DATA": "text.txt", "BLOCK_SIZE": "32", "BATCH_SIZE": "4"}
    run |= {"NUM_THREADS": "1", "DTYPE": "float32"}
    budget = {"MAX_STEPS": "4", "EVAL_INTERVAL": "2", "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "5"}
    refusal = refused(start_script(tmp_path, **run | {"BASE_CHECKPOINT": "."}))
    assert "config.json cannot be read" in refusal
    budget |= {"LORA_TARGETS": "all", "TRAIN_EMBEDDINGS": "True"}
    log = succeeded(start_script(tmp_path, USE_LORA="True", **run, **budget))
    assert "tokens:   " in log and "weights of the family gpt2" in log
    caches = list((tmp_path / "out").glob("tokens-*.bin"))
    assert len(caches) == 1
    asked = start_script(
        tmp_path, script="generate.py", BASE_CHECKPOINT="gpt2", ADAPTERS="out/lora.pt",
        PROMPT="the quick", MAX_NEW_TOKENS="5", NUM_THREADS="1",
    )  # fmt: skip
    assert succeeded(asked).startswith("the quick")
    succeeded(start_script(tmp_path, "out/lora.pt", "peft", script="export.py"))
    evaluated = [
        succeeded(start_script(tmp_path, EVAL_ONLY="True", ADAPTERS=name, **run))
        for name in ("out/lora.pt", "peft")
    ]
    lines = [next(x for x in r.splitlines() if "Validation loss" in x) for r in evaluated]
    assert lines[0] == lines[1] and "per token" in lines[0]
    succeeded(start_script(tmp_path, MERGE="True", ADAPTERS="peft", **run))
    succeeded(start_script(tmp_path, "out/merged.pt", "merged", script="export.py"))
    again = succeeded(
        start_script(tmp_path, EVAL_ONLY="True", **run | {"BASE_CHECKPOINT": "merged"})
    )
    assert lines[0].split(" nats")[0] in again  # four decimals
    idx = tokens(SHAPES[0])
    model = ours(read_base(folder), use_lora=True)
    adapter = read_adapter(tmp_path / "out" / "lora.pt", fingerprint(base_state(model)))
    switch_adapter(model, adapter)
    with torch.no_grad():
        logits = model(idx)[0]
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert relative_error(merged(idx).logits, logits) < 1e-5
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        on_peft = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
        assert relative_error(on_peft.eval()(idx).logits, logits) < 1e-5


def test_a_published_base_keeps_its_embeddings_and_head_unless_asked(folder, tmp_path):
    run = {"BASE_CHECKPOINT": "gpt2", "DATA": "text.txt", "USE_LORA": "True", "MAX_STEPS": "1"}
    run |= {"BATCH_SIZE": "2", "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "0", "NUM_THREADS": "1"}
    log = succeeded(start_script(tmp_path, **run))
    assert "LoRA layers: query,key,value,proj,fc_in,fc_out\n" in log
    assert ", embeddings 0\n" in log and "Embeddings frozen: the default" in log
    assert "lm_head not adapted: the default" in log
    adapter = read_adapter(tmp_path / "out" / "lora.pt")
    assert adapter.extras == [] and not any("lm_head" in name for name in adapter.alpha)
    asked = {"TRAIN_EMBEDDINGS": "True", "LORA_TARGETS": "query,lm_head", "OUT_DIR": "asked"}
    log = succeeded(start_script(tmp_path, **run | asked))
    assert "Embeddings frozen" not in log and "lm_head not adapted" not in log
    assert len(read_adapter(tmp_path / "asked" / "lora.pt").extras) == 2
    refusal = refused(start_script(tmp_path, **run | {"LORA_TARGETS": "q_proj"}))
    assert "'q_proj' is no layer of the model" in refusal and "query,key,value" in refusal


def test_a_checkpoint_that_lacks_a_tensor_is_not_exported(folder, tmp_path):
    base = read_base(folder)
    del base.tensors["ln_f.weight"]
    with pytest.raises(FileError, match=r"lacks tensor ln_f\.weight"):
        write_model(tmp_path / "new", base)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", [["key"], ["query", "value"], ["key", "value", "fc_in"]])
def test_an_adapter_of_some_of_query_key_and_value_is_exported_whole(folder, there):
    model = BigramLanguageModelLoRA(
        **dataclasses.asdict(read_base(folder).sizes),
        device="cpu",
        dropout=0.0,
        use_lora=True,
        lora_targets=there,
    )
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    adapter = take_adapter(model, "base")
    again = adapter_from_folder(adapter_to_folder(adapter, GPT2), GPT2)
    assert again.alpha == adapter.alpha and again.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    odd = dict(adapter_to_folder(adapter, GPT2).tensors)
    odd["transformer.h.0.attn.c_attn.lora_B"] = torch.ones(4, 24)
    with pytest.raises(FileError, match="4 rows, which are not 3 equal parts"):
        adapter_from_folder(
            dataclasses.replace(adapter_to_folder(adapter, GPT2), tensors=odd), GPT2
        )
    foreign = dataclasses.replace(adapter, alpha=adapter.alpha | {"layers.0.q_proj": 1.0})
    with pytest.raises(FileError, match=r"layers\.0\.q_proj is no layer of gpt2's"):
        adapter_to_folder(foreign, GPT2)


def test_records_take_the_tokenizer_of_the_base_and_its_mark_of_an_end(folder, tmp_path):
    run = {"BASE_CHECKPOINT": "gpt2", "DATA": "python-instructions", "NUM_THREADS": "1"}
    budget = {"MAX_STEPS": "2", "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "5", "BATCH_SIZE": "2"}
    log = succeeded(start_script(tmp_path, USE_LORA="True", DTYPE="float32", **run, **budget))
    assert "records" in log and "user: " in log.rpartition("Sample")[2]
    asked = start_script(
        tmp_path, script="generate.py", BASE_CHECKPOINT="gpt2", ADAPTERS="out/lora.pt",
        PROMPT="What does list.sort do?", MAX_NEW_TOKENS="5", NUM_THREADS="1",
    )  # fmt: skip
    assert "user" not in succeeded(asked)

    answers = [f"{i} caf\u00e9s" for i in range(40)]
    lines = [json.dumps({"prompt": "a", "completion": answer}) for answer in answers]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    short = {"EVAL_ONLY": "True", "DTYPE": "float32"} | run | {"DATA": "short.jsonl"}
    evaluated = succeeded(start_script(tmp_path, **short))
    assert "nats per token" in evaluated
    n_tokens, loss, bits = (
        float(re.search(rf"^{name}: ([\d.,]+)", evaluated, re.M)[1])
        for name in ("Tokens evaluated", "Validation loss", "Bits per byte")
    )
    n_bytes = sum(len(answer.encode()) + 1 for answer in answers[9::10])  # the end is one
    assert bits == pytest.approx(loss * n_tokens / math.log(2) / n_bytes, rel=1e-3)


def test_numbers_that_are_not_finite_are_not_handed_on(tmp_path):
    model = GPT2.model(
        vocab_size=256, n_embd=8, block_size=8, n_head=2, n_layer=1, device="cpu", dropout=0.0
    )
    model.blocks[0].mlp.fc_in.weight.data[0, 0] = math.nan
    save_checkpoint(tmp_path / "full.pt", model, {})
    with pytest.raises(FileError, match=r"full\.pt: .* holds numbers that are not finite"):
        write_model(tmp_path / "folder", read_base(tmp_path / "full.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["full.pt"]


def test_adapters_on_a_base_in_float64_are_in_float64(tmp_path):
    sizes = {"vocab_size": 256, "n_embd": 8, "block_size": 8, "n_head": 2, "n_layer": 1}
    save_checkpoint(
        tmp_path / "full.pt", GPT2.model(**sizes, device="cpu", dropout=0.0).double(), {}
    )
    base = read_base(tmp_path / "full.pt")
    model = build_model(GPT2, base.sizes, base, "cpu", lora=LoraOptions(rank=2))
    loss = model(torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64))[1]
    loss.backward()
    assert model.lm_head.lora_B.grad.dtype == torch.float64


@needs_posix
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FileError, match=r"config\.json cannot be read: it is no regular file"):
        read_base(tmp_path)


@needs_posix
def test_a_name_that_is_no_text_is_said(tmp_path):
    """safetensors opens files by names in UTF-8 alone."""
    name = tmp_path / os.fsdecode(b"\xff.safetensors")
    name.write_bytes(b"")
    with pytest.raises(FileError, match="its name is not UTF-8"):
        read_foreign_tensors(name)
