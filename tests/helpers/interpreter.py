"""Makes Triton's interpreter compute what hardware does, where the two differ."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch


@contextmanager
def like_hardware() -> Iterator[None]:
    """Convert bfloat16 as PyTorch does: the interpreter truncates where hardware rounds to the
    nearest, and does not know bfloat16's infinities. And overflow silently."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_as_pytorch(self, src, dst_type):
        data = torch.from_numpy(np.ascontiguousarray(src.data))
        match src.dtype.scalar, dst_type.scalar:
            case tl.float32, tl.bfloat16:
                data = data.bfloat16().view(torch.uint16)
            case tl.bfloat16, tl.float32:
                data = data.view(torch.bfloat16).float()
            case _:
                return cast(self, src, dst_type)
        return TensorHandle(data.numpy(), dst_type.scalar)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(InterpreterBuilder, "cast_impl", cast_as_pytorch)
        yield
