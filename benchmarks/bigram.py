"""The loss of a byte bigram model: what a language model must beat to have learned anything.

    python benchmarks/bigram.py [python-code | python-docs | path]

Counts pairs of bytes in the training split (plus one for every pair, so that none is
impossible) and prints the mean cross-entropy of the validation split, in nats per byte.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import results
from data import DataError, load_corpus

DEFAULT_INPUT = Path(__file__).resolve().parent.parent / "data" / "input.txt"


def bigram_loss(train: np.ndarray, validation: np.ndarray) -> float:
    """Nats per byte of `validation` under the pair counts of `train`; both (n,) uint8."""
    pairs = train[:-1].astype(np.int64) * 256 + train[1:]
    counts = np.bincount(pairs, minlength=256 * 256).reshape(256, 256) + 1
    log_probability = np.log(counts / counts.sum(1, keepdims=True))
    return -log_probability[validation[:-1], validation[1:]].mean()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", help="a built-in text, a file or a folder")
    results.add_results_options(parser)
    args = parser.parse_args()
    try:
        corpus = load_corpus(args.data, DEFAULT_INPUT)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*corpus.describe(), sep="\n")
    loss = bigram_loss(corpus.train, corpus.validation)
    print(f"bigram loss: {loss:.4f} nats per byte")
    row = {"data": corpus.name, "loss": loss}
    results.write("bigram", [row], torch.device("cpu"), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
