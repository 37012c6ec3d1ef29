"""Megatron's `TEGroupedMLP` on one CPU rank, with our activation: what FP8's padding does to it.

Run by test_grouped_experts.py in a process of its own, since CPU mode changes torch for good; a
case that fails ends it with an AssertionError.
"""

import dataclasses

import one_rank
import torch
from measure_activation_memory import saved_bytes
from torch import Tensor

from megatron_xielu import cpu

HIDDEN, FFN, EXPERTS = 8, 24, 4
TOKENS = [5, 0, 16, 2]
ALIGN = 16


def padded(tokens: list[int]) -> list[int]:
    return [-(-count // ALIGN) * ALIGN for count in tokens]


class Padding(torch.nn.Module):
    """As Transformer Engine's, in what it takes and returns; what it adds is no zeros."""

    def forward(self, rows: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        # Of the hidden states something, since fc1's weights get 0 times it; of the router's
        # probabilities NaN.
        fill = float("nan") if rows.shape[1] == 1 else 1e3
        parts = []
        for part, count in zip(rows.split(m_splits), padded(m_splits), strict=True):
            parts += [part, part.new_full((count - len(part), rows.shape[1]), fill)]
        return torch.cat(parts), padded(m_splits)


class Unpadding(torch.nn.Module):
    def forward(self, rows: Tensor, m_splits: list[int]) -> Tensor:
        parts = rows.split(padded(m_splits))
        return torch.cat([part[:n] for part, n in zip(parts, m_splits, strict=True)])


def main() -> None:
    """Compute the same with and without padding, and what is refused."""
    cpu.activate()
    from functools import partial

    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    from megatron_xielu.activation_slot import with_activation
    from megatron_xielu.activations import XIELU
    from megatron_xielu.megatron_activations import ActivationBuilder
    from megatron_xielu.megatron_grouped import connect

    one_rank.start()
    options = one_rank.config(
        hidden_size=HIDDEN, num_moe_experts=EXPERTS, moe_ffn_hidden_size=FFN, moe_grouped_gemm=True
    )

    def build(settings=options, experts=EXPERTS, *, ours=True):
        spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=True)
        assert spec.keywords["submodules"].experts.func is TEGroupedMLP
        if ours:

            @dataclasses.dataclass
            class Layer:
                mlp: object

            spec = with_activation(Layer(spec), ActivationBuilder(XIELU)).mlp
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return spec.keywords["submodules"].experts(experts, settings, pg_collection=groups)

    plain = build()
    with torch.no_grad():
        plain.activation_func.alpha_p.copy_(torch.linspace(-1, 1, EXPERTS))
        plain.activation_func.alpha_n.copy_(torch.linspace(1, 3, EXPERTS))
    torch.manual_seed(0)
    hidden = torch.randn(sum(TOKENS), HIDDEN)
    probs = torch.rand(sum(TOKENS))
    upstream = torch.randn(sum(TOKENS), HIDDEN)

    def results(experts) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, probs)]
        experts.zero_grad()
        output, bias = experts(inputs[0], torch.tensor(TOKENS), inputs[1])
        assert bias is None
        output.backward(upstream)
        return [output.detach(), *(t.grad for t in (*inputs, *experts.parameters()))]

    class Given(torch.nn.Module):
        """The experts with the router's part, as a module of one input."""

        def __init__(self, experts) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, rows: Tensor) -> Tensor:
            return self.experts(rows, torch.tensor(TOKENS), probs)

    def saved(experts) -> int:
        return saved_bytes(Given(experts), hidden.clone().requires_grad_())

    recomputing = dataclasses.replace(
        options, recompute_granularity="selective", recompute_modules=["moe_act"]
    )
    # What is as wide as fc1's output: that, and what fc2 gets, which can be computed again.
    wide = sum(TOKENS) * FFN * 4
    kept = [saved(experts) // wide for experts in (plain, build(recomputing))]
    assert kept == [2, 1]

    expected = results(plain)
    for settings in (options, recomputing):
        experts = build(settings)
        experts.load_state_dict(plain.state_dict())
        # FP8 itself needs Transformer Engine: the padding that it brings with it, on fp32.
        experts.config = dataclasses.replace(settings)
        experts.config.fp8 = "hybrid"
        experts.quantization_padding = Padding()
        experts.quantization_unpadding = Unpadding()
        connect(experts)
        for actual, wanted in zip(results(experts), expected, strict=True):
            assert torch.isfinite(actual).all()
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
        second = experts.activation_func.alpha_p.grad[1]
        assert second == 0  # it has no token

    # Built in another way, the activation says what is missing.
    bare = build(ours=False)
    bare.activation_func = type(plain.activation_func)(options, is_expert=True)
    for failing, message in (
        (partial(results, bare), "was not told whose a row is: build the experts from a spec"),
        (partial(build, experts=2), "2 grouped experts on this rank, and alphas for 4"),
    ):
        try:
            failing()
        except (RuntimeError, ValueError) as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


if __name__ == "__main__":
    main()
