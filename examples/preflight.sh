#!/usr/bin/env bash
# Check this node, and the network to the others, before a run: versions, clocks, shared directory,
# data, GPUs, collectives, tensor-parallel alphas. Run it on every node at the same time, as pretrain.sh
# does; on one node it can be run by hand. It takes seconds to a minute, and names the node that is at fault.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 RUN_DIR=/shared/run1 examples/preflight.sh --min-bandwidth 100
#
# Flags go to megatron_xielu.cluster.preflight; --help shows them. The arguments of the training may
# follow after --: then the first rank also checks that checkpoints of its layout keep the optimizer's
# state. Environment:
#   NNODES   [1]    GPUS_PER_NODE   [8; on a CPU the processes]    NODE_RANK   [0]
#   MASTER_ADDR   node 0   [localhost, for one node]    MASTER_PORT   one below the port used here   [29500]
#   LOCAL_ADDR    this node's own address, where its name leads elsewhere
#   RUN_DIR       checked, and where every node leaves a sign of life
#   DEVICE        gpu or cpu   [gpu]    TP   tensor parallel size   [1]    PYTHON   [python3]
#   DATA_ARGS, DATA, TOKENIZER    as for pretrain.sh
#   FP8_RECIPE    the GPUs and Transformer Engine must have it: tensorwise, blockwise or mxfp8
#   NEED_GIB, MIN_DISK_MBPS, MIN_BANDWIDTH   as --need-gib and so on
#   LAYOUT_CHECK  0: not that   [1]
#   NODE_LIST     names of all nodes, as MEGATRON_XIELU_NODE or their host names, parted by spaces or
#                 commas: those that do not join are then named
#   MEGATRON_XIELU_NODE   this node's name   [uname -n]    OMP_NUM_THREADS   [1]
#   PREFLIGHT_TIMEOUT   seconds to wait for all nodes   [120]
#
# Exit codes: 0 all checks passed; 1 one failed, or a node did not join; 2 wrong usage.
set -euo pipefail
unset CDPATH # with it cd prints, and may go elsewhere
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${NNODES:=1}" "${GPUS_PER_NODE:=8}" "${NODE_RANK:=0}" "${MASTER_ADDR:=}"
: "${MASTER_PORT:=29500}" "${LOCAL_ADDR:=}" "${RUN_DIR:=}" "${DEVICE:=gpu}" "${TP:=1}"
: "${PYTHON:=python3}" "${PREFLIGHT_TIMEOUT:=120}" "${NODE_LIST:=}"
export NODE_RANK
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MEGATRON_XIELU_NODE=${MEGATRON_XIELU_NODE:-$(uname -n)}

die() { # message
    echo "preflight.sh: error: ${1//[[:cntrl:]]/?}" >&2
    exit 2
}

own=()
for argument in "$@"; do
    [[ $argument == -- && ${LAYOUT_CHECK:-1} == 0 ]] && break
    own+=("$argument")
    if [[ $argument == --help || $argument == -h ]]; then
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exec "$PYTHON" -m megatron_xielu.cluster.preflight --help
    fi
done

command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON: there is no such program"
"$PYTHON" -m megatron_xielu.plan.variables preflight.sh || {
    (($? == 2)) && exit 2
    die "PYTHON=$PYTHON does not work, or is older than 3.9"
}
[[ -n $MASTER_ADDR || $NNODES == 1 ]] || die "NNODES=$NNODES needs MASTER_ADDR, the address of node 0"
: "${MASTER_ADDR:=localhost}"
MASTER_ADDR=${MASTER_ADDR#[} MASTER_ADDR=${MASTER_ADDR%]} # of IPv6
flags=(--tensor-model-parallel-size "$TP")
[[ $DEVICE != cpu ]] || flags+=(--cpu)
[[ -n $RUN_DIR ]] && flags+=(--run-dir "$RUN_DIR")
[[ -n ${FP8_RECIPE:-} ]] && flags+=(--fp8-recipe "$FP8_RECIPE")
[[ -n ${NEED_GIB:-} ]] && flags+=(--need-gib "$NEED_GIB")
[[ -n ${MIN_DISK_MBPS:-} ]] && flags+=(--min-disk-mbps "$MIN_DISK_MBPS")
[[ -n ${MIN_BANDWIDTH:-} ]] && flags+=(--min-bandwidth "$MIN_BANDWIDTH")
[[ -n ${TOKENIZER:-} && $TOKENIZER != null ]] && flags+=(--tokenizer-model "$TOKENIZER")
if [[ ${DATA_ARGS:-} == *.json ]]; then
    flags+=(--per-split-data-args-path "$DATA_ARGS")
elif [[ -n ${DATA_ARGS:-} ]]; then
    flags+=(--data-args-path "$DATA_ARGS")
elif [[ -n ${DATA:-} ]]; then
    read -rd '' -a prefixes <<<"$DATA" || true # on lines of their own, too
    flags+=(--data-path "${prefixes[@]}")
fi
# The ranks would all say it, where the filter below hides it.
RANK=0 LOCAL_RANK=0 WORLD_SIZE=$((NNODES * GPUS_PER_NODE)) LOCAL_WORLD_SIZE=$GPUS_PER_NODE \
    MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT "$PYTHON" -c 'from megatron_xielu.cluster.preflight.__main__ import parse; parse()' \
    "${flags[@]}" "${own[@]}" || exit 2

# Signs of life: RUN_DIR/preflight/NODE, renewed while this node waits. Their times are the file
# system's own, so the nodes' clocks do not matter.
signs=$RUN_DIR/preflight
started=''
outer=${MEGATRON_XIELU_GUARD:-}
export MEGATRON_XIELU_GUARD=${outer:-$MEGATRON_XIELU_NODE-$$}.preflight$$
if [[ -n $RUN_DIR ]]; then
    # shellcheck disable=SC2016 # expanded by the inner shell
    started=$(timeout 10 bash -c 'mkdir -p "$0" && touch "$0/$1" && stat -c %Y "$0/$1"' \
        "$signs" "$MEGATRON_XIELU_NODE" 2>/dev/null || true)
    (while sleep 2 && kill -0 $$; do touch "$signs/$MEGATRON_XIELU_NODE" || exit; done) >/dev/null 2>&1 &
fi
# Kills that and the ranks when this script has ended, whatever ends it.
"$PYTHON" -m megatron_xielu.cluster.guard $$ >/dev/null &
guard=$!
clean_up() {
    { kill -USR2 "$guard" && wait "$guard"; } 2>/dev/null || true
}
trap clean_up EXIT

name_the_missing() {
    local node sign nodes=() answered=() missing=()
    # A site's own form of many names in one names nobody.
    [[ $NODE_LIST == *[][*?]* ]] || read -rd '' -a nodes <<<"${NODE_LIST//,/ }" || true
    if [[ -z $started ]]; then
        echo "FAIL join         $MEGATRON_XIELU_NODE: not all of $NNODES nodes joined within $PREFLIGHT_TIMEOUT s; RUN_DIR is not set or not writable here, so which of them is not known" >&2
        return
    fi
    for sign in "$signs"/*; do
        (($(stat -c %Y "$sign") >= started)) && answered+=("${sign##*/}")
    done
    for node in "${nodes[@]}"; do
        [[ " ${answered[*]} " == *" $node "* ]] || missing+=("$node")
    done
    echo "FAIL join         $MEGATRON_XIELU_NODE: not all of $NNODES nodes joined within $PREFLIGHT_TIMEOUT s; did not answer: ${missing[*]:-not known${nodes:+, all have started}}; answered: ${answered[*]}" >&2
    echo "     join         look at the missing nodes first (up? in the job? RUN_DIR mounted?), then at the way to $MASTER_ADDR port $((MASTER_PORT + 1))" >&2
}

launcher=(
    --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts 0
    --rdzv-backend c10d --rdzv-id "preflight-${SLURM_JOB_ID:-}"
    --rdzv-endpoint "$MASTER_ADDR:$((MASTER_PORT + 1))"
    --rdzv-conf "is_host=$((NODE_RANK == 0)),join_timeout=$PREFLIGHT_TIMEOUT,read_timeout=10"
)
[[ -n $LOCAL_ADDR ]] && launcher+=(--local-addr "$LOCAL_ADDR")

# The launcher's own report of a failed rank is forty lines that hide ours: dropped, but for the rank
# that a signal ended. Status 3: the nodes did not find each other; 4: the port is taken.
# shellcheck disable=SC2016 # awk's own variables
filter='
    /^preflight: .* has joined$/ { joined = 1; next }
    /EADDRINUSE/ { taken = 1 }
    /failed \(exitcode: / { if (/exitcode: -/) print; quiet = 1 }
    /^torch\.distributed\..*(Rendezvous(Timeout|Connection|Closed)Error|DistNetworkError)/ { lost = 1 }
    /Sending process .* closing signal|has failed to (shutdown the|send a keep-alive heartbeat to the) rendezvous|^\*+$|OMP_NUM_THREADS|No CUDA runtime is found|^\[?W.*(TCPStore|socket)/ { next }
    /^(frame #|Exception raised from|<omitting python)|^\[E.*(TCPStore|socket)\.cpp/ { next }
    /^Traceback/ { held = $0; next }
    held != "" { if (/runpy|torch.distributed/) quiet = 1; else if (!quiet) print held; held = "" }
    !quiet { print; fflush() }
    END { exit joined || !lost ? 0 : taken ? 4 : 3 }'
# Node 0 may start later than the others, but does not go away later: found here, the store is then
# given up soon (read_timeout).
if ((NODE_RANK)); then
    # shellcheck disable=SC2016 # expanded by the inner shell
    until timeout 5 bash -c ': <"/dev/tcp/$0/$1"' "$MASTER_ADDR" $((MASTER_PORT + 1)) 2>/dev/null; do
        if ((SECONDS >= PREFLIGHT_TIMEOUT)); then
            name_the_missing
            exit 1
        fi
        sleep 0.5
    done
fi
exec 3> >(MEGATRON_XIELU_GUARD=$outer exec awk "$filter" >&2) # which ends when all others have
filter_pid=$!
"$PYTHON" -m torch.distributed.run "${launcher[@]}" -m megatron_xielu.cluster.preflight \
    "${flags[@]}" "${own[@]}" 2>&3 && code=0 || code=$?
exec 3>&-
clean_up # a launcher that was killed leaves its ranks
wait "$filter_pid" && reason=0 || reason=$?
((reason == 3 && code)) && name_the_missing
((reason == 4 && code)) &&
    echo "FAIL join         $MEGATRON_XIELU_NODE: port $((MASTER_PORT + 1)) is taken by another program; choose another MASTER_PORT" >&2
((code == 0)) || exit 1
