#!/usr/bin/env bash
# make test-image: builds the real Dockerfile with buildah, without NVIDIA's base, and looks inside.
#
# The base is a plain Debian made here by debootstrap, so PyTorch comes from the package index: 7.2 GB
# of image. Layers are kept between runs in .cache/image; remove it with `rm -r .cache/image`.
#
#   SUITE   Debian release of the base, with Python 3.12 or newer   [trixie]
#   MIRROR  where its packages come from   [debootstrap's default]
# shellcheck disable=SC2016 # the quoted programs expand in the image, not here
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${SUITE:=trixie}" "${MIRROR:=}"
base=localhost/megatron_xielu-base:$SUITE
image=localhost/megatron_xielu:test

die() {
    echo "tests/image/run.sh: error: $*" >&2
    exit 1
}
step() { printf '\n== %s\n' "$*"; }

[[ $(id -u) == 0 ]] || die "run it as root: debootstrap and the packages below need that"
command -v apt-get >/dev/null || die "run it on Debian or Ubuntu: it installs packages with apt-get"
packages=()
for package in buildah debootstrap git; do
    command -v "$package" >/dev/null || packages+=("$package")
done
if ((${#packages[@]})); then
    step "installing ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi

# A store of its own: nothing of the user's is touched, and all of it goes with one folder.
mkdir -p .cache/image
cache=$(cd .cache/image && pwd)
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "%s"\n' \
    "$cache/store" "$cache/run" >"$cache/storage.conf"
export CONTAINERS_STORAGE_CONF=$cache/storage.conf BUILDAH_ISOLATION=chroot

scratch=$(mktemp -d "$cache/scratch.XXXXXX")
finish() {
    buildah rm --all >/dev/null
    buildah rmi --prune >/dev/null
    rm -rf "$scratch"
}
trap finish EXIT

if [[ -z $(buildah images --quiet --filter "reference=$base") ]]; then
    step "base: debootstrap $SUITE"
    # Without a compiler and pip, to see that the Dockerfile adds what is missing.
    debootstrap --variant=minbase --include=ca-certificates,python3 "$SUITE" "$scratch/base" \
        ${MIRROR:+"$MIRROR"} >"$scratch/debootstrap.log" || { tail "$scratch/debootstrap.log" && die "debootstrap failed"; }
    rm -rf "$scratch"/base/var/cache/apt/archives/*.deb "$scratch"/base/var/lib/apt/lists/*
    touch "$scratch/base/etc/pip.conf" # the mount point of the host's, see below
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$scratch/base" / >/dev/null
    buildah config --cmd bash "$container"
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$scratch/base"
fi

# The host's way to the package index, bound into the RUN steps over files that the base has: neither
# gets into the image. Proxies in the environment are passed on by buildah itself.
bind=()
certificates=/etc/ssl/certs/ca-certificates.crt
[[ ! -f $certificates ]] || bind+=(--volume "$certificates:$certificates:ro")
for configuration in "${PIP_CONFIG_FILE:-}" ~/.config/pip/pip.conf ~/.pip/pip.conf /etc/pip.conf; do
    if [[ -f $configuration ]]; then
        bind+=(--volume "$configuration:/etc/pip.conf:ro")
        break
    fi
done

# A copy of the working tree, since one of its files is changed below.
tree=$scratch/tree
git clone --quiet --shared --no-checkout . "$tree"
git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [[ ! -f $file ]] || printf '%s\0' "$file"; done |
    tar --create --null --files-from - | tar --extract --directory "$tree"
git -C "$tree" reset --quiet

build() { # log
    SECONDS=0
    "$tree/tools/build_image.sh" --builder buildah --base "$base" --tag "$image" -- "${bind[@]}" \
        >"$1" 2>&1 || { tail -n 40 "$1" && die "the build failed"; }
    seconds=$SECONDS
}

step "first build"
build "$scratch/first.log"
first=$seconds
echo "$first s"

step "second build, one source file changed"
echo "# changed $(date +%s)" >>"$tree/megatron_xielu/functional.py" # at each run: what an earlier one built is kept
build "$scratch/second.log"
second=$seconds
echo "$second s"
awk '/^STEP /{step = $0} /^--> Using cache/{cached = cached step "\n"}
    END {exit !(cached ~ /image_dependencies\.py \/tmp/ && cached !~ /COPY \. \./)}' "$scratch/second.log" ||
    { cat "$scratch/second.log" && die "the dependencies were installed again"; }
((second < 60)) || die "a changed line of code must rebuild in under a minute"

step "labels and settings"
inspect() { buildah inspect --type image --format "$1" "$image"; }
label() { # name, pattern
    local value
    value=$(inspect "{{index .OCIv1.Config.Labels \"org.opencontainers.image.$1\"}}")
    echo "$1: $value"
    [[ $value =~ ^$2$ ]] || die "the label $1 should match $2"
}
label version '[0-9]+\.[0-9.]+.*'
label revision '[0-9a-f]{40}-dirty'
label base.name "$base"
label licenses Apache-2.0
[[ $(inspect '{{.OCIv1.Config.User}}') =~ ^[1-9][0-9]*(:[0-9]+)?$ ]] || die "the user is not a number above 0"
[[ $(inspect '{{.Docker.Config.Healthcheck.Test}}') == *megatron_xielu.selftest* ]] || die "no health check"

step "inside"
container=$(buildah from --pull-never "$image")
inside() { buildah run "$@"; }
for user in '' --user=54321:0; do
    inside ${user:+"$user"} "$container" -- bash -ec '
        echo "as $(id -u):$(id -g)"
        [ "$(id -u)" != 0 ] && touch "$HOME/written-by-$(id -u)" "runs/written-by-$(id -u)"
        python3 -m megatron_xielu.selftest
    '
done
inside "$container" -- python3 -W ignore -c '
import importlib, nltk, os, sys
from importlib.metadata import version
for name in sys.argv[1:]:
    importlib.import_module(name)
assert nltk.data.path[0] == os.environ["NLTK_DATA"] and os.path.isdir(nltk.data.path[0])
print(*(f"{n}=={version(n)}" for n in ("megatron_xielu", "megatron-core", "torch", "transformers", "nltk")))
' megatron.core megatron.core.datasets.helpers_cpp pybind11 transformers safetensors numpy tensorboard
inside "$container" -- bash -ec '
    for program in ssh sshd pdsh; do
        if command -v "$program"; then exit 1; fi
    done
    MODEL=debug MOCK_DATA=1 DEVICE=cpu GPUS_PER_NODE=1 PREFLIGHT=0 examples/pretrain.sh --dry-run >/dev/null
    [ -x tools/build_image.sh ]
'

# As on NVIDIA's image: PyTorch and what is built on it are there, older than constraints.txt has them.
step "what the base brings stays"
container=$(buildah from --pull-never "$image")
inside --user=0 "${bind[@]}" "$container" -- bash -ec '
    export HOME=/root PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
    python3 -m pip uninstall --quiet --yes torch triton megatron-core
    site=$(python3 -c "import sysconfig; print(sysconfig.get_path(\"purelib\"))")
    for name in torch-2.13.0a0+0123456789.nv26.6 triton-3.7.0 transformer_engine-2.16.0 apex-0.1; do
        mkdir -p "$site/$name.dist-info"
        printf "Metadata-Version: 2.1\nName: %s\nVersion: %s\n" "${name%%-*}" "${name#*-}" >"$site/$name.dist-info/METADATA"
    done
    python3 tools/image_dependencies.py /tmp/dependencies
    PIP_CONSTRAINT=/tmp/dependencies/constraints.txt python3 -m pip install --quiet --dry-run \
        --report /tmp/report.json --requirement /tmp/dependencies/requirements.txt
    python3 -c "
import json
installs = sorted(i[\"metadata\"][\"name\"] for i in json.load(open(\"/tmp/report.json\"))[\"install\"])
assert installs == [\"megatron-core\"], installs
print(\"pip would install\", *installs)"
'

step "nothing of this host is left"
mounted=$(buildah mount "$(buildah from --pull-never "$image")")
origin=$(buildah mount "$(buildah from --pull-never "$base")")
for file in /etc/pip.conf "$certificates"; do
    cmp "$mounted$file" "$origin$file"
done
[[ ! -e $mounted/root/.cache && -z $(ls -A "$mounted/tmp") ]] || die "the build left files behind"

size=$(buildah images --format '{{.Size}}' --filter "reference=$image")
step "passed: first build $first s, after a change $second s, image $size"
