#!/usr/bin/env bash
# Pretrain on hosts that one can ssh to, without a scheduler; starts all of them again after a failure.
#
#   MODEL=llama_1b DATA_ARGS=/data/fineweb RUN_DIR=/shared/run1 \
#       examples/torchrun/launch.sh host1 host2 … [-- [--dry-run] MEGATRON FLAGS]
#
# Every host sees the repository and RUN_DIR under the same path as this machine. The environment is
# passed on, through ssh's standard input: keys appear in no process list. Ctrl-C, SIGTERM or a closed
# terminal (without nohup) saves a checkpoint and ends; the same command goes on from there. So it does
# when launch.sh was killed, and the hosts train on: they are first asked to save and end.
#
# They run a copy of the repository, RUN_DIR/code/DIGEST, taken when this starts (../snapshot.sh).
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
    echo "launch.sh: error: ${1//[[:cntrl:]]/?}" >&2
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
MASTER_ADDR=${MASTER_ADDR#[} MASTER_ADDR=${MASTER_ADDR%]} # of IPv6
[[ $MASTER_ADDR =~ $host ]] || die "MASTER_ADDR=$MASTER_ADDR is not a host's name or address"
[[ $RESTART_DELAY =~ ^[0-9]{1,9}(\.[0-9]+)?$ ]] || die "RESTART_DELAY=$RESTART_DELAY is not a number of seconds"
[[ $RESTART_BUDGET =~ ^(0|[1-9][0-9]{0,17})$ ]] || die "RESTART_BUDGET=$RESTART_BUDGET is not a whole number"
[[ $RUN_DIR != *[[:cntrl:]]* ]] || die "RUN_DIR has a line end or another control character"
command -v "${ssh[0]}" >/dev/null || die "SSH=${ssh[*]}: there is no such program"
[[ $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR
export RUN_DIR NNODES=${#hosts[@]} MASTER_ADDR NODE_LIST="${hosts[*]}"

if [[ " $* " == *' --dry-run '* ]]; then
    code=$("$home/examples/snapshot.sh" --dry-run "$RUN_DIR") || exit 2
    printf 'on %s: NODE_RANK=0…%d MASTER_ADDR=%s %q\n\n' "$NODE_LIST" $((NNODES - 1)) "$MASTER_ADDR" "$code/examples/pretrain.sh"
    exec "$home/examples/pretrain.sh" "$@"
fi

home=$("$home/examples/snapshot.sh" "$RUN_DIR") || exit 2

# What belongs to this machine, this shell or the allocation that it stands in, not to the run.
private='^(HOME|USER|LOGNAME|SHELL|PWD|OLDPWD|SHLVL|TERM|DISPLAY|HOSTNAME|MAIL|TMPDIR|SSH.*|SLURM_.*|XDG_.*|BASH.*|_)$'

trap '' PIPE # whoever read the output may be gone; the ranks must still be stopped
say() {
    echo "launch.sh: $1" >&2 || true
}

started() { # process of this machine: when it started; nothing if there is none
    local stat
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
    read -ra stat <<<"${stat##*) }"
    [[ ${stat[0]} == [ZX] ]] || echo "${stat[19]}"
}
launch="launch.sh $$ $(uname -n) $(started $$)" # in RUN_DIR/lock, too

start() { # rank: run pretrain.sh on that host; it stays there when the connection breaks
    local rank=$1 host=${hosts[$1]} name
    shift
    trap '' INT HUP # which reach every process of the terminal, and ssh must stay
    {
        while IFS= read -r name; do
            [[ $name =~ $private ]] || printf 'export %s=%q\n' "$name" "${!name}"
        done < <(compgen -e)
        printf 'export NODE_RANK=%q MEGATRON_XIELU_NODE=%q MEGATRON_XIELU_LAUNCH=%q\n' "$rank" "$host" "$launch"
        printf 'cd %q || exit 2; exec' "$PWD"
        printf ' %q' "$home/examples/pretrain.sh" "$@"
        printf '\n'
    } | "${ssh[@]}" "$host" setsid --wait bash -s 2>&1 | { sed -u "s/^/$host: /" || cat >/dev/null; }
    return "${PIPESTATUS[1]}"
}

# By an environment variable: ranks lead sessions of their own, and a checkpoint writer outlives its
# rank. Every process of the run gets the signal, as from Slurm; those of another launch.sh do not.
signal() { # TERM, KILL or 0, of this launch.sh or that one; whether there was any process
    local host some=1
    for host in "${hosts[@]}"; do
        (
            trap '' INT HUP
            # shellcheck disable=SC2016 # expanded on the host
            printf 'pids=$(grep -lzxF %q /proc/[0-9]*/environ | cut -d/ -f3); [ -n "$pids" ] && { kill -%s $pids; true; }' \
                "MEGATRON_XIELU_LAUNCH=${2:-$launch}" "$1" |
                "${ssh[@]}" -o ConnectTimeout=5 "$host" bash -s &>/dev/null
        ) && some=0
    done
    return "$some"
}

stopping=0
stop() {
    ((stopping)) || say "stopping: the ranks save and end"
    stopping=1
    signal TERM || true
}
trap stop INT TERM HUP

counted() { # what the first host has of the budget
    printf 'cksum %q 2>/dev/null' "$RUN_DIR/attempts" | "${ssh[@]}" -o ConnectTimeout=5 "${hosts[0]}" bash -s || true
}

# A launch.sh that was killed leaves its ranks at work.
take_back() {
    local former pid host begun end=$((SECONDS + 300))
    former=$(sed -n 's/.*"run": "\(launch\.sh [^"]*\)".*/\1/p' "$RUN_DIR/lock" 2>/dev/null || true)
    read -r _ pid host begun <<<"$former"
    [[ -n $former && $host == "$(uname -n)" && $(started "$pid") != "$begun" ]] || return 0
    signal TERM "$former" || return 0
    say "$RUN_DIR is still trained in, by what a launch.sh that was killed (process $pid) has left on the hosts; waiting until that has saved and ended"
    while ((SECONDS < end)); do
        sleep 2
        ((stopping)) && exit 75
        signal 0 "$former" || return 0
    done
    signal KILL "$former" || true
}

take_back
verdict='' uncounted=0 attempt=0
while :; do
    tries=0
    for host in "${hosts[@]}"; do
        until "${ssh[@]}" -o ConnectTimeout=5 "$host" true </dev/null; do
            ((stopping)) && exit 75
            [[ -n $verdict ]] || ((++tries < 12)) || die "$host does not answer"
            say "$host does not answer; trying again"
            sleep 5
        done
    done
    signal KILL || true # of an earlier attempt
    ((stopping)) && exit 75
    now=$(counted)
    # A start that was killed, or cut off, before pretrain.sh counted it.
    [[ -n $verdict && $verdict != 75 && $now == "$before" ]] && uncounted=$((uncounted + 1)) || uncounted=0
    if ((uncounted && uncounted >= RESTART_BUDGET)); then
        say "error: $uncounted starts in a row ended before ${hosts[0]} counted the attempt (RESTART_BUDGET); the cause is above"
        exit 4
    fi
    before=$now
    export MEGATRON_XIELU_ATTEMPT=$((attempt += 1))
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
        ((left == 0 || code == 0 || code == 75)) || signal KILL || true
    done
    case ${refused:-$verdict} in
        0 | 2 | 4) exit "${refused:-$verdict}" ;;
    esac
    ((stopping)) && exit 75
    say "starting again in $RESTART_DELAY s (exit code $verdict)"
    sleep "$RESTART_DELAY"
done
