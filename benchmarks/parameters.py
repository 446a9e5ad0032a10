"""How many parameters train: the models of several sizes with adapters of several ranks.

    python benchmarks/parameters.py

With the embeddings training, and with TRAIN_EMBEDDINGS=False. The sizes are step_time.py's, over
bytes, and GPT-2's smallest. What trains is in percent of all parameters, adapters included, as the
log of a run has it.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
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


def rows(train_embeddings: bool) -> list[results.Row]:
    """The parameters of each model, and with adapters of each rank what they have and what trains
    in percent."""
    found = []
    for name, shape in shapes().items():
        with torch.device("meta"):  # which holds no numbers
            options = {"dropout": 0.0, "device": "meta"}
            full = BigramLanguageModelLoRA(**shape, **options).get_parameter_info()
            row = {"embeddings": "train" if train_embeddings else "frozen", "model": name}
            row |= {"parameters": full["total"], "of_embeddings": full["embedding"]}
            options |= {"use_lora": True, "train_embeddings": train_embeddings}
            for rank in RANKS:
                model = BigramLanguageModelLoRA(**shape, **options, lora_rank=rank)
                info = model.get_parameter_info()
                row[f"rank_{rank}"] = info["lora"]
                row[f"rank_{rank}_trains_percent"] = round(info["lora_percentage"], 2)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results.add_results_options(parser)
    args = parser.parse_args()
    found = rows(train_embeddings=True) + rows(train_embeddings=False)
    print(results.table(found))
    results.write("parameters", found, torch.device("cpu"), args)


if __name__ == "__main__":
    main()
