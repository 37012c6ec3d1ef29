"""One rank that converts Hugging Face models with Megatron-Bridge, there and back, on the CPU.

Run by test_bridge.py with Megatron-Bridge on PYTHONPATH: ``bridge_case.py MODEL …``. Rank 0
writes MODEL.pt: the tensors that come back, and what the Megatron model computes.

Bridge imports Transformer Engine for classes that this never reaches, and that package cannot be
built without CUDA: empty modules take its name after Megatron has been imported without it. All
else is real: Bridge, Megatron's local layers, gloo.
"""

import importlib.abc
import importlib.machinery
import logging
import sys
import types

import torch

from megatron_xielu import cpu


class _Name(type):
    """Of a class whose attributes are classes of the same kind."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _NoTransformerEngine(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "transformer_engine":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(_Name("module", (), {}), name)
        return module

    def exec_module(self, module) -> None: ...


def main(folders: list[str]) -> None:
    cpu.activate()
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.training

    assert not megatron.core.extensions.transformer_engine.HAVE_TE
    sys.meta_path.append(_NoTransformerEngine())
    import megatron_xielu.bridge  # noqa: F401  (what is tested)

    logging.disable(logging.INFO)
    torch.distributed.init_process_group("gloo")
    for folder in folders:
        try:
            result = there_and_back(folder)
        except ValueError as error:
            result = {"refused": str(error)}
        if torch.distributed.get_rank() == 0:
            torch.save(result, f"{folder}.pt")
    torch.distributed.barrier()


def there_and_back(folder: str) -> dict:
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = torch.distributed.get_world_size()
    provider.masked_softmax_fusion = provider.bias_dropout_fusion = False
    provider.apply_rope_fusion = provider.persist_layer_norm = False
    provider.gradient_accumulation_fusion = False
    provider.use_cpu_initialization = True
    provider.finalize()
    if not parallel_state.is_initialized():
        provider.initialize_model_parallel(seed=1)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)

    tokens = torch.arange(3, 27).reshape(2, 12)
    logits = model(tokens, torch.arange(12).expand(2, 12), None)  # [b, s, v / tp]
    logits.float().sin().sum().backward()
    group = parallel_state.get_tensor_model_parallel_group()
    columns = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(columns, logits.detach().contiguous(), group=group)
    gradients = {
        name.removeprefix("module."): parameter.grad
        for name, parameter in model.named_parameters()
        if "alpha" in name
    }
    everywhere = [None] * group.size()
    torch.distributed.all_gather_object(everywhere, gradients)
    back = dict(bridge.export_hf_weights([model], cpu=True, show_progress=False))
    return {
        "tensors": back,
        "logits": torch.cat(columns, dim=-1),
        "gradients": everywhere,
        "alpha_dtypes": {p.dtype for name, p in model.named_parameters() if "alpha" in name},
        "config": bridge._model_bridge.megatron_to_hf_config(provider),
        "provider": {
            name: getattr(provider, name)
            for name in ("xielu_beta", "rope_scaling", "rope_scaling_factor")
        },
    }


if __name__ == "__main__":
    main(sys.argv[1:])
