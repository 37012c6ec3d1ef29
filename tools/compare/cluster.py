"""The presets that run on a cluster: the commands to submit, with what each will take.

Nothing is run here. Each line is ``examples/slurm/pretrain.sbatch`` around examples/pretrain.sh,
which puts the Megatron command together; the numbers are those of its plan.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher_command import megatron_arguments

from compare import equal_cost
from compare.variants import Variant
from megatron_xielu.catalog import INPUTS_FLAG
from megatron_xielu.plan import layouts
from megatron_xielu.plan.run import Cluster, Plan

_GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Preset:
    """A model file of examples/models, and the nodes and layout of the authors' run."""

    model: str
    nodes: int
    layout: str = ""  # variables, where the model file's is another


PRESETS = {
    "paper-1b": Preset("llama_1b", 11),
    "paper-3b": Preset("llama_3b", 32, "TP=2 MICRO_BATCH=5"),
}


def show(
    preset: Preset, variants: Sequence[Variant], seeds: Sequence[int], out: Path, baseline: str
) -> str:
    """The commands and the plan, as text.

    Raises:
        SystemExit: the variants are not at equal cost.
    """
    plans = {variant.name: _plan(preset, variant) for variant in variants}
    costs = {name: equal_cost.Cost(plan.model) for name, plan in plans.items()}
    equal_cost.check(costs, baseline)
    any_plan = plans[baseline]
    schedule = any_plan.schedule()
    hours = schedule.steps * layouts.seconds_per_step(any_plan) / 3600
    gpus, mfu = any_plan.cluster.gpus, any_plan.mfu()
    lines = [
        equal_cost.table(costs, {variant.name: variant.label for variant in variants}, baseline),
        "",
        f"a run: {schedule.steps:,} steps of {any_plan.tokens_per_step():,} tokens, "
        f"{any_plan.flops():.3g} FLOPs; on {preset.nodes} nodes of {_GPUS_PER_NODE} H100 "
        f"{hours:.1f} hours, {hours * gpus:,.0f} GPU-hours at an MFU of "
        f"{mfu.value:.0%} ({mfu.source})",
        f"all {len(variants) * len(seeds)} runs: {len(variants) * len(seeds) * hours * gpus:,.0f} "
        "GPU-hours",
        "",
        "# Prepare the data (docs/data.md) and set DATA_ARGS first. With DECAY_NORMS=1, exported,",
        "# the gains of norms decay, too, as in the paper's code. Then, on a login node:",
    ]
    folders = []
    for seed in seeds:
        for variant in variants:
            folder = out / variant.name / f"seed_{seed}"
            folders.append(str(folder))
            lines.append(_command(preset, variant, seed, folder))
    lines += [
        "",
        "# and when all have finished:",
        "python tools/compare_activations.py collect "
        + shlex.join([*folders, "--baseline", baseline, "--out", f"{out}/results"]),
    ]
    return "\n".join(lines)


def _changes(variant: Variant) -> list[str]:
    """The flags that make an ablation of an activation."""
    return list(variant.flags[1:])


def _command(preset: Preset, variant: Variant, seed: int, folder: Path) -> str:
    activation = variant.name.partition("-")[0]
    model = " ".join(filter(None, (f"MODEL={preset.model}", preset.layout)))
    what = f"{model} ACTIVATION={activation} SEED={seed}"
    where = f'DATA_ARGS="$DATA_ARGS" RUN_DIR={shlex.quote(str(folder))}'
    nodes = f"--nodes {preset.nodes} --gpus-per-node {_GPUS_PER_NODE} --time 24:00:00"
    flags = [*_changes(variant), INPUTS_FLAG]  # the last for `collect`, which looks at the regime
    words = ["sbatch", nodes, "examples/slurm/pretrain.sbatch", *flags]
    return f"{what} {where} {' '.join(words)}"


def _plan(preset: Preset, variant: Variant) -> Plan:
    """The plan of the command that the launcher would run."""
    activation = variant.name.partition("-")[0]
    words = megatron_arguments(
        *_changes(variant),
        MODEL=preset.model,
        ACTIVATION=activation,
        NNODES=str(preset.nodes),
        GPUS_PER_NODE=str(_GPUS_PER_NODE),
        **dict(variable.split("=") for variable in preset.layout.split()),
    )
    return Plan(words, cluster=Cluster(nodes=preset.nodes, gpus_per_node=_GPUS_PER_NODE))
