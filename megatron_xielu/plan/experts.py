"""The experts of a model: how many, how wide, and in which layers."""

from __future__ import annotations

import ast
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_xielu.plan.flags import PlanError

_LONGEST = 100_000  # layers of a list, so that "[1]*10**9" is refused and not built


@dataclass(frozen=True)
class Experts:
    """Routed and shared experts.

    Attributes:
        count, top_k: routed experts of a layer, and how many a token is sent to.
        ffn, shared_ffn: width of a routed one, and of all shared ones of a layer together.
        shared_gate: whether a vector decides how much of the shared ones is taken.
        every: each n-th layer has experts, the first among them; or 0 and 1 by layer.
        bias: whether the router has one.
    """

    count: int
    top_k: int
    ffn: int
    shared_ffn: int
    shared_gate: bool
    every: int | tuple[int, ...]
    bias: bool

    @classmethod
    def of(cls, args: Namespace, *, ffn: int) -> Experts | None:
        """The experts of arguments with all of Megatron's defaults; None for a dense model.

        Args:
            args: of numbers within their limits.
            ffn: of a dense layer, which experts have where nothing else is given.

        Raises:
            PlanError: experts that Megatron would not build.
        """
        if not args.num_experts:
            return None
        problems = []
        if not 1 <= args.moe_router_topk <= args.num_experts:
            problems.append(
                f"--moe-router-topk {args.moe_router_topk} must be from 1 to --num-experts "
                f"{args.num_experts}"
            )
        every = _every(args.moe_layer_freq)
        if isinstance(every, tuple) and len(every) != args.num_layers:
            problems.append(
                f"--moe-layer-freq lists {len(every)} layers, and --num-layers is {args.num_layers}"
            )
        shared = args.moe_shared_expert_intermediate_size or 0
        if shared and args.add_bias_linear:
            problems.append("--moe-shared-expert-intermediate-size needs --disable-bias-linear")
        if problems:
            raise PlanError(problems)
        return cls(
            count=args.num_experts,
            top_k=args.moe_router_topk,
            ffn=args.moe_ffn_hidden_size or ffn,
            shared_ffn=shared,
            shared_gate=bool(shared and args.moe_shared_expert_gate),
            every=every,
            bias=args.add_bias_linear,
        )

    def layers(self, first: int, end: int) -> int:
        """How many of the layers from ``first`` to before ``end`` have experts."""
        if isinstance(self.every, tuple):
            return sum(self.every[first:end])
        return -(-end // self.every) - -(-first // self.every)


def _every(frequency: Any) -> int | tuple[int, ...]:
    """What ``--moe-layer-freq`` says: a number, or a list such as ``[0]+[1]*23``."""
    try:
        every = frequency
        if isinstance(frequency, str):
            every = _value(ast.parse(frequency.strip(), mode="eval").body)
        if isinstance(every, (list, tuple)) and all(kind in (0, 1) for kind in every):
            return tuple(int(kind) for kind in every)
        if type(every) is int and every < 1:
            raise PlanError([f"--moe-layer-freq must be 1 or more, not {every}"])
        if type(every) is int:
            return every
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        if isinstance(error, PlanError):
            raise
    raise PlanError(
        [
            f"--moe-layer-freq {str(frequency)[:40]!r} is neither a number nor a list of 0 and 1, "
            "one for each layer, such as [0]+[1]*23"
        ]
    )


def _value(node: ast.expr) -> Any:
    """Of numbers, lists, ``+`` and ``*``, and of nothing else."""
    if isinstance(node, ast.List):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _value(node.left) + _value(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _value(node.left), _value(node.right)
        size = len(left) * right if isinstance(left, list) else len(right) * left
        if size > _LONGEST:
            raise ValueError
        return left * right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise ValueError
