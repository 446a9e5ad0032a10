"""Adapters of PEFT's with embeddings of their own: whole heads, and vocabularies that were resized.

Expected logits are those of PEFT on the models of `transformers`.
"""

import json
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import refused, start_script, succeeded

import export
from generate import load_writer
from lora import __main__ as lora_command
from lora import lora_layers, read_adapter
from models.huggingface import read_base
from trainer.loading import metadata_of_asking
from trainer.own_head import fit_base
from trainer.settings import GenerateConfig

WORDS, MORE = 64, 6  # tokens of the base, and those that are added
IDX = torch.randint(WORDS, (2, 16), generator=torch.manual_seed(1))
GROWN = torch.randint(WORDS + MORE, (2, 16), generator=torch.manual_seed(2))
KINDS = {
    "gpt2": (
        transformers.GPT2Config,
        {"n_embd": 16, "n_positions": 32, "n_head": 2, "n_layer": 2},
        ("c_attn", "wte"),
    ),
    "llama": (
        transformers.LlamaConfig,
        {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 32,
        },
        ("q_proj", "embed_tokens"),
    ),
}  # fmt: skip
EVERY = [(kind, tied) for kind in KINDS for tied in (True, False)]


def words(n: int) -> tokenizers.Tokenizer:
    """A tokenizer of n words, w0 and so on, the first of which ends a text."""
    vocabulary = {f"w{i}": i for i in range(n)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def write_base(folder: Path, kind: str, tied: bool, dtype=torch.float32) -> None:
    config, sizes, _ = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config(vocab_size=WORDS, tie_word_embeddings=tied, eos_token_id=0, bos_token_id=0, **sizes)
    )
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.to(dtype).save_pretrained(folder)
    words(WORDS).save(str(folder / "tokenizer.json"))


def opened(folder: Path, more: int = 0):
    """The base in `transformers`, with `more` new tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    if more:
        model.resize_token_embeddings(WORDS + more)
    return model


def write_adapter(tmp_path: Path, kind: str, targets=(), saved=None, more: int = 0) -> None:
    """`adapter`, an adapter with random weights that PEFT saves, and its tokenizer."""
    names = {"wte": KINDS[kind][2][1]}
    torch.manual_seed(3)
    model = peft.get_peft_model(
        opened(tmp_path / "base", more),
        peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=[KINDS[kind][2][0], *targets], task_type="CAUSAL_LM",
            modules_to_save=saved and [names.get(name, name) for name in saved],
        ),
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "adapter")
    if more:
        words(WORDS + more).save(str(tmp_path / "adapter" / "tokenizer.json"))


@torch.no_grad()
def logits(model, idx: torch.Tensor) -> torch.Tensor:
    found = model.eval()(idx)
    return found[0] if isinstance(found, tuple) else found.logits


def in_peft(tmp_path: Path, idx: torch.Tensor, adapter: str = "adapter") -> torch.Tensor:
    base = opened(tmp_path / "base", MORE if idx is GROWN else 0)
    return logits(peft.PeftModel.from_pretrained(base, tmp_path / adapter), idx)


def writer(tmp_path: Path, base: str = "base", adapter: str | None = "adapter"):
    """What generate.py writes with."""
    variables = {"BASE_CHECKPOINT": str(tmp_path / base), "DEVICE": "cpu"}
    if adapter is not None:
        variables["ADAPTERS"] = str(tmp_path / adapter)
    return load_writer(GenerateConfig.from_environment(variables), torch.device("cpu"))


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


SAVED = [
    ((), ["wte"]), ((), ["lm_head"]), ((), ["wte", "lm_head"]),
    (["lm_head"], None), (["lm_head"], ["wte"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tied"), EVERY)
@pytest.mark.parametrize(("targets", "saved"), SAVED)
def test_embeddings_saved_whole_give_pefts_logits(kind, tied, targets, saved, tmp_path):
    write_base(tmp_path / "base", kind, tied)
    write_adapter(tmp_path, kind, targets, saved)
    expected = in_peft(tmp_path, IDX)
    assert_alike(logits(writer(tmp_path).model, IDX), expected)
    bare = logits(writer(tmp_path, adapter=None).model, IDX)
    assert (bare - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize(("kind", "tied"), EVERY)
@pytest.mark.parametrize(("targets", "saved"), [((), None), *SAVED])
def test_a_resized_vocabulary_gives_pefts_logits(kind, tied, targets, saved, tmp_path):
    write_base(tmp_path / "base", kind, tied)
    write_adapter(tmp_path, kind, targets, saved, MORE)
    asked = {"BASE_CHECKPOINT": "base", "ADAPTERS": "adapter", "PROMPT": "w1 w69"}
    if targets and not saved and not tied:  # PEFT saves the head alone, and the rest was random
        refusal = refused(start_script(tmp_path, script="generate.py", **asked))
        assert "is of a vocabulary of 70 tokens, the base of 64, and lacks" in refusal
        assert "embed" in refusal and "save_embedding_layers=True" in refusal
        return
    found = writer(tmp_path)
    assert found.base.sizes.vocab_size == WORDS + MORE
    assert_alike(logits(found.model, GROWN), in_peft(tmp_path, GROWN))
    assert found.format.start == [] and found.ends == [0]
    assert found.base.tokenizer == (tmp_path / "adapter" / "tokenizer.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_stays_as_it_was_saved_where_products_are_rounded(kind, tmp_path):
    write_base(tmp_path / "base", kind, tied=True)
    write_adapter(tmp_path, kind, saved=["lm_head"])
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % WORDS}" for i in range(0, 4000, 3)))
    run = {
        "BASE_CHECKPOINT": "base", "DATA": "text.txt", "DTYPE": "bfloat16", "BATCH_SIZE": "2",
        "BLOCK_SIZE": "16", "MAX_STEPS": "1", "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "0",
    }  # fmt: skip
    succeeded(start_script(tmp_path, USE_LORA="True", ADAPTERS="adapter", **run))
    before, after = (read_adapter(tmp_path / name).tensors for name in ("adapter", "out/lora.pt"))
    head = next(tensor for name, tensor in before.items() if name.endswith("lm_head.weight"))
    assert torch.equal(after["lm_head.weight"], head)
    assert not torch.equal(head, head.bfloat16())
    succeeded(start_script(tmp_path, EVAL_ONLY="True", ADAPTERS="out/lora.pt", **run))
    asked = {"ESTIMATE": "True", "USE_LORA": "True", "ADAPTERS": "adapter"}
    assert "\nMemory: about " in succeeded(start_script(tmp_path, **asked, **run))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resized_vocabulary_goes_all_the_way(kind, dtype, tmp_path):
    """Evaluated, merged, exported, trained further, and that result read again here and in PEFT."""
    write_base(tmp_path / "base", kind, tied=True, dtype=dtype)
    write_adapter(tmp_path, kind, ["lm_head"], ["wte"], MORE)
    text = " ".join(f"w{i % (WORDS + MORE)}" for i in range(0, 4000, 3))
    (tmp_path / "text.txt").write_text(text)
    run = {
        "BASE_CHECKPOINT": "base", "ADAPTERS": "adapter", "DATA": "text.txt", "DTYPE": "float32",
        "BLOCK_SIZE": "16", "BATCH_SIZE": "2", "MAX_STEPS": "4", "EVAL_INTERVAL": "2",
        "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "5", "NUM_THREADS": "1", "LEARNING_RATE": "0.01",
    }  # fmt: skip

    def loss(**variables: str) -> str:
        asked = run | {"EVAL_ONLY": "True"} | variables
        asked = {name: value for name, value in asked.items() if value}
        log = succeeded(start_script(tmp_path, **asked))
        return next(line for line in log.splitlines() if line.startswith("Validation loss"))

    log = succeeded(start_script(tmp_path, USE_LORA="True", **run))
    assert "Head: the adapter's own" in log and "Tokenizer: the adapter's own, of 70 tokens" in log
    before, after = loss(), loss(ADAPTERS="out/lora.pt")
    assert before != after
    assert len(read_adapter(tmp_path / "out/lora.pt").metadata["files"]) == 1

    succeeded(start_script(tmp_path, MERGE="True", **run))
    succeeded(start_script(tmp_path, "out/merged.pt", "merged", script="export.py"))
    if dtype == torch.float32:  # else the merged weights are rounded
        assert loss(BASE_CHECKPOINT="merged", ADAPTERS="") == before
        there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_alike(logits(there, GROWN), in_peft(tmp_path, GROWN))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (WORDS + MORE, False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "merged" / "tokenizer.json")
    )
    assert tokenizer("w1 w69").input_ids == [1, 69]

    succeeded(start_script(tmp_path, "out/lora.pt", "again", script="export.py"))
    assert loss(ADAPTERS="again") == after
    assert_alike(
        in_peft(tmp_path, GROWN, "again"),
        logits(writer(tmp_path, adapter="out/lora.pt").model, GROWN),
    )
    again = {"ADAPTERS": "out/lora.pt", "OUT_DIR": "more", "USE_LORA": "True"}
    succeeded(start_script(tmp_path, **run | again))
    assert loss(ADAPTERS="more/lora.pt") != after


def test_fewer_rows_than_the_bases_are_read_too(tmp_path):
    """As where an embedding was larger than its tokenizer, and was resized to that."""
    write_base(tmp_path / "base", "llama", tied=True)
    write_adapter(tmp_path, "llama", more=-10)
    words(54).save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    expected = logits(
        peft.PeftModel.from_pretrained(opened(tmp_path / "base", -10), tmp_path / "adapter"),
        IDX % 54,
    )
    assert_alike(logits(writer(tmp_path).model, IDX % 54), expected)


def test_new_tokens_without_their_tokenizer_are_refused(tmp_path):
    write_base(tmp_path / "base", "llama", tied=True)
    write_adapter(tmp_path, "llama", more=MORE)
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    run = {"BASE_CHECKPOINT": "base", "ADAPTERS": "adapter"}
    refusal = refused(start_script(tmp_path, script="generate.py", **run))
    assert "adapter is of a vocabulary of 70 tokens, the base of 64: put the tokenizer" in refusal
    words(80).save(str(tmp_path / "adapter" / "tokenizer.json"))
    assert "put the tokenizer" in refused(start_script(tmp_path, script="generate.py", **run))
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    refusal = refused(start_script(tmp_path, script="generate.py", **run))
    assert "adapter: the base's tokenizer cannot be used" in refusal


def test_a_head_of_its_own_takes_no_weight_and_no_other_adapter(tmp_path):
    write_base(tmp_path / "base", "llama", tied=True)
    write_adapter(tmp_path, "llama", saved=["lm_head"])
    for adapters in ("adapter:0.5", "adapter,adapter"):
        run = {"BASE_CHECKPOINT": "base", "ADAPTERS": adapters}
        refusal = refused(start_script(tmp_path, script="generate.py", **run))
        assert "adapter has a head of its own, so ADAPTERS takes it alone" in refusal


def test_a_saved_head_that_is_the_bases_stays_tied_and_combines(tmp_path):
    """As `shared/cases/emb_saved_auto`: saved, and never changed."""
    write_base(tmp_path / "base", "gpt2", tied=True)
    model = peft.get_peft_model(
        opened(tmp_path / "base"), peft.LoraConfig(target_modules=["c_attn"])
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert "lm_head.weight" in read_adapter(tmp_path / "adapter").tensors
    found = writer(tmp_path, adapter="adapter:0.5")
    assert found.base.sizes == read_base(tmp_path / "base").sizes
    assert not lora_layers(found.model)
    assert_alike(logits(found.model, IDX), logits(opened(tmp_path / "base"), IDX))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_modules_that_are_not_supported_are_refused_by_name(kind, tmp_path):
    write_base(tmp_path / "base", kind, tied=True)
    norm = {"gpt2": "ln_f", "llama": "model.norm"}[kind]
    write_adapter(tmp_path, kind, saved=[norm])
    run = {"BASE_CHECKPOINT": "base", "ADAPTERS": "adapter", "USE_LORA": "True"}
    name = {"gpt2": "transformer.ln_f", "llama": "model.norm"}[kind]
    expected = f"ADAPTERS=adapter: adapter has modules_to_save {name}, which is not supported"
    assert expected in refused(start_script(tmp_path, script="generate.py", **run))
    (tmp_path / "text.txt").write_text("w1 w2 " * 400)
    assert expected in refused(start_script(tmp_path, DATA="text.txt", **run))


TEMPLATE = "{% for m in messages %}{{ m.content }} w0 {% endfor %}"


def with_template(tmp_path: Path, name: str, template: str, config: bool = False) -> str:
    """An adapter of random weights with a chat template beside it, as TRL saves it."""
    write_adapter(tmp_path, "llama")
    folder = (tmp_path / "adapter").rename(tmp_path / name)
    if config:  # where older versions of transformers put it
        content = json.dumps({"chat_template": template})
        (folder / "tokenizer_config.json").write_text(content)
    else:
        (folder / "chat_template.jinja").write_text(template)
    return name


@pytest.mark.parametrize("config", [False, True])
def test_the_chat_template_beside_an_adapter_is_the_models(config, tmp_path):
    write_base(tmp_path / "base", "llama", tied=True)
    (tmp_path / "base" / "chat_template.jinja").write_text("w1 " + TEMPLATE)
    run = {"BASE_CHECKPOINT": "base", "ADAPTERS": with_template(tmp_path, "a", TEMPLATE, config)}
    rows = [{"prompt": "w5", "completion": "w6"}] * 9
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    log = succeeded(start_script(tmp_path, DATA="a.jsonl", USE_LORA="True", PREVIEW="1", **run))
    assert '"{prompt} w0 ", in the trained model\'s chat template' in log
    assert lora_command.main(["import", str(tmp_path / "a"), str(tmp_path / "a.pt")]) == 0
    assert export.main([str(tmp_path / "a.pt"), str(tmp_path / "again")]) == 0
    for path in ("a", "a.pt", "again"):
        assert writer(tmp_path, adapter=path).format.template == TEMPLATE


def test_adapters_of_different_formats_are_said_and_the_first_counts(tmp_path):
    write_base(tmp_path / "base", "llama", tied=True)
    one, two = (with_template(tmp_path, n, f"{n} {TEMPLATE}") for n in ("one", "two"))
    (tmp_path / "text.txt").write_text("w1 w2 " * 400)
    note = "Note: ADAPTERS were trained in different formats; without CHAT_TEMPLATE, that of the "
    for adapters, said in ((f"{one}:0.5,{two}:0.5", True), (f"{one},{one}", False)):
        run = {"BASE_CHECKPOINT": "base", "ADAPTERS": adapters}
        process = start_script(tmp_path, script="generate.py", PROMPT="w3", **run)
        assert succeeded(process) and (note in process.stderr) == said
    base = read_base(tmp_path / "base")
    files = [(n, read_adapter(tmp_path / n), 1.0) for n in (two, one)]
    _, fitted = fit_base(base, files)
    assert metadata_of_asking(base, fitted)["chat_template"].startswith("two ")
    assert metadata_of_asking(base, []) == {}
