"""Folders of the Llama family, both ways: what a user takes in, trains, and hands on."""

import json
import shutil
import signal
import unicodedata
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import TEXT, Started, needs_posix, refused, start_script, succeeded
from tokenizers.processors import TemplateProcessing

from data import end_tokens, load_records, start_tokens
from data.chat import PlainFormat
from data.tokenizer import begun, encode, load_tokenizer, stream_decoder
from files import FileError
from files.tensors import fingerprint
from lora import (
    Adapter,
    base_state,
    load_adapter,
    lora_layers,
    read_adapter,
    take_adapter,
    write_peft,
)
from models import GPT2, LLAMA
from models import huggingface as folders
from models.huggingface import adapter_from_folder, adapter_to_folder, read_base, write_model
from trainer.loading import LoraOptions, build_model

SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>", "<|im_end|>"]
IDX = torch.randint(290, (2, 24), generator=torch.manual_seed(1))
SIZES = {
    "vocab_size": 294, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 290, "eos_token_id": 291,
}  # fmt: skip
KINDS = {
    "llama": (transformers.LlamaConfig, {"rope_theta": 5e5}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
}
FILES = {
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
    },
    "generation_config.json": {"eos_token_id": [291, 292], "temperature": 0.6, "do_sample": True},
}  # fmt: skip


def bpe(kind: str = "llama") -> tokenizers.Tokenizer:
    """A byte-level BPE of 294 tokens, which for Llama puts a BOS before a text."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=290, show_progress=False)
    trained.add_special_tokens(SPECIAL)
    words = tokenizers.Tokenizer.from_str(trained.to_str())
    if kind == "llama":
        words.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 290)]
        )
    return words


TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{ message.role + ':\n' + message.content + '<|turn|>' }}{% endfor %}
{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"""


def published(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **more):
    """A random model as `transformers` saves it, with all that is published beside it."""
    torch.manual_seed(0)
    config, options = KINDS[kind]
    model = transformers.AutoModelForCausalLM.from_config(config(**SIZES | options | more))
    for p in model.parameters():  # biases and norms too, and logits that tell tokens apart
        p.data += 0.2 * torch.randn_like(p)
    model.to(dtype).save_pretrained(folder)
    bpe(kind).save(str(folder / "tokenizer.json"))
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def ours(folder: Path, lora: LoraOptions | None = None):
    base = read_base(folder)
    return build_model(base.family, base.sizes, base, "cpu", lora=lora).eval()


@pytest.mark.parametrize("base_dtype", ["auto", "float32", "bfloat16"])
def test_a_tied_base_in_float64_takes_packed_records(base_dtype, tmp_path):
    published(tmp_path / "base", dtype=torch.float64, tie_word_embeddings=True)
    base = read_base(tmp_path / "base")
    lora = LoraOptions(targets=["q_proj"], train_embeddings=False)
    idx, segments = torch.arange(24)[None], torch.arange(24)[None] // 10
    for options in ({"lora": lora}, {"trains": False}):
        options |= {"base_dtype": base_dtype}
        model = build_model(base.family, base.sizes, base, "cpu", 0.0, **options)
        assert model(idx, idx, segments)[1].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_does_not_train_is_its_file_and_no_copy(kind, tmp_path):
    published(tmp_path / kind, kind, dtype=torch.bfloat16)
    base = read_base(tmp_path / kind)
    model = build_model(base.family, base.sizes, base, "cpu", trains=False)
    for name, p in model.named_parameters():
        assert not p.requires_grad and p.data_ptr() == base.tensors[name].data_ptr()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model.eval()(IDX)
    return found[0] if isinstance(found, tuple) else found.logits


def assert_alike(found, expected) -> None:
    """The same logits: at most 1e-5 apart, as a share of their size."""
    one, two = (x if isinstance(x, torch.Tensor) else logits(x) for x in (found, expected))
    assert (one - two).abs().max() < 1e-5 * two.abs().max()


def randomized(model):
    """The model with adapters that change it."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return model


def continued(folder: Path, prompt: str, n: int) -> str:
    """What `transformers` writes after a prompt, the likeliest token each time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    asked = words(prompt, return_tensors="pt")
    tokens = model.generate(
        **asked, max_new_tokens=n, do_sample=False, pad_token_id=0, temperature=None
    )[0].tolist()
    ends = model.generation_config.eos_token_id
    while tokens[-1] in (ends if isinstance(ends, list) else [ends]):
        tokens.pop()
    text = words.decode(tokens[1:] if tokens[0] == 290 else tokens)
    # generate.py shows no control characters, which a model of random weights may write.
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


@needs_posix
def test_the_whole_way_from_a_published_folder_to_transformers_and_peft(tmp_path):
    """LoRA, interrupted and not, asked, evaluated, merged, and both results handed on."""
    published(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)
    base = {"BASE_CHECKPOINT": "base", "NUM_THREADS": "1", "DTYPE": "float32"}
    data = base | {"DATA": "text.txt", "BLOCK_SIZE": "32", "BATCH_SIZE": "2"}
    run = data | {
        "USE_LORA": "True", "LORA_TARGETS": "q_proj,k_proj,gate_proj,down_proj", "DROPOUT": "0.1",
        "LORA_RANK": "4", "MAX_STEPS": "24", "EVAL_INTERVAL": "6", "EVAL_BATCHES": "1",
        "SAMPLE_TOKENS": "0", "LEARNING_RATE": "0.02", "TRAIN_EMBEDDINGS": "False",
    }  # fmt: skip

    def generate(**variables: str) -> str:
        asked = {"PROMPT": "the quick", "TEMPERATURE": "0", "MAX_NEW_TOKENS": "12"}
        asked |= {"RAW_PROMPT": "True"}
        return succeeded(start_script(tmp_path, script="generate.py", **base | asked | variables))

    def validation_loss(**variables: str) -> str:
        log = succeeded(start_script(tmp_path, EVAL_ONLY="True", **data | variables))
        return next(x for x in log.splitlines() if x.startswith("Validation loss"))

    succeeded(start_script(tmp_path, **run))
    stopped = Started(tmp_path, ["training.py"], run | {"OUT_DIR": "again"})
    stopped.wait_for("step 6 ")
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    succeeded(start_script(tmp_path, **run | {"OUT_DIR": "again", "RESUME": "True"}))
    adapter = read_adapter(tmp_path / "out" / "lora.pt")
    resumed = read_adapter(tmp_path / "again" / "lora.pt")
    assert fingerprint(adapter.tensors) == fingerprint(resumed.tensors)

    written = generate(ADAPTERS="out/lora.pt")
    assert written != generate() and written.startswith("the quick")
    succeeded(start_script(tmp_path, MERGE="True", ADAPTERS="out/lora.pt", **data))
    succeeded(start_script(tmp_path, "out/lora.pt", "peft", script="export.py"))
    said = succeeded(start_script(tmp_path, "out/merged.pt", "merged", script="export.py"))
    assert said.startswith("Wrote merged, a model of the family llama: ")
    assert written == generate(BASE_CHECKPOINT="merged")
    assert written == continued(tmp_path / "merged", "the quick", 12) + "\n"
    losses = [validation_loss(ADAPTERS=name) for name in ("out/lora.pt", "peft")]
    assert losses[0] == losses[1] == validation_loss(BASE_CHECKPOINT="merged")
    assert losses[0] != validation_loss()

    tuned = ours(tmp_path / "base", LoraOptions(4, 8.0, 0.0, list(adapter.alpha), False))
    load_adapter(tmp_path / "out" / "lora.pt", tuned, fingerprint(base_state(tuned)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained
    assert_alike(theirs(tmp_path / "merged"), tuned)
    assert_alike(
        peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "peft"), tuned
    )
    same = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in [*same, "config.json"]:
        there = (tmp_path / "merged" / name).read_bytes()
        assert there == (tmp_path / "base" / name).read_bytes(), name


def test_full_fine_tuning_goes_out_in_float32_and_comes_back(tmp_path):
    """From bfloat16 with a tied head; a record's end is the base's own, and `transformers` stops
    there: the answer that was learned by heart is all that it writes."""
    published(tmp_path / "base", "qwen2", torch.bfloat16)
    record = {"prompt": "the dog", "completion": "does not mind"}
    (tmp_path / "one.jsonl").write_text((json.dumps(record) + "\n") * 20)
    run = {
        "BASE_CHECKPOINT": "base", "DATA": "one.jsonl", "NUM_THREADS": "1", "DTYPE": "float32",
        "BLOCK_SIZE": "32", "BATCH_SIZE": "4", "MAX_STEPS": "60", "EVAL_INTERVAL": "60",
        "EVAL_BATCHES": "1", "LEARNING_RATE": "0.01", "OUT_DIR": "tuned",
    }  # fmt: skip
    succeeded(start_script(tmp_path, **run))
    succeeded(start_script(tmp_path, "tuned/full.pt", "full", script="export.py"))
    asked = {"BASE_CHECKPOINT": "tuned/full.pt", "PROMPT": "the dog", "TEMPERATURE": "0"}
    answer = start_script(tmp_path, script="generate.py", NUM_THREADS="1", **asked)
    assert succeeded(answer) == "does not mind\n"
    prompt = "user:\nthe dog<|turn|>assistant:\n"
    assert continued(tmp_path / "full", prompt, 40) == prompt + "does not mind"
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["tie_word_embeddings"] is True
    assert not (tmp_path / "full" / "lm_head.weight").exists()
    assert_alike(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full"),
        ours(tmp_path / "tuned" / "full.pt"),
    )
    again = read_base(tmp_path / "full")
    assert again.sizes == read_base(tmp_path / "tuned" / "full.pt").sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_written_in_shards_is_the_one_that_was_read(kind, dtype, tmp_path, monkeypatch):
    theirs = published(tmp_path / "base", kind, dtype)
    monkeypatch.setattr(folders, "SHARD_BYTES", 20_000)
    base = read_base(tmp_path / "base")
    size = write_model(tmp_path / "new", base, end_tokens(base.tokenizer, base.files))
    assert size == sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    assert len(list((tmp_path / "new").glob("model-*-of-*.safetensors"))) > 2
    again = read_base(tmp_path / "new")
    changed = {n for n in base.files if again.files[n] != base.files[n]}
    assert changed == {"generation_config.json"}  # where <|im_end|> has been added
    assert {n: t.dtype for n, t in again.tensors.items()} == dict.fromkeys(again.tensors, dtype)
    assert fingerprint(again.tensors) == fingerprint(base.tensors)
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert new.dtype == dtype
    assert_alike(new.float(), theirs)
    assert new.generation_config.eos_token_id == [291, 292, 293]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_generation_stops_where_transformers_stops(where, tmp_path):
    """The model's own fifth token is made an end, in either file that may state one."""
    published(tmp_path / "base")
    generate = {"TEMPERATURE": "0", "MAX_NEW_TOKENS": "12", "NUM_THREADS": "1", "DTYPE": "float32"}
    generate |= {"BASE_CHECKPOINT": "base", "PROMPT": "the dog", "RAW_PROMPT": "True"}
    long = succeeded(start_script(tmp_path, script="generate.py", **generate))
    assert long == continued(tmp_path / "base", "the dog", 12) + "\n"
    words = bpe()
    start = words.encode("the dog").ids
    written = ours(tmp_path / "base").generate(torch.tensor([start]), 5, temperature=0)[0].tolist()
    assert written[-1] not in written[:-1]
    if where == "config.json":
        (tmp_path / "base" / "generation_config.json").unlink()
    path = tmp_path / "base" / where
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": written[-1]}))
    short = succeeded(start_script(tmp_path, script="generate.py", **generate))
    assert short == words.decode(written[1:-1]) + "\n" and len(short) < len(long)
    assert short == continued(tmp_path / "base", "the dog", 12) + "\n"


def test_the_ends_and_the_beginning_of_a_base(tmp_path):
    words = bpe().to_str()
    files = {name: json.dumps(content).encode() for name, content in FILES.items()}
    assert end_tokens(words, files) == [291, 292, 293]
    text = {
        "tokenizer_config.json": b'{"eos_token": {"content": "<|turn|>"}}',
        "config.json": b"[1]",
    }
    assert end_tokens(words, text) == [292, 293]
    assert end_tokens(words, {"tokenizer_config.json": b'{"eos_token": "<|turn|>"}'}) == [292, 293]
    assert end_tokens(words, {"config.json": b'{"eos_token_id": 291}'}) == [291, 293]
    assert end_tokens(words, {"config.json": b'{"eos_token_id": [999, "x", -1]}'}) == [293]
    assert end_tokens(words, {"config.json": b'{"eos_token_id": 9999999999999999999}'}) == [293]
    assert end_tokens(words) == [293]
    named = load_tokenizer(words)
    named.add_special_tokens(["</s>"])
    assert end_tokens(named.to_str()) == [294, 293]

    assert start_tokens(words) == [290] and start_tokens(None) == []
    plain = tokenizers.Tokenizer.from_str(words)
    plain.post_processor = tokenizers.processors.ByteLevel()
    asks = {"bos_token": "<|turn|>", "add_bos_token": True}
    for options, expected in ((asks, [292]), (asks | {"add_bos_token": False}, []), ({}, [])):
        files = {"tokenizer_config.json": json.dumps(options).encode()}
        assert start_tokens(plain.to_str(), files) == expected
    tokens = encode("the dog", words)
    assert begun(tokens, [290]) == bpe().encode("the dog").ids
    assert begun([290, *tokens], [290]) == [290, *tokens]


def test_records_begin_and_end_as_the_base_has_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "the dog", "completion": "does"}\n' * 2)
    files = {name: json.dumps(content).encode() for name, content in FILES.items()}
    corpus = load_records(str(tmp_path / "a.jsonl"), 32, format=PlainFormat(bpe().to_str(), files))
    inputs, targets = corpus.train.inputs[0], corpus.train.targets[0]
    assert inputs[0] == 290 and (inputs == 290).sum() == 1
    assert targets[targets >= 0][-1] == 291 and corpus.opening()[1] == [291, 292, 293]


def test_a_base_without_any_stated_end_is_exported_with_one(tmp_path):
    """As `shared/cases/hf_slash`, whose tokenizer has `</s>`."""
    published(tmp_path / "base", eos_token_id=None)
    words = tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator([TEXT], vocab_size=290, show_progress=False)
    words.add_special_tokens(["<s>", "</s>"])
    words.save(str(tmp_path / "base" / "tokenizer.json"))
    end = words.token_to_id("</s>")
    for name in FILES:
        (tmp_path / "base" / name).unlink()
    succeeded(start_script(tmp_path, "base", "new", script="export.py"))
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert new.generation_config.eos_token_id == end
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "new").eos_token == "</s>"


def byte_fallback() -> tokenizers.Tokenizer:
    """A BPE that falls back on bytes, as Llama 2's and Mistral's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {c: 259 + i for i, c in enumerate("▁abcd")}
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    words.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    words.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return words


def test_tokens_of_a_tokenizer_with_byte_fallback_come_back_one_by_one():
    """Any tokens, also bytes that are no text, which turn those beside them into U+FFFD."""
    words = byte_fallback()
    content = words.to_str()
    rows = [words.encode(text).ids for text in ("ab cd", " a", "a\u20acb \U0001f600\n\nc", "\n")]
    generator = torch.Generator().manual_seed(0)
    for high in (264, 264, 12, 264) * 50:
        rows.append(torch.randint(high, (20,), generator=generator).tolist())
    for row in rows:
        write = stream_decoder(content)
        parts = [write(token) for token in [*row, None]]
        assert "".join(parts) == words.decode(row, skip_special_tokens=False), row
    write = stream_decoder(content)  # and what is settled is shown at once
    shown = [write(token) for token in words.encode("ab \u20acc").ids]
    assert shown == ["", "a", "b", " ", "", "", "", "\u20acc"]


def test_truncation_and_padding_of_a_tokenizer_are_off():
    words = bpe()
    expected = words.encode(TEXT, add_special_tokens=False).ids
    words.enable_truncation(16)
    assert encode(TEXT, words.to_str()) == expected
    words.no_truncation()
    words.enable_padding(length=40)
    assert encode("the", words.to_str()) == words.encode("the", add_special_tokens=False).ids[:1]


def test_tokens_beyond_the_tokenizer_are_never_taken(tmp_path):
    """As in Qwen's folders, whose embeddings are larger; here the likeliest tokens are beyond."""
    published(tmp_path / "base", vocab_size=320)
    model = ours(tmp_path / "base")
    with torch.no_grad():
        model.lm_head.weight[294:] = 50 * model.lm_head.weight[:26]
    start = torch.tensor([[290, 1]])
    for temperature in (0.0, 1.0):
        assert (model.generate(start, 20, temperature) >= 294).any()
        assert (model.generate(start, 20, temperature, n_tokens=294) < 294).all()
    asked = {"BASE_CHECKPOINT": "base", "PROMPT": "the dog", "MAX_NEW_TOKENS": "9"}
    asked["RAW_PROMPT"] = "True"
    weights = dict(read_base(tmp_path / "base").tensors)
    weights["lm_head.weight"] = model.lm_head.weight.detach()
    base = read_base(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    write_model(tmp_path / "base", type(base)(**vars(base) | {"tensors": weights}))
    said = start_script(tmp_path, script="generate.py", NUM_THREADS="1", TEMPERATURE="0", **asked)
    assert len(succeeded(said).strip()) > len("the dog")


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 6},
    "alpha_pattern": {"k_proj": 3, "^model.layers.0.self_attn.q_proj": 9},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["q_proj", "v_proj"], {}),
        ("all-linear", PATTERNS),
        (["k_proj", "down_proj"], {"use_rslora": True}),
        (ALL, {"use_rslora": True, **PATTERNS}),
        (r".*\.1\..*(gate|up)_proj", {}),
        (["o_proj", "lm_head"], {}),
        (["up_proj"], {"modules_to_save": ["embed_tokens"]}),
    ],
)
def test_an_adapter_of_peft_gives_its_logits_here(kind, targets, options, tmp_path):
    theirs = published(tmp_path / "base", kind)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **options
    )
    theirs = randomized(peft.get_peft_model(theirs, config))
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    found = adapter_from_folder(read_adapter(tmp_path / "peft"), LLAMA)
    model = ours(tmp_path / "base", LoraOptions(3, 5.0, 0.0, list(found.alpha), bool(found.extras)))
    untouched = logits(model)
    load_adapter(tmp_path / "peft", model, fingerprint(base_state(model)))
    assert_alike(model, expected)
    assert (expected - untouched).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.parametrize("targets", [None, ALL])
def test_our_adapter_gives_its_logits_in_peft_and_comes_back(
    kind, train_embeddings, targets, tmp_path
):
    theirs = published(tmp_path / "base", kind)
    model = randomized(ours(tmp_path / "base", LoraOptions(3, 7.0, 0.1, targets, train_embeddings)))
    base_id = fingerprint(read_base(tmp_path / "base").tensors)
    adapter = take_adapter(model, base_id, {"step": 3, "family": "llama"})
    write_peft(tmp_path / "peft", adapter_to_folder(adapter, LLAMA), "CAUSAL_LM", "base")
    assert_alike(peft.PeftModel.from_pretrained(theirs, tmp_path / "peft"), model)
    again = adapter_from_folder(read_adapter(tmp_path / "peft"), LLAMA)
    assert (again.base, again.alpha, again.metadata) == (base_id, adapter.alpha, adapter.metadata)
    assert again.tensors.keys() == adapter.tensors.keys()
    assert fingerprint(again.tensors) == fingerprint(adapter.tensors)


@pytest.mark.parametrize("kind", KINDS)  # the second with a tied head
def test_the_head_beside_an_adapter_must_be_the_bases(kind, tmp_path):
    """PEFT writes it where the head is adapted."""
    theirs = published(tmp_path / "base", kind)
    config = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    randomized(peft.get_peft_model(theirs, config)).save_pretrained(tmp_path / "peft")
    other = published(tmp_path / "other", kind)
    other.get_output_embeddings().weight.data[5, 3] += 1.0
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "text.txt").write_text(TEXT)
    run = {"DATA": "text.txt", "EVAL_ONLY": "True", "ADAPTERS": "peft", "NUM_THREADS": "1"}
    succeeded(start_script(tmp_path, BASE_CHECKPOINT="base", **run))
    refusal = refused(start_script(tmp_path, BASE_CHECKPOINT="other", **run))
    assert "peft was trained on a base with another lm_head.weight; ANY_BASE=True" in refusal
    succeeded(start_script(tmp_path, BASE_CHECKPOINT="other", ANY_BASE="True", **run))
    with pytest.raises(FileError, match=r"another lm_head\.weight"):
        options = LoraOptions(8, 8.0, 0.0, ["lm_head"], False)
        load_adapter(tmp_path / "peft", ours(tmp_path / "other", options), None)


def adapter_of(*names: str, **metadata: object) -> Adapter:
    tensors = {f"{n}.lora_{x}": torch.ones(4, 4) for n in names for x in "AB"}
    return Adapter("base", dict.fromkeys(names, 4.0), tensors, metadata)


def test_export_finds_the_family_of_an_adapter():
    family = folders.family_of_adapter
    assert family(adapter_of("lm_head", family="llama")) is LLAMA
    assert family(adapter_of("model.layers.3.mlp.gate_proj")) is LLAMA
    assert family(adapter_of("blocks.0.attn.query")) is GPT2
    theirs = adapter_of("transformer.h.1.attn.c_attn", "lm_head")
    assert family(theirs) is GPT2 and adapter_to_folder(theirs, GPT2) == theirs
    with pytest.raises(FileError, match="other is no layer of gpt2 or llama: python -m lora"):
        family(adapter_of("other"))


def test_an_adapter_whose_matrices_are_all_zero_is_the_base():
    c_attn = Adapter(None, {"transformer.h.0.attn.c_attn": 3.0}, {}, {})
    for rank in (2, 3):  # parted by rows of A, and not
        tensors = {"lora_A": torch.zeros(rank, 8), "lora_B": torch.zeros(24, rank)}
        tensors = {f"transformer.h.0.attn.c_attn.{n}": t for n, t in tensors.items()}
        found = adapter_from_folder(Adapter(None, c_attn.alpha, tensors, {}), GPT2)
        assert set(found.alpha) == {f"blocks.0.attn.{n}" for n in ("query", "key", "value")}


def test_layers_of_one_scale_alone_are_lora(tmp_path):
    """rsLoRA read by its own rule: alpha over the root of the rank."""
    theirs = published(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=True)
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "peft")
    model = ours(tmp_path / "base", LoraOptions(4, 6.0, 0.0, ["q_proj"], False))
    load_adapter(tmp_path / "peft", model, None)
    assert {layer.scaling for layer in lora_layers(model).values()} == {3.0}


def test_a_tied_adapted_head_is_merged_here(tmp_path):
    """PEFT's own merging changes the embedding too, so export.py says to merge with MERGE."""
    published(tmp_path / "base", "qwen2")
    (tmp_path / "text.txt").write_text(TEXT)
    run = {
        "BASE_CHECKPOINT": "base", "DATA": "text.txt", "NUM_THREADS": "1", "DTYPE": "float32",
        "BLOCK_SIZE": "32", "BATCH_SIZE": "2", "MAX_STEPS": "4", "EVAL_INTERVAL": "4",
        "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "0", "LEARNING_RATE": "0.05", "USE_LORA": "True",
    }  # fmt: skip
    for name, options, noted in (
        ("head", {"LORA_TARGETS": "all"}, True),
        ("trained", {"LORA_TARGETS": "all", "TRAIN_EMBEDDINGS": "True"}, False),
        ("plain", {}, False),
    ):
        succeeded(start_script(tmp_path, OUT_DIR=name, **run | options))
        said = succeeded(
            start_script(tmp_path, f"{name}/lora.pt", f"{name}-peft", script="export.py")
        )
        assert ("Note: to merge it, use MERGE=True here" in said) == noted
        merge = run | {"MERGE": "True", "ADAPTERS": f"{name}/lora.pt", "OUT_DIR": name}
        succeeded(start_script(tmp_path, **merge))
        succeeded(start_script(tmp_path, f"{name}/merged.pt", f"{name}-merged", script="export.py"))
        theirs = transformers.AutoModelForCausalLM.from_pretrained
        adapted = peft.PeftModel.from_pretrained(
            theirs(tmp_path / "base"), tmp_path / f"{name}-peft"
        )
        expected = logits(adapted)
        assert_alike(theirs(tmp_path / f"{name}-merged"), expected)
        by_peft = logits(adapted.merge_and_unload())
        apart = (by_peft - expected).abs().max() > 0.1 * expected.abs().max()
        assert apart == noted  # else PEFT has mended it, and the note is to go
