"""Let a trained model write, with adapters or without.

    python generate.py                                  continue a line break
    PROMPT="The " USE_LORA=True python generate.py      with the adapter lora.pt in OUT_DIR
    ADAPTERS=a.pt:0.7,b.pt:0.3 python generate.py       a weighted sum of two adapters
    PROMPT="What is a list?" python generate.py         a model trained on chats answers it
    python generate.py                                  on a terminal such a model chats:
                                                        /reset begins anew, Ctrl-D ends
    python generate.py --help                           every variable

The text goes to stdout as it is made, as UTF-8; what made it goes to stderr.
"""

import os
import sys

if __name__ == "__main__":  # before the imports that take seconds
    from trainer.settings import GenerateConfig
    from trainer.start import start

    start(__doc__, os.environ, GenerateConfig, 'PROMPT="The " python generate.py')

import itertools
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hardware
from data import (
    Format,
    chat_format,
    continues_text,
    decode,
    ends_of,
    stream_decoder,
    text_format,
    vocabulary_size,
)
from files import FileError
from files.streams import read_stdin, set_stdout, waits_on_stdin, write_err, write_out
from lora import lies_below_adapter, lora_layers, merge_adapter
from models import Caches, LanguageModel
from models.checkpoint import Checkpoint
from trainer.console import exit_code_of
from trainer.loading import (
    LoraOptions,
    base_fingerprint,
    build_model,
    describe_adapters,
    metadata_of_asking,
    parts_of,
    put_on_adapters,
    read_adapters,
    read_checked_base,
)
from trainer.own_head import fit_base
from trainer.settings import ConfigError, GenerateConfig


def main() -> int:
    """Run the script; returns its exit code: 0, or 2 for input that cannot be used."""
    return exit_code_of(work, "BASE_DTYPE=nf4 takes the least")


def work() -> None:
    """Write the continuation of PROMPT, or the answer to it, or chat."""
    hardware.postpone_compiler()
    config = GenerateConfig.from_environment(os.environ)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, _ = hardware.choose_device(config.device)
    dtype, _ = hardware.choose_dtype(config.dtype, device)
    writer = load_writer(config, device)
    set_stdout(encoding="utf-8", errors="replace")
    torch.manual_seed(config.seed)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        try:
            if config.prompt is None and writer.answers and sys.stdin and sys.stdin.isatty():
                chat(writer)
            else:
                write_text(writer)
        except FloatingPointError as error:
            raise FileError(f"{writer.base.path} cannot be used: {error}") from error


@dataclass(frozen=True)
class Writer:
    """A model that writes, and how it is asked.

    It `answers` a question in its `format`, unless it was trained on text, or RAW_PROMPT asks for
    the continuation of a text. It stops after any of the tokens `ends`.
    """

    config: GenerateConfig
    model: LanguageModel
    base: Checkpoint
    format: Format
    answers: bool
    ends: list[int]
    device: torch.device

    def write(self, prompt: Sequence[int], length: int, caches: Caches | None = None) -> list[int]:
        """Write up to `length` tokens that follow a prompt to stdout, each character as soon as it
        is complete; returns the tokens with the end, if one came.

        A text that is continued is written first. `caches` may hold the first tokens of the prompt,
        and hold more afterwards.
        """
        config, written = self.config, []
        decoded = stream_decoder(self.base.tokenizer)
        if not self.answers:
            start = self.format.start
            text = prompt[len(start) :] if prompt[: len(start)] == start else prompt
            show("".join(map(decoded, text)))
        for token in self.model.stream(
            torch.tensor([prompt], device=self.device),
            length,
            config.temperature,
            config.top_k,
            config.top_p,
            n_tokens=vocabulary_size(self.base.tokenizer),
            caches=caches,
        ):
            written.append(token.item())
            if written[-1] in self.ends:
                break
            show(decoded(written[-1]))
        show(decoded(None) + "\n")
        return written


def load_writer(config: GenerateConfig, device: torch.device) -> Writer:
    """The model on its base with the sum of ADAPTERS.

    Adapters are merged into the weights unless those lie in a lower precision. Raises FileError or
    DataError for a base, adapters or a chat template that cannot be used, and ConfigError for a
    SYSTEM_PROMPT to a model that answers no questions.
    """
    base = read_checked_base(config.base_checkpoint or str(Path(config.output_folder) / "full.pt"))
    adapters = read_adapters(config.adapter_files, base.family, base.sizes)
    base, adapters = fit_base(base, adapters)
    lora = None
    if adapters:
        targets, train_embeddings = parts_of(adapters)
        lora = LoraOptions(targets=targets, train_embeddings=train_embeddings)
    model = build_model(
        base.family, base.sizes, base, device,
        lora=lora, base_dtype=config.base_dtype, trains=False,
    )  # fmt: skip
    lines = [f"Base: {base.path}"]
    if adapters:
        rank, any_base = config.lora_rank, config.any_base
        base_id = base_fingerprint(base, model)
        metadata = put_on_adapters(model, base_id, adapters, rank, any_base)
        largest_rank = max(layer.rank for layer in lora_layers(model).values())
        lines += describe_adapters(adapters, metadata, largest_rank, config.base_dtype)
        layers = lora_layers(model).values()
        if not any(lies_below_adapter(layer) for layer in layers):
            merge_adapter(model)  # not in lower precision, which would round the sum
    for line in lines:
        write_err(line)
    metadata = metadata_of_asking(base, adapters)
    answers = not config.raw_prompt
    if config.chat_template is None and continues_text(base.files, metadata):
        answers = False
    if config.system_prompt is not None and not answers:
        raise ConfigError(
            "SYSTEM_PROMPT needs a model that answers: one that was trained on chats or has a chat "
            "template, without RAW_PROMPT"
        )
    format = text_format(base.tokenizer, base.files)
    if answers:
        format = chat_format(base.tokenizer, base.files, metadata, config.chat_template)
    ends = ends_of(format, base.files, metadata)
    return Writer(config, model.eval(), base, format, answers, ends, device)


def write_text(writer: Writer) -> None:
    """Write the prompt and its continuation, or only the answer where the model answers.

    Raises ConfigError for a prompt without tokens, and for a question longer than the context.
    """
    config, size = writer.config, writer.model.block_size
    if config.prompt is None and waits_on_stdin():
        write_err("stdin is not read: PROMPT=- takes the prompt from it")
    text = "\n" if config.prompt is None else config.prompt
    if text == "-":
        text = read_stdin().removesuffix("\n")
    prompt = asked(writer, [{"role": "user", "content": text}])
    if not prompt:
        raise ConfigError(f"PROMPT={text!r} has no tokens that the base's tokenizer knows")
    if not writer.answers and len(prompt) > size:
        write_err(f"PROMPT has {len(prompt):,} tokens, of which the model sees the last {size:,}")
    if writer.answers and len(prompt) >= size:
        raise ConfigError(
            f"PROMPT has {len(prompt):,} tokens in the model's format; accepted: up to {size - 1:,}"
        )
    started = time.perf_counter()
    written = writer.write(prompt, config.max_new_tokens)
    n_written = len(written) - any(token in writer.ends for token in written[-1:])
    write_err(f"{n_written} tokens in {time.perf_counter() - started:.2f} s")


def chat(writer: Writer) -> None:
    """Answer the lines that are typed, each with all turns before it, until Ctrl-D.

    The oldest turns are forgotten where they would leave an answer less than a quarter of the
    context, or less than MAX_NEW_TOKENS if these are fewer.
    """
    size, length = writer.model.block_size, writer.config.max_new_tokens
    room = size - min(length, size // 4)  # tokens for a question and the turns before it
    write_err("/reset begins anew, Ctrl-D ends")
    turns: list[dict[str, str]] = []
    caches, seen = writer.model.new_caches(), []  # `seen` are the tokens in them
    while (line := typed()) is not None:
        if line.strip() == "/reset":
            turns = []
        if line.strip() in ("", "/reset"):
            continue
        question = {"role": "user", "content": line}
        if len(alone := asked(writer, [question])) >= size:
            write_err(f"that has {len(alone):,} tokens; accepted: up to {size - 1:,}")
            continue
        turns.append(question)
        forgotten = 0
        while len(prompt := asked(writer, turns)) > room and len(turns) > 1:
            turns, forgotten = turns[2:], forgotten + 2
        if forgotten:
            write_err(f"the oldest {forgotten} turns are forgotten: the context is {size:,} tokens")
        same = [a == b for a, b in zip(seen, prompt[:-1], strict=False)]
        for cache in caches:
            cache.truncate(same.index(False) if False in same else len(same))
        written = writer.write(prompt, min(length, size - len(prompt)), caches)
        seen = [*prompt, *written][: caches[0].length]
        if len(written) == size - len(prompt) < length and written[-1] not in writer.ends:
            write_err(f"the answer is cut: the context is {size:,} tokens")
        answer = itertools.takewhile(lambda token: token not in writer.ends, written)
        turns.append({"role": "assistant", "content": decode(answer, writer.base.tokenizer)})


def typed() -> str | None:
    """The next line that the user types; None after Ctrl-D."""
    try:
        return input("> ")
    except EOFError:
        show("\n")
        return None


def asked(writer: Writer, turns: list[dict[str, str]]) -> list[int]:
    """The tokens that ask for the next turn, after SYSTEM_PROMPT. Raises ConfigError where the
    model's format refuses the turns."""
    system = writer.config.system_prompt
    first = [] if system is None else [{"role": "system", "content": system}]
    try:
        return writer.format.ask(first + turns)
    except ValueError as error:
        raise ConfigError(f"PROMPT: {error}") from error


def show(text: str) -> None:
    """Print text without the control characters that a terminal would obey."""
    safe = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    write_out("".join(safe))


if __name__ == "__main__":
    sys.exit(main())
