#!/usr/bin/env bash
# Pretrain on hosts that one can ssh to, without a scheduler; starts all of them again after a failure.
#
#   MODEL=llama_1b DATA_ARGS=/data/data_args.txt RUN_DIR=/shared/run1 \
#       examples/torchrun/launch.sh host1 host2 … [-- [--dry-run] MEGATRON FLAGS]
#
# Every host sees the repository and RUN_DIR under the same path as this machine. The environment is
# passed on, through ssh's standard input: keys appear in no process list. Ctrl-C or SIGTERM saves a
# checkpoint and ends; the same command goes on from there.
#
#   MASTER_ADDR    address of the first host that the others reach   [the first host's name]
#   SSH            remote shell   [ssh -o BatchMode=yes -o ServerAliveInterval=15]
#   RESTART_DELAY  seconds before starting again   [10]
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

hosts=()
while (($#)) && [[ $1 != -- ]]; do
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

start() { # rank: run pretrain.sh on that host, as a process group that can be ended as a whole
    local rank=$1 host=${hosts[$1]} name
    shift
    trap '' INT # Ctrl-C reaches every process of the terminal, and ssh must stay
    {
        while IFS= read -r name; do
            [[ $name =~ $private ]] || printf 'export %s=%q\n' "$name" "${!name}"
        done < <(compgen -e)
        printf 'export NODE_RANK=%q MEGATRON_XIELU_NODE=%q\n' "$rank" "$host"
        printf 'mkdir -p %q && echo $$ >%q && cd %q && exec' "$RUN_DIR/pids" "$RUN_DIR/pids/$host" "$PWD"
        printf ' %q' "$home/examples/pretrain.sh" "$@"
        printf '\n'
    } | "${ssh[@]}" "$host" setsid --wait bash -s 2>&1 | sed -u "s/^/$host: /"
    return "${PIPESTATUS[1]}"
}

signal() { # TERM: to pretrain.sh on every host; KILL: to its whole group
    local host sign=''
    [[ $1 == KILL ]] && sign=-
    for host in "${hosts[@]}"; do
        "${ssh[@]}" -o ConnectTimeout=5 "$host" \
            "kill -$1 -- $sign\$(cat '$RUN_DIR/pids/$host')" </dev/null 2>/dev/null || true
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
    signal KILL # what an earlier attempt left behind
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
