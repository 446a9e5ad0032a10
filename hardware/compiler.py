"""torch's compiler, which is imported only where it is used."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAME, SETTINGS = "torch._dynamo", "torch._dynamo.config"


class _Postponed(types.ModuleType):
    """torch._dynamo, until something of it is used beside its settings.

    Optimizers, and what computes shapes, import it to ask how they hide from it. That takes a
    second, and a run without COMPILE has no use of it. They are answered here: nothing hides.
    """

    @staticmethod
    def disable(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
        return (lambda given: given) if function is None else function

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # whoever looks through all modules
            raise AttributeError(name)
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
        return getattr(importlib.import_module(NAME), name)


def postpone_compiler() -> None:
    """Let torch._dynamo be imported by the first use of it, and not by the first optimizer.

    Not for a run that compiles: what has asked before would not hide from the compiler.
    """
    if NAME in sys.modules:
        return
    file = Path(torch.__file__).with_name("_dynamo") / "config.py"
    spec = importlib.util.spec_from_file_location(SETTINGS, file)
    if spec is None or spec.loader is None:
        return
    postponed = _Postponed(NAME)
    postponed.config = sys.modules[SETTINGS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(postponed.config)
    torch._dynamo = sys.modules[NAME] = postponed
