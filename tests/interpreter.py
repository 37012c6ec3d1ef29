"""Makes Triton's interpreter compute what hardware does, where the two differ."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch


@contextmanager
def like_hardware() -> Iterator[None]:
    """Round float32 to the nearest bfloat16, which the interpreter truncates; overflow silently."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_to_nearest(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), dst_type.scalar)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(InterpreterBuilder, "cast_impl", cast_to_nearest)
        yield
