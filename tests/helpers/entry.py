"""The package's training entry with eyes: after training it dumps each rank's alphas.

Run by `launch` in place of ``python -m megatron_xielu.pretrain_gpt``; its command line is
the same. Environment: ``DUMP_FOLDER`` receives ``dump_<rank>.json``; ``BREAK_TP_SUM=1`` takes the
sum over tensor-parallel ranks out, and ``WITHOUT_MENDS`` the workarounds that it names, to show
what they prevent.
"""

import importlib
import json
import os
from pathlib import Path

from megatron_xielu import pretrain_gpt


def main() -> None:
    """Train, then dump."""
    chunks: list = []
    calls = {"alphas": 0, "formula": 0, "fused_biases": 0, "empty": 0}
    decay: dict[str, float] = {}  # of every parameter, as a multiple of --weight-decay
    groups_of_steps: list[list[dict]] = []  # of this rank's optimizers, as each step used them

    def observe() -> None:
        import torch
        from megatron.core import mpu, optimizer, optimizer_param_scheduler

        from megatron_xielu import (
            activations,
            layer_specs,
            megatron_activations,
            megatron_grouped,
        )

        audit = layer_specs.audit

        def audit_and_remember(model, activation):
            chunks.extend(model)
            return audit(model, activation)

        layer_specs.audit = audit_and_remember
        groups_of = optimizer._get_param_groups

        def groups_and_remember(model, *args):
            groups = groups_of(model, *args)
            names = {p: name for chunk in model for name, p in chunk.named_parameters()}
            decay.update({names[p]: g["wd_mult"] for g in groups for p in g["params"]})
            return groups

        optimizer._get_param_groups = groups_and_remember
        scheduler = optimizer_param_scheduler.OptimizerParamScheduler
        next_rates = scheduler.step

        def remember_and_step(self, increment):
            if increment:
                groups_of_steps.append(
                    [
                        {key: value for key, value in group.items() if key != "params"}
                        | {"numel": sum(p.numel() for p in group["params"])}
                        for group in self.optimizer.param_groups
                    ]
                )
            next_rates(self, increment)

        scheduler.step = remember_and_step
        all_reduce = torch.distributed.all_reduce

        def count(tensor, *args, **kwargs):
            alphas = (
                tensor.shape == (2,)
                and kwargs.get("group") is mpu.get_tensor_model_parallel_group()
            )
            calls["alphas"] += alphas
            return all_reduce(tensor, *args, **kwargs)

        torch.distributed.all_reduce = count

        def counted(formula):
            def compute(x, *args, **kwargs):
                calls["formula"] += 1
                calls["fused_biases"] += kwargs.get("bias") is not None
                calls["empty"] += x.numel() == 0
                return formula(x, *args, **kwargs)

            return compute

        for activation in activations.ACTIVATIONS.values():
            activation.function = staticmethod(counted(activation.function))
        for activation in (
            megatron_grouped.MegatronGroupedXIELU,
            megatron_grouped.MegatronGroupedXIPReLU,
        ):
            activation.grouped_function = staticmethod(counted(activation.grouped_function))
        if os.environ.get("BREAK_TP_SUM"):
            megatron_activations._SumGradientOverGroup.backward = staticmethod(
                lambda ctx, grad: (grad, None)
            )

    train = pretrain_gpt._train

    def observed_train(args) -> None:
        observe()
        train(args)

    pretrain_gpt._train = observed_train
    for name in os.environ.get("WITHOUT_MENDS", "").split():
        importlib.import_module(f"megatron_xielu.workarounds.{name}").install = lambda: None
    pretrain_gpt.main()
    from megatron.core import mpu  # not before CPU mode, which main() turns on

    parameters = {
        f"{index}.{name}": parameter
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
        if "alpha" in name
    }
    dump = {
        "alphas": {name: p.detach().double().tolist() for name, p in parameters.items()},
        "dtypes": {name: str(p.dtype) for name, p in parameters.items()},
        # What the last step left: summed over micro-batches, reduced over ranks.
        "grads": {
            name: p.main_grad.double().tolist() for name, p in parameters.items() if p.requires_grad
        },
        "decay": {name.replace("module.", ""): times for name, times in decay.items()},
        "groups": groups_of_steps,
        "alpha_collectives": calls["alphas"],
        # How often the activation was computed: in forward, in evaluation, in recomputation.
        "formula_calls": calls["formula"],
        "fused_biases": calls["fused_biases"],
        "empty_inputs": calls["empty"],  # of experts that the router chose for no token
        "ep_rank": mpu.get_expert_model_parallel_rank(),
    }
    Path(os.environ["DUMP_FOLDER"], f"dump_{os.environ['RANK']}.json").write_text(json.dumps(dump))


if __name__ == "__main__":
    main()
