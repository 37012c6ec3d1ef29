#!/usr/bin/env bash
# The first hour on a new node: are its numbers right, is it as fast as it should be, does it train, and
# can the result be used? Every step says what it found and what to expect; the first that fails ends it.
#
#   examples/first_hour.sh [FOLDER]                                             # 8 GPUs
#   DEVICE=cpu GPUS_PER_NODE=2 PYTHON=.venv/bin/python examples/first_hour.sh   # none: the way of it
#
# FOLDER gets a log of each step and two runs [runs/first-hour]; made anew, where it was made by this.
# docs/first-hour.md explains the steps, and goes on to two nodes and eleven. Environment:
#   GPUS_PER_NODE   [8; on a CPU the processes]    DEVICE  gpu or cpu   [gpu]    PYTHON   [python3]
#   MASTER_PORT     another for each run on one node   [29500]
#
# Exit codes: 0 every step is as expected; 1 one is not, and names its log; 2 wrong usage.
set -euo pipefail
unset CDPATH # with it cd prints, and may go elsewhere
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${GPUS_PER_NODE:=8}" "${DEVICE:=gpu}" "${PYTHON:=python3}"
export GPUS_PER_NODE DEVICE PYTHON NNODES=1 NODE_RANK=0 MASTER_ADDR=localhost
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}

die() { # code, message
    echo "first_hour.sh: error: $2" >&2
    exit "$1"
}

case ${1:-} in
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    -*) die 2 "$1: takes no options; --help shows its variables" ;;
esac
(($# < 2)) || die 2 "$2: takes one folder"
folder=${1:-runs/first-hour}
[[ $DEVICE == gpu || $DEVICE == cpu ]] || die 2 "DEVICE=$DEVICE: choose gpu or cpu"
command -v "$PYTHON" >/dev/null || die 2 "PYTHON=$PYTHON: there is no such program"
[[ $GPUS_PER_NODE =~ ^[1-9][0-9]{0,3}$ ]] || die 2 "GPUS_PER_NODE=$GPUS_PER_NODE is not a number of processes"
# What a shell that is set up for a run may have exported, and would change what is expected below.
for name in $("$PYTHON" -c 'from megatron_xielu.plan.variables import VARIABLES; print(*VARIABLES)'); do
    case $name in
        GPUS_PER_NODE | DEVICE | PYTHON | NNODES | NODE_RANK | MASTER_* | LOCAL_ADDR) ;;
        *) unset "$name" ;;
    esac
done
"$PYTHON" -m megatron_xielu.plan.variables first_hour.sh || [[ $? != 2 ]] || exit 2
[[ $DEVICE == cpu ]] || "$PYTHON" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null ||
    die 2 "there is no driver of NVIDIA's here (libcuda.so.1); on a machine without a GPU: DEVICE=cpu"
mark=$folder/first_hour # nothing else is ever removed
[[ ! -e $folder || -e $mark ]] || die 2 "$folder is there, and not of this script; name another folder"
rm -rf "$folder"
logs=$folder/logs
{ mkdir -p "$logs" && touch "$mark"; } || die 2 "$folder cannot be written to"

cpu=()
[[ $DEVICE == gpu ]] || cpu=(--cpu)

say() { # step, words
    printf '%-10s %s\n' "$1" "$2"
}

step() { # step, what to expect, command: run it, its output into a log
    local name=$1 expected=$2 begin=$SECONDS
    shift 2
    say "$name" "… $expected"
    "$@" >"$logs/$name.log" 2>&1 || {
        tail -n 5 "$logs/$name.log" | cut -c1-200
        say "$name" "FAILED; all it said: $logs/$name.log"
        exit 1
    }
    say "$name" "ok, $((SECONDS - begin)) s"
}

steps_of() { # log: lm loss of each iteration
    sed -nE 's/.* iteration +[0-9]+\/.*lm loss: ([0-9.E+-]+).*/\1/p' "$1"
}

within() { # step, what, value, least, most
    awk -v x="$3" -v least="$4" -v most="$5" 'BEGIN { exit !(x >= least && x <= most) }' || {
        say "$1" "FAILED: $2 is ${3:-missing}, and should be from $4 to $5; $logs/$1.log"
        exit 1
    }
    say "$1" "$2 $3, expected $4 to $5"
}

TP=$((GPUS_PER_NODE % 2 ? 1 : 2))
export TP
replicas=$((GPUS_PER_NODE / TP))
batch=$(((15 + replicas) / replicas * replicas)) # 16 samples, or the next that all replicas share
step numbers 'both activations against float64, and their gradients over all ranks' \
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS_PER_NODE" -m megatron_xielu.selftest
if [[ $DEVICE == gpu ]]; then
    step speed 'the activation at 0.9 or more of a copy of the same bytes (a target, see docs/benchmarks)' \
        "$PYTHON" "$here/../tools/bench/bench_activation.py" --device cuda --op --dtypes bfloat16 \
        --shapes 8192x9216 --providers copy ours-triton --rounds 10 --output "$logs/speed"
    cat "$logs/speed/cuda.txt"
fi
step preflight 'every check ok; bandwidth as in docs/first-hour.md' \
    env RUN_DIR="$folder/debug" "$here/preflight.sh"
grep -E '^ok +(gpus|collectives|alphas)' "$logs/preflight.log"

# The whole machinery, on data that is made up and learnable.
step train '100 steps of MODEL=debug' \
    env MODEL=debug ACTIVATION=xielu RUN_DIR="$folder/debug" TOKENS=$((100 * batch * 64)) STEPS=100 \
    WARMUP_STEPS=10 DECAY_STEPS=20 SAVE_INTERVAL=50 EVAL_INTERVAL=50 GLOBAL_BATCH=$batch \
    MICRO_BATCH=$((batch / replicas)) PREFLIGHT=0 "$here/pretrain.sh"
losses=$(steps_of "$logs/train.log")
within train 'first loss (ln 256 = 5.55 knows nothing)' "$(head -n 1 <<<"$losses")" 5.45 5.70
within train 'last loss' "$(tail -n 1 <<<"$losses")" 0.75 1.05
step evaluate 'the loss of the last checkpoint, near the last loss' \
    "$PYTHON" -m megatron_xielu.evaluate --load "$folder/debug/checkpoints" --eval-iters 2 "${cpu[@]}"
grep '^loss' "$logs/evaluate.log"
step report 'a page of losses and alphas' "$PYTHON" -m megatron_xielu.report "$folder/debug"
step convert 'a folder for transformers' \
    "$PYTHON" -m megatron_xielu.convert to-hf "$folder/debug/checkpoints" "$folder/debug/hf"

if [[ $DEVICE == gpu ]]; then
    step paper '20 steps of the paper'\''s 1.1B on made-up data: 300 to 450 TFLOP/s a GPU on H100s' \
        env MODEL=llama_1b ACTIVATION=xielu RUN_DIR="$folder/llama_1b" MOCK_DATA=1 TOKENIZER=null VOCAB_SIZE=131071 \
        TP=1 GLOBAL_BATCH=$((10 * GPUS_PER_NODE)) TOKENS=$((20 * 10 * GPUS_PER_NODE * 4096)) LOG_INTERVAL=5 \
        PREFLIGHT=0 "$here/pretrain.sh"
    grep -oE 'iteration +[0-9]+/.*TFLOP/s/GPU\): [0-9.]+' "$logs/paper.log" | tail -n 2
fi
say end "look at $folder/debug/report/report.html; next: docs/first-hour.md"
