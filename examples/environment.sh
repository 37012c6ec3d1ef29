# shellcheck shell=bash disable=SC2154 # the variables are pretrain.sh's
# What PyTorch, Transformer Engine and the compilers read from the environment. Sourced by
# pretrain.sh after command.sh; anything already in the environment wins. What it needs of this:
# `environment`, the names, for the dry run; and $caches, the folder of this node that it has to
# make, or nothing.

# On Hopper and older GPUs Megatron's overlap depends on the order that one queue keeps, and it
# refuses others; Blackwell needs none. FSDP wants more than 1.
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"
# With torchrun's own store a replaced node could not join.
: "${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:=1}"
environment=(CUDA_DEVICE_MAX_CONNECTIONS TORCH_DISABLE_SHARE_RDZV_TCP_STORE)

# A tokenizer in a folder needs nothing of the Hub, which hundreds of ranks would ask at once.
if [[ -d $TOKENIZER ]]; then
    : "${HF_HUB_OFFLINE:=1}"
    environment+=(HF_HUB_OFFLINE)
fi

caches=''
if [[ $DEVICE == gpu ]]; then
    # Segments that grow leave fewer holes in a GPU's memory. The older of its two names, which every
    # PyTorch reads, and which Megatron looks for where it does not go with the flags.
    if [[ -z ${PYTORCH_ALLOC_CONF:-} ]]; then
        : "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"
        environment+=(PYTORCH_CUDA_ALLOC_CONF)
    fi
    # Segments that grow and NCCL's registration in graphs do not go together: Megatron refuses both.
    if [[ " ${trailing[*]} " =~ \ --(cuda-graph-impl|enable-cuda-graph|external-cuda-graph)[\ =] ]]; then
        : "${NCCL_GRAPH_REGISTER:=0}"
        environment+=(NCCL_GRAPH_REGISTER)
    fi
    # Transformer Engine's norms take every multiprocessor of a GPU, and wait for those that a
    # gradient's reduction holds; 16 are left to it. Megatron-Bridge has 16 to 20 in its recipes.
    : "${NVTE_FWD_LAYERNORM_SM_MARGIN:=16}" "${NVTE_BWD_LAYERNORM_SM_MARGIN:=16}"
    environment+=(NVTE_FWD_LAYERNORM_SM_MARGIN NVTE_BWD_LAYERNORM_SM_MARGIN)
    # Compiled kernels on the node itself: Triton's own place is the home folder, which nodes share.
    if [[ -z ${TRITON_CACHE_DIR:-} || -z ${TORCHINDUCTOR_CACHE_DIR:-} ]]; then
        caches=/tmp # a job's TMPDIR may be that of the machine which submitted it
        [[ ! -d ${TMPDIR:-} || ! -w $TMPDIR ]] || caches=$TMPDIR
        caches+=/megatron_xielu-$UID
    fi
    : "${TRITON_CACHE_DIR:=$caches/triton}" "${TORCHINDUCTOR_CACHE_DIR:=$caches/inductor}"
    environment+=(TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR)
fi
export "${environment[@]}"
# For the dry run: what network.env.sh says to the network's libraries, and what they find set anyway.
for name in "${!NCCL_@}" "${!TORCH_NCCL_@}" "${!GLOO_@}" "${!FI_@}"; do
    [[ " ${environment[*]} " == *" $name "* ]] || environment+=("$name")
done
# Not set: TORCH_NCCL_AVOID_RECORD_STREAMS, which PyTorch has made the default and now warns of.
