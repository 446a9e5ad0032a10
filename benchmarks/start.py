"""How long a user waits: for --help, for the first step, and for a file of chats to be made ready.

    python benchmarks/start.py
    python benchmarks/start.py --rounds 5 --megabytes 100

Each is a process of its own, timed from its start to the line that is waited for, or to its end.
`import torch` alone is beside them. Chats are python-docs in pieces, in the tokens of a vocabulary
of 8,000 that is trained on it, on a base of random weights; a second run finds what the first kept.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
from benchmarks.families import write_folder
from benchmarks.measure import at_least_one, other_variables
from benchmarks.results import ROOT
from data import load_corpus

TRAINING = str(ROOT / "training.py")
FIRST_STEP = {"MAX_STEPS": "1", "EVAL_BATCHES": "1", "SAMPLE_TOKENS": "0", "DEVICE": "cpu"}
PREVIEW = {"BASE_CHECKPOINT": "base", "DATA": "chats.jsonl", "PREVIEW": "1", "BLOCK_SIZE": "128"}
VOCABULARY = 8000
MARK = "<|endoftext|>"
TURN = 600  # bytes of a question, and of an answer


def seconds_until(
    line: str, command: Sequence[str], variables: dict[str, str], folder: Path
) -> float:
    """Seconds from the start of a Python process to a line of its output that matches, "" for its
    end. Exits with what it said when it fails."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=other_variables() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        found = None
        for written in process.stdout:
            if line and found is None and re.match(line, written):
                found = time.perf_counter() - started
        errors = process.stderr.read()
    if process.returncode != 0 or (line and found is None):
        sys.exit(f"error: {' '.join(command)} failed: {errors.strip()[-2000:]}")
    return time.perf_counter() - started if found is None else found


def write_chats(folder: Path, megabytes: int) -> None:
    """A base with a tokenizer, and a file of chats of so many MB."""
    text = bytes(load_corpus("python-docs", ROOT / "data").train)
    (folder / "base").mkdir()
    write_folder(folder / "base", "tiny", vocab_size=VOCABULARY + 1, max_position_embeddings=128)
    words = tokenizers.ByteLevelBPETokenizer()
    sample = [text.decode(errors="ignore")]
    words.train_from_iterator(sample, vocab_size=VOCABULARY, show_progress=False)
    words.add_special_tokens([MARK])
    words.save(str(folder / "base" / "tokenizer.json"))
    pieces = [text[i : i + TURN].decode(errors="ignore") for i in range(0, len(text) - TURN, TURN)]
    size, i = 0, 0
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        while size < megabytes * 10**6:
            asked, answered = (pieces[(i + k) % len(pieces)] for k in range(2))
            size += file.write(json.dumps({"prompt": asked, "completion": answered}) + "\n")
            i += 1


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=at_least_one, default=3, help="(default: 3)")
    parser.add_argument("--megabytes", type=at_least_one, default=10, help="(default: 10)")
    results.add_results_options(parser)
    args = parser.parse_args()
    of_chats = f"{args.megabytes} MB of chats, PREVIEW=1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_chats(folder, args.megabytes)
        waits = {
            "import torch": ("", ["-c", "import torch"], {}),
            "python training.py --help": ("", [TRAINING, "--help"], {}),
            "python training.py, first step": ("step 1 ", [TRAINING], FIRST_STEP),
            of_chats: ("", [TRAINING], PREVIEW),
            f"{of_chats}, again": ("", [TRAINING], PREVIEW),
        }
        times: dict[str, list[float]] = {what: [] for what in waits}
        for _ in range(args.rounds):
            shutil.rmtree(folder / "out", ignore_errors=True)
            for what, (line, command, variables) in waits.items():
                times[what].append(seconds_until(line, command, variables, folder))
    rows = [{"wait": what} | results.ranged("time_s", found) for what, found in times.items()]
    print(results.table(rows))
    results.write("start", rows, torch.device("cpu"), args)


if __name__ == "__main__":
    main()
