#!/usr/bin/env bash
# A copy of this code in RUN_DIR/code, for a run that goes on for weeks while the checkout changes.
#
#   examples/snapshot.sh [--dry-run] RUN_DIR
#
# Prints the folder, RUN_DIR/code/DIGEST, whose examples/pretrain.sh runs that copy: the package and
# examples/, 1.2 MB; not ENTRY and a MODEL file of your own. A copy that is there is used again; that of a
# copy is itself. Nothing deletes old ones. --dry-run copies nothing.
# slurm/pretrain.sbatch and torchrun/launch.sh call it at their first start. To fix the code when a
# job is submitted, though it waits for days:
#   MEGATRON_XIELU_HOME=$(examples/snapshot.sh RUN_DIR) RUN_DIR=RUN_DIR sbatch … examples/slurm/pretrain.sbatch
set -euo pipefail
unset CDPATH # with it cd prints, and may go elsewhere
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() { # message
    echo "snapshot.sh: error: ${1//[[:cntrl:]]/?}" >&2
    exit 2
}

dry_run=0
[[ ${1:-} != --dry-run ]] || { dry_run=1 && shift; }
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ $# == 1 && -n $1 && $1 != -* ]] || die "say examples/snapshot.sh [--dry-run] RUN_DIR"
run_dir=$1
[[ $run_dir == /* ]] || run_dir=$PWD/$run_dir

list() { # folder: its files, in an order of their own
    cd "$1" && find -L megatron_xielu examples pyproject.toml -name __pycache__ -prune -o -type f -print0 |
        LC_ALL=C sort -z
}
digest() { # folder: of names and contents
    list "$1" | (cd "$1" && xargs -0 sha256sum) | sha256sum | cut -c -12
}

found=$(digest "$home" 2>/dev/null) || die "$home is not the whole repository: no megatron_xielu, examples or pyproject.toml"
if [[ $home =~ /code/([0-9a-f]{12})$ ]]; then
    [[ $found == "${BASH_REMATCH[1]}" ]] || die "$home has been changed, or lost files: submit the run anew from a checkout"
    echo "$home"
    exit 0
fi
if [[ $run_dir == *:* ]]; then # PYTHONPATH would part it there
    echo "snapshot.sh: warning: RUN_DIR=${run_dir//[[:cntrl:]]/?} has a colon, so that no copy of the code can run there: $home itself runs, whatever becomes of it" >&2
    echo "$home"
    exit 0
fi
code=$run_dir/code/$found
if ((!dry_run)) && [[ ! -d $code ]]; then
    unwritable="RUN_DIR=$run_dir cannot be written to, or is full: no copy of the code"
    fresh=$run_dir/code/.new-$(uname -n)-$$
    mkdir -p "$fresh" 2>/dev/null || die "$unwritable"
    trap 'rm -rf "$fresh"' EXIT
    # Files in place of links; and folders that their owner can write to, whatever the checkout's are.
    list "$home" | tar -C "$home" -c --dereference --null -T - | tar -x -C "$fresh" 2>/dev/null || die "$unwritable"
    # Of what was copied, since the checkout may be changing now.
    found=$(digest "$fresh" 2>/dev/null) || die "$unwritable"
    code=$run_dir/code/$found
    mv -T "$fresh" "$code" 2>/dev/null || [[ -d $code ]] || die "$unwritable"
fi
[[ ! -d $code ]] || "$code/examples/snapshot.sh" "$run_dir" >/dev/null || exit 2
((dry_run)) || code=$(cd "$code" && pwd)
echo "$code"
