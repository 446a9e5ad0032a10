"""Kernels below both the models and LoRA."""
