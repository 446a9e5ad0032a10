"""Kernels that models and LoRA share: attention, dropout, activations, small products."""
