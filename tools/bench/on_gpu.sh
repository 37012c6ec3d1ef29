#!/usr/bin/env bash
# Everything that is measured on a GPU, for one that can be had for minutes: the most valuable first,
# each step with a limit of its own, and $OUT (runs/on_gpu) up to date after each.
#
#     tools/bench/on_gpu.sh check     right? how fast? what would be faster?      (6.5 minutes at most)
#     tools/bench/on_gpu.sh train     Megatron: losses, times, memory, resume     (7.5 minutes at most)
#
# Takes the Python of .venv; where `make setup` was not run, PYTHON (python3) with PyTorch, Triton,
# pytest, pytest-xdist and matplotlib. Wheels in .whl/ are put beside it: megatron-core and omegaconf,
# where there is no Megatron; without it the peers ReLU² and SwiGLU are left out, and `train` fails.
# `train` takes runs/minutes/text from a machine with a network:
#     python tools/compare_activations.py minutes --prepare-text
# A step that fails or runs out of time does not stop the others, but for the first (KEEP_GOING=1:
# nor does that). After SECONDS_MAX nothing goes on.
set -u -o pipefail
cd "$(dirname "$0")/../.." || exit
what=${1:-}
[[ $what == check || $what == train ]] || { echo "usage: tools/bench/on_gpu.sh check|train" >&2; exit 2; }
# As the Makefile's ON_GPU.
python=${PYTHON:-python3}
[[ -e .venv/installed ]] && python=$PWD/.venv/bin/python
# Before anything is made or deleted.
"$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"on_gpu.sh: {error}")
sys.exit(not torch.cuda.is_available() and "on_gpu.sh: PyTorch sees no CUDA device here")' || exit
if [[ $what == train && ! -d runs/minutes/text ]]; then
    echo "on_gpu.sh: there is no runs/minutes/text; make it where there is a network, as this file says at its top" >&2
    exit 2
fi
out=${OUT:-$PWD/runs/on_gpu}
# Kept: a second call finds what is compiled, and goes on with the trainings of the first.
work=${TMPDIR:-/tmp}/on_gpu.$UID
site=$work/site
mkdir -p "$out" "$work/$what"
rm -f "$work/$what/summary.txt"
if [[ ! -d $site ]] && compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
fi
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCHINDUCTOR_COMPILE_THREADS=1 # no sixteen processes beside what is timed
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor TORCH_EXTENSIONS_DIR=$work/extensions

end=${SECONDS_MAX:-$([[ $what == check ]] && echo 350 || echo 420)}

step() { # NAME SECONDS LINES COMMAND…: run it, show the last lines of what it says, keep everything
    local name=$1 limit=$2 lines=$3 begin=$SECONDS status
    shift 3
    limit=$((limit < end - SECONDS ? limit : end - SECONDS))
    if ((limit < 10)); then
        printf '%-12s left out: no time\n' "$name" | tee -a "$work/$what/summary.txt"
        return
    fi
    # SIGINT: pytest then tells what has failed so far, and a training saves a checkpoint.
    timeout --signal=INT --kill-after=30 "$limit" "$@" >"$work/$what/$name.log" 2>&1
    status=$?
    printf '%-12s exit %3d  %4d s\n' "$name" "$status" $((SECONDS - begin)) | tee -a "$work/$what/summary.txt"
    tail -n "$lines" "$work/$what/$name.log" | cut -c1-200
    tar -C "$work" --exclude=checkpoints --exclude=text -czf "$out/.$what.tgz" "$what"
    mv "$out/.$what.tgz" "$out/$what.tgz"
    return "$status"
}

bench() { # NAME SECONDS LINES FLAGS…
    local name=$1 limit=$2 lines=$3
    shift 3
    step "$name" "$limit" "$lines" "$python" tools/bench/bench_activation.py --device cuda \
        --providers copy hf eager compile ours-triton relu2 swiglu --output "$work/$what/$name" "$@"
}

# As make test-gpu, without make and without the test of the benchmark.
tests=("$python" -m pytest --numprocesses 8 -v --tb=short -p no:cacheprovider -m gpu)
one_pass='
import torch
from megatron_xielu import functional
x = torch.randn(8192, 9216, device="cuda", dtype=torch.bfloat16, requires_grad=True)
alphas = [torch.zeros(1, device="cuda", requires_grad=True) for _ in range(2)]
functional.xielu(x, *alphas).backward(torch.ones_like(x))
torch.cuda.synchronize()'

case $what in
check)
    { nvidia-smi; "$python" -m pip list; } >"$work/$what/machine.txt" 2>&1
    # Megatron's extension for recomputation takes half a minute of one core to compile.
    "$python" -c 'from megatron.core.tensor_parallel import random as r; r._get_share_storage()' &>/dev/null &
    # Without right numbers nothing else means anything.
    step smoke 90 20 "${tests[@]}" tests/kernels/test_gpu.py || [[ ${KEEP_GOING:-} ]] || exit
    step tune 75 40 "$python" tools/bench/tune_kernels.py --output "$work/$what/tune.json" --shapes 8192x9216 16384x43008
    bench op 100 70 --op --dtypes bfloat16 --rounds 30
    bench block 100 40 --block --rounds 12
    step tests 110 20 "${tests[@]}" tests/kernels --ignore tests/kernels/test_gpu.py
    step grouped 40 14 "$python" tools/bench/bench_grouped.py --device cuda --output "$work/$what/grouped.md"
    step host 20 8 "$python" tools/bench/measure_host_cost.py --device cuda
    step memory 60 20 "$python" tools/bench/measure_activation_memory.py --device cuda
    bench fp32 60 30 --op --shapes 8192x9216 --dtypes float32 --rounds 20
    step tune-bias 45 20 "$python" tools/bench/tune_kernels.py --output "$work/$what/tune-bias.json" --bias
    step ncu 60 80 ncu --clock-control none --kernel-name 'regex:_(forward|backward|finish)_kernel' \
        --section SpeedOfLight --section Occupancy --section WarpStateStats "$python" -c "$one_pass"
    ;;
train)
    mkdir -p "$work/$what/minutes"
    cp -r runs/minutes/text "$work/$what/minutes/" || exit
    compare=("$python" tools/compare_activations.py minutes --out "$work/$what/minutes")
    step train 300 40 "${compare[@]}" --activations xielu swiglu relu2 --ablation xielu-recompute
    step resume 120 20 "${compare[@]}" --check-resume
    ;;
esac
cat "$work/$what/summary.txt"
