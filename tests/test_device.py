"""Devices, threads and timers, as far as a machine without a GPU can show them."""

import itertools
import math
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hardware
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from trainer.settings import Config, ConfigError
from trainer.setup import check_checkpointing
from training import is_launch_bound


def test_a_cpu_times_each_step_and_a_queue_some_together():
    for name, expected in (("cpu", 5), ("meta", 3)):  # meta stands for a device with a queue
        times: list[float] = []
        timer = hardware.StepTimer(torch.device(name), times, {}, together=3)
        for _ in range(5):
            timer.begin()
            time.sleep(0.01)
            timer.end()
        assert len(times) == expected
        time.sleep(0.1)
        timer.flush()
        assert len(times) == 5
    # What is between the last step and the flush counts for a queue, as there it may be its work.
    assert times[:3] == pytest.approx([0.01] * 3, abs=0.02) and times[4] > 0.05


def test_parts_of_a_step_are_noted_in_a_gpus_queue_without_waiting_for_it(monkeypatch):
    """For a GPU that does each thing a millisecond after the one before."""
    clock, waits = itertools.count(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: "Event") -> float:
            assert waits  # before that torch raises an error
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    parts: dict[str, float] = {}
    timer = hardware.StepTimer(torch.device("cuda"), [], parts, together=3)
    for n in range(1, 8):
        timer.begin()
        timer.end_part("data")
        timer.end_part("optimizer")
        timer.end()
        assert len(waits) == n // 3
    timer.flush()
    assert parts == pytest.approx({"data": 0.007, "optimizer": 0.007})
    with timer.timed("saving"):
        pass
    assert timer.take_parts().keys() == {"data", "optimizer", "saving"} and parts == {}


class OnlyMeta(TorchDispatchMode):
    """Within it, an operation on a tensor of a CPU fails, except on a single number; and one into
    parts of rows, which torch on MPS puts in the wrong place before macOS 26."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        assert "out" not in kwargs or kwargs["out"].is_contiguous(), func
        for leaf in tree_leaves((args, kwargs, result)):
            # Checkpointing makes an empty one, in earlier versions.
            allowed = not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.numel() == 0
            assert allowed or leaf.is_meta, func
        return result


@pytest.mark.parametrize("lora", [{}, {"use_lora": True}, {"use_lora": True, "lora_dropout": 0.1}])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_what_a_step_computes_is_on_the_models_device(lora, packed, grad_checkpoint):
    # meta goes the ways of cuda and mps, for whatever is no CPU does, and computes nothing.
    model = BigramLanguageModelLoRA(
        vocab_size=256, n_embd=32, block_size=16, device="meta", dropout=0.2, n_head=2, n_layer=2,
        **lora,
    )  # fmt: skip
    model.grad_checkpoint = grad_checkpoint
    idx = torch.zeros(4, 16, dtype=torch.long, device="meta")
    with OnlyMeta():
        _, loss = model(idx, idx, idx if packed else None)
        loss.backward()
        assert model.generate(idx[:, :3], 4, top_k=5, top_p=0.5).shape == (4, 7)
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


def test_a_gpu_for_each_process_or_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert hardware.choose_device("auto")[0] == torch.device("cuda")
    assert hardware.choose_device("cuda", 1, 2)[0] == torch.device("cuda", 1)
    assert chosen == [1]
    with pytest.raises(hardware.DeviceError, match=r"3 processes need a GPU each, .* finds 2"):
        hardware.choose_device("auto", 0, 3)


def test_mps_is_for_one_process_and_not_for_checkpoints_with_dropout(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mps, _ = hardware.choose_device("auto")
    assert mps == torch.device("mps")
    assert hardware.choose_device("auto", in_group=True)[0] == torch.device("cpu")
    with pytest.raises(hardware.DeviceError, match="no mps device for several processes"):
        hardware.choose_device("mps", in_group=True)
    settings = {"GRAD_CHECKPOINT": "True", "USE_LORA": "True"}  # LoRA has no dropout of itself
    check_checkpointing(Config.from_environment(settings), mps)
    for more in ({"DROPOUT": "0.1"}, {"LORA_DROPOUT": "0.1"}):
        config = Config.from_environment(settings | more)
        check_checkpointing(config, torch.device("cpu"))
        with pytest.raises(ConfigError, match="GRAD_CHECKPOINT=True is wrong with dropout on mps"):
            check_checkpointing(config, mps)


def test_each_device_has_its_words_for_too_little_memory():
    for words in ("MPS backend out of memory (MPS allocated: 1 GiB)", "DefaultCPUAllocator: can't "
                  "allocate memory: you tried to allocate 8 bytes"):  # fmt: skip
        assert hardware.is_out_of_memory(RuntimeError(words))
    with pytest.raises(ValueError) as error:
        np.random.default_rng(0).integers(9, size=2**62)
    assert hardware.is_out_of_memory(error.value)
    assert not hardware.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_processes_share_the_cores_unless_told_otherwise(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does
    hardware.choose_threads(None, 2)
    hardware.choose_threads(3, 2)
    hardware.choose_threads(None, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    hardware.choose_threads(None, 2)
    assert chosen == [4, 3]


@pytest.mark.parametrize(
    ("flag", "name", "dtype", "reason"),
    [
        ("amx_bf16", "auto", torch.bfloat16, "multiplies it natively with AMX"),
        ("avx512_bf16", "auto", torch.bfloat16, "multiplies it natively with AVX512-BF16"),
        ("avx2", "auto", torch.float32, "the CPU has no native bfloat16"),
        ("amx_bf16", "bfloat16", torch.bfloat16, "^DTYPE=bfloat16$"),
        ("avx2", "bfloat16", torch.bfloat16, "no native bfloat16: far slower than float32"),
        ("amx_bf16", "float32", torch.float32, "^DTYPE=float32$"),
    ],
)
def test_the_dtype_is_the_cpus_own_unless_told_otherwise(monkeypatch, flag, name, dtype, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    found, why = hardware.choose_dtype(name, torch.device("cpu"))
    assert found == dtype and re.search(reason, why)


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "capability", "dtype"),
    [
        ("T4", False, (7, 5), torch.float16),
        ("V100", False, (7, 0), torch.float16),
        ("P100", False, (6, 0), torch.float32),
        ("A100", True, (8, 0), torch.bfloat16),
    ],
)
def test_the_dtype_is_what_a_gpu_multiplies_fast(monkeypatch, gpu, bfloat16, capability, dtype):
    def supported(including_emulation: bool = True) -> bool:
        return bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.choose_dtype("auto", torch.device("cuda"))[0] == dtype, gpu


def test_float16_is_for_cuda_and_cpu():
    assert hardware.choose_dtype("float16", torch.device("cpu"))[0] == torch.float16
    with pytest.raises(hardware.DeviceError, match="DTYPE=float16 is for cuda and cpu"):
        hardware.choose_dtype("float16", torch.device("mps"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("amx_tile", torch.bfloat16),
        ("avx512_bf16", torch.bfloat16),
        ("", torch.float32),
    ],
)
def test_earlier_versions_of_torch_know_bfloat16_too(monkeypatch, name, dtype):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for known in ("amx_tile", "avx512_bf16"):
        function = f"_is_{known}_supported"
        monkeypatch.setattr(torch.cpu, function, lambda known=known: known == name, raising=False)
    assert hardware.choose_dtype("auto", torch.device("cpu"))[0] == dtype
    assert hardware.device_name(torch.device("cpu")).startswith("CPU, ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2},
        {"dropout": 0.2, "use_lora": True},
        {"dropout": 0.2, "use_lora": True, "lora_dropout": 0.1},
        {"dropout": 0.0, "use_lora": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_losses_and_gradients_of_python(options, dtype):
    """With the same masks of dropout, from batch to batch, and capturing draws no numbers; without
    dropout also where blocks are computed again."""
    torch.manual_seed(0)
    model = BigramLanguageModelLoRA(
        vocab_size=256, n_embd=32, block_size=16, device="cuda", n_head=2, n_layer=2, **options
    )  # fmt: skip
    model.grad_checkpoint = not model.has_dropout
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = torch.randint(256, (3, 2, 4, 16), device="cuda").unbind()
    state = torch.cuda.get_rng_state()
    graphed = hardware.in_cuda_graphs(model, tuple(batches[0]), dtype)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    found: list[list[torch.Tensor]] = [[], []]
    for function, results in zip((model, graphed), found, strict=True):
        torch.manual_seed(1)
        for batch in batches:
            with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
                loss = function(*batch)[-1]
            gradients = torch.autograd.grad(loss, trained)
            results += [t.detach().clone() for t in (loss, *gradients)]
        results.append(torch.cuda.get_rng_state())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_graphs_are_for_small_steps_of_one_batch_on_cuda(monkeypatch):
    def waits(
        shape: tuple[int, int] = (32, 128), parameters: int = 10**8, device: str = "cuda",
        dropout: bool = False, grad_checkpoint: bool = False, packed: bool = False, n: int = 1,
    ) -> bool:  # fmt: skip
        model = SimpleNamespace(
            get_parameter_info=lambda: {"total": parameters}, has_dropout=dropout,
            grad_checkpoint=grad_checkpoint,
        )  # fmt: skip
        tensor = SimpleNamespace(
            shape=shape, numel=lambda: math.prod(shape), device=torch.device(device),
            is_cuda=device == "cuda", is_meta=False,
        )  # fmt: skip
        return is_launch_bound(model, [[tensor] * (3 if packed else 2)] * n)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert waits() and waits(dropout=True) and waits(grad_checkpoint=True) and waits(packed=True)
    assert not waits(device="cpu") and not waits(device="mps")
    assert not waits(parameters=10**11) and waits((2, 128), parameters=10**11)
    assert not waits(n=2)
    assert not waits(grad_checkpoint=True, dropout=True)
    assert waits((1, 8192)) and not waits((1, 8192), packed=True)
    monkeypatch.setattr("hardware.processes.world_size", lambda: 2)
    assert not waits()
