"""A whole fine-tuning of a published shape, beside TRL's SFTTrainer: steps, evaluations and files.

    python benchmarks/sft.py
    python benchmarks/sft.py --models Qwen2.5-0.5B --batches 2x512 --dtypes bfloat16

Both start from one folder of random weights, and train adapters of rank 8 on all linears of the
blocks on the same text, with fused AdamW at one rate. Both evaluate as many tokens before the first
step, in the middle and at the end, and write adapter and optimizer after the last two. Ours is
training.py as a user starts it. TRL has the settings of its users but for GRAD_CHECKPOINT, which
neither does here, and for the text, which it gets in tokens already. In float32 our base stays in
bfloat16, as its file has it. Both take turns; `time` is that of the loop, `whole` that of the
process, with imports and loading.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.families import MODELS, RANK, batches_of, targets_of
from benchmarks.measure import at_least_one, metrics_of, names_of, printed_by
from benchmarks.memory import write_base
from data import load_corpus

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[1]
EVAL_BATCHES = 4
RATE = 1e-3
TEXT_BYTES = 400_000


def ours(folder: Path, model: str, batch: tuple[int, int], dtype: str, steps: int) -> results.Row:
    """Run training.py."""
    variables = {
        "BASE_CHECKPOINT": model, "DATA": "text.txt", "OUT_DIR": "out", "DEVICE": "cpu",
        "USE_LORA": "True", "LORA_RANK": str(RANK), "LORA_ALPHA": str(2 * RANK), "DTYPE": dtype,
        "BATCH_SIZE": str(batch[0]), "BLOCK_SIZE": str(batch[1]), "MAX_STEPS": str(steps),
        "EVAL_INTERVAL": str(steps // 2), "EVAL_BATCHES": str(EVAL_BATCHES),
        "LEARNING_RATE": str(RATE), "LORA_PLUS_RATIO": "1", "WARMUP_STEPS": "0",
        "ADAM_BETA2": "0.999",
    }  # fmt: skip
    summary = metrics_of(variables, folder)[-1]["summary"]
    return {
        "loss": summary["final_val_loss"],
        "time_s": summary["training_time"],
        "peak_mib": summary["peak_memory"],
    }


def trl(folder: Path, model: str, batch: tuple[int, int], dtype: str, steps: int) -> results.Row:
    """Run this script as one that trains with TRL."""
    options = ["--trl-of", model, f"{batch[0]}x{batch[1]}", dtype, str(steps)]
    return json.loads(printed_by([str(SCRIPT), *options], "TRL", folder).splitlines()[-1])


def train_with_trl(model: str, batch: tuple[int, int], dtype: str, steps: int) -> results.Row:
    """Train in this process and folder, as a user of TRL would."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    size, block = batch
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{model}/tokenizer.json", eos_token=end, pad_token=end
    )
    tokens = tokenizer(Path("text.txt").read_text())["input_ids"]
    blocks = [tokens[i : i + block] for i in range(0, len(tokens) - block, block)]
    n_eval = EVAL_BATCHES * size
    sets = [Dataset.from_dict({"input_ids": part}) for part in (blocks[:-n_eval], blocks[-n_eval:])]
    options = SFTConfig(
        output_dir="out-trl", use_cpu=True, bf16=dtype == "bfloat16", max_steps=steps,
        per_device_train_batch_size=size, per_device_eval_batch_size=size,
        learning_rate=RATE, optim="adamw_torch_fused", eval_on_start=True, eval_strategy="steps",
        eval_steps=steps // 2, save_strategy="steps", save_steps=steps // 2, report_to=[],
        gradient_checkpointing=False, disable_tqdm=True, max_length=block,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
        args=options,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets_of(model)),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    peak = hardware.peak_memory(torch.device("cpu"))
    return {"loss": losses[-1], "time_s": seconds, "peak_mib": peak}


def rows_of(model: str, batch: tuple[int, int], dtype: str, args: argparse.Namespace) -> list:
    """The rows of both methods, which take turns."""
    found: dict[str, list[results.Row]] = {"ours": [], "TRL": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_base(folder / model, model)
        text = load_corpus("python-docs", ROOT / "data").train[:TEXT_BYTES]
        (folder / "text.txt").write_bytes(bytes(text).decode(errors="ignore").encode())
        methods = [("ours", ours), ("TRL", trl)]
        for i in range(args.rounds):
            for method, run in methods[:: 1 if i % 2 == 0 else -1]:
                started = time.perf_counter()
                row = run(folder, model, batch, dtype, args.steps)
                found[method].append(row | {"whole_s": time.perf_counter() - started})
    rows = []
    for method, runs in found.items():
        times = {name: [run[name] for run in runs] for name in ("time_s", "whole_s")}
        pairs = zip(times["time_s"], (run["time_s"] for run in found["TRL"]), strict=True)
        row = {"model": model, "batch": f"{batch[0]}x{batch[1]}", "dtype": dtype, "method": method}
        row |= results.ranged("time_ratio", [own / theirs for own, theirs in pairs])
        row |= {name: statistics.median(values) for name, values in times.items()}
        seconds = statistics.median(times["time_s"])
        row["tokens_per_second"] = batch[0] * batch[1] * args.steps / seconds
        row["peak_mib"] = statistics.median(run["peak_mib"] for run in runs)
        rows.append(row | {"loss": runs[-1]["loss"]})
    for row in rows:
        row["peak_ratio"] = row["peak_mib"] / rows[-1]["peak_mib"]
    return rows


def main() -> None:
    """Measure, print and write; or train with TRL, in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=names_of(list(MODELS)), default=["SmolLM2-135M"])
    parser.add_argument("--batches", type=batches_of, default=[(2, 256)])
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", type=names_of(dtypes), default=dtypes)
    parser.add_argument("--steps", type=at_least_one, default=20, help="of a run (default: 20)")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="(default: 3)")
    results.add_results_options(parser)
    parser.add_argument("--trl-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps 1 is too few: there is an evaluation after half of them")
    if importlib.util.find_spec("trl") is None:
        parser.error("the package trl is not installed: pip install -r requirements-dev.txt")
    if args.trl_of is not None:
        model, batch, dtype, steps = args.trl_of
        print(json.dumps(train_with_trl(model, batches_of(batch)[0], dtype, int(steps))))
        return
    found: list[results.Row] = []
    for model in args.models:
        for batch in args.batches:
            for dtype in args.dtypes:
                found += rows_of(model, batch, dtype, args)
                print(results.table(found[-2:]), flush=True)
                results.write("sft", found, torch.device("cpu"), args)


if __name__ == "__main__":
    main()
