"""Makes Triton's interpreter compute what hardware does, and in a third of the time."""

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

    The rest takes two thirds of the time: triton.language is made the interpreter's once, not again
    in every call of a device function; types are not built anew for every operation; operands of
    one shape are not examined for how to broadcast them; and the softplus of an alpha is computed
    once, not in every program.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from megatron_xielu.kernels import gpu_triton, grouped_triton

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

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unlike_shapes(self, lhs, rhs):
        is_block = lhs.type.is_block() and rhs.type.is_block()
        if is_block and lhs.handle.data.shape == rhs.handle.data.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    # By name: types of blocks have no hash.
    with_element = tl.block_type.with_element_ty
    blocks: dict[tuple[str, str], tl.block_type] = {}

    def with_element_once(self, element):
        key = self.name, element.name
        if key not in blocks:
            blocks[key] = with_element(self, element)
        return blocks[key]

    softplus = gpu_triton._softplus
    softplus_of: dict[bytes, tl.tensor] = {}

    def softplus_once(z):
        key = z.handle.data.tobytes()
        if key not in softplus_of:
            softplus_of[key] = softplus(z)
        return softplus_of[key]

    if torch.cuda.is_available():  # nothing is interpreted then
        yield
        return
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(InterpreterBuilder, "cast_impl", cast_as_pytorch)
        patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_unlike_shapes)
        patch.setattr(tl.block_type, "with_element_ty", with_element_once)
        # The interpreter's own types are Triton's.
        patch.setattr(tl.block_type, "to_ir", lambda self, builder: self)
        patch.setattr(gpu_triton, "_softplus", softplus_once)
        programs = {False: PROGRAMS, True: PROGRAMS}
        for kernels in (gpu_triton, grouped_triton):
            patch.setattr(kernels, "FORWARD_PROGRAMS", programs)
            patch.setattr(kernels, "BACKWARD_PROGRAMS", programs)
        # Several times round each loop over the partials of so few programs.
        finish = {"ALPHA_SUMS": 2, "BIAS_ROWS": 2, "BIAS_COLS": 16}
        patch.setattr(gpu_triton, "FINISH_BLOCKS", finish)
        patch.setattr(grouped_triton, "ALPHA_SUMS", 2)
        patched = interpreter._patch_lang(
            types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        )
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        try:
            yield
        finally:
            patched.restore()
