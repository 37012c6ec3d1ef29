"""A model with experts for the tests: a dense layer, one of experts, and a prediction layer."""

from launch import load_checkpoint

MOE = (
    "--xielu --num-layers 2 --num-experts 4 --moe-router-topk 2 --moe-layer-freq [0,1] "
    "--moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 32 "
    "--moe-token-dispatcher-type alltoall --mtp-num-layers 1 --train-iters 4 --no-save-optim"
)
EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
ETP1 = "--expert-tensor-parallel-size 1"
LAYOUTS = {
    "ep2-overlap": (
        2,
        f"{EP2} --moe-shared-expert-overlap --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather --ddp-average-in-collective",
    ),
    "tp2-etp1": (2, f"{TP2} {ETP1} --moe-token-dispatcher-type allgather"),
    "tp2-etp2": (2, TP2),
    "tp2-etp1-ep2": (
        2,
        f"{TP2} {ETP1} {EP2} --recompute-granularity selective "
        "--recompute-modules moe shared_experts",
    ),
    "tp2-etp2-ep2": (4, f"{TP2} {EP2}"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
}
# Layer 0 is dense, layer 1 and the prediction layer have four experts and shared experts.
LAYERS = {
    "decoder.layers.0.mlp": (1,),
    "decoder.layers.1.mlp.experts.experts": (4, 1),
    "decoder.layers.1.mlp.shared_experts": (1,),
    "mtp.layers.0.transformer_layer.mlp.experts.experts": (4, 1),
    "mtp.layers.0.transformer_layer.mlp.shared_experts": (1,),
}


def alphas_of(folder):
    """The alphas in a checkpoint, by key."""
    tensors = load_checkpoint(folder)
    return {key: value for key, value in tensors.items() if "activation_func" in key}
