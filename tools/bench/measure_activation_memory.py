"""Measures what Megatron's MLP keeps for its backward pass, by activation, in bytes per token.

Builds Megatron's real dense MLP (local layers, bf16, no linear bias, one rank) at the widths of the
paper's models and runs one forward pass. Every tensor that autograd saves passes through
`torch.autograd.graph.saved_tensors_hooks`. Their distinct storages are counted at the size they
have after the forward pass: a parameter not at all, and an output that was freed as 0.

    python tools/bench/measure_activation_memory.py [--output table.md]

prints a Markdown table; docs/memory.md has it, and what the numbers leave out. On a GPU

    python tools/bench/measure_activation_memory.py --device cuda

measures the peak instead: the most that the CUDA allocator gives out beyond weights and their
gradients while 12 such MLPs in a row, with residuals, run forward and backward over 8192 tokens.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from bench_flags import need_cuda

from megatron_xielu import cpu
from megatron_xielu.common import files
from megatron_xielu.common.flags import output_file
from megatron_xielu.common.text import ready_output

MODELS = {"1.1B": (1536, 6144), "3B": (2048, 8192)}  # hidden size, ffn size of SwiGLU
TOKENS = (2, 1)  # sequence, micro-batch: CPUs are slow at bf16, and bytes are per token
GPU_TOKENS = (8192, 1)
GPU_MLPS = 12


def saved_bytes(mlp: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that autograd holds after ``mlp(x)``, without those of parameters."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = mlp(x)[0]
    parameters = {parameter.untyped_storage()._cdata for parameter in mlp.parameters()}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    output.sum().backward()  # what was counted is what the backward pass lives on
    return sum(size for key, size in storages.items() if key not in parameters)


def peak_bytes(mlps: list[torch.nn.Module], x: torch.Tensor) -> int:
    """Most bytes allocated on the GPU in a forward and a backward pass, over those before."""
    for _ in range(2):  # the first compiles, and makes the gradients of the weights
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = x
        for mlp in mlps:
            y = y + mlp(y)[0]
        y.sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
        del y
    return peak


def build_mlp(hidden: int, ffn: int, builder: Any, **options: Any) -> torch.nn.Module:
    """Megatron's dense MLP with its own activation, or with ``builder`` in the activation slot."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_xielu.layer_specs import with_activation

    settings = {
        "num_layers": 1,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": 8,
        "add_bias_linear": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "use_te_activation_func": builder is not None,
        **options,
    }
    config = TransformerConfig(**settings)
    spec = get_gpt_layer_local_spec()
    if builder is not None:
        spec = with_activation(spec, builder)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return spec.submodules.mlp(config=config, pg_collection=groups, is_mtp_layer=False)


def measure(on_gpu: bool = False) -> Iterator[str]:
    """The table's lines, in Markdown, each when it is measured.

    Raises:
        RuntimeError: the MLPs of a model do not have the same number of weights.
    """
    from megatron.core.activations import squared_relu

    from megatron_xielu.activations import XIELU, XIPReLU
    from megatron_xielu.features import recompute
    from megatron_xielu.megatron_activations import ActivationBuilder

    xielu, xiprelu = ActivationBuilder(XIELU), ActivationBuilder(XIPReLU)
    # Megatron's default for SwiGLU is the fused form, which saves its input alone.
    swiglu = {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": True,
    }
    rows: list[tuple[str, Any, dict, bool]] = [
        ("SwiGLU", None, swiglu, False),
        ("GELU", None, {}, False),
        ("ReLU²", None, {"activation_func": squared_relu}, False),
        ("xIELU", xielu, {}, False),
        ("xIPReLU", xiprelu, {}, False),
        ("xIELU, `--xielu-recompute-output`", xielu, {}, True),
        ("xIPReLU, `--xielu-recompute-output`", xiprelu, {}, True),
    ]
    what = "peak bytes per token and MLP" if on_gpu else "bytes per token and layer"
    yield f"| model | MLP | hidden | ffn | weights | {what} | of SwiGLU's |"
    yield "|---|---|---|---|---|---|---|"
    device, count, tokens = ("cuda", GPU_MLPS, GPU_TOKENS) if on_gpu else ("cpu", 1, TOKENS)
    for model, (hidden, gated_ffn) in MODELS.items():
        weights_of_swiglu = bytes_of_swiglu = 0
        for name, builder, options, recomputed in rows:
            ffn = gated_ffn if name == "SwiGLU" else gated_ffn * 3 // 2
            # Bytes do not depend on the weights, which take half a minute to draw.
            options = {"perform_initialization": False, **options}
            # Megatron moves a model to the GPU after it is built.
            mlps = [build_mlp(hidden, ffn, builder, **options).to(device) for _ in range(count)]
            if recomputed:
                recompute.install(mlps)
            weights = sum(p.numel() for p in mlps[0].parameters() if p.dim() == 2)
            x = torch.zeros(*tokens, hidden, dtype=torch.bfloat16, device=device)
            x.requires_grad_()
            held = peak_bytes(mlps, x) if on_gpu else saved_bytes(*mlps, x)
            per_token, remainder = divmod(held, count * tokens[0] * tokens[1])
            weights_of_swiglu = weights_of_swiglu or weights
            bytes_of_swiglu = bytes_of_swiglu or per_token
            if weights != weights_of_swiglu:
                raise RuntimeError(f"{name}: {weights:,} weights, SwiGLU {weights_of_swiglu:,}")
            if remainder and not on_gpu:
                raise RuntimeError(f"{name}: {remainder} bytes were saved that are no token's")
            yield (
                f"| {model} | {name} | {hidden} | {ffn} | {weights:,} | {per_token:,} "
                f"| {per_token / bytes_of_swiglu:.0%} |"
            )


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=output_file, help="also write the table to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the peak")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu:
        need_cuda("give another --device")
    else:
        cpu.hide_gpus()
        cpu.activate()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    lines = []
    for line in measure(on_gpu):
        print(line, flush=True)
        lines.append(line)
    if args.output:
        files.keep(args.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    ready_output()
    main()
