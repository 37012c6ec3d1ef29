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
#   RESTART_BUDGET is pretrain.sh's; so many starts in a row may also fail before it counts them   [3]
#
# What is wrong with other variables every host says, and that ends all. A host that never answered at
# the first start ends it after a minute; later this waits until all answer.
set -euo pipefail
unset CDPATH # with it cd prints, and may go elsewhere
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

die() { # message
    echo "launch.sh: error: $1" >&2
    exit 2
}

hosts=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        -*) die "$1 is no host; flags stand behind --" ;;
    esac
    hosts+=("$1")
    shift
done
[[ ${1:-} == -- ]] && shift
((${#hosts[@]})) || die "name the hosts: examples/torchrun/launch.sh host1 host2 … [-- MEGATRON FLAGS]"
read -rd '' -a ssh <<<"${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15}" || true
: "${RUN_DIR:=runs/${MODEL:-llama_1b}-${ACTIVATION:-xielu}}" "${RESTART_DELAY:=10}" "${RESTART_BUDGET:=3}"
: "${MASTER_ADDR:=${hosts[0]#*@}}"
# By the shell, since this machine may have no Python; pretrain.sh judges all others on the hosts.
host='^([[:alnum:]_.:%-]+@)?[[:alnum:]_:%][[:alnum:]_.:%-]*$'
for name in "${hosts[@]}"; do
    [[ $name =~ $host ]] || die "$name is not a host's name or address"
done
[[ $MASTER_ADDR =~ $host ]] || die "MASTER_ADDR=$MASTER_ADDR is not a host's name or address"
[[ $RESTART_DELAY =~ ^[0-9]{1,9}(\.[0-9]+)?$ ]] || die "RESTART_DELAY=$RESTART_DELAY is not a number of seconds"
[[ $RESTART_BUDGET =~ ^(0|[1-9][0-9]{0,17})$ ]] || die "RESTART_BUDGET=$RESTART_BUDGET is not a whole number"
[[ $RUN_DIR != *[[:cntrl:]]* ]] || die "RUN_DIR has a line end or another control character"
command -v "${ssh[0]}" >/dev/null || die "SSH=${ssh[*]}: there is no such program"
[[ $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR
export RUN_DIR NNODES=${#hosts[@]} MASTER_ADDR NODE_LIST="${hosts[*]}"

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
        printf 'cd %q || exit 2; exec' "$PWD"
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
        printf 'grep -lzxF %q /proc/[0-9]*/environ | cut -d/ -f3 | xargs -r kill -%s' \
            "MEGATRON_XIELU_LAUNCH=$RUN_DIR" "$1" |
            "${ssh[@]}" -o ConnectTimeout=5 "$host" bash -s &>/dev/null || true
    done
}

stopping=0
stop() {
    ((stopping)) || echo "launch.sh: stopping: the ranks save and end" >&2
    stopping=1
    signal TERM
}
trap stop INT TERM

counted() { # what the first host has of the budget
    printf 'cksum %q 2>/dev/null' "$RUN_DIR/attempts" | "${ssh[@]}" -o ConnectTimeout=5 "${hosts[0]}" bash -s || true
}

verdict='' uncounted=0
while :; do
    tries=0
    for host in "${hosts[@]}"; do
        until "${ssh[@]}" -o ConnectTimeout=5 "$host" true </dev/null; do
            ((stopping)) && exit 75
            [[ -n $verdict ]] || ((++tries < 12)) || die "$host does not answer"
            echo "launch.sh: $host does not answer; trying again" >&2
            sleep 5
        done
    done
    signal KILL # of an earlier attempt
    now=$(counted)
    # A start that was killed, or cut off, before pretrain.sh counted it.
    [[ -n $verdict && $verdict != 75 && $now == "$before" ]] && uncounted=$((uncounted + 1)) || uncounted=0
    if ((uncounted && uncounted >= RESTART_BUDGET)); then
        echo "launch.sh: error: $uncounted starts in a row ended before ${hosts[0]} counted the attempt (RESTART_BUDGET); the cause is above" >&2
        exit 4
    fi
    before=$now
    pids=()
    for rank in "${!hosts[@]}"; do
        start "$rank" "$@" &
        pids+=("$!")
    done
    # The first host's exit code is the verdict, or what any refuses (2), or has not (126, 127); a host
    # that fails ends the others.
    verdict=1 refused=''
    left=${#hosts[@]}
    while ((left)); do
        wait -n -p ended && code=0 || code=$?
        [[ -n ${ended:-} ]] || continue # interrupted by a signal
        left=$((left - 1))
        [[ $ended == "${pids[0]}" ]] && verdict=$code
        case $code in
            2 | 126 | 127) refused=2 ;;
        esac
        ((left == 0 || code == 0 || code == 75)) || signal KILL
    done
    case ${refused:-$verdict} in
        0 | 2 | 4) exit "${refused:-$verdict}" ;;
    esac
    ((stopping)) && exit 75
    echo "launch.sh: starting again in $RESTART_DELAY s (exit code $verdict)" >&2
    sleep "$RESTART_DELAY"
done
