"""NF4: its values, the products with it, and runs whose base lies in it."""

import copy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ON_CPU, TEXT, TINY, refused, start_group, start_script, succeeded
from safetensors.torch import save_file
from test_llama_attacks import small_llama
from test_resume import assert_same, files_of
from test_training import losses as lines_of_losses
from torch import Tensor, nn

from files.tensors import read_foreign_tensors, release
from lora import LoRALinear, lies_below_adapter, read_adapter
from lora.linear import apply_linear, grouped_linear, lora_reference
from models.checkpoint import read_checkpoint
from models.huggingface import read_base
from ops import nf4
from ops.nf4 import BLOCK, GROUP, LEVELS, NF4, dequantize, dequantize_rows, quantize
from trainer.loading import LoraOptions, base_fingerprint, build_model, put_on_adapters

SHAPES = [(64, 64), (7, 9), (33, 100), (1, 1), (130, 520)]
DTYPES = [torch.float32, torch.bfloat16]
SMALL = {"BLOCK_SIZE": "16", "BATCH_SIZE": "4", "MAX_STEPS": "4", "EVAL_INTERVAL": "2"}
SMALL |= {"EVAL_BATCHES": "2", "SAMPLE_TOKENS": "4", "DATA": "text.txt", "NUM_THREADS": "1"}
SMALL |= {"BASE_CHECKPOINT": "llama", "DTYPE": "float32"}
TRAINED = {"USE_LORA": "True", "BASE_DTYPE": "nf4"}


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.rand(shape[0], 1, generator=generator).exp()
    return (torch.randn(shape, generator=generator) * 0.02 * sizes).to(dtype)


# ---- values


def nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.abs(values[..., None] - levels).argmin(-1)


def scale_levels() -> np.ndarray:
    """By the words of Dettmers 2016: the leading zeros are the exponent of ten, and the bits behind
    the first one divide 0.1 to 1 evenly."""
    found = [0.0, 1.0]
    for zeros in range(7):
        n = 2 ** (6 - zeros)
        for i in range(n):
            found += [s * 10.0**-zeros * (0.1 + 0.9 * (i + 0.5) / n) for s in (1, -1)]
    return np.sort(found)


def values_of(W: Tensor) -> np.ndarray:
    """What NF4 keeps of a matrix, in float64."""
    flat = W.double().numpy().reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scales = np.abs(blocks).max(1)
    codes = nearest(blocks / scales[:, None], np.array(LEVELS))
    mean = scales.mean()
    for start in range(0, len(scales), GROUP):
        group = scales[start : start + GROUP] - mean
        reach = np.abs(group).max() or 1.0
        group[:] = scale_levels()[nearest(group / reach, scale_levels())] * reach
        scales[start : start + GROUP] = group + mean
    values = np.array(LEVELS)[codes] * scales[:, None]
    return values.reshape(-1)[: len(flat)].reshape(W.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_values_are_those_of_the_papers_words(shape, dtype):
    W = matrix(shape, dtype)
    found = quantize(W)
    assert (found.shape, found.dtype) == (W.shape, dtype)
    np.testing.assert_allclose(dequantize(found, torch.float64), values_of(W), rtol=1e-5)
    rounded = dequantize(found, torch.float32).to(torch.bfloat16)
    assert torch.equal(dequantize(found, torch.bfloat16), rounded)


@pytest.mark.parametrize("shape", SHAPES)
def test_some_rows_at_a_time_are_the_rows_of_all(shape):
    W = quantize(matrix(shape))
    parts = list(dequantize_rows(W, 1000, torch.float32))
    assert torch.equal(torch.cat(parts), dequantize(W, torch.float32))
    assert len(parts) > 1 or W.numel() <= max(1000, BLOCK * shape[1])


def test_it_takes_4_127_bits_a_number_and_keeps_zeros():
    assert quantize(torch.zeros(2048, 2048)).nbytes * 8 / 2048**2 == pytest.approx(4.127, abs=5e-4)
    assert not dequantize(quantize(torch.zeros(3, 70)), torch.float32).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_values_are_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    W = matrix((512, 1024), dtype)
    ours = quantize(W)
    codes, state = functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.codes.view(-1), codes.view(-1))
    assert torch.equal(ours.reaches, state.state2.absmax) and torch.equal(ours.mean, state.offset)
    # Its CPU kernel takes a neighbouring level for a few scales.
    assert (ours.scales.int() - state.absmax.int()).abs().max() <= 1
    assert (ours.scales != state.absmax).float().mean() < 0.01
    state.absmax = ours.scales
    assert torch.equal(dequantize(ours, dtype), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_its_kernel_for_a_gpu_gives_the_same_values(shape, dtype):
    """On a CPU, where ours takes the same way with it, and on a GPU where there is one."""
    pytest.importorskip("bitsandbytes")
    ours = quantize(matrix(shape))
    expected = dequantize(ours, dtype)
    with mock.patch.object(nf4, "has_kernel", lambda device: True):
        assert torch.equal(dequantize(ours, dtype), expected)
        rows = list(dequantize_rows(ours, 100, dtype))
    assert torch.equal(torch.cat(rows), expected)
    if torch.cuda.is_available():
        assert torch.equal(dequantize(ours.to("cuda"), dtype).cpu(), expected)


def test_it_moves_and_is_copied_and_everything_else_gets_its_values():
    W = matrix((40, 70), torch.bfloat16)
    linear = nn.Linear(70, 40)
    linear.weight = nn.Parameter(quantize(W), requires_grad=False)
    values = dequantize(linear.weight, torch.float32)
    for other in (copy.deepcopy(linear).weight, linear.weight.clone(), linear.weight.to("cpu")):
        assert type(other) is NF4 and torch.equal(other.to(torch.float32), values)
    assert type(linear.to("meta").weight) is NF4 and linear.weight.is_meta
    weight = quantize(W)
    assert torch.equal(weight[3:5], values[3:5].bfloat16())
    assert type(weight.float()) is Tensor and torch.equal(weight.float(), values)
    with pytest.raises(TypeError, match="NF4"):
        weight.zero_()


# ---- products


def in_nf4(n_in: int, n_out: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)
    W = quantize(matrix((n_out, n_in), dtype))
    linear.weight = nn.Parameter(W, requires_grad=False)
    return linear


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(64, 64), (33, 70), (700, 300)])
def test_layers_compute_with_the_dequantized_weight(sizes, dtype, stored, monkeypatch):
    monkeypatch.setattr("ops.products.DEQUANTIZED", 2**14)  # so that a weight comes in slices
    torch.manual_seed(0)
    n_in, n_out = sizes
    layers = [LoRALinear(in_nf4(n_in, n_out, stored), 4) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    assert all(lies_below_adapter(layer) for layer in layers)
    plain = in_nf4(n_in, n_out, stored)
    x = torch.randn(3, 20, n_in, requires_grad=True)
    trained = [x, *(p for layer in layers for p in (layer.lora_A, layer.lora_B))]

    def gradients(*outputs: Tensor) -> list[Tensor]:
        loss = sum((i + 1) * y.float().square().mean() for i, y in enumerate(outputs))
        return [*outputs, *torch.autograd.grad(loss, trained)]

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = gradients(*grouped_linear(x, layers), apply_linear(plain, x))
    wide = [dequantize(layer.weight, torch.float32) for layer in (*layers, plain)]
    expected = gradients(
        *(
            lora_reference(x, W, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
            for W, layer in zip(wide, layers, strict=False)
        ),
        F.linear(x, wide[-1], plain.bias),
    )
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < tolerance


def test_no_dequantized_weight_is_kept_for_backward():
    layer = LoRALinear(in_nf4(256, 256, torch.float32, bias=False), 4)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 8, 256, requires_grad=True))
    assert [t for t in kept if type(t) is NF4]
    assert not [t for t in kept if type(t) is not NF4 and t.numel() >= 256 * 256]


# ---- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a text, a Llama in bfloat16, and in out/ an adapter of it trained on NF4."""
    folder = tmp_path_factory.mktemp("nf4")
    (folder / "text.txt").write_text(TEXT)
    small_llama(folder / "llama")
    log = succeeded(start_script(folder, **SMALL | TRAINED))
    assert "\nBase weights: nf4, " in log
    return folder


def losses(log: str) -> list[float]:
    """The validation losses of a log."""
    return [float(val) for _, _, val, _ in lines_of_losses(log)]


def run(folder: Path, **variables: str) -> str:
    return succeeded(start_script(folder, **SMALL | variables))


def logits_of(folder: Path, base: str, dtype: str, adapter: str | None = None) -> Tensor:
    checkpoint = read_base(folder / base)
    lora = LoraOptions(targets=["q_proj"], train_embeddings=False)
    if adapter is not None:
        files = [(adapter, read_adapter(folder / adapter), 1.0)]
        lora = LoraOptions(targets=list(files[0][1].alpha), train_embeddings=False)
    model = build_model(
        checkpoint.family, checkpoint.sizes, checkpoint, "cpu", 0.0, lora, base_dtype=dtype
    )
    if adapter is not None:
        put_on_adapters(model, base_fingerprint(checkpoint, model), files, None, False)
    idx = torch.arange(24)[None] % checkpoint.sizes.vocab_size
    return model(idx)[0].detach()


def test_the_linears_of_the_blocks_lie_in_nf4_and_nothing_else(folder, monkeypatch):
    base = read_base(folder / "llama")
    released = []
    monkeypatch.setattr("models.checkpoint.release", lambda tensor: released.append(id(tensor)))
    lora = LoraOptions(targets=["q_proj", "down_proj"], train_embeddings=False)
    model = build_model(base.family, base.sizes, base, "cpu", 0.0, lora, base_dtype="nf4")
    kinds = {name: type(p) for name, p in model.named_parameters()}
    quantized = {name for name, kind in kinds.items() if kind is NF4}
    linears = {n for n in kinds if n.endswith("_proj.weight")}
    assert quantized == linears and len(linears) == 2 * 7
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    for name, tensor in base.tensors.items():  # after its check, and after it was quantized
        assert released.count(id(tensor)) >= (2 if name in linears else 1)
    embedding = model.model.embed_tokens.weight
    assert embedding.data_ptr() == base.tensors["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_another_dtype_has_its_linears_in_it(folder, dtype):
    base = read_base(folder / "llama")
    options = LoraOptions(targets=["q_proj"], train_embeddings=False)
    model = build_model(base.family, base.sizes, base, "cpu", 0.0, options, base_dtype=dtype)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | LoRALinear)]
    assert {layer.weight.dtype for layer in layers} == {getattr(torch, dtype)}
    log = run(folder, USE_LORA="True", BASE_DTYPE=dtype, OUT_DIR=f"out-{dtype}")
    exact = run(folder, USE_LORA="True", OUT_DIR=f"out-{dtype}-auto")
    assert f"Base weights: {dtype}, " in log and "Base weights" not in exact
    np.testing.assert_allclose(losses(log), losses(exact), atol=1e-4)  # the file is in bfloat16


def test_an_adapter_says_on_what_it_was_trained_and_fits_the_base_in_any_dtype(folder):
    assert read_adapter(folder / "out" / "lora.pt").metadata["base_dtype"] == "nf4"
    run(folder, USE_LORA="True", OUT_DIR="out-auto")
    plain = read_adapter(folder / "out-auto" / "lora.pt")
    assert plain.base == read_adapter(folder / "out" / "lora.pt").base
    assert "base_dtype" not in plain.metadata
    evaluate = {"EVAL_ONLY": "True", "OUT_DIR": "elsewhere"}
    for adapter, trained in (("out/lora.pt", "nf4"), ("out-auto/lora.pt", "auto")):
        for base_dtype in ("auto", "nf4"):
            log = run(folder, **evaluate, ADAPTERS=adapter, BASE_DTYPE=base_dtype)
            note = (
                f"Note: {adapter} was trained with BASE_DTYPE={trained}, and this base is of "
                f"BASE_DTYPE={base_dtype}"
            )
            assert (note in log) == (trained != base_dtype)


def test_a_run_is_the_same_with_checkpointing_and_in_two_processes(folder):
    trained = TRAINED | ON_CPU
    first = losses(run(folder, **trained, OUT_DIR="first"))
    again = losses(run(folder, **trained, OUT_DIR="again", GRAD_CHECKPOINT="True"))
    assert first == again
    (log, *_) = start_group(folder, 2, **SMALL | trained | {"OUT_DIR": "group"})
    np.testing.assert_allclose(losses(succeeded(log)), first, atol=2e-4)
    exact = losses(run(folder, **ON_CPU, USE_LORA="True", OUT_DIR="exact"))
    assert first != exact
    np.testing.assert_allclose(first, exact, atol=0.02)


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(folder):
    run(folder, **TRAINED, OUT_DIR="whole", DTYPE="bfloat16")
    run(folder, **TRAINED, OUT_DIR="parts", DTYPE="bfloat16", MAX_STEPS="4")
    longer = {"MAX_STEPS": "6", "RESUME": "True", "DTYPE": "bfloat16"}
    for name in ("whole", "parts"):
        assert "Resuming" in run(folder, **TRAINED, **longer, OUT_DIR=name)
    assert_same(files_of(folder / "whole", "lora"), files_of(folder / "parts", "lora"))


def test_an_adapter_is_merged_onto_the_values_in_nf4_unless_told_otherwise(folder):
    log = run(folder, MERGE="True", ADAPTERS="out/lora.pt", OUT_DIR="merged")
    assert "Merged onto the base's weights in BASE_DTYPE=nf4\n" in log
    merged = read_checkpoint(folder / "merged" / "merged.pt")
    assert merged.metadata["base_dtype"] == "nf4"
    with_adapter = logits_of(folder, "llama", "nf4", "out/lora.pt")
    found = logits_of(folder, "merged/merged.pt", "auto")
    near = (found - with_adapter).norm()
    other = (logits_of(folder, "llama", "auto", "out/lora.pt") - with_adapter).norm()
    assert near < 0.1 * other  # the file has bfloat16
    log = run(folder, MERGE="True", ADAPTERS="out/lora.pt", OUT_DIR="other", BASE_DTYPE="auto")
    assert "Merged onto the base's weights in BASE_DTYPE=auto\n" in log
    assert read_checkpoint(folder / "other" / "merged.pt").metadata["base_dtype"] == "auto"
    onto_file = logits_of(folder, "other/merged.pt", "auto") - with_adapter
    assert onto_file.norm() == pytest.approx(other.item(), rel=0.1)


def test_several_adapters_are_summed_on_it_and_generate_writes_with_them(folder):
    run(folder, **TRAINED, OUT_DIR="second", SEED="3")
    both = "out/lora.pt:0.5,second/lora.pt:0.5"
    log = run(folder, EVAL_ONLY="True", BASE_DTYPE="nf4", ADAPTERS=both, LORA_RANK="4")
    assert "Reduced to rank 4" in log and "Note: out/lora.pt" not in log
    variables = {"BASE_CHECKPOINT": "llama", "ADAPTERS": both, "TEMPERATURE": "0"}
    variables |= {"MAX_NEW_TOKENS": "5", "PROMPT": "the", "BASE_DTYPE": "nf4"}
    written = start_script(folder, script="generate.py", **variables)
    assert succeeded(written).startswith("the") and "Note" not in written.stderr
    written = start_script(folder, script="generate.py", **variables | {"BASE_DTYPE": "auto"})
    assert succeeded(written) and "Note: out/lora.pt" in written.stderr


def test_gpt2s_kind_trains_and_merges_on_it_exactly(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    # 36 x 36 is no multiple of a block.
    tiny = TINY | {"N_EMBD": "36", "DTYPE": "float32"}
    succeeded(start_script(tmp_path, **tiny))
    log = succeeded(start_script(tmp_path, **tiny, **TRAINED))
    assert "Base weights: nf4, " in log and losses(log)[-1] < losses(log)[0]
    succeeded(start_script(tmp_path, **tiny, MERGE="True", ADAPTERS="out/lora.pt"))

    def loss(**changes: str) -> str:
        log = succeeded(start_script(tmp_path, **tiny, EVAL_ONLY="True", **changes))
        (line,) = (line for line in log.splitlines() if line.startswith("Validation loss"))
        return line

    with_adapter = loss(ADAPTERS="out/lora.pt", BASE_DTYPE="nf4")
    assert loss(BASE_CHECKPOINT="out/merged.pt") == with_adapter
    assert loss(ADAPTERS="out/lora.pt") != with_adapter


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"BASE_DTYPE": "nf4"}, "BASE_DTYPE=nf4 is for a frozen base and needs USE_LORA=True"),
        ({**TRAINED, "BASE_CHECKPOINT": ""}, "BASE_CHECKPOINT is set to nothing"),
        ({**TRAINED, "FSDP": "True"}, "FSDP and BASE_DTYPE=nf4 exclude each other"),
        ({"BASE_DTYPE": "int4"}, "is not one of auto, float32, bfloat16, nf4"),
    ],
)
def test_what_it_is_not_for_gets_one_line(folder, variables, words):
    assert words in refused(start_script(folder, **SMALL | variables))


def test_it_needs_a_base(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    error = refused(start_script(tmp_path, **TINY, **TRAINED))
    assert "BASE_DTYPE=nf4 needs a base" in error and "set BASE_CHECKPOINT" in error


# ---- memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds")
def test_a_released_tensor_of_a_file_takes_no_memory_until_it_is_read_again(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssFile")) // 1024

    values = torch.arange(2**24, dtype=torch.float32)  # 64 MiB
    save_file({"a": values}, tmp_path / "a.safetensors")
    tensor = read_foreign_tensors(tmp_path / "a.safetensors")[0]["a"]
    before = resident()
    assert torch.equal(tensor, values)
    assert resident() - before > 56
    release(tensor)
    assert resident() - before < 8
    assert torch.equal(tensor, values)
    release(values)  # is no file's, and stays
    assert torch.equal(tensor, values)
