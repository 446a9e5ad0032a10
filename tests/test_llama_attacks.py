"""Published bases in every state that a user or an attacker can give them: one line and exit code
2, which says what was found and what to do."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import TEXT, TINY, Started, needs_posix, refused, start_script, succeeded

from files import FileError
from files.writing import replacing

TUNING = {name: value for name, value in TINY.items() if not name.startswith("N_")}
TUNING |= {"USE_LORA": "True", "NUM_THREADS": "1", "MAX_STEPS": "2", "BASE_CHECKPOINT": "base"}


def small_llama(folder: Path) -> None:
    """A model of the Llama family with its tokenizer."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, show_progress=False)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ends = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ends))
    model.to(torch.bfloat16).save_pretrained(folder)
    bpe.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as a model of the Llama family is published in."""
    folder = tmp_path_factory.mktemp("published") / "base"
    torch.manual_seed(0)
    small_llama(folder)
    return folder


@pytest.fixture
def base(published, tmp_path) -> Path:
    """A copy of it in a fresh folder, which holds text.txt too."""
    (tmp_path / "text.txt").write_text(TEXT)
    return Path(shutil.copytree(published, tmp_path / "base"))


def change_weights(base: Path, change) -> None:
    """Write the weights again, each as `change` of its name and its number makes it."""
    path = base / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    changed = {name: change(tensors[name], i) for i, name in enumerate(sorted(tensors))}
    safetensors.torch.save_file(changed, path)


def refusals(folder: Path, **variables: str) -> str:
    """The error in which all commands that take a base agree."""
    variables = {"BASE_CHECKPOINT": "base"} | variables
    training = refused(start_script(folder, **TUNING | variables))
    generating = refused(start_script(folder, script="generate.py", **variables))
    exporting = start_script(folder, variables["BASE_CHECKPOINT"], "x", script="export.py")
    assert training == generating == refused(exporting)
    assert not (folder / "x").exists()
    return training


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M"),
        ("HuggingFaceTB/SmolLM2-135M/", "HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"),
        ("gpt2", "gpt2 --local-dir gpt2"),
        ("SmolLM2-135M", "OWNER/SmolLM2-135M --local-dir SmolLM2-135M"),
    ],
)
def test_the_name_of_a_model_is_refused_with_the_command_that_gets_it(name, command, tmp_path):
    message = refusals(tmp_path, BASE_CHECKPOINT=name)
    assert message.endswith(f"to get it from Hugging Face: hf download {command}")
    assert f"{name.rstrip('/')}" in message


def test_the_name_of_an_adapter_is_refused_with_the_command_that_gets_it(base):
    process = start_script(
        base.parent, script="generate.py", BASE_CHECKPOINT="base", ADAPTERS="someone/lora:0.5"
    )
    assert refused(process).endswith("hf download someone/lora --local-dir lora")


@pytest.mark.parametrize("path", ["/no/where", "../base", "out/full.pt", "base/part"])
def test_a_path_that_is_no_name_of_a_model_gets_no_such_command(path, base):
    message = refused(start_script(base.parent, **TUNING | {"BASE_CHECKPOINT": path}))
    assert message == f"error: {path} cannot be read: No such file or directory"


def test_a_tilde_within_quotes_is_the_home_folder(base):
    at_home = {"HOME": str(base.parent), "BASE_CHECKPOINT": "~/base", "OUT_DIR": "~/out"}
    log = succeeded(start_script(base.parent, **TUNING | at_home | {"DATA": "~/text.txt"}))
    assert f"BASE_CHECKPOINT: {base} *" in log and (base.parent / "out" / "lora.pt").exists()
    adapters = {"ADAPTERS": "~/out/lora.pt:0.5,~/out/lora-best.pt:0.5", "MAX_NEW_TOKENS": "1"}
    succeeded(start_script(base.parent, script="generate.py", **at_home | adapters))


def test_a_trailing_slash_changes_nothing(base):
    succeeded(start_script(base.parent, **TUNING | {"BASE_CHECKPOINT": "./base//"}))


def test_a_file_of_the_folder_is_refused_with_the_folder(base):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        message = refusals(base.parent, BASE_CHECKPOINT=f"base/{name}")
        assert message.endswith(
            f"base/{name} is a file of a Hugging Face folder: name the folder base"
        )


def test_a_folder_without_a_model_is_refused_with_what_is_there(base):
    empty, cached = base.parent / "empty", base.parent / "models--a--b" / "snapshots" / "0123"
    empty.mkdir()
    assert "config.json cannot be read: No such file" in refusals(
        base.parent, BASE_CHECKPOINT="empty"
    )
    cached.parent.mkdir(parents=True)
    base.rename(cached)
    assert refusals(base.parent, BASE_CHECKPOINT="models--a--b").endswith(
        "did you mean models--a--b/snapshots/0123?"
    )


def test_an_adapter_as_the_base_is_refused_with_the_variable_for_it(base):
    folder = base.parent / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    process = start_script(base.parent, **TUNING | {"BASE_CHECKPOINT": "peft"})
    assert "it holds an adapter of PEFT's, which belongs in ADAPTERS" in refused(process)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_git_leaves_of_a_large_file_is_refused_as_such(name, base):
    (base / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refusals(base.parent).endswith(
        f"base/{name} is a pointer of git-lfs, not the file itself, which git lfs pull gets"
    )


def test_a_tokenizer_model_alone_is_refused_with_what_makes_the_other(base):
    (base / "tokenizer.json").rename(base / "tokenizer.model")
    assert "transformers makes one of tokenizer.model" in refusals(base.parent)


def header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


HOSTILE = {
    "empty file": b"",
    "short": b"abcd",
    "a length beyond the file": (2**62).to_bytes(8, "little") + b"{}",
    "no table": header([]),
    "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "negative": header({"a": entry(shape=[-1])}, b"1234"),
    "too large": header({"a": entry(shape=[2**40, 2**40])}, b"1234"),
    "unknown dtype": header({"a": entry(dtype="X9")}, b"1234"),
    "overlapping": header({"a": entry(), "b": entry()}, b"1234"),
    "a control character": header({"a\x1b[31m\n": entry()}, b"1234"),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(content, base):
    (base / "model.safetensors").write_bytes(content)
    process = start_script(base.parent, **TUNING)
    assert "base/model.safetensors holds no tensors, or it is damaged" in refused(process)


def test_half_a_file_of_weights_is_refused(base):
    path = base / "model.safetensors"
    whole = path.read_bytes()
    tensors = safetensors.torch.load(whole)  # from memory: the file shrinks
    path.write_bytes(whole[: len(whole) // 2])
    assert "holds no tensors, or it is damaged" in refusals(base.parent)
    path.unlink()
    path = base / "pytorch_model.bin"
    torch.save(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "holds no tensors, or it is damaged" in refusals(base.parent)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_weights_of_other_kinds_than_floats_are_refused(dtype, all_of_them, base):
    change_weights(base, lambda t, i: t.to(dtype) if all_of_them or i == 3 else t)
    assert re.search(
        rf"base: .*weight is {dtype}, not floating-point numbers of 16, 32 or 64 bits",
        refusals(base.parent),
    )


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_plain_values_are_refused(kind, base):
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to_sparse() if kind == "sparse" else tensors[name].to("meta")
    torch.save(tensors, base / "pytorch_model.bin")
    assert "up_proj.weight is sparse or has no values" in refusals(base.parent)


def test_quantized_tensors_are_refused_without_torchs_warnings(base):
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.quantize_per_tensor(tensors[name].float(), 0.1, 0, torch.qint8)
    torch.save(tensors, base / "pytorch_model.bin")
    assert "up_proj.weight is torch.qint8, not floating-point" in refusals(base.parent)


@pytest.mark.parametrize("use_lora", ["True", "False"])
def test_weights_of_several_floating_point_dtypes_train(use_lora, base):
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    change_weights(base, lambda t, i: t.to(dtypes[i % 3]))
    succeeded(start_script(base.parent, **TUNING | {"USE_LORA": use_lora}))


def test_float64_beside_others_is_refused_and_alone_trains(base):
    change_weights(base, lambda t, i: t.to(torch.float64) if i % 2 else t)
    assert "has weights in float64 beside others" in refusals(base.parent)
    change_weights(base, lambda t, i: t.to(torch.float64))
    for use_lora in ("False", "True"):
        succeeded(start_script(base.parent, **TUNING | {"USE_LORA": use_lora}))


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_weights_too_large_for_the_arithmetic_write_no_text(temperature, base):
    change_weights(base, lambda t, i: torch.full_like(t, 3e38) if t.dim() == 1 else t)
    process = start_script(
        base.parent, script="generate.py", BASE_CHECKPOINT="base", TEMPERATURE=temperature
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last == "error: base cannot be used: the model's logits are not finite numbers"


def test_a_run_without_the_base_it_began_with_is_refused_with_its_name(base):
    variables = TUNING | {"USE_LORA": "False"}
    succeeded(start_script(base.parent, **variables))
    del variables["BASE_CHECKPOINT"]
    message = refused(start_script(base.parent, **variables | {"RESUME": "True"}))
    assert "is a run on another base" in message
    assert message.endswith("it began with BASE_CHECKPOINT=base")


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_stopped_leaves_nothing(number, base):
    path = base / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    wide = {n: t.repeat(8000, 1) if "embed" in n else t for n, t in tensors.items()}
    safetensors.torch.save_file(wide, path)  # 150 MB: long enough to be stopped
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": 300 * 8000}
    (base / "config.json").write_text(json.dumps(config))
    process = Started(base.parent, ["export.py", "base", "out"], {})
    until = time.monotonic() + 60
    while not list(base.parent.glob(".out.*.new/*")) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(number)
    ended = process.wait()
    assert ended.returncode == 128 + number, ended.stderr
    assert ended.stderr.endswith(("interrupted\n", "terminated\n"))
    assert sorted(p.name for p in base.parent.iterdir()) == ["base", "text.txt"]


def test_a_disk_that_is_full_is_said_in_words(tmp_path):
    said = r"x\.pt cannot be written: .* full disk"
    with pytest.raises(FileError, match=said), replacing(tmp_path / "x.pt"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0")
    assert not list(tmp_path.iterdir())
