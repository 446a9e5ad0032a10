"""The memory that the log announces beside the peak that was measured, over sizes and methods.

    python benchmarks/memory.py
    python benchmarks/memory.py --models 3.3M,SmolLM2-135M --methods lora --batches 4x256

Each row is a run of training.py of three steps and an evaluation, in a process of its own: models
trained from random weights, full or with LoRA, and published shapes with random weights and LoRA.
`announced` is the log's line before the first weight is read. Its parts stand before it: weights,
the optimizer, what a step holds at its largest moment, gaps between tensors, and the program.
`peak` is the process's largest resident set, or on CUDA the most that torch reserved.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hardware
from benchmarks import results
from benchmarks.families import MODELS, batches_of, write_folder
from benchmarks.measure import names_of, other_variables, printed_by

ROOT = Path(__file__).resolve().parents[1]
SMALL = {  # width, blocks, heads
    "nano": (128, 2, 2), "3.3M": (256, 4, 4), "11M": (384, 6, 6), "25M": (512, 8, 8),
    "85M": (768, 12, 12),
}  # fmt: skip
METHODS = {
    "full": {},
    "lora": {"USE_LORA": "True"},
    "lora-checkpoint": {"USE_LORA": "True", "GRAD_CHECKPOINT": "True"},
    "lora-nf4": {"USE_LORA": "True", "BASE_DTYPE": "nf4"},
}
RUN = {"MAX_STEPS": "3", "EVAL_INTERVAL": "3", "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "0"}
FIGURES = (r"^Memory: about ([\d,]+) MiB \((.*?)\)", r"^Peak memory: ([\d,]+) MiB")


def write_base(folder: Path, model: str) -> None:
    """A published shape with random weights and a tokenizer of bytes."""
    folder.mkdir()
    write_folder(folder, model)
    words = tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator([], vocab_size=256, show_progress=False)
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(folder / "tokenizer.json"))


def measured(folder: Path, variables: dict[str, str]) -> results.Row:
    """What the log of a run announces, in its parts, and what its peak was, in MiB."""
    environment = other_variables() | RUN | variables
    log = printed_by([str(ROOT / "training.py")], "training.py", folder, environment)
    announced, peak = (re.search(pattern, log, re.MULTILINE) for pattern in FIGURES)
    row = {}
    for part in announced[2].split(", "):
        name, size = part.replace(" ", "_").rsplit("_", 1)
        row[f"{name}_mib"] = whole(size)
    row |= {"announced_mib": whole(announced[1]), "peak_mib": whole(peak[1])}
    return row | {"announced_ratio": row["announced_mib"] / row["peak_mib"]}


def whole(text: str) -> int:
    """The number of a text such as 1,234."""
    return int(text.replace(",", ""))


def rows(args: argparse.Namespace) -> Iterator[results.Row]:
    """The rows, each as soon as it is measured."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4000)
        for model in args.models:
            variables = {"DATA": "text.txt"}
            if model in MODELS:
                write_base(folder / model, model)
                variables["BASE_CHECKPOINT"] = model
            else:
                sizes = dict(zip(("N_EMBD", "N_LAYER", "N_HEAD"), SMALL[model], strict=True))
                variables |= {name: str(size) for name, size in sizes.items()} | {"DROPOUT": "0"}
            for method in args.methods:
                if (method == "full" and model in MODELS) or ("nf4" in method and model in SMALL):
                    continue
                for dtype in args.dtypes:
                    for batch, block in args.batches:
                        more = {"BATCH_SIZE": str(batch), "BLOCK_SIZE": str(block), "DTYPE": dtype}
                        out = {"OUT_DIR": f"out-{model}-{method}"}
                        found = measured(folder, variables | METHODS[method] | more | out)
                        row = {"model": model, "method": method, "dtype": dtype}
                        yield row | {"batch": f"{batch}x{block}"} | found


def parse_arguments() -> argparse.Namespace:
    """The command line. Exits with an error for what is not understood."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*SMALL, *MODELS]
    models = ["nano", "3.3M", "11M", "25M", "SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B"]
    parser.add_argument("--models", type=names_of(every), default=models)
    parser.add_argument("--methods", type=names_of(list(METHODS)), default=list(METHODS))
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", type=names_of(dtypes), default=["float32"])
    parser.add_argument("--batches", type=batches_of, default=[(16, 128), (4, 512)])
    results.add_results_options(parser)
    return parser.parse_args()


def main() -> None:
    """Print each row as it is measured, and write them."""
    args = parse_arguments()
    found: list[results.Row] = []
    device, _ = hardware.choose_device("auto")
    for row in rows(args):
        found.append(row)
        lines = results.table(found).splitlines()
        print(*(lines if len(found) == 1 else lines[-1:]), sep="\n", flush=True)
        results.write("memory", found, device, args)


if __name__ == "__main__":
    main()
