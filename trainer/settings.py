"""Every setting of a script: one dataclass for each, one field for each environment variable.

`MAX_STEPS=200 USE_LORA=True python training.py` sets the fields `max_steps` and `use_lora` of
`Config`; generate.py has `GenerateConfig`. A field knows its default, its check and its help line.
A default of None follows from other settings, the base or the data (recipe.py, resolving.py).
"""

import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from files.streams import did_you_mean

# Names that begin like ours are ours, or misspelt.
PREFIXES = ("LORA_", "USE_LORA", "EVAL_", "ADAM_", "GRAD_", "WARMUP_", "MIN_LEARNING_", "LEARNING_")
PREFIXES += ("TRAIN_EMB",)
FOREIGN = ("COMPILER",)  # of build systems, and no misspelt COMPILE

# What other trainers call ours.
ELSEWHERE = dict.fromkeys(("EPOCHS", "NUM_EPOCHS", "MAX_EPOCHS", "NUM_TRAIN_EPOCHS"), "MAX_STEPS")
ELSEWHERE |= dict.fromkeys(("NUM_STEPS", "TRAIN_STEPS", "MAX_ITERS"), "MAX_STEPS")
ELSEWHERE |= dict.fromkeys(("SEQ_LEN", "MAX_SEQ_LENGTH", "CONTEXT_LENGTH"), "BLOCK_SIZE")
ELSEWHERE |= dict.fromkeys(("PER_DEVICE_TRAIN_BATCH_SIZE", "TRAIN_BATCH_SIZE"), "BATCH_SIZE")
ELSEWHERE |= dict.fromkeys(("BASE_MODEL", "MODEL_NAME_OR_PATH"), "BASE_CHECKPOINT")
ELSEWHERE |= {"LR": "LEARNING_RATE", "LOAD_IN_4BIT": "BASE_DTYPE", "MAX_GRAD_NORM": "GRAD_CLIP"}
ELSEWHERE |= {"GRADIENT_ACCUMULATION_STEPS": "GRAD_ACCUM_STEPS"}
ELSEWHERE |= {"GRADIENT_CHECKPOINTING": "GRAD_CHECKPOINT"}

LARGEST_WEIGHT = 1e3  # of an adapter in a sum: far beyond any use
TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")

# Where a path may begin with ~, which a shell does not replace within quotes or after a comma.
PATHS = ("DATA", "OLD_DATA", "OUT_DIR", "BASE_CHECKPOINT", "CHAT_TEMPLATE")

# What the frozen weights of linears may lie in; auto is what their file has.
BASE_DTYPES = ("auto", "float32", "bfloat16", "nf4")

DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("linear", "cosine", "constant")

# The variables that change defaults. Where two are set, the later one here decides.
MODES = {"base": "BASE_CHECKPOINT", "lora": "USE_LORA", "fsdp": "FSDP", "test": "TEST_MODE"}


class ConfigError(ValueError):
    """A variable that cannot be used: names the variable, what was found, what is accepted."""


@dataclass(frozen=True)
class WeightedAdapters:
    """What ADAPTERS names: paths and weights, as in `a.pt` or `a.pt:0.7,b.pt:-0.3`."""

    text: str
    parts: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Self:
        """What the text names. A comma or a weight's colon that is in the name of an existing file
        belongs to that name.

        Raises ConfigError for an empty name and for a weight that is not finite or too large.
        """
        parts, pieces = [], text.split(",")
        while pieces:
            taken = len(pieces)
            while taken > 1 and not _names_a_file(",".join(pieces[:taken])):
                taken -= 1
            part = ",".join(pieces[:taken]).strip()
            pieces = pieces[taken:]
            path, weight = _path_and_weight(part)
            if not path or not abs(weight) <= LARGEST_WEIGHT:
                raise ConfigError(
                    f"ADAPTERS={text!r}: {part!r} is neither a file nor a file with its weight, "
                    f"as in out/lora.pt:0.7, of at most {LARGEST_WEIGHT:g}"
                )
            parts.append((os.path.expanduser(path), weight))
        return cls(text, tuple(parts))


@dataclass(frozen=True)
class ColumnNames:
    """What COLUMNS names: pairs of a layout's column and the file's name for it, as in
    `prompt:frage,completion:antwort`. A name alone, as in `text`, is both."""

    text: str
    pairs: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ConfigError for a name that no layout has, or that is there twice, or for none."""
        from data.forms import COLUMNS  # here, as it brings torch, which --help does not wait for

        pairs = []
        for part in text.split(","):
            ours, colon, theirs = (word.strip() for word in part.partition(":"))
            if ours not in COLUMNS:
                raise ConfigError(
                    f"COLUMNS={text!r}: {ours!r} is no column of a layout"
                    f"{did_you_mean(ours, COLUMNS)}; accepted, as in "
                    f"prompt:frage,completion:antwort: {', '.join(COLUMNS)}"
                )
            if colon and not theirs:
                raise ConfigError(f"COLUMNS={text!r}: {ours}: names no column of the file")
            pairs.append((ours, theirs or ours))
        if len(dict(pairs)) < len(pairs):
            raise ConfigError(f"COLUMNS={text!r} has one name twice")
        return cls(text, tuple(pairs))


def _path_and_weight(part: str) -> tuple[str, float]:
    """The path and the weight that a part of ADAPTERS names; the path may be empty."""
    path, _, weight = part.rpartition(":")
    try:
        value = float(weight)
    except ValueError:  # no weight: the colon, if any, belongs to the path
        return part, 1.0
    return (part, 1.0) if _exists(part) else (path, value)


def _names_a_file(part: str) -> bool:
    """Whether a part of ADAPTERS is an existing file or folder, with a weight or without."""
    return _exists(_path_and_weight(part.strip())[0])


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def option(
    default: Any,
    help: str,
    *,
    base: Any = None,
    lora: Any = None,
    fsdp: Any = None,
    test: Any = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    verbatim: bool = False,
) -> Any:
    """A field that is an environment variable.

    Args:
        default: its value where the variable is not set.
        help: its line in `--help`.
        base, lora, fsdp, test: its default with BASE_CHECKPOINT, USE_LORA, FSDP or TEST_MODE, where
            that is another.
        at_least, above, below, at_most: the range of a number.
        choices: the words that a text may be, in lower case.
        verbatim: whether spaces around a value belong to it.
    """
    metadata = dict(locals())
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What the scripts' settings share. `explicit` holds the variables that the user set."""

    explicit: frozenset[str] = frozenset()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read every variable. Raises ConfigError for a bad value or a misspelt name."""
        # A number is the width of a terminal, which shells and other programs tell each other.
        if environment.get("COLUMNS", "").strip().isdecimal():
            environment = {n: v for n, v in environment.items() if n != "COLUMNS"}
        # cmd.exe's own, which environments put their names before.
        if sys.platform == "win32" and "$P$G" in environment.get("PROMPT", ""):
            environment = {n: v for n, v in environment.items() if n != "PROMPT"}
        options = {field.name.upper(): field for field in option_fields(cls)}
        known = {f.name.upper() for kind in (Config, GenerateConfig) for f in option_fields(kind)}
        for name in environment:
            _refuse_misspelt(name, known)
        given = {n: _parse(n, environment[n], f) for n, f in options.items() if n in environment}
        modes = [mode for mode, variable in MODES.items() if given.get(variable)]

        def default(field: dataclasses.Field) -> Any:
            found = [field.metadata[mode] for mode in modes if field.metadata[mode] is not None]
            return found[-1] if found else field.default

        values = {f.name: given.get(n, default(f)) for n, f in options.items()}
        config = cls(**values, explicit=frozenset(given))
        config._check_combinations()
        return config

    def describe(self) -> list[str]:
        """One `NAME: value` line for each variable; `*` marks those that the user set."""
        lines = []
        for field in option_fields(type(self)):
            name, value = field.name.upper(), getattr(self, field.name)
            value = "default" if value is None else value
            lines.append(f"{name}: {value}{' *' if name in self.explicit else ''}")
        return lines

    @property
    def output_folder(self) -> str:
        """OUT_DIR, or beside it a folder for test runs, which must not replace real ones."""
        return f"{Path(self.out_dir)}-test" if self.test_mode else self.out_dir

    @property
    def own_adapter(self) -> Path:
        """The adapter that a run with USE_LORA=True writes to OUT_DIR."""
        return Path(self.output_folder) / "lora.pt"

    def _check_combinations(self) -> None:
        """Raise ConfigError for values that do not go together."""


@dataclass(frozen=True)
class Config(Settings):
    """The settings of one run of training.py."""

    # What to train
    use_lora: bool = option(
        False, "train LoRA adapters, and embeddings where tokens are bytes; freeze the rest"
    )
    lora_rank: int = option(8, "rank of the adapters; ADAPTERS are reduced to it", at_least=1)
    lora_alpha: float = option(
        16.0,
        "adapters are scaled by LORA_ALPHA / LORA_RANK [with ADAPTERS, theirs]",
        above=0,
        below=1e9,
    )
    lora_dropout: float = option(0.0, "dropout on the input of the adapters", at_least=0, below=1)
    lora_plus_ratio: float = option(
        8.0, "learning rate of the adapters' B over that of the rest (LoRA+)", above=0
    )
    lora_targets: str | None = option(
        None,
        "linears to adapt: all, or names of the base's, as in query,value [all; of a published "
        "base all but lm_head; with ADAPTERS, theirs]",
    )
    train_embeddings: bool | None = option(
        None,
        "under USE_LORA train the embeddings too [where tokens are bytes; with ADAPTERS, if they "
        "hold them]",
    )
    test_mode: bool = option(False, "a run of a few steps, in an output folder of its own")
    resume: bool = option(False, "go on with the interrupted run in OUT_DIR")
    eval_only: bool = option(
        False,
        "evaluate on all of the validation data; train nothing [with USE_LORA and without "
        "ADAPTERS, lora.pt in OUT_DIR]",
    )
    preview: int = option(
        0, "show this many examples, and in them what the loss counts; train nothing", at_least=0
    )
    estimate: bool = option(
        False, "say how much memory the run needs, without its weights; train nothing"
    )
    merge: bool = option(False, "write base and ADAPTERS as merged.pt in OUT_DIR; train nothing")

    # Data and files
    data: str | None = option(
        None, "python-code, python-docs, python-instructions, or a file or folder, of text or "
        "records [data/input.txt if there, else python-code]"
    )  # fmt: skip
    old_data: str | None = option(
        None,
        "what the base knew: with EVAL_ONLY and ADAPTERS, the losses on it and on DATA at weights "
        "of the adapters from 0 to 1",
    )
    chat_template: str | None = option(
        None, "file with a chat template for records, or none for the plain format [the base's]"
    )
    text: bool = option(False, "take DATA as plain text, also where it looks like records")
    columns: ColumnNames | None = option(
        None,
        "columns of records by the names of a layout, as in prompt:frage,completion:antwort; no "
        "others are read [the layouts' own]",
    )
    loss_on_prompt: bool = option(False, "count the prompts of records in the loss too")
    out_dir: str = option("out", "folder for what a run writes; TEST_MODE adds -test to it")
    base_checkpoint: str | None = option(
        None,
        "checkpoint or Hugging Face folder to start from [full.pt in OUT_DIR; none when training "
        "every weight]",
    )
    adapters: WeightedAdapters | None = option(
        None,
        "adapters to start from: a file or a folder of PEFT's, or several with weights, as in "
        "a.pt:0.7,b.pt:-0.3; a name with a comma or :2 at its end is that of the existing file",
    )
    any_base: bool = option(False, "load adapters onto another base than theirs")

    # Hardware
    seed: int = option(1337, "seed of weights, batches and dropout", at_least=0, below=2**63)
    device: str = option("auto", "where to run", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "dtype of the arithmetic", choices=DTYPES)
    base_dtype: str = option(
        "auto",
        "dtype of the base's frozen linears; nf4 has 4 bits a weight, in the blocks [the file's; "
        "with MERGE, nf4 for ADAPTERS trained on it]",
        choices=BASE_DTYPES,
    )
    num_threads: int | None = option(
        None,
        "CPU threads of a process [torch's own choice; under torchrun its share of the cores]",
        at_least=1,
        below=1025,
    )
    compile: bool = option(False, "train through torch.compile")
    grad_checkpoint: bool = option(
        False, "compute activations again in backward: less memory, more time", fsdp=True
    )
    fsdp: bool = option(False, "shard weights and optimizer over the processes of torchrun")

    # Model
    n_embd: int = option(256, "width of the model; with a base, the base's", at_least=1)
    n_head: int = option(4, "attention heads; with a base, the base's", at_least=1)
    n_layer: int = option(4, "transformer blocks; with a base, the base's", at_least=1)
    block_size: int = option(
        128, "context in tokens; with a base, the base's up to 1024, or as set", at_least=1
    )
    dropout: float | None = option(
        None,
        "dropout of the model while training [0; from random weights 0.1 beyond 5.5 passes over a "
        "million tokens, or more over fewer, and 0.2 beyond half as many again]",
        base=0.0,
        lora=0.0,
        at_least=0,
        below=1,
    )

    # Optimization
    batch_size: int = option(32, "sequences in a batch, of all processes", at_least=1, test=8)
    grad_accum_steps: int = option(1, "batches accumulated for a step", at_least=1)
    max_steps: int | None = option(
        None,
        "optimizer steps [400; on a base or with adapters at most 3 passes over the data]",
        at_least=1,
        test=10,
    )
    optimizer: str = option(
        "muon",
        "muon for the matrices of the blocks and adamw for the rest, or adamw for all",
        base="adamw",
        lora="adamw",
        choices=OPTIMIZERS,
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate [0.01, with adamw 0.003; on a base or with adapters by width, tokens "
        "of a step and rank, as the log says]",
        above=0,
    )
    schedule: str = option(
        "linear", "how the learning rate falls to the end of the run", choices=SCHEDULES
    )
    min_learning_rate: float | None = option(
        None, "learning rate to which it falls [0; LEARNING_RATE / 10 with cosine]", at_least=0
    )
    warmup_steps: int = option(50, "steps of warm-up, at most half the run", at_least=0, test=2)
    weight_decay: float = option(0.1, "decay of weights, of matrices alone", lora=0.0, at_least=0)
    adam_beta1: float = option(0.9, "AdamW's first beta", at_least=0, below=1)
    adam_beta2: float = option(0.99, "AdamW's second beta", at_least=0, below=1)
    grad_clip: float = option(1.0, "largest norm of the gradient, 0 for no limit", at_least=0)

    # Report
    eval_interval: int | None = option(
        None, "steps between evaluations [a tenth of MAX_STEPS]", at_least=1, test=5
    )
    patience: int | None = option(
        None,
        "end after so many evaluations in a row without a better validation loss, 0 for never [0; "
        "on a base or with adapters 2, unless EVAL_INTERVAL is set]",
        at_least=0,
        test=0,
    )
    eval_batches: int = option(20, "validation batches an evaluation", at_least=1, test=2)
    sample_tokens: int = option(400, "tokens of text to sample at the end", at_least=0, test=60)
    progress: bool = option(True, "progress bar on a terminal")

    def _check_combinations(self) -> None:
        if self.text and self.columns is not None:
            raise ConfigError("TEXT and COLUMNS exclude each other: plain text has no columns")
        names = ("resume", "eval_only", "merge", "preview", "estimate")
        modes = [name for name in names if getattr(self, name)]
        if len(modes) > 1:
            raise ConfigError(f"{' and '.join(m.upper() for m in modes)} exclude each other")
        for name in ("compile", "merge"):
            if self.fsdp and getattr(self, name):
                raise ConfigError(f"FSDP and {name.upper()} exclude each other")
        if self.fsdp and self.base_dtype == "nf4":
            raise ConfigError("FSDP and BASE_DTYPE=nf4 exclude each other")
        if self.base_dtype != "auto" and not (self.use_lora or self.eval_only or self.merge):
            raise ConfigError(
                f"BASE_DTYPE={self.base_dtype} is for a frozen base and needs USE_LORA=True, "
                "EVAL_ONLY=True or MERGE=True: else every weight trains, in float32"
            )
        if self.merge and self.adapters is None:
            raise ConfigError("MERGE=True needs ADAPTERS, such as ADAPTERS=out/lora.pt")
        if self.adapters is not None and not (self.use_lora or self.eval_only or self.merge):
            raise ConfigError("ADAPTERS needs USE_LORA=True, EVAL_ONLY=True or MERGE=True")
        if self.old_data is not None and not (self.eval_only and self.adapters):
            raise ConfigError("OLD_DATA needs EVAL_ONLY=True and ADAPTERS, such as out/lora.pt")
        if self.schedule == "constant" and self.min_learning_rate is not None:
            raise ConfigError(
                "SCHEDULE=constant and MIN_LEARNING_RATE exclude each other: the rate never falls"
            )
        if self.train_embeddings is False and not self.use_lora:
            raise ConfigError(
                "TRAIN_EMBEDDINGS=False needs USE_LORA=True: else every parameter trains"
            )

    @property
    def trains(self) -> bool:
        """Whether a run trains, or says what training needs, and does not evaluate, merge or show
        its data."""
        return not (self.eval_only or self.merge or self.preview)

    @property
    def writes(self) -> bool:
        """Whether a run writes results."""
        return not (self.eval_only or self.estimate or self.preview)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, of all processes."""
        return self.grad_accum_steps * self.batch_size * self.block_size


@dataclass(frozen=True)
class GenerateConfig(Settings):
    """The settings of one run of generate.py."""

    prompt: str | None = option(
        None,
        "text to continue, or a question to answer; - reads it from stdin [a line break; on a "
        "terminal a model that answers chats]",
        verbatim=True,
    )
    system_prompt: str | None = option(
        None, "what the system says before the first question", verbatim=True
    )
    raw_prompt: bool = option(
        False, "take PROMPT as it is, and not in the format of the chats trained on"
    )
    chat_template: str | None = option(
        None, "file with a chat template, or none for the plain format [the model's]"
    )
    max_new_tokens: int = option(400, "tokens to write", at_least=0)
    temperature: float = option(0.8, "randomness; 0 takes the likeliest token", at_least=0)
    top_k: int | None = option(None, "sample from this many of the likeliest tokens", at_least=1)
    top_p: float | None = option(
        None, "sample from the fewest tokens that have this probability", above=0, at_most=1
    )
    seed: int = option(1337, "seed of the samples", at_least=0, below=2**63)

    out_dir: str = option("out", "folder of the default base and adapter")
    use_lora: bool = option(False, "take lora.pt in OUT_DIR where ADAPTERS is not set")
    test_mode: bool = option(False, "take the files of runs with TEST_MODE=True")
    base_checkpoint: str | None = option(
        None, "checkpoint or Hugging Face folder [full.pt in OUT_DIR]"
    )
    adapters: WeightedAdapters | None = option(
        None,
        "adapters on it: a file or a folder of PEFT's, or several with weights, as in "
        "a.pt:0.7,b.pt:-0.3; a name with a comma or :2 at its end is that of the existing file",
    )
    any_base: bool = option(False, "load adapters onto another base than theirs")
    lora_rank: int | None = option(None, "rank to which ADAPTERS are reduced", at_least=1)

    device: str = option("auto", "where to run", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("float32", "dtype of the arithmetic", choices=DTYPES)
    base_dtype: str = option(
        "auto",
        "dtype of the base's linears; nf4 has 4 bits a weight, in the blocks [the file's]",
        choices=BASE_DTYPES,
    )
    num_threads: int | None = option(
        None, "CPU threads [torch's own choice]", at_least=1, below=1025
    )

    def _check_combinations(self) -> None:
        if self.raw_prompt and self.chat_template is not None:
            raise ConfigError("RAW_PROMPT and CHAT_TEMPLATE exclude each other")

    @property
    def adapter_files(self) -> WeightedAdapters | None:
        """ADAPTERS, or with USE_LORA the adapter in OUT_DIR."""
        if self.adapters is None and self.use_lora:
            return WeightedAdapters.parse(str(self.own_adapter))
        return self.adapters


def option_fields(kind: type[Settings]) -> list[dataclasses.Field]:
    """The fields of `kind` that are environment variables, in order."""
    return [field for field in dataclasses.fields(kind) if "help" in field.metadata]


def help_table(kind: type[Settings]) -> list[tuple[str, str, str]]:
    """(variable, default, help line) for each variable, for `--help` and the documents."""
    rows = []
    for field in option_fields(kind):
        default = "" if field.default is None else str(field.default).replace("\n", "\\n")
        for mode, variable in MODES.items():
            if field.metadata[mode] is not None:
                default += f" ({variable}: {field.metadata[mode]})"
        text = field.metadata["help"]
        if field.metadata["choices"]:
            text += f": {', '.join(field.metadata['choices'])}"
        rows.append((field.name.upper(), default, text))
    return rows


def _parse(name: str, text: str, field: dataclasses.Field) -> Any:
    """The value of variable `name`. Raises ConfigError for what its field does not accept."""
    if not field.metadata["verbatim"]:
        text = text.strip()
    kind = field.type if isinstance(field.type, type) else field.type.__args__[0]  # X of X | None
    if kind is bool:
        if text.lower() in TRUE_WORDS + FALSE_WORDS:
            return text.lower() in TRUE_WORDS
        raise ConfigError(f"{name}={text[:80]!r} is neither True nor False")
    if kind is WeightedAdapters and text:
        return WeightedAdapters.parse(text)
    if kind is ColumnNames and text:
        return ColumnNames.parse(text)
    if kind in (str, WeightedAdapters, ColumnNames):
        choices = field.metadata["choices"]
        if choices and text.lower() not in choices:
            raise ConfigError(f"{name}={text[:80]!r} is not one of {', '.join(choices)}")
        if not text:
            raise ConfigError(f"{name} is set to nothing; give it a value or unset it")
        if name in PATHS:
            return os.path.expanduser(text)
        return text.lower() if choices else text
    accepted = ("a whole number" if kind is int else "a number") + _range(field)
    try:
        if not text.isascii():
            raise ValueError
        value = kind(text)
    except ValueError:
        raise ConfigError(f"{name}={text[:80]!r} is not {accepted}") from None
    limits = field.metadata
    if kind is int and limits["below"] is None and value >= 2**31:  # beyond any use
        raise ConfigError(f"{name}={text[:80]} is too large")
    if (
        (kind is float and not math.isfinite(value))
        or (limits["at_least"] is not None and value < limits["at_least"])
        or (limits["above"] is not None and value <= limits["above"])
        or (limits["below"] is not None and value >= limits["below"])
        or (limits["at_most"] is not None and value > limits["at_most"])
    ):
        raise ConfigError(f"{name}={text[:80]} is not {accepted}")
    return value


def _range(field: dataclasses.Field) -> str:
    """The range of a number in words, as in ` at least 0 and below 1`; empty where it has none."""
    words = {"at_least": "at least", "above": "above", "below": "below", "at_most": "at most"}
    limits = [f"{w} {field.metadata[k]}" for k, w in words.items() if field.metadata[k] is not None]
    return " " + " and ".join(limits) if limits else ""


def _one_slip_apart(name: str, known: str) -> bool:
    """Whether two neighbouring letters are swapped; or one is wrong, missing or too much, unless
    the name is short, as then it may be another program's."""
    pairs = enumerate(zip(name, known, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(name), len(known)))
    a, b = name[same:], known[same:]
    if b[1:] in (a, a[1:]) or a[1:] == b:
        return len(known) > 4
    return a[:2] == b[1::-1] and a[2:] == b[2:]


def _refuse_misspelt(name: str, known: Collection[str]) -> None:
    """Raise ConfigError for a variable that was probably meant to be one of ours.

    The environment is full of other programs' variables, so only three kinds are refused: those
    that other trainers have, those that begin like ours, and those that are almost spelled as one
    of ours. A known name behind another program's prefix (OMP_NUM_THREADS) is left alone.
    """
    if name.upper() in ELSEWHERE and name not in known:
        ours = ELSEWHERE[name.upper()]
        raise ConfigError(f"{name} is not a variable of this script; did you mean {ours}?")
    begins_like_ours = name.upper().startswith(PREFIXES) or name.upper() == "LORA"
    foreign = name.endswith(tuple("_" + k for k in known)) and not begins_like_ours
    if name in known or name in FOREIGN or foreign:
        return
    cutoff = 0.0 if begins_like_ours else 0.85
    nearest = [k for k in sorted(known) if _one_slip_apart(name.upper(), k)]
    nearest += difflib.get_close_matches(name.upper(), known, n=1, cutoff=cutoff)
    if nearest:
        raise ConfigError(f"{name} is not a variable of this script; did you mean {nearest[0]}?")
