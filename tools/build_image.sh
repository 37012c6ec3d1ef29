#!/usr/bin/env bash
# Build the image of the Dockerfile with docker, podman or buildah.
#
#   tools/build_image.sh [options] [-- arguments for the builder, such as --build-arg NAME=VALUE]
#
#   --tag NAME        name of the image   [megatron_xielu:VERSION, and -dirty with uncommitted changes]
#   --base IMAGE      base image, for the same one each time NAME@sha256:…   [the Dockerfile's]
#   --builder NAME    docker, podman or buildah   [$BUILDER, or the first of them that works]
#   --push            push it to the registry that --tag names; log in with the builder before
#   --sif FILE        also write an Apptainer image
#   --enroot FILE     also write an enroot image (.sqsh), for pyxis
#   --help            this text
set -euo pipefail
unset CDPATH # with it cd prints, and may go elsewhere

die() {
    echo "build_image.sh: error: $*" >&2
    exit 2
}

# docker is often only a client without an engine behind it.
works() {
    case $1 in
        docker) docker info >/dev/null 2>&1 ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

tag='' base='' builder=${BUILDER:-} push='' sif='' enroot=''
while (($#)); do
    case $1 in
        --tag | --base | --builder | --sif | --enroot)
            [[ -n ${2:-} && $2 != -* ]] || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        --push) push=1 ;;
        -h | --help)
            sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *) die "unknown option $1; --help lists them" ;;
    esac
    shift
done

# Everything that can be missing is looked for before a build that takes long.
case $builder in
    '')
        for candidate in docker podman buildah; do
            if works "$candidate"; then
                builder=$candidate
                break
            fi
        done
        [[ -n $builder ]] || die "found no docker with a running engine, no podman and no buildah"
        ;;
    docker | podman | buildah)
        works "$builder" || die "$builder is not installed, or its engine is not running"
        ;;
    *) die "--builder $builder: choose docker, podman or buildah" ;;
esac
[[ -z $push || $tag == */* ]] || die "--push needs --tag REGISTRY/NAME:TAG"
[[ -z $sif ]] || command -v apptainer >/dev/null || die "--sif needs apptainer, which is not installed"
if [[ -n $enroot ]]; then
    command -v enroot >/dev/null || die "--enroot needs enroot, which is not installed"
    [[ $builder != buildah ]] || die "--enroot needs docker or podman; enroot cannot read buildah's images"
fi
for file in "$sif" "$enroot"; do
    [[ ! -e $file ]] || die "$file exists"
done

root=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/megatron_xielu/__init__.py")
commit=unknown dirty=''
if head=$(git -C "$root" rev-parse HEAD 2>/dev/null); then
    commit=$head
    [[ -z $(git -C "$root" status --porcelain) ]] || dirty=-dirty
fi
: "${tag:=megatron_xielu:$version$dirty}"

build=("$builder" build --tag "$tag" --file "$root/Dockerfile"
    --build-arg "VERSION=$version" --build-arg "COMMIT=$commit$dirty")
[[ -z $base ]] || build+=(--build-arg "BASE_IMAGE=$base")
# The OCI format has no HEALTHCHECK; --layers is the cache, which buildah leaves off by default.
[[ $builder == docker ]] || build+=(--format docker --layers)
"${build[@]}" "$@" "$root"
echo "build_image.sh: built $tag ($commit$dirty)"
: "${base:=$(sed -n 's/^ARG BASE_IMAGE=//p' "$root/Dockerfile")}"
if [[ $base != *@* ]]; then
    name=$base
    [[ ${base##*/} != *:* ]] || name=${base%:*} # the colon of a tag, not that of a port
    case $builder in
        docker) digest=(docker buildx imagetools inspect --format '{{.Manifest.Digest}}') ;;
        podman) digest=(podman image inspect --format '{{.Digest}}') ;;
        buildah) digest=(buildah inspect --type image --format '{{.FromImageDigest}}') ;;
    esac
    if found=$("${digest[@]}" "$base" 2>/dev/null) && [[ $found == sha256:* ]]; then
        echo "build_image.sh: its base is --base $name@$found"
    else
        echo "build_image.sh: $builder does not know the digest of its base, $base"
    fi
fi

[[ -z $push ]] || "$builder" push "$tag"

if [[ -n $sif ]]; then
    # Beside the result: /tmp is often too small for an image.
    archive=$(mktemp -d "$(dirname "$sif")/.image.XXXXXX")
    trap 'rm -rf "$archive"' EXIT
    case $builder in
        docker) docker save --output "$archive/image.tar" "$tag" ;;
        podman) podman save --format docker-archive --output "$archive/image.tar" "$tag" ;;
        buildah) buildah push "$tag" "docker-archive:$archive/image.tar" ;;
    esac
    apptainer build "$sif" "docker-archive:$archive/image.tar"
fi

case ${enroot:+$builder} in
    docker) enroot import --output "$enroot" "dockerd://$tag" ;;
    podman) enroot import --output "$enroot" "podman://$tag" ;;
esac
