"""LoRA for PyTorch: the layer, its injection into a model, and adapter files."""

from lora.adapters import adapter_state, load_adapter, save_adapter
from lora.files import FileError
from lora.inject import add_lora, count_parameters, lora_layers, store_base
from lora.linear import LoRALinear, grouped_linear

__all__ = [
    "FileError",
    "LoRALinear",
    "adapter_state",
    "add_lora",
    "count_parameters",
    "grouped_linear",
    "load_adapter",
    "lora_layers",
    "save_adapter",
    "store_base",
]
