#!/usr/bin/env bash
# Pretrain on hosts that one can ssh to, without a scheduler; starts all of them again after a failure.
#
#   MODEL=llama_1b DATA_ARGS=/data/fineweb RUN_DIR=/shared/run1 \
#       examples/torchrun/launch.sh host1 host2 … [-- [--dry-run] MEGATRON FLAGS]
#
# Every host sees the repository and RUN_DIR under the same path as this machine. The environment is
# passed on, through ssh's standard input: keys appear in no process list. Ctrl-C or SIGTERM saves a
# checkpoint and ends; the same command goes on from there.
#
#   RUN_DIR        a relative one is of this folder   [runs/MODEL-ACTIVATION]
#   MASTER_ADDR    address of the first host that the others reach   [the first host's name]
#   SSH            remote shell   [ssh -o BatchMode=yes -o ServerAliveInterval=15]
#   RESTART_DELAY  seconds before starting again   [10]
set -euo pipefail
unset CDPATH # with it cd prints, and may go elsewhere
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

hosts=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -*)
            echo "launch.sh: error: $1 is no host; flags stand behind --" >&2
            exit 2
            ;;
    esac
    hosts+=("$1")
    shift
done
[[ ${1:-} == -- ]] && shift
if ((${#hosts[@]} == 0)); then
    echo "launch.sh: error: name the hosts: examples/torchrun/launch.sh host1 host2 … [-- MEGATRON FLAGS]" >&2
    exit 2
fi
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15}"
: "${RUN_DIR:=runs/${MODEL:-llama_1b}-${ACTIVATION:-xielu}}" "${RESTART_DELAY:=10}"
[[ $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR
export RUN_DIR NNODES=${#hosts[@]} MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}} NODE_LIST="${hosts[*]}"

if [[ " $* " == *' --dry-run '* ]]; then
    printf 'on %s: NODE_RANK=0…%d MASTER_ADDR=%s\n\n' "$NODE_LIST" $((NNODES - 1)) "$MASTER_ADDR"
    exec "$home/examples/pretrain.sh" "$@"
fi

# What belongs to this machine and this shell, not to the run.
private='^(HOME|USER|LOGNAME|SHELL|PWD|OLDPWD|SHLVL|TERM|DISPLAY|HOSTNAME|MAIL|TMPDIR|SSH.*|XDG_.*|BASH.*|_)$'

start() { # rank: run pretrain.sh on that host; it stays there when the connection breaks
    local rank=$1 host=${hosts[$1]} name
    shift
    trap '' INT # Ctrl-C reaches every process of the terminal, and ssh must stay
    {
        while IFS= read -r name; do
            [[ $name =~ $private ]] || printf 'export %s=%q\n' "$name" "${!name}"
        done < <(compgen -e)
        printf 'export NODE_RANK=%q MEGATRON_XIELU_NODE=%q MEGATRON_XIELU_LAUNCH=%q\n' "$rank" "$host" "$RUN_DIR"
        printf 'cd %q && exec' "$PWD"
        printf ' %q' "$home/examples/pretrain.sh" "$@"
        printf '\n'
    } | "${ssh[@]}" "$host" setsid --wait bash -s 2>&1 | sed -u "s/^/$host: /"
    return "${PIPESTATUS[1]}"
}

# By an environment variable: ranks lead sessions of their own, and a checkpoint writer outlives its
# rank. Every process of the run gets the signal, as from Slurm.
signal() { # TERM or KILL
    local host
    for host in "${hosts[@]}"; do
        "${ssh[@]}" -o ConnectTimeout=5 "$host" \
            "grep -lzxF 'MEGATRON_XIELU_LAUNCH=$RUN_DIR' /proc/[0-9]*/environ | cut -d/ -f3 | xargs -r kill -$1" \
            </dev/null 2>/dev/null || true
    done
}

stopping=0
stop() {
    ((stopping)) || echo "launch.sh: stopping: the ranks save and end" >&2
    stopping=1
    signal TERM
}
trap stop INT TERM

while :; do
    for host in "${hosts[@]}"; do
        until "${ssh[@]}" -o ConnectTimeout=5 "$host" true </dev/null; do
            ((stopping)) && exit 75
            echo "launch.sh: $host does not answer; trying again" >&2
            sleep 5
        done
    done
    signal KILL # of an earlier attempt
    pids=()
    for rank in "${!hosts[@]}"; do
        start "$rank" "$@" &
        pids+=("$!")
    done
    # The first host's exit code is the verdict; a host that fails ends the others.
    verdict=1
    left=${#hosts[@]}
    while ((left)); do
        wait -n -p ended && code=0 || code=$?
        [[ -n ${ended:-} ]] || continue # interrupted by a signal
        left=$((left - 1))
        [[ $ended == "${pids[0]}" ]] && verdict=$code
        ((left == 0 || code == 0 || code == 75)) || signal KILL
    done
    case $verdict in
        0 | 2 | 4) exit "$verdict" ;;
    esac
    ((stopping)) && exit 75
    echo "launch.sh: starting again in $RESTART_DELAY s (exit code $verdict)" >&2
    sleep "$RESTART_DELAY"
done
