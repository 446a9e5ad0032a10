"""How a command starts: --help and Ctrl-C, before it imports torch, which takes seconds."""

import atexit
import gc
import importlib.util
import sys
from collections.abc import MutableMapping

from files import FileError
from files.streams import fail, report_ctrl_c_in_a_line, write_out
from trainer.settings import ConfigError, Settings, help_table

PACKAGES = ("torch", "numpy", "tqdm")  # that every run needs

# On a CPU torch and oneDNN each keep what they compiled for 1,024 shapes of bfloat16 products, and
# packed records of many lengths would fill that. Those of a step of fixed shapes must fit, or they
# would be compiled in every step. torch reads both early.
KEPT_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def start(
    documentation: str,
    environment: MutableMapping[str, str],
    settings: type[Settings] | None = None,
    example: str = "",
) -> None:
    """Print the help and end, if the command line asks for it; from here on Ctrl-C takes one line,
    and torch keeps less.

    Args:
        documentation: the docstring of the command.
        environment: that of the process, which torch will read.
        settings: what it reads from the environment, for the help; None for a command that takes
            arguments. Of others any but --help ends in an error.
        example: a command line with a variable, for that error.
    """
    report_ctrl_c_in_a_line()
    for name, capacity in KEPT_SHAPES.items():
        environment.setdefault(name, capacity)
    atexit.register(gc.freeze)  # looking through torch's objects for garbage at the end takes 0.5 s
    arguments = sys.argv[1:]
    try:
        if arguments in (["--help"], ["-h"]):
            rows = [] if settings is None else help_table(settings)
            for line in [*documentation.strip().split("\n"), *([""] if rows else []), *table(rows)]:
                write_out(line + "\n")
            sys.exit(0)
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"the package {missing[0]} is not installed: pip install -r requirements.txt"
            )
        if arguments and settings is not None:
            raise ConfigError(
                f"{arguments[0]!r} is not understood: configuration comes from the environment, "
                f"as in {example}; --help lists the variables"
            )
    except (ConfigError, FileError) as error:
        sys.exit(fail(str(error), 2))


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Lines of three columns, the first two as wide as their longest cell."""
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return [f"{name:{widths[0]}}  {default:{widths[1]}}  {text}" for name, default, text in rows]
