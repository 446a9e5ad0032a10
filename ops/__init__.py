"""Kernels that models and LoRA share.

attention.py      causal attention, with a cache, segments, groups of heads and dropout
dropout.py        dropout with few random bits
activations.py    SiLU times a gate
norms.py          RMS norms
rope.py           rotary embeddings
loss.py           the head and its cross-entropy in chunks of tokens
products.py       small matrix products, and the frozen weight in the dtype of a product
nf4.py            weights in 4 bits
shapes.py         whether the shapes of results may depend on values
"""
