"""LoRA for PyTorch: for this project's models, and for any other.

linear.py         the layer
inject.py         putting it into a model
adapters.py       adapters: their files, switching, combining and merging
peft_format.py    the files of Hugging Face PEFT
"""

import sys

from files import FileError
from files.streams import report_ctrl_c_in_a_line

if sys.argv[:1] == ["-m"] and "lora" in sys.orig_argv:  # `python -m lora`; torch takes seconds
    report_ctrl_c_in_a_line()

from lora.adapters import (
    Adapter,
    BaseMismatch,
    adapter_state,
    base_state,
    check_base_weights,
    combine_adapters,
    complete_adapter,
    load_adapter,
    merge_adapter,
    read_adapter,
    save_adapter,
    sum_adapters,
    sum_scaling,
    switch_adapter,
    take_adapter,
    unmerge_adapter,
    write_adapter,
)
from lora.inject import add_lora, count_parameters, lora_layers, store_base
from lora.linear import LoRALinear, grouped_linear, lies_below_adapter
from lora.peft_format import read_peft, write_peft

__all__ = [
    "Adapter",
    "BaseMismatch",
    "FileError",
    "LoRALinear",
    "adapter_state",
    "add_lora",
    "base_state",
    "check_base_weights",
    "combine_adapters",
    "complete_adapter",
    "count_parameters",
    "grouped_linear",
    "lies_below_adapter",
    "load_adapter",
    "lora_layers",
    "merge_adapter",
    "read_adapter",
    "read_peft",
    "save_adapter",
    "store_base",
    "sum_adapters",
    "sum_scaling",
    "switch_adapter",
    "take_adapter",
    "unmerge_adapter",
    "write_adapter",
    "write_peft",
]
