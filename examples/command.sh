# shellcheck shell=bash disable=SC2034,SC2154 # the variables are pretrain.sh's
# The Megatron command, from the environment and the model file: the only place where it is put
# together. Sourced by pretrain.sh, which knows $here, ${trailing[@]} (the user's own flags),
# $dry_run and die. What pretrain.sh needs of it: `command`, the launcher with its ranks; `plan`, the
# check of it; `megatron`, its flags; and every variable of pretrain.sh --help, set.

# --- what to train -------------------------------------------------------------------------------

: "${MODEL:=llama_1b}" "${ACTIVATION:=xielu}"
model_file=$here/models/$MODEL.sh
[[ $MODEL == */* || $MODEL == *.sh ]] && model_file=$MODEL
[[ $model_file == */* ]] || model_file=./$model_file # or source takes one of PATH's
[[ -f $model_file ]] || die 2 "MODEL=$MODEL: no file $model_file; there are: $(cd "$here/models" && echo *.sh)"
"$PYTHON" -m megatron_xielu.plan.variables pretrain.sh "$model_file" \
    here="$here" MODEL="$MODEL" ACTIVATION="$ACTIVATION" PYTHON="$PYTHON" || {
    (($? == 2)) && exit 2
    die 2 "PYTHON=$PYTHON does not work, or is older than 3.9"
}
given_port=${MASTER_PORT:-} given_mock=${MOCK_DATA:-0}
given_tokenizer=${TOKENIZER:-}${VOCAB_SIZE:-} given_padding=${PADDED_VOCAB_SIZE:-}${VOCAB_SIZE:-}
# Tokens a step, the learning rate chosen for them, and its tokenizer, before the environment has its say.
# shellcheck source=models/llama_1b.sh
own=$({
    unset GLOBAL_BATCH SEQ_LENGTH LR TOKENIZER
    source "$model_file" >/dev/null
    echo "$((GLOBAL_BATCH * SEQ_LENGTH)) $LR ${TOKENIZER:-}"
} 2>/dev/null) || own=''
read -r made_for made_for_lr own_tokenizer <<<"$own"
# shellcheck source=models/llama_1b.sh
source "$model_file"

: "${DEVICE:=gpu}" "${PRECISION:=bf16}" "${FP8_RECIPE:=}" "${DECAY_NORMS:=0}" "${SEED:=42}" "${SPLIT:=990,10,0}"
: "${own_tokenizer:=mistralai/Mistral-Nemo-Base-2407}" "${TOKENIZER:=$own_tokenizer}"
: "${PADDED_VOCAB_SIZE:=}" "${VOCAB_SIZE:=}"
: "${DATA_ARGS:=}" "${DATA:=}" "${MOCK_DATA:=0}" "${DOCUMENT_MASK:=0}" "${WANDB_PROJECT:=}"
: "${NNODES:=1}" "${GPUS_PER_NODE:=8}" "${NODE_RANK:=0}" "${MASTER_ADDR:=}"
: "${MASTER_PORT:=29500}" "${LOCAL_ADDR:=}" "${PREFLIGHT:=1}" "${NETWORK:=}"
: "${SAVE_INTERVAL:=1000}" "${KEEP_LAST:=3}" "${KEEP_EVERY:=5000}" "${LOG_INTERVAL:=10}"
: "${EVAL_INTERVAL:=1000}" "${EVAL_ITERS:=20}" "${TIMEOUT_MINUTES:=10}"
: "${OPTIMIZER_FORMAT:=dp}" "${BUCKET_SIZE:=40000000}"
: "${RENDEZVOUS_TIMEOUT:=600}" "${PROFILE_STEPS:=}"
[[ $DEVICE == cpu ]] && : "${STRAGGLER_RATIO:=0}" # ranks that share cores differ
: "${STRAGGLER_RATIO:=1.2}"
: "${IN_JOB_RESTARTS:=3}" "${RESTART_BUDGET:=3}" "${INPROCESS_RESTART:=0}"
: "${RUN_DIR:=runs/$(basename "$MODEL" .sh)-$ACTIVATION}"
own_cache=$RUN_DIR/cache # whole in checkpoints, for an evaluation that starts elsewhere
[[ $RUN_DIR == /* ]] || own_cache=$PWD/$own_cache
: "${DATA_CACHE:=$own_cache}"
: "${LOSS_FUSION:=1}" "${GC_INTERVAL:=500}" "${NAN_CHECK:=1}" "${NUMA_BINDING:=}"
: "${ENTRY:=-m megatron_xielu.pretrain_gpt}"

for name in DATA_ARGS DATA; do
    [[ ${!name##*/} == manifest.json && -f ${!name} ]] && printf -v "$name" %s "$(dirname -- "${!name}")"
done
[[ -z $DATA_ARGS && -f $DATA/manifest.json ]] && DATA_ARGS=$DATA DATA=''
[[ -f $DATA_ARGS/manifest.json ]] && DATA_ARGS=$DATA_ARGS/per_split_data_args.json
# What the data were made with comes after what was given, and before the model file; where its
# tokenizer is the data's, too, its padding stays.
read -rd '' -a prefixes <<<"$DATA" || true # on lines of their own, too
if [[ -n $DATA_ARGS$DATA ]] &&
    IFS=$'\t' read -r data_folder data_padding < <("$PYTHON" -c '
import sys
from megatron_xielu.common import data_lists, prepared_data
own, given, data_args, *prefixes = sys.argv[1:]
if found := data_lists.prepared_with(data_args, prefixes):
    folder, made_with = found
    is_own, is_given = (prepared_data.is_one_of(name, made_with) for name in (own, given))
    if not is_own and (is_given or not given):
        print(folder, prepared_data.padded(made_with[0].vocab_size), sep="\t")
' "$own_tokenizer" "${given_tokenizer:+$TOKENIZER}" "$DATA_ARGS" "${prefixes[@]}") &&
    [[ -d $data_folder/tokenizer ]]; then
    taken=''
    if [[ -z $given_tokenizer ]]; then
        TOKENIZER=$data_folder/tokenizer taken=" TOKENIZER=$TOKENIZER"
    fi
    if [[ -z $given_padding ]]; then
        PADDED_VOCAB_SIZE=$data_padding
        taken+=" PADDED_VOCAB_SIZE=$PADDED_VOCAB_SIZE"
    fi
    [[ -n $taken ]] && echo "pretrain.sh: taken from $data_folder/manifest.json:$taken" >&2
fi

no_master=''
((NNODES > 1)) && [[ -z $MASTER_ADDR ]] &&
    no_master="NNODES=$NNODES needs MASTER_ADDR, the address of node 0"
MASTER_ADDR=${MASTER_ADDR#[} MASTER_ADDR=${MASTER_ADDR%]} # of IPv6
: "${MASTER_ADDR:=localhost}"
if [[ -z $given_port ]] && ((NNODES == 1 && !dry_run)); then
    MASTER_PORT=$("$PYTHON" -c '
import random, socket
while True:
    port = random.randrange(20000, 30000, 2)
    try:
        for number in (port, port + 1):
            with socket.socket() as one:
                one.bind(("", number))
        break
    except OSError:
        pass
print(port)')
fi

ours=0
[[ $ENTRY == "-m megatron_xielu.pretrain_gpt" ]] && ours=1
ffn_size=$((GATED_FFN_SIZE * 3 / 2)) # two matrices of this width are three of the gated one's
case $ACTIVATION in
    xielu | xiprelu)
        if ((ours)); then
            activation=("--$ACTIVATION")
        else
            activation=(--spec megatron_xielu.layer_specs "${ACTIVATION}_layer_spec" --use-te-activation-func)
        fi
        ;;
    relu2) activation=(--squared-relu) ;;
    gelu) activation=() ;;
    swiglu) activation=(--swiglu) ffn_size=$GATED_FFN_SIZE ;;
esac
((GATED_FFN_SIZE % 2 == 0)) || die 2 "GATED_FFN_SIZE=$GATED_FFN_SIZE must be even for equal parameters"

samples() { # tokens, numerator, denominator: in whole batches, rounded up
    awk -v tokens="$1" -v top="$2" -v bottom="$3" -v sequence="$SEQ_LENGTH" -v batch="$GLOBAL_BATCH" '
        BEGIN { steps = tokens * top / bottom / sequence / batch
                printf "%.0f", (steps > int(steps) + 1e-6 ? int(steps) + 1 : int(steps)) * batch }'
}
train_samples=$(samples "$TOKENS" 1 1)
warmup_samples=$(samples "$TOKENS" "$WARMUP_STEPS" "$STEPS")
decay_samples=$(samples "$TOKENS" "$DECAY_STEPS" "$STEPS")

# Groups are said also where there are as many as heads, which is plain attention: reports compare runs by
# it, and a checkpoint of other NUM_KV_HEADS is refused only then.
megatron=(
    --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --ffn-hidden-size "$ffn_size"
    --num-attention-heads "$NUM_HEADS" --group-query-attention --num-query-groups "$NUM_KV_HEADS"
    --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
    --position-embedding-type rope --rotary-base "$ROTARY_BASE"
    --normalization RMSNorm --norm-epsilon 1e-6 --init-method-std 0.025
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    "${activation[@]}"
    --train-samples "$train_samples" --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --lr "$LR" --min-lr 0 --lr-warmup-samples "$warmup_samples" --lr-decay-samples "$train_samples"
    --lr-decay-style WSD --lr-wsd-decay-style minus_sqrt --lr-wsd-decay-samples "$decay_samples"
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0
    --seed "$SEED"
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --ddp-bucket-size "$BUCKET_SIZE" # Megatron's own changes with the node count, and checkpoints with it
    # Until the first step is done, which waits for rank 0's index of the data and for compilers.
    --distributed-timeout-minutes "$((TIMEOUT_MINUTES > 30 ? TIMEOUT_MINUTES : 30))"
    --distributed-timeout-seconds-after-init "$((TIMEOUT_MINUTES * 60))"
    --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
    --ckpt-format torch_dist --ckpt-assume-constant-structure --exit-signal-handler
    --ckpt-fully-parallel-load
    --log-interval "$LOG_INTERVAL" --log-throughput
    --tensorboard-dir "$RUN_DIR/tensorboard" --tensorboard-log-interval "$LOG_INTERVAL"
    --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard # time of a step, TFLOP/s, perplexity
    --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS"
    # Megatron's own place is beside the data, which may be read-only here or on another node.
    --data-cache-path "$DATA_CACHE"
)
# Attention is causal without a mask, on every backend: s × s bytes a sample that nobody reads. Only
# Megatron's local attention reads those of --reset-attention-mask.
[[ " ${trailing[*]} " == *' --reset-attention-mask '* ]] || megatron+=(--no-create-attention-mask-in-dataloader)
# Python's own collector stops each rank at another step, and all the others wait for it.
((GC_INTERVAL == 0)) || megatron+=(--manual-gc --manual-gc-interval "$GC_INTERVAL")
# The check waits for the GPU twice a micro-batch, and twice a gradient bucket of each step.
((NAN_CHECK)) || megatron+=(--no-check-for-nan-in-loss-and-grad)
if [[ $DEVICE == gpu ]]; then
    megatron+=(--log-memory-to-tensorboard)
    # Megatron's own, compiled by PyTorch; 0.19 refuses Transformer Engine's, with which trainings
    # were not stable (NVIDIA/Megatron-LM #5115). Its gradients are bf16 whatever the logits are.
    ((LOSS_FUSION)) && [[ $PRECISION != fp32 ]] &&
        megatron+=(--cross-entropy-loss-fusion --cross-entropy-fusion-impl native)
fi
((TIE_EMBEDDINGS)) || megatron+=(--untie-embeddings-and-output-weights)
((TP > 1)) && megatron+=(--sequence-parallel)
((TP > 1 && ours)) && [[ $ACTIVATION == xi* ]] && megatron+=(--xielu-check-tp-sync 1000)
[[ -n $PADDED_VOCAB_SIZE ]] && megatron+=(--padded-vocab-size "$PADDED_VOCAB_SIZE")
[[ $PRECISION == fp32 ]] || megatron+=(--bf16)
[[ -z $FP8_RECIPE || $PRECISION == fp8 ]] || die 2 "FP8_RECIPE=$FP8_RECIPE needs PRECISION=fp8"
if [[ $PRECISION == fp8 ]]; then
    : "${FP8_RECIPE:=tensorwise}"
    [[ " ${trailing[*]} " != *' --fp8-recipe'[\ =]* ]] ||
        die 2 "give FP8_RECIPE=…, not --fp8-recipe: the preflight and other flags go by it"
    # As NVIDIA's recipes have them: hybrid has gradients in E5M2, which mxfp8's blocks do not need.
    if [[ $FP8_RECIPE == mxfp8 ]]; then fp8_format=e4m3; else fp8_format=hybrid; fi
    megatron+=(--fp8-format "$fp8_format" --fp8-recipe "$FP8_RECIPE")
    [[ $FP8_RECIPE != tensorwise ]] || megatron+=(--first-last-layers-bf16) # one scale a tensor is coarse
fi
if ((ours)) && [[ $STRAGGLER_RATIO != 0 ]]; then megatron+=(--straggler-ratio "$STRAGGLER_RATIO"); fi
if ((DECAY_NORMS)); then
    ((ours)) || die 2 "DECAY_NORMS=1 needs this package's entry, not ENTRY=$ENTRY"
    megatron+=(--apply-wd-to-norms)
fi
[[ $OPTIMIZER_FORMAT != full ]] || megatron+=(--dist-ckpt-optim-fully-reshardable)
[[ $DEVICE != cpu ]] || megatron+=(--cpu)
if [[ $TOKENIZER == null ]]; then
    [[ -n $VOCAB_SIZE ]] || die 2 "TOKENIZER=null needs VOCAB_SIZE"
    megatron+=(--tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE")
else
    megatron+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
fi
[[ $given_mock == 1 && -n $DATA_ARGS$DATA ]] && die 2 "give one of MOCK_DATA=1, DATA_ARGS and DATA"
no_data=0
if [[ $DATA_ARGS == *.json ]]; then
    megatron+=(--per-split-data-args-path "$DATA_ARGS")
elif [[ -n $DATA_ARGS ]]; then
    megatron+=(--data-args-path "$DATA_ARGS" --split "$SPLIT")
elif [[ -n $DATA ]]; then
    megatron+=(--data-path "${prefixes[@]}" --split "$SPLIT")
elif [[ $MOCK_DATA == 1 ]]; then
    megatron+=(--mock-data)
else
    no_data=1
fi
((DOCUMENT_MASK)) && megatron+=(--dataloader-inter-document-masking)
if [[ -n $PROFILE_STEPS ]]; then
    first_profiled=${PROFILE_STEPS%-*} last_profiled=${PROFILE_STEPS#*-}
    megatron+=(--profile --profile-ranks 0)
    # With nsys Megatron's range is from after one step to after another; PyTorch's profiler takes
    # the first, and not the last.
    if [[ $DEVICE == cpu ]]; then
        megatron+=(--use-pytorch-profiler
            --profile-step-start "$first_profiled" --profile-step-end $((last_profiled + 1)))
    else
        megatron+=(--profile-step-start $((first_profiled - 1)) --profile-step-end "$last_profiled")
    fi
fi
[[ -n $WANDB_PROJECT ]] && megatron+=(
    --wandb-project "$WANDB_PROJECT" --wandb-exp-name="$(basename "$RUN_DIR")" --wandb-save-dir "$RUN_DIR")

# --- how it is launched --------------------------------------------------------------------------

# NVIDIA's resiliency extension, where it is installed.
resiliency=$("$PYTHON" -c '
from importlib.metadata import version
print(version("nvidia-resiliency-ext"))' 2>/dev/null || true)
if [[ -n $resiliency ]]; then
    printf '0.6\n%s\n' "$resiliency" | sort -VC ||
        die 2 "nvidia-resiliency-ext $resiliency is installed, at which Megatron fails: install 0.6 or newer, or none"
    : "${FAULT_TOLERANCE:=1}" "${ASYNC_SAVE:=nvrx}"
fi
: "${FAULT_TOLERANCE:=0}" "${ASYNC_SAVE:=mcore}"
[[ $ASYNC_SAVE == 0 ]] ||
    megatron+=(--async-save --use-persistent-ckpt-worker --async-strategy "$ASYNC_SAVE")
launcher=()
((FAULT_TOLERANCE)) && launcher=(--fault-tolerance) megatron+=(--enable-ft-package --calc-ft-timeouts)
((INPROCESS_RESTART)) && megatron+=(--inprocess-restart)
is_host=$((NODE_RANK == 0))
launcher+=(
    --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "$IN_JOB_RESTARTS"
    --rdzv-backend c10d --rdzv-id="${SLURM_JOB_ID:-$(basename "$RUN_DIR")}"
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-conf "is_host=$is_host,join_timeout=$RENDEZVOUS_TIMEOUT"
)
((NNODES == 1)) && : "${LOCAL_ADDR:=127.0.0.1}" # a container's own name often resolves to nothing
[[ -n $LOCAL_ADDR ]] && launcher+=(--local-addr "$LOCAL_ADDR")
if [[ -n $NUMA_BINDING ]]; then
    ((FAULT_TOLERANCE == 0)) || die 2 "NUMA_BINDING=$NUMA_BINDING is torchrun's; add FAULT_TOLERANCE=0, or drop it"
    [[ $DEVICE == gpu ]] || die 2 "NUMA_BINDING=$NUMA_BINDING needs GPUs; drop it"
    launcher+=(--numa-binding "$NUMA_BINDING")
fi
# Signals are for the ranks, which save on SIGTERM; a launcher that handles it would kill them half-way.
((FAULT_TOLERANCE)) || launcher+=(--signals-to-handle SIGQUIT)
read -rd '' -a entry <<<"$ENTRY" || true
command=(
    "$PYTHON" -m megatron_xielu.cluster.launcher "${launcher[@]}"
    -m megatron_xielu.cluster.rank "${entry[@]}" "${megatron[@]}" "${trailing[@]}"
)

if [[ -n $NETWORK ]]; then
    # shellcheck source=network.env.sh
    source "$here/network.env.sh"
fi
plan=("$PYTHON" -m megatron_xielu.plan --nodes "$NNODES" --gpus-per-node "$GPUS_PER_NODE"
    --keep-checkpoints "$KEEP_LAST" --keep-every "$KEEP_EVERY" --from-variables "${#megatron[@]}")
((ours)) || plan+=(--other-entry)
[[ "$made_for $made_for_lr" =~ ^[0-9]+\ [0-9.eE+-]+$ ]] && plan+=(--made-for "$made_for" "$made_for_lr")
plan+=(${GPU:+--gpu "$GPU"} ${GPU_MEMORY_GIB:+--gpu-memory "$GPU_MEMORY_GIB"}
    ${MFU:+--mfu "$MFU"} ${PEAK_TFLOPS:+--peak-tflops "$PEAK_TFLOPS"}
    ${NODE_NETWORK:+--node-network "$NODE_NETWORK"})
