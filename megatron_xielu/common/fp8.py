"""What FP8 asks of a GPU, of Transformer Engine and of a model's sizes, by ``--fp8-recipe``.

Read in Transformer Engine 2.20.2 (``check_recipe_support``, ``assert_dim_for_fp8_exec``) and in
Megatron-core 0.19.2 (``get_fp8_recipe``), not tried on a GPU. Megatron itself says it in the first
step, and with local layers it says nothing and trains in 16 bits. Standard library only, of Python
3.9: the plan asks here, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

_INSTEAD = ", or drop --fp8-format (pretrain.sh: PRECISION=bf16)"

# Not in a walk of checkpoints, whose local layers stand for others.
LOCAL = (
    "--fp8-format does not work with --transformer-impl local, whose layers would train in 16 bits "
    "without a word; drop one of them"
)


@dataclass(frozen=True)
class Recipe:
    """What one asks for.

    Attributes:
        least, below: compute capabilities, of which the second one is too new.
        cards: the generations of GPUs that have them.
        engine: the least release of Transformer Engine, for Megatron.
        multiple: what tokens and widths must be a multiple of: 16 bytes to cuBLAS, or a block.
        cuda: the least release that PyTorch must be built for.
    """

    least: tuple[int, int]
    cards: str
    engine: tuple[int, int]
    below: tuple[int, int] = (99, 0)
    multiple: int = 16
    cuda: tuple[int, int] = (12, 0)


# By Megatron's name; `custom` is whatever its factory makes.
RECIPES = {
    "tensorwise": Recipe((8, 9), "Ada, Hopper, Blackwell", (2, 2)),
    "delayed": Recipe((8, 9), "Ada, Hopper, Blackwell", (1, 0)),
    "blockwise": Recipe((9, 0), "Hopper, Blackwell", (2, 3), cuda=(12, 9)),
    "mxfp8": Recipe((10, 0), "Blackwell of a data centre", (2, 1), below=(12, 0), multiple=32),
}


def gpu_fault(recipe: str, capability: tuple[int, int], cuda: str | None) -> str:
    """What is wrong with a GPU of this compute capability under a release of CUDA, or ""."""
    if recipe not in RECIPES:
        return ""
    needs = RECIPES[recipe]
    if fault := capability_fault(recipe, capability):
        return fault
    if _release(cuda) < needs.cuda:
        return (
            f"--fp8-recipe={recipe} needs a PyTorch for CUDA {_dotted(needs.cuda)} or newer, and "
            f"this one is for {cuda}; take another recipe or image{_INSTEAD}"
        )
    return ""


def capability_fault(recipe: str, capability: tuple[int, int], gpu: str = "this one") -> str:
    """What is wrong with a GPU of this compute capability, or ""."""
    needs = RECIPES.get(recipe)
    if needs and not needs.least <= capability < needs.below:
        below = f" and below {_dotted(needs.below)}" if capability >= needs.below else ""
        return (
            f"--fp8-recipe={recipe} needs a GPU of compute capability {_dotted(needs.least)} or "
            f"more{below} ({needs.cards}), and {gpu} has {_dotted(capability)}; take another "
            f"recipe or GPU{_INSTEAD}"
        )
    return ""


def engine_fault(recipe: str, version: str | None) -> str:
    """What is wrong with an installed Transformer Engine, None where there is none, or ""."""
    least = RECIPES[recipe].engine if recipe in RECIPES else (0, 0)
    if version and _release(version) >= least:
        return ""
    return (
        f"--fp8-recipe={recipe} needs Transformer Engine {_dotted(least)} or newer, and "
        + (f"{version} is installed" if version else "none is installed")
        + f"; take an image that has it{_INSTEAD}"
    )


def _release(version: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in (version or "").split(".")[:2] if n.isdigit())


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def installed_engine() -> str | None:
    """The version of Transformer Engine; None where there is none."""
    for name in ("transformer-engine", "transformer_engine"):  # as images of NVIDIA's have it
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def size_faults(
    recipe: str,
    *,
    hidden: int,
    ffn: int,
    queries: int,
    keys: int,
    tokens: int,
    tensor: int,
    split_tokens: bool,
) -> Iterator[str]:
    """One line for widths, and one for tokens, that FP8 matrices cannot have on a rank.

    Args:
        recipe: of `RECIPES`.
        hidden, ffn: widths of the model.
        queries, keys: widths of all query heads, and of all key heads.
        tokens: of a micro-batch, on a context-parallel rank.
        tensor: the tensor-parallel size.
        split_tokens: it divides the tokens, too (sequence parallelism).
    """
    multiple = RECIPES[recipe].multiple if recipe in RECIPES else 16
    needs = f"--fp8-recipe={recipe} needs multiples of {multiple}"
    for flag, part in (
        ("--hidden-size", hidden),
        ("--ffn-hidden-size", ffn // tensor),
        ("--num-attention-heads", queries // tensor),
        ("--num-query-groups", (queries + 2 * keys) // tensor),
    ):
        if part % multiple:
            yield (
                f"{needs} as widths on a tensor-parallel rank, and {flag} makes {part}; change it, "
                f"or --tensor-model-parallel-size {tensor}{_INSTEAD}"
            )
            break  # the others are made of it
    part = tokens // (tensor if split_tokens else 1)
    if part % multiple:
        yield (
            f"{needs} tokens on a rank, and --micro-batch-size × --seq-length makes {part}; change "
            f"one of them{_INSTEAD}"
        )
