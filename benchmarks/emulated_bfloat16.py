"""training.py in bfloat16 on a CPU that has none, at about float32's speed.

    DTYPE=bfloat16 python benchmarks/emulated_bfloat16.py

It is training.py with its variables, but for matrix products: torch makes those of bfloat16 one by
one where the CPU has no instruction for them, tens of times slower. Here they are made in float32
and then rounded to bfloat16, which is what the instructions do: they add up in float32 too. Losses
can be read from it, and times not.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import training

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
IN_PLACE = {aten.addmm_: torch.addmm, aten.baddbmm_: torch.baddbmm}


class EmulatedBfloat16(TorchDispatchMode):
    """Within it, products of bfloat16 tensors are made in float32 and rounded once."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        packet, first = func.overloadpacket, args[0] if args else None
        is_bfloat16 = isinstance(first, Tensor) and first.dtype == torch.bfloat16
        if is_bfloat16:
            if packet in PRODUCTS:
                out = kwargs.pop("out", None)
                product = packet(*map(as_float32, args), **kwargs)
                return product.bfloat16() if out is None else out.copy_(product)
            if packet in IN_PLACE:
                return first.copy_(IN_PLACE[packet](*map(as_float32, args), **kwargs))
        return func(*args, **kwargs)


def as_float32(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) else argument


def main() -> int:
    """Run training.py; returns its exit code."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with EmulatedBfloat16():
        return training.main()


if __name__ == "__main__":
    sys.exit(main())
