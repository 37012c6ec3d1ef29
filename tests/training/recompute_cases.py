"""Runs Megatron's real MLP with and without recomputation of the activation's output.

Run by test_recompute.py in a process of its own, since CPU mode changes torch for good; a
case that fails ends it with an AssertionError.
"""

from functools import partial

import one_rank
import torch
from measure_activation_memory import build_mlp, saved_bytes
from torch.nn.functional import rms_norm

from megatron_xielu import cpu

HIDDEN, FFN = 32, 96
SHAPE = (4, 2, HIDDEN)


def main() -> None:
    """Build one MLP twice, install the recomputation in the second, compare."""
    cpu.activate()
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    from megatron_xielu.activations import XIELU
    from megatron_xielu.features import recompute
    from megatron_xielu.megatron_activations import ActivationBuilder

    one_rank.start()
    # With linear biases: fc2 then returns its own beside the output.
    kept, recomputed = (
        build_mlp(HIDDEN, FFN, ActivationBuilder(XIELU), add_bias_linear=True) for _ in range(2)
    )
    recomputed.load_state_dict(kept.state_dict())
    recompute.install([recomputed])

    def some_input() -> torch.Tensor:
        return torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True)

    def outputs_and_gradients(mlp, inputs) -> list[torch.Tensor]:
        """Of several micro-batches: all forward, then all backward, the first one first."""
        for tensor in (*inputs, *mlp.parameters()):
            tensor.grad = None
        outputs = []
        for x in inputs:
            # As Megatron recomputes a layer norm: with a hook on the same tensor as ours.
            norm = CheckpointWithoutOutput(fp8=None)
            output, bias = mlp(norm.checkpoint(partial(rms_norm, normalized_shape=(HIDDEN,)), x))
            norm.discard_output_and_register_recompute(output)
            outputs.append(output + bias)
        for output in outputs:
            output.square().sum().backward()
        return [*outputs, *(tensor.grad for tensor in (*inputs, *mlp.parameters()))]

    def assert_equal(inputs) -> None:
        pair = (outputs_and_gradients(mlp, inputs) for mlp in (kept, recomputed))
        for expected, actual in zip(*pair, strict=True):
            assert torch.equal(actual, expected)

    saved = [saved_bytes(mlp, some_input()) for mlp in (kept, recomputed)]
    output_bytes = 4 * 2 * FFN * 2
    assert saved[0] - saved[1] == output_bytes, saved
    assert_equal([some_input() for _ in range(3)])

    # Evaluation is left alone, also between the forward and the backward of a training step.
    given_to_fc2: list[torch.Tensor] = []
    recomputed.linear_fc2.register_forward_pre_hook(lambda fc2, args: given_to_fc2.append(*args))
    x = some_input()
    output = recomputed(x)[0]
    with torch.no_grad():
        assert torch.equal(recomputed(x)[0], output)
    assert torch.equal(recomputed.eval()(x)[0], output)
    assert [y.untyped_storage().nbytes() for y in given_to_fc2] == [0, output_bytes, output_bytes]
    output.sum().backward()

    # A forward pass that ends between the activation and fc2 leaves nothing to the next one.
    y = recomputed.train().activation_func(some_input())
    recomputed.eval()(x)
    assert y.untyped_storage().nbytes() == 4 * 2 * HIDDEN * 2
    recomputed.train()

    # What the flag's check would have refused, a configuration cannot smuggle in.
    recomputed.config.recompute_modules = ["mlp"]
    try:
        recompute.install([recomputed])
    except ValueError as error:
        assert "--recompute-modules mlp" in str(error)
    else:
        raise AssertionError("not refused")


if __name__ == "__main__":
    main()
