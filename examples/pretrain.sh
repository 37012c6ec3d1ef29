#!/usr/bin/env bash
# Pretrain a Llama with the activation of choice: this node's part of a job. Run it on every node; the
# front ends in slurm/, torchrun/ and kubernetes/ do just that.
#
#   MODEL=llama_1b ACTIVATION=xielu DATA_ARGS=data examples/pretrain.sh --dry-run
#
# This is the only place where the Megatron command is put together. Whatever stands after the options
# is appended to it: `examples/pretrain.sh --lr 5e-4 --seed 1`.
#
# Options
#   --dry-run   print the command and the plan, run nothing
#   --help      this text
#
# What to train (environment)
#   MODEL        llama_1b, llama_3b, debug, or a file like those in models/   [llama_1b]
#   ACTIVATION   xielu, xiprelu, relu2, swiglu, gelu, at equal parameters and FLOPs   [xielu]
#   TOKENS       tokens to train on, 125e9 for example   [the model file's]
#   DATA_ARGS    a folder of tools/prepare_data.py or its manifest.json; or a file for --data-args-path
#                or (*.json) --per-split-data-args-path; or DATA, prefixes for --data-path; or MOCK_DATA=1
#   SPLIT        train, validation, test shares, without such a *.json   [990,10,0]
#   TOKENIZER    Hugging Face name or folder, or null
#                [that of prepared data, else the model file's, or mistralai/Mistral-Nemo-Base-2407]
#   PADDED_VOCAB_SIZE  rows of the embedding   [as TOKENIZER; none: Megatron's, by the tokenizer]
#   NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, GATED_FFN_SIZE (SwiGLU's; the others' is 3/2 of
#   it), SEQ_LENGTH, ROTARY_BASE, TIE_EMBEDDINGS, VOCAB_SIZE, LR, and WARMUP_STEPS and DECAY_STEPS of
#   STEPS, which are shares of TOKENS   [the model file's]
#   SEED   [42]    PRECISION  bf16 or fp32   [bf16]    DEVICE  gpu or cpu   [gpu]
#   ENTRY        training script   [-m megatron_xielu.pretrain_gpt]; Megatron-LM's own gets --spec
# Where
#   NNODES   [1]    GPUS_PER_NODE   [8; on a CPU the processes]    NODE_RANK   [0]
#   MASTER_ADDR   node 0   [localhost, for one node]    LOCAL_ADDR  this node's own address
#   MASTER_PORT   and the preflight takes the next   [29500; for one node two that are free]
#   TP, PP, CP   tensor, pipeline, context parallel sizes    MICRO_BATCH, GLOBAL_BATCH   in samples
#   NETWORK      infiniband, efa, roce or ethernet: network.env.sh   [left to NCCL]
#   TIMEOUT_MINUTES     a collective that takes longer ends the ranks   [10]
#   RENDEZVOUS_TIMEOUT  seconds that nodes wait for each other   [600]
#   PREFLIGHT    0 skips the checks before training   [1]    PYTHON   [python3]
#   LAYOUT_CHECK 0 skips one: that checkpoints of this layout keep the optimizer's state   [1]
#   GPU_MEMORY_GIB, PEAK_TFLOPS, MFU   of a GPU, for the plan's memory and hours   [80, 989, 0.4]
#   MEGATRON_XIELU_NODE          this node's name in events and checks   [uname -n]
#   CUDA_DEVICE_MAX_CONNECTIONS  Megatron's   [1]
# What is kept
#   RUN_DIR        checkpoints, logs, events; on a file system all nodes share   [runs/MODEL-ACTIVATION]
#   SAVE_INTERVAL  steps between checkpoints   [1000]
#   BUCKET_SIZE    elements of a gradient bucket, the same during a whole run   [the model file's, or 40000000]
#   OPTIMIZER_FORMAT  dp: each rank writes its part, and later jobs may change the node count; full: all
#                  is gathered first, and they may change TP and PP too (docs/checkpoint-formats.md)   [dp]
#   KEEP_LAST, KEEP_EVERY   the last so many are kept, and every so many-th step   [3, 5000]
#   LOG_INTERVAL (TensorBoard's too), EVAL_INTERVAL, EVAL_ITERS   in steps   [10, 1000, 20]
#   WANDB_PROJECT  also log to Weights & Biases; its key belongs in WANDB_API_KEY
# When something fails
#   IN_JOB_RESTARTS  restarts of all ranks without leaving the job   [3]
#   RESTART_BUDGET   jobs in a row that may end without a new checkpoint   [3]
#   FAULT_TOLERANCE  1: ft_launcher of nvidia-resiliency-ext, 0: torchrun   [1 where that is installed]
#   ASYNC_SAVE  who writes checkpoints beside the training: nvrx (nvidia-resiliency-ext), mcore
#               (Megatron's own), or 0: nobody, it waits   [nvrx where it is installed, else mcore]
#   INPROCESS_RESTART  1: restart inside the processes (nvidia-resiliency-ext)   [0]
#
# Exit codes: 0 finished; 2 wrong configuration, or RUN_DIR is another training's, and 4 restart budget spent (starting again is useless);
# 75 stopped by SIGTERM, SIGUSR1, SIGINT or SIGHUP after saving (start again to go on); others: failed (start again).
set -euo pipefail
unset CDPATH # with it cd prints, and may go elsewhere
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() { # code, message
    echo "pretrain.sh: error: ${2//[[:cntrl:]]/?}" >&2
    exit "$1"
}

# Until the attempt is counted, whatever fails is a wrong setting: it would fail again, for ever.
counted='' guard_pid='' since=$(date -u +%Y-%m-%dT%H:%M:%SZ)
# shellcheck disable=SC2329 # called at the end
leave() {
    local code=$?
    [[ -z $guard_pid$counted ]] || release
    [[ -n $counted ]] || ((code == 0 || code == 4 || code == 75)) || exit 2
}
trap leave EXIT
trap 'exit 75' TERM USR1 INT HUP

dry_run=0
trailing=()
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=1 ;;
        -h | --help)
            sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --) ;; # as before the flags of launch.sh
        *) trailing+=("$argument") ;;
    esac
done

# Found by its folder when the package is not installed: in a checkout, on a login node.
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}
: "${PYTHON:=python3}"
command -v "$PYTHON" >/dev/null || die 2 "PYTHON=$PYTHON: there is no such program"

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

: "${DEVICE:=gpu}" "${PRECISION:=bf16}" "${SEED:=42}" "${SPLIT:=990,10,0}"
: "${own_tokenizer:=mistralai/Mistral-Nemo-Base-2407}" "${TOKENIZER:=$own_tokenizer}"
: "${PADDED_VOCAB_SIZE:=}" "${VOCAB_SIZE:=}"
: "${DATA_ARGS:=}" "${DATA:=}" "${MOCK_DATA:=0}" "${WANDB_PROJECT:=}"
: "${NNODES:=1}" "${GPUS_PER_NODE:=8}" "${NODE_RANK:=0}" "${MASTER_ADDR:=}"
: "${MASTER_PORT:=29500}" "${LOCAL_ADDR:=}" "${PREFLIGHT:=1}" "${NETWORK:=}"
: "${SAVE_INTERVAL:=1000}" "${KEEP_LAST:=3}" "${KEEP_EVERY:=5000}" "${LOG_INTERVAL:=10}"
: "${EVAL_INTERVAL:=1000}" "${EVAL_ITERS:=20}" "${TIMEOUT_MINUTES:=10}"
: "${OPTIMIZER_FORMAT:=dp}" "${BUCKET_SIZE:=40000000}"
: "${RENDEZVOUS_TIMEOUT:=600}"
: "${IN_JOB_RESTARTS:=3}" "${RESTART_BUDGET:=3}" "${INPROCESS_RESTART:=0}"
: "${RUN_DIR:=runs/$(basename "$MODEL" .sh)-$ACTIVATION}"
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
    --distributed-timeout-minutes "$TIMEOUT_MINUTES"
    --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
    --ckpt-format torch_dist --ckpt-assume-constant-structure --exit-signal-handler
    --ckpt-fully-parallel-load
    --log-interval "$LOG_INTERVAL" --log-throughput
    --tensorboard-dir "$RUN_DIR/tensorboard" --tensorboard-log-interval "$LOG_INTERVAL"
    --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS"
)
((TIE_EMBEDDINGS)) || megatron+=(--untie-embeddings-and-output-weights)
((TP > 1)) && megatron+=(--sequence-parallel)
((TP > 1 && ours)) && [[ $ACTIVATION == xi* ]] && megatron+=(--xielu-check-tp-sync 1000)
[[ -n $PADDED_VOCAB_SIZE ]] && megatron+=(--padded-vocab-size "$PADDED_VOCAB_SIZE")
[[ $PRECISION != bf16 ]] || megatron+=(--bf16)
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
[[ -n ${GPU_MEMORY_GIB:-} ]] && plan+=(--gpu-memory "$GPU_MEMORY_GIB")
[[ -n ${MFU:-} ]] && plan+=(--mfu "$MFU")
[[ -n ${PEAK_TFLOPS:-} ]] && plan+=(--peak-tflops "$PEAK_TFLOPS")

if ((dry_run)); then
    printf '%q' "${command[0]}"
    for argument in "${command[@]:1}"; do
        if [[ $argument == -* ]]; then printf ' \\\n   '; fi
        printf ' %q' "$argument"
    done
    printf '\n\n'
    "${plan[@]}" -- "${megatron[@]}" "${trailing[@]}"
    [[ -n $no_master ]] && echo "to set before the run: MASTER_ADDR, the address of node 0"
    ((no_data)) && echo "to set before the run: DATA_ARGS=FILE, DATA=PREFIX or MOCK_DATA=1"
    exit 0
fi
"${plan[@]}" --check -- "${megatron[@]}" "${trailing[@]}" || exit 2
[[ -z $no_master ]] || die 2 "$no_master"
((no_data)) && die 2 "no data: set DATA_ARGS=FILE, DATA='PREFIX ...' or MOCK_DATA=1"
[[ ${entry[0]} == -* || -f ${entry[0]} ]] || die 2 "ENTRY=$ENTRY: there is no ${entry[0]}"
((NNODES > 1)) || [[ $DEVICE == cpu ]] ||
    "$PYTHON" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null ||
    die 2 "there is no driver of NVIDIA's here (libcuda.so.1); on a machine without a GPU: DEVICE=cpu"

# --- the run -------------------------------------------------------------------------------------

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron overlaps by this order
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1                          # or a replaced node cannot join
export MEGATRON_XIELU_NODE=${MEGATRON_XIELU_NODE:-$(uname -n)}
unwritable="RUN_DIR=$RUN_DIR cannot be written to"
mkdir -p "$RUN_DIR"/{checkpoints,events,logs,tensorboard} 2>/dev/null || die 2 "$unwritable"
for folder in "$RUN_DIR" "$RUN_DIR"/{checkpoints,events,logs,tensorboard}; do
    [[ -w $folder && -x $folder ]] || die 2 "$unwritable: $folder belongs to another user, or is read-only"
done
RUN_DIR=$(cd "$RUN_DIR" && pwd)
export RUN_DIR MEGATRON_XIELU_EVENTS=$RUN_DIR/events/$MEGATRON_XIELU_NODE.log
export MEGATRON_XIELU_FINISHED=$RUN_DIR/events/$MEGATRON_XIELU_NODE.finished
export NNODES GPUS_PER_NODE NODE_RANK MASTER_ADDR MASTER_PORT LOCAL_ADDR DEVICE TP PYTHON # for
export DATA_ARGS DATA TOKENIZER                                                            # preflight.sh
verdict=$RUN_DIR/${MEGATRON_XIELU_VERDICT:-exit_code}
for file in "$RUN_DIR/attempts" "$verdict" "$MEGATRON_XIELU_EVENTS" "$MEGATRON_XIELU_FINISHED"; do
    [[ ! -e $file || -f $file && -w $file ]] || die 2 "$unwritable: $file is a folder, or another user's"
done

event() { # name, reason: as megatron_xielu/common/event_log.py
    local line
    line="$(date -u +%Y-%m-%dT%H:%M:%SZ) node=$MEGATRON_XIELU_NODE rank=- event=$1 reason=\"$2\""
    echo "[event] $line" >&2 || true
    echo "$line" >>"$MEGATRON_XIELU_EVENTS" || true
}

leave_verdict() { # exit code, for the front end; none on a full disk
    ((NODE_RANK)) || { echo "$1" >"$verdict"; } 2>/dev/null || rm -f "$verdict" || true
}

finish() { # exit code, event, reason
    event "$2" "$3"
    leave_verdict "$1"
    exit "$1"
}

reached() { # iteration of the newest checkpoint; 0: none, or a damaged tracker, repaired before the ranks start
    local tracker
    tracker=$(cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || true)
    [[ $tracker =~ ^[0-9]{1,18}$ ]] || tracker=0
    echo $((10#$tracker))
}

stopping=''
launcher_pid=''
preflight=''
terminate_ranks() { # those whose parent is the launcher; pkill is not everywhere
    local stat fields
    for stat in /proc/[0-9]*/stat; do
        fields=''
        { read -rd '' fields <"$stat"; } 2>/dev/null || true
        [[ ${fields##*) } =~ ^.\ ([0-9]+)\  && ${BASH_REMATCH[1]} == "$launcher_pid" ]] || continue
        kill -TERM "${stat//[^0-9]/}" 2>/dev/null || true
    done
}
# shellcheck disable=SC2329 # called by the traps
stop() { # signal
    [[ -n $stopping ]] || event stopping "SIG$1: the ranks save after this step and end"
    stopping=$1
    [[ -z $launcher_pid ]] || terminate_ranks
    [[ -z $preflight ]] || kill -TERM "$preflight" 2>/dev/null || true
}

guard() { # holds RUN_DIR, and kills what is left here when this script has ended, whatever ends it
    local ready
    exec {ready}<> <(:) # a pipe
    "$PYTHON" -m megatron_xielu.cluster.guard $$ --run-dir "$RUN_DIR" --node-rank "$NODE_RANK" \
        --wait "$RENDEZVOUS_TIMEOUT" --since "$since" ${counted:+--again} >&"$ready" &
    guard_pid=$!
    until read -t 0.1 -r _ <&"$ready"; do
        kill -0 "$guard_pid" 2>/dev/null && continue
        wait "$guard_pid" && code=1 || code=$?
        guard_pid=''
        [[ -z $counted ]] || return 0 # Python does not start: tried again, the ranks are at work
        # Another training's files are left as they are, but for the front end's.
        [[ -z ${MEGATRON_XIELU_VERDICT:-} ]] || leave_verdict "$code"
        exit "$code"
    done
    exec {ready}>&-
}

watch=''
# shellcheck disable=SC2329 # called at the end
release() { # waits: the next start repairs this folder, and nobody else may be at work in it
    [[ -z $watch ]] || { kill "$watch" && wait "$watch"; } 2>/dev/null || true
    [[ -z $launcher_pid ]] || kill -KILL "$launcher_pid" 2>/dev/null || true # only if there is no guard
    { kill -USR2 "$guard_pid" && wait "$guard_pid"; } 2>/dev/null || true
}

export MEGATRON_XIELU_GUARD=$MEGATRON_XIELU_NODE-$$-$RANDOM$RANDOM
guard
trap '' PIPE # whoever read the output may have ended by the same signal; the ranks must still be stopped
for signal in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064 # now
    trap "stop $signal" "$signal"
done

# The budget: attempts that were not stopped on purpose, since the newest checkpoint that any of them
# began with. One that falls back past a bad checkpoint and reaches it again has come no further.
attempts=$RUN_DIR/attempts
if ((NODE_RANK == 0)); then
    rm -f "$verdict"
    latest=$(reached)
    touch "$attempts"
    failed=$(awk -v latest="$latest" '$1 > best { best = $1; n = 0 } { n++ } END { print (latest > best ? 0 : n + 0) }' "$attempts")
    ((failed < RESTART_BUDGET)) || finish 4 budget-spent \
        "$failed attempts in a row ended without a checkpoint after iteration $latest; find the cause in $RUN_DIR/events and $RUN_DIR/logs, then delete $attempts"
    { echo "$latest" >>"$attempts"; } 2>/dev/null || die 2 "$unwritable: $attempts; is the disk full?"
fi
counted=1
event start "job ${SLURM_JOB_ID:--} restart ${SLURM_RESTART_COUNT:-0}, node $NODE_RANK of $NNODES, $GPUS_PER_NODE ranks each"

if [[ $PREFLIGHT == 1 && -z $stopping ]]; then
    "$here/preflight.sh" -- "${megatron[@]}" "${trailing[@]}" &
    preflight=$!
    while kill -0 "$preflight" 2>/dev/null; do
        wait "$preflight" || true # a signal ends the wait
    done
    wait "$preflight" && code=0 || code=$?
    preflight=''
    ((code == 0)) || [[ -n $stopping ]] || finish $((code == 2 ? 2 : 3)) preflight-failed "preflight.sh ended with $code, and named the node above"
fi

if ((NODE_RANK == 0)); then
    "$PYTHON" -m megatron_xielu.checkpoints "$RUN_DIR/checkpoints" watch \
        --keep-last "$KEEP_LAST" --keep-every "$KEEP_EVERY" &
    watch=$!
fi

code=75
if [[ -z $stopping ]]; then
    logs=$RUN_DIR/logs/$(date -u +%Y%m%dT%H%M%SZ)-$MEGATRON_XIELU_NODE
    # Started with these ignored, which the ranks inherit: until Megatron has its handler in place
    # a SIGTERM is lost, not fatal, and the loop below repeats it.
    (
        trap '' TERM USR1 INT HUP
        exec "${command[@]:0:3}" --log-dir "$logs" --tee 3 "${command[@]:3}"
    ) &
    launcher_pid=$!
    while kill -0 "$launcher_pid" 2>/dev/null; do
        if [[ -n $stopping ]]; then
            terminate_ranks
            sleep 2 || true # the signal may have been for this, too
        else
            # A signal ends the wait, not the launcher; and old shells miss what ends just before it.
            sleep $((guard_pid ? 10 : 1)) &
            wait -n "$launcher_pid" ${guard_pid:+"$guard_pid"} $! || true
            kill -0 "$guard_pid" 2>/dev/null || guard
        fi
    done
    wait "$launcher_pid" && code=0 || code=$?
fi

if ((code == 0 || code == 75)); then
    finished=''
    [[ $code == 75 || ! -e $MEGATRON_XIELU_FINISHED ]] || finished=1
    if ((NODE_RANK == 0)); then
        [[ -n $finished$stopping ]] || (($(reached) > latest)) ||
            finish 75 stopped "without a signal, and without a checkpoint after iteration $latest: counted as a failure"
        sed -i '$d' "$attempts" || true # not a failure
    fi
    [[ -z $finished ]] || finish 0 finished "trained to the last step; checkpoints in $RUN_DIR/checkpoints"
    finish 75 stopped "${launcher_pid:+saved, }to be continued"
fi
finish "$code" failed "the launcher ended with $code; the first failed rank is named above"
