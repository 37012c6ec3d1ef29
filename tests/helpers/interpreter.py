"""Makes Triton's interpreter compute what hardware does, and in half the time."""

import types
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

# Of a kernel at a time, one after the other: as few as show every case. With two blocks of columns,
# two for each block's rows.
PROGRAMS = 4


@contextmanager
def like_hardware() -> Iterator[None]:
    """Convert bfloat16 as PyTorch does: the interpreter truncates where hardware rounds to the
    nearest, and does not know bfloat16's infinities. And overflow silently.

    triton.language is made the interpreter's once, not again in every call of a device function,
    which takes half the time.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from megatron_xielu.kernels import gpu_triton

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

    if torch.cuda.is_available():  # nothing is interpreted then
        yield
        return
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(InterpreterBuilder, "cast_impl", cast_as_pytorch)
        patch.setattr(gpu_triton, "FORWARD_PROGRAMS", PROGRAMS)
        patch.setattr(gpu_triton, "BACKWARD_PROGRAMS", PROGRAMS)
        patched = interpreter._patch_lang(
            types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        )
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        try:
            yield
        finally:
            patched.restore()
