"""Writes the files that are generated: ``make docs``.

docs/limits.md from `megatron_xielu.catalog` and the tables of other rooms; for the plan, which runs
where there is no Megatron, the names of all flags. `DOCUMENTS` has a function for each;
tests/docs/test_generated.py says which one is stale.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_xielu import catalog
from megatron_xielu.catalog import Refusal
from megatron_xielu.checkpoints.optimizer_format import UNEVEN_STAGES
from megatron_xielu.convert.megatron_arguments import IMPLIED
from megatron_xielu.plan.flags import KNOWN

TOP = Path(__file__).parents[1]


def limits() -> str:
    """docs/limits.md."""
    in_spec = " ".join(
        f"`{r.flag}`" for r in (*catalog.WITH_OURS, *catalog.BY_ENTRY) if r.in_spec
    ).replace(" ", ", ")
    return f"""\
<!-- Written by `make docs` from megatron_xielu/catalog.py; change it there. -->

# Limits: what is refused, and why

Each of these ends a run before anything is allocated, with one line that names the flag. So does a
number out of its flag's range, of which `NUMBERS` in megatron_xielu/catalog.py has the usual ones.

## With `--xielu` and `--xiprelu`

{_table(catalog.WITH_OURS)}
| `--transformer-impl inference_optimized` | it is for inference | |
| `--moe-use-upcycling` | it scales the weights of a dense model for GELU, and has no alphas to \
start from | |
| `--spec` of another module | what is in it is not known | put the activation into that spec with \
`megatron_xielu.layer_specs.with_activation` |

A script that takes `--spec megatron_xielu.layer_specs …` checks only what Megatron's configuration
shows: gated activations, `--moe-use-upcycling`, {in_spec}.

## In this package's entry, with any activation

{_table((*catalog.BY_ENTRY, *catalog.UNREAD))}
| `--mtp-num-layers` with `--pipeline-model-parallel-layout` | prediction layers are fed on \
the last stage only | drop one of them |

## With `--xielu-recompute-output`

{_table(catalog.WITH_RECOMPUTE_OUTPUT)}

How it works, and what works together with it: [memory.md](memory.md).

## With `--xielu-shared-alphas`

{_table(catalog.WITH_SHARED_ALPHAS)}

It, `--xielu-frozen-alphas` and `--xielu-recompute-output` need `--xielu` or `--xiprelu`, as do
`--xielu-alpha-lr-mult` and `--xielu-alpha-weight-decay`, which do not go with frozen alphas, nor
the first with `--use-mup` and `--optimizer sgd`. Shared alphas start from one pair, not from one of
each layer.

## With `{catalog.DOCUMENTS_FLAG}`

{_table(catalog.WITH_DOCUMENTS)}
| `--micro-batch-size` above 1 with `--pipeline-model-parallel-size` above 1 | Megatron joins the \
samples of a micro-batch into one, and its pipeline stages expect them apart | micro-batches of 1 |
| `--transformer-impl local` on a GPU | Megatron's own attention has no code for it | \
`transformer_engine` |

What it does: [training.md](training.md#documents).

## With `{catalog.INPUTS_FLAG}`

{_table(catalog.WITH_INPUTS)}

## Before Megatron 0.19

{_table(catalog.BEFORE_0_19)}

A patched script refuses the first two, `--spec` all of them ([versions.md](versions.md)).

## Optimizers, and resuming

[checkpoints.md](checkpoints.md#optimizers) has the optimizers that are refused. A state that was
saved in the format `dp_reshardable` is tied to its layout, these flags among it:
{_listed(UNEVEN_STAGES)}. A run with another one is refused; go on with
`--dist-ckpt-optim-fully-reshardable` until the next checkpoint, or add `--no-load-optim`
([checkpoint-formats.md](checkpoint-formats.md)).

## On a CPU (`--cpu`): they need a GPU

{_listed(refusal.said for refusal in catalog.ON_CPU)}

## By the plan (`--dry-run`)

The flags of the first six tables, with `--cpu` those that need a GPU, names that no release of
Megatron in [versions.md](versions.md) knows (abbreviations, too: Megatron takes none), and:

{_listed(refusal.flag for refusal in catalog.BY_PLAN)}: the plan has no
arithmetic for them.

{_listed(refusal.flag for refusal in catalog.BY_PLAN_WITH_CHECKPOINTS)}: it is not proven that
checkpoints keep the optimizer's state; `--no-save-optim` lets them pass.

It warns of {_listed((*UNEVEN_STAGES, *catalog.NOT_MODELLED))}: stages and batches are taken to be
of equal size.

## By `convert`

A model that no Hugging Face class computes: one with an argument of another value than these, or
with QK-norm and SwiGLU, or with a `--spec` of another module.

| argument | values |
|---|---|
{_implied()}

## By `evaluate`

The flags of an activation, since the activation is the checkpoint's; `--activation-statistics` with
experts or `--context-parallel-size`.
"""


def _table(refusals: Iterable[Refusal]) -> str:
    rows = [f"| `{r.said}` | {r.reason} | {r.instead} |" for r in refusals]
    return "\n".join(["| flag | why | instead |", "|---|---|---|", *rows])


def _listed(flags: Iterable[str]) -> str:
    return ", ".join(f"`{flag}`" for flag in flags)


def _implied() -> str:
    shown = {name: [str(v) or "(empty)" for v in values] for name, values in IMPLIED.items()}
    return "\n".join(f"| `{name}` | {_listed(values)} |" for name, values in shown.items())


def known_flags() -> str:
    """The flags of the installed Megatron and ours, and those of other releases that are there.

    To add a release: ``PYTHONPATH=TREE python tools/make_docs.py``, its wheel unpacked in TREE.
    """
    from megatron.training.arguments import add_megatron_arguments

    from megatron_xielu.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    flags = {flag for action in parser._actions for flag in action.option_strings}
    # Ours are those of this version, and no other.
    kept = {flag for flag in KNOWN.read_text().split() if not flag.startswith("--xi")}
    return "\n".join(sorted(flags | kept)) + "\n"


DOCUMENTS: dict[str, Callable[[], str]] = {
    "docs/limits.md": limits,
    KNOWN.relative_to(TOP).as_posix(): known_flags,
}


if __name__ == "__main__":
    for name, write in DOCUMENTS.items():
        (TOP / name).write_text(write())
