"""Write a model or an adapter for Hugging Face's `transformers` and `peft`.

    python export.py out/merged.pt merged    a checkpoint, as a folder of its family's model
    python export.py out/lora.pt peft        an adapter, as a folder that PEFT reads

The folders must not exist yet. They have the chat template that the model was trained in.
"""

import os
import sys

if __name__ == "__main__":  # before the imports that take seconds
    from trainer.start import start

    start(__doc__, os.environ)

from data import TEMPLATE_FILE, chat_format, continues_text, ends_of, template_in, text_format
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
    notes: list[str] = []
    try:
        adapter = read_adapter(source)
    except OtherKind:
        checkpoint = read_base(source)
        tokenizer, files, metadata = checkpoint.tokenizer, checkpoint.files, checkpoint.metadata
        format = text_format(tokenizer, files)
        if not continues_text(files, metadata):
            format = chat_format(tokenizer, files, metadata)
        template = format.as_template()
        others = {} if template == template_in(files) else template_file(template)
        ends = ends_of(format, files, metadata)
        size = write_model(folder, checkpoint, ends, others)
        what = f"a model of the family {checkpoint.family.name}"
    else:
        family = family_of_adapter(adapter)
        below = adapter.metadata.get("base_checkpoint")
        base_model = below if below is not None and os.path.isdir(below) else None
        others = template_file(adapter.metadata.get("chat_template"))
        adapter = adapter_to_folder(adapter, family)
        size = write_peft(folder, adapter, "CAUSAL_LM", base_model, others)
        what = "a PEFT adapter"
        shape = adapter.metadata.get("shape")
        tied = isinstance(shape, dict) and shape.get("tied_head") is True
        if tied and "lm_head" in adapter.alpha and not adapter.extras:
            notes.append(
                "Note: to merge it, use MERGE=True here and export the result: lm_head is tied to "
                "the embedding, which PEFT's merge_and_unload would change too"
            )
    say(f"Wrote {folder}, {what}: {size / 2**20:.2f} MiB", *notes)


def template_file(template: str | None) -> dict[str, bytes]:
    """The file of a chat template, by its name; none for none."""
    return {} if template is None else {TEMPLATE_FILE: template.encode()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
