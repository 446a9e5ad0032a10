"""Write a model or an adapter for Hugging Face's `transformers` and `peft`.

    python export.py out/merged.pt merged    a checkpoint, as a folder of its family's model
    python export.py out/lora.pt peft        an adapter, as a folder that PEFT reads

The folders must not exist yet.
"""

import sys

if __name__ == "__main__":  # before the imports that take seconds
    from trainer.start import start

    start(__doc__)

import os

from data import end_tokens
from files import OtherKind
from lora import read_adapter, write_peft
from models.huggingface import adapter_to_folder, family_of_adapter, read_base, write_model
from trainer.console import exit_code_of, say
from trainer.settings import ConfigError


def main(arguments: list[str]) -> int:
    """Run the script; returns its exit code: 0, or 2 for input that cannot be used."""
    return exit_code_of(lambda: work(arguments))


def work(arguments: list[str]) -> None:
    """Write the first argument's file as the folder that the second names."""
    options = [argument for argument in arguments if argument.startswith("-")]
    if options or len(arguments) != 2:
        found = f", not {options[0]!r}" if options else ""
        raise ConfigError(
            f"export.py takes a checkpoint or an adapter, and the folder to write{found}"
        )
    source, folder = arguments
    try:
        adapter = read_adapter(source)
    except OtherKind:
        checkpoint = read_base(source)
        ends = end_tokens(checkpoint.tokenizer, checkpoint.files)
        size = write_model(folder, checkpoint, ends)
        what = f"a model of the family {checkpoint.family.name}"
    else:
        family = family_of_adapter(adapter)
        below = adapter.metadata.get("base_checkpoint")
        base_model = below if below is not None and os.path.isdir(below) else None
        size = write_peft(folder, adapter_to_folder(adapter, family), "CAUSAL_LM", base_model)
        what = "a PEFT adapter"
    say(f"Wrote {folder}, {what}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
