"""How many parameters train: the models of several sizes with adapters of several ranks.

    python benchmarks/parameters.py

Prints two tables in Markdown, with the embeddings training and with TRAIN_EMBEDDINGS=False. The
sizes are step_time.py's, over bytes, and GPT-2's smallest. A cell has the adapters' parameters and
what trains in percent of all parameters, adapters included, as a run's record has it.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_time import SIZES
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA

RANKS = (4, 8, 16, 32)
GPT2 = {
    "vocab_size": 50257, "n_embd": 768, "block_size": 1024, "n_head": 12, "n_layer": 12,
    "gelu": "tanh", "tied_head": True,
}  # fmt: skip


def shapes() -> dict[str, dict[str, int | str | bool]]:
    """The shapes of the models by name."""
    return {
        name: {
            "vocab_size": 256, "n_embd": size.n_embd, "block_size": size.block,
            "n_head": size.n_head, "n_layer": size.n_layer,
        }
        for name, size in SIZES.items() if not size.llama and name != "nano"  # which is 0.8M
    } | {"GPT-2 124M": GPT2}  # fmt: skip


def table(train_embeddings: bool) -> str:
    """Parameters of each model, and with adapters of each rank, as a table in Markdown."""
    head = ["model", "parameters", "embeddings", *(f"rank {rank}" for rank in RANKS)]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, shape in shapes().items():
        with torch.device("meta"):  # which holds no numbers
            options = {"dropout": 0.0, "device": "meta"}
            full = BigramLanguageModelLoRA(**shape, **options).get_parameter_info()
            options |= {"use_lora": True, "train_embeddings": train_embeddings}
            adapted = [
                BigramLanguageModelLoRA(**shape, **options, lora_rank=rank).get_parameter_info()
                for rank in RANKS
            ]
        cells = [f"{info['lora']:,} ({info['lora_percentage']:.2f}%)" for info in adapted]
        rows.append([name, f"{full['total']:,}", f"{full['embedding']:,}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for title, train_embeddings in (("Embeddings train", True), ("Embeddings frozen", False)):
        print(f"{title}:", "", table(train_embeddings), "", sep="\n")


if __name__ == "__main__":
    main()
