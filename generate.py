"""Let a trained model write, with adapters or without.

    python generate.py                                  continue a line break
    PROMPT="The " ADAPTERS=out/lora.pt python generate.py
    ADAPTERS=a.pt:0.7,b.pt:0.3 python generate.py       a weighted sum of two adapters
    PROMPT="What is a list?" python generate.py         a model trained on records answers it
    python generate.py --help                           every variable

The text goes to stdout as it is made, as UTF-8; what made it goes to stderr.
"""

import sys

if __name__ == "__main__":  # before the imports that take seconds
    from trainer.settings import GenerateConfig
    from trainer.start import start

    start(__doc__, GenerateConfig, 'PROMPT="The " python generate.py')

import os
import time
import unicodedata
from pathlib import Path

import torch

import hardware
from data import begun, encode, end_tokens, start_tokens, stream_decoder, vocabulary_size
from files import FileError
from files.streams import write_err, write_out
from lora import lora_layers, merge_adapter
from models import LanguageModel
from models.checkpoint import Checkpoint
from trainer.console import exit_code_of
from trainer.loading import (
    LoraOptions,
    base_fingerprint,
    build_model,
    describe_adapters,
    parts_of,
    put_on_adapters,
    read_adapters,
    read_checked_base,
)
from trainer.settings import ConfigError, GenerateConfig


def main() -> int:
    """Run the script; returns its exit code: 0, or 2 for input that cannot be used."""
    return exit_code_of(work)


def work() -> None:
    """Write the continuation of PROMPT."""
    config = GenerateConfig.from_environment(os.environ)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, _ = hardware.choose_device(config.device)
    dtype, _ = hardware.choose_dtype(config.dtype, device)
    model, base, prompt_format = load_model(config, device)
    torch.manual_seed(config.seed)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        try:
            write_text(config, model, base, prompt_format, device)
        except FloatingPointError as error:
            raise FileError(f"{base.path} cannot be used: {error}") from error


def load_model(
    config: GenerateConfig, device: torch.device
) -> tuple[LanguageModel, Checkpoint, str | None]:
    """The model on its base with the sum of ADAPTERS, its base, and the format of its prompts.

    Adapters are merged into the weights unless those lie in a lower precision. The format has
    "{prompt}" in it; it is None for a model that was trained on text. Raises FileError for a base
    or adapters that cannot be used.
    """
    base = read_checked_base(config.base_checkpoint or str(Path(config.out_dir) / "full.pt"))
    adapters = read_adapters(config.adapters, base.family, base.sizes)
    lora = None
    if adapters:
        targets, train_embeddings = parts_of(adapters)
        lora = LoraOptions(targets=targets, train_embeddings=train_embeddings)
    model = build_model(base.family, base.sizes, base, device, lora=lora)
    lines, metadata = [f"Base: {base.path}"], base.metadata
    if adapters:
        rank, any_base = config.lora_rank, config.any_base
        metadata = put_on_adapters(model, base_fingerprint(model), adapters, rank, any_base)
        largest_rank = max(layer.rank for layer in lora_layers(model).values())
        lines += describe_adapters(adapters, metadata, largest_rank)
        layers = lora_layers(model).values()
        if all(layer.weight.dtype == layer.lora_A.dtype for layer in layers):
            merge_adapter(model)  # not in lower precision, which would round the sum
    for line in lines:
        write_err(line)
    prompt_format = metadata.get("prompt_format")
    return model.eval(), base, prompt_format if isinstance(prompt_format, str) else None


def write_text(
    config: GenerateConfig,
    model: LanguageModel,
    base: Checkpoint,
    prompt_format: str | None,
    device: torch.device,
) -> None:
    """Write the prompt and its continuation to stdout, each character as soon as it is complete.

    Where the prompt is put in a format, only the answer is written. It ends at one of the model's
    end tokens; a model of bytes that was trained on text has none. Raises ConfigError for a prompt
    without tokens.
    """
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    tokenizer, files = base.tokenizer, base.files
    decoded = stream_decoder(tokenizer)
    text, ends = config.prompt, []
    if tokenizer is not None or prompt_format is not None:
        ends = end_tokens(tokenizer, files)
    if prompt_format is not None and not config.raw_prompt:
        text = prompt_format.replace("{prompt}", config.prompt)
    start = start_tokens(tokenizer, files)
    prompt = begun(encode(text, tokenizer), start)
    if not prompt:
        raise ConfigError(f"PROMPT={config.prompt!r} has no tokens that the base's tokenizer knows")
    if text == config.prompt:
        show("".join(decoded(token) for token in prompt[len(start) :]))
    idx = torch.tensor([prompt], device=device)
    options = (config.temperature, config.top_k, config.top_p)
    started, n_written = time.perf_counter(), 0
    n_tokens = vocabulary_size(tokenizer)
    for token in model.stream(idx, config.max_new_tokens, *options, n_tokens=n_tokens):
        if token.item() in ends:
            break
        show(decoded(token.item()))
        n_written += 1
    seconds = time.perf_counter() - started
    show(decoded(None) + "\n")
    write_err(f"{n_written} tokens in {seconds:.2f} s")


def show(text: str) -> None:
    """Print text without the control characters that a terminal would obey."""
    safe = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    write_out("".join(safe))


if __name__ == "__main__":
    sys.exit(main())
