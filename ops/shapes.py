"""Whether the shapes of results may depend on values."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def may_depend_on_values(t: Tensor) -> bool:
    """Whether shapes of what is computed from t may depend on its values.

    Not so in a graph that is compiled or captured, which fixes them, nor of a tensor on meta or a
    fake one, which have no values.
    """
    if torch.compiler.is_compiling() or t.is_meta or is_fake(t):
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())
