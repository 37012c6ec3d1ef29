#!/usr/bin/env bash
# Pretrain a Llama with the activation of choice: this node's part of a job. Run it on every node; the
# front ends in slurm/, torchrun/ and kubernetes/ do just that.
#
#   MODEL=llama_1b ACTIVATION=xielu DATA_ARGS=data examples/pretrain.sh --dry-run
#
# command.sh puts the Megatron command together. Whatever stands after the options
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
#   DOCUMENT_MASK  1: the documents of a sample do not attend to each other   [0, as Megatron]
#   TOKENIZER    Hugging Face name or folder, or null
#                [that of prepared data, else the model file's, or mistralai/Mistral-Nemo-Base-2407]
#   PADDED_VOCAB_SIZE  rows of the embedding   [as TOKENIZER; none: Megatron's, by the tokenizer]
#   NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, GATED_FFN_SIZE (SwiGLU's; the others' is 3/2 of
#   it), SEQ_LENGTH, ROTARY_BASE, TIE_EMBEDDINGS, VOCAB_SIZE, LR, and WARMUP_STEPS and DECAY_STEPS of
#   STEPS, which are shares of TOKENS   [the model file's]
#   SEED   [42]    PRECISION  bf16, fp32 or fp8   [bf16]    DEVICE  gpu or cpu   [gpu]
#   FP8_RECIPE   of PRECISION=fp8: tensorwise, blockwise or (Blackwell) mxfp8   [tensorwise]
#   DECAY_NORMS  1: weight decay for the gains of norms too, as in the paper's runs   [0]
#   ENTRY        training script   [-m megatron_xielu.pretrain_gpt]; Megatron-LM's own gets --spec
# Where
#   NNODES   [1]    GPUS_PER_NODE   [8; on a CPU the processes]    NODE_RANK   [0]
#   MASTER_ADDR   node 0   [localhost, for one node]    LOCAL_ADDR  this node's own address
#   MASTER_PORT   and the preflight takes the next   [29500; for one node two that are free]
#   TP, PP, CP   tensor, pipeline, context parallel sizes    MICRO_BATCH, GLOBAL_BATCH   in samples
#   NETWORK      infiniband, efa, roce, cxi (Slingshot) or ethernet: network.env.sh   [left to NCCL]
#   NUMA_BINDING node, socket, exclusive or core-complex: torchrun ties each rank to the CPUs beside its
#                GPU, with numactl; PyTorch 2.9 and newer   [none]
#   TIMEOUT_MINUTES     a collective that takes longer ends the ranks; before the first step is done
#                       it may take 30   [10]
#   RENDEZVOUS_TIMEOUT  seconds that nodes wait for each other   [600]
#   PREFLIGHT    0 skips the checks before training   [1]    PYTHON   [python3]
#   LAYOUT_CHECK 0 skips one: that checkpoints of this layout keep the optimizer's state   [1]
#   GPU          a100, h100, h200, gh200, b200 or gb200, for the plan's memory, hours and FP8   [h100]
#   GPU_MEMORY_GIB, PEAK_TFLOPS, MFU   of one   [the GPU's; as published for the model's size]
#   NODE_NETWORK   GB/s into a node, for the plan's hours   [a card a GPU, of 400 or 200 Gb/s]
#   On Slurm also SRUN_ARGS, IMAGE and MOUNTS: slurm/pretrain.sbatch --help
#   MEGATRON_XIELU_NODE          this node's name in events and checks   [uname -n]
# How fast
#   LOSS_FUSION  0: without --cross-entropy-loss-fusion, which costs memory, and does not go with
#                --deterministic-mode   [1 on a GPU, 0 in fp32]
#   GC_INTERVAL  steps between collections of Python's garbage, on all ranks at once; 0: Python's own   [500]
#   NAN_CHECK    0: no look for NaN in every loss and gradient (docs/multi-node.md)   [1]
#   CUDA_DEVICE_MAX_CONNECTIONS, TORCH_DISABLE_SHARE_RDZV_TCP_STORE, HF_HUB_OFFLINE, PYTORCH_CUDA_ALLOC_CONF
#   (or PYTORCH_ALLOC_CONF), NCCL_GRAPH_REGISTER of CUDA graphs, NVTE_FWD_LAYERNORM_SM_MARGIN,
#   NVTE_BWD_LAYERNORM_SM_MARGIN, TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR, in this node's TMPDIR
#   [environment.sh; a dry run shows them]
# What is kept
#   RUN_DIR        checkpoints, logs, events; on a file system all nodes share   [runs/MODEL-ACTIVATION]
#   DATA_CACHE     Megatron's index of the data, on such a file system, too; runs may share one   [RUN_DIR/cache]
#   SAVE_INTERVAL  steps between checkpoints   [1000]
#   BUCKET_SIZE    elements of a gradient bucket, the same during a whole run   [the model file's, or 40000000]
#   OPTIMIZER_FORMAT  dp: each rank writes its part, and later jobs may change the node count; full: all
#                  is gathered first, and they may change TP and PP too (docs/checkpoint-formats.md)   [dp]
#   KEEP_LAST, KEEP_EVERY   the last so many are kept, and every so many-th step   [3, 5000]
#   LOG_INTERVAL (TensorBoard's too), EVAL_INTERVAL, EVAL_ITERS   in steps   [10, 1000, 20]
#   STRAGGLER_RATIO  an event tells of each rank that takes so many times the median for its own part of a
#                  step; 0: none   [1.2; on a CPU, or with another ENTRY, 0]
#   PROFILE_STEPS  100-103: rank 0 under nsys in these steps, into RUN_DIR/profiles; on a CPU PyTorch's
#                  profiler, into RUN_DIR/torch_profile   [none]
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

# The package beside this script, be another one installed, or in the folder that this is started in
# (which Python puts first, but for SAFEPATH); last, for an ENTRY of one's own.
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}:$PWD PYTHONSAFEPATH=1
[[ $here =~ /code/([0-9a-f]{12})/examples$ ]] && code_key="code=${BASH_REMATCH[1]}" || code_key=''
: "${PYTHON:=python3}"
command -v "$PYTHON" >/dev/null || die 2 "PYTHON=$PYTHON: there is no such program"

# shellcheck source=command.sh
source "$here/command.sh"
# shellcheck source=environment.sh
source "$here/environment.sh"

if ((dry_run)); then
    printf '%q' "${command[0]}"
    for argument in "${command[@]:1}"; do
        if [[ $argument == -* ]]; then printf ' \\\n   '; fi
        printf ' %q' "$argument"
    done
    printf '\n\nenvironment\n'
    for name in "${environment[@]}"; do printf '  %s=%s\n' "$name" "${!name}"; done
    echo
    "${plan[@]}" -- "${megatron[@]}" "${trailing[@]}"
    [[ -z $PROFILE_STEPS || $DEVICE == cpu ]] ||
        echo "rank 0 runs under nsys in steps $PROFILE_STEPS, which writes to $RUN_DIR/profiles"
    [[ -n $no_master ]] && echo "to set before the run: MASTER_ADDR, the address of node 0"
    ((no_data)) && echo "to set before the run: DATA_ARGS=FILE, DATA=PREFIX or MOCK_DATA=1"
    exit 0
fi
"${plan[@]}" --check -- "${megatron[@]}" "${trailing[@]}" || exit 2
[[ -z $no_master ]] || die 2 "$no_master"
((no_data)) && die 2 "no data: set DATA_ARGS=FILE, DATA='PREFIX ...' or MOCK_DATA=1"
[[ ${entry[0]} == -* || -f ${entry[0]} ]] || die 2 "ENTRY=$ENTRY: there is no ${entry[0]}"
[[ -z $PROFILE_STEPS || $DEVICE == cpu ]] || command -v nsys >/dev/null ||
    die 2 "PROFILE_STEPS=$PROFILE_STEPS needs nsys, of NVIDIA's Nsight Systems, which is not on PATH; install it on all nodes, or unset PROFILE_STEPS"
[[ -z $NUMA_BINDING ]] || command -v numactl >/dev/null ||
    die 2 "NUMA_BINDING=$NUMA_BINDING needs numactl, which is not on PATH; install it on all nodes or in the image, or unset NUMA_BINDING"
((NNODES > 1)) || [[ $DEVICE == cpu ]] ||
    "$PYTHON" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null ||
    die 2 "there is no driver of NVIDIA's here (libcuda.so.1); on a machine without a GPU: DEVICE=cpu"

# --- the run -------------------------------------------------------------------------------------

# Everybody may write to /tmp, and what is compiled there is run.
[[ -z $caches ]] || mkdir -m 700 "$caches" 2>/dev/null || [[ -d $caches && -O $caches && ! -L $caches ]] ||
    die 2 "$caches, for compiled kernels, is no folder of this user's, or cannot be made; set another TMPDIR"
export MEGATRON_XIELU_NODE=${MEGATRON_XIELU_NODE:-$(uname -n)}
unwritable="RUN_DIR=$RUN_DIR cannot be written to"
mkdir -p "$RUN_DIR"/{checkpoints,events,logs,tensorboard} 2>/dev/null || die 2 "$unwritable"
for folder in "$RUN_DIR" "$RUN_DIR"/{checkpoints,events,logs,tensorboard}; do
    [[ -w $folder && -x $folder ]] || die 2 "$unwritable: $folder belongs to another user, or is read-only"
done
RUN_DIR=$(cd "$RUN_DIR" && pwd)
export RUN_DIR MEGATRON_XIELU_EVENTS=$RUN_DIR/events/$MEGATRON_XIELU_NODE.log
export MEGATRON_XIELU_FLIGHT_RECORDER=$RUN_DIR/flight_recorder
export MEGATRON_XIELU_FINISHED=$RUN_DIR/events/$MEGATRON_XIELU_NODE.finished
[[ -z $PROFILE_STEPS || $DEVICE == cpu ]] || export MEGATRON_XIELU_PROFILES=$RUN_DIR/profiles
export NNODES GPUS_PER_NODE NODE_RANK MASTER_ADDR MASTER_PORT LOCAL_ADDR DEVICE TP PYTHON # for
export DATA_ARGS DATA TOKENIZER FP8_RECIPE                                                 # preflight.sh
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
end_watch() {
    [[ -z $watch ]] || { kill "$watch" && wait "$watch"; } 2>/dev/null || true
    watch=''
}
# shellcheck disable=SC2329 # called at the end
release() { # waits: the next start repairs this folder, and nobody else may be at work in it
    end_watch
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
event "start${code_key:+ $code_key}" "job ${SLURM_JOB_ID:--} restart ${SLURM_RESTART_COUNT:-0}, node $NODE_RANK of $NNODES, $GPUS_PER_NODE ranks each"

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

watch_command=("$PYTHON" -m megatron_xielu.checkpoints "$RUN_DIR/checkpoints" watch
    --keep-last "$KEEP_LAST" --keep-every "$KEEP_EVERY")
if ((NODE_RANK == 0)); then
    "${watch_command[@]}" &
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
    if [[ -n $finished ]] && ((NODE_RANK == 0)); then
        end_watch
        "${watch_command[@]}" --once || true # what was saved last is checked by no further start
    fi
    [[ -z $finished ]] || finish 0 finished "trained to the last step; checkpoints in $RUN_DIR/checkpoints"
    finish 75 stopped "${launcher_pid:+saved, }to be continued"
fi
finish "$code" failed "the launcher ended with $code; the first failed rank is named above"
