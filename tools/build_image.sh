#!/usr/bin/env bash
# Build the image of the Dockerfile with docker, podman or buildah.
#
#   tools/build_image.sh [options] [-- arguments for the builder, such as --build-arg NAME=VALUE]
#
#   --tag NAME        name of the image   [megatron_xielu:VERSION, and -dirty with uncommitted changes]
#   --base IMAGE      base image, for the same one each time NAME@sha256:…   [the Dockerfile's]
#                     (for several platforms the digest of the index, not that of one of them)
#   --platform LIST   linux/amd64, linux/arm64 (GH200, GB200), or both with a comma: one name, an image
#                     for each; a platform that is not this machine's needs an emulator, and long
#                     [this machine's]
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

declare -A QEMU=([linux/amd64]=x86_64 [linux/arm64]=aarch64)
tag='' base='' platform='' builder=${BUILDER:-} push='' sif='' enroot=''
while (($#)); do
    case $1 in
        --tag | --base | --platform | --builder | --sif | --enroot)
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
several=''
case $platform in
    '' | linux/amd64 | linux/arm64) ;;
    linux/amd64,linux/arm64 | linux/arm64,linux/amd64) several=1 ;;
    *) die "--platform $platform: choose linux/amd64, linux/arm64 or linux/amd64,linux/arm64" ;;
esac
[[ -z $several || -z $sif$enroot ]] || die "--sif and --enroot take one platform, not $platform"
[[ -z $several || $builder != docker || -n $push ]] ||
    die "--platform $platform with docker needs --push: docker keeps the images of one platform"
[[ $(uname -m) == aarch64 ]] && own=linux/arm64 || own=linux/amd64
for one in ${platform//,/ }; do
    [[ $one != "$own" ]] || continue
    case $builder in
        docker) [[ " $(docker buildx inspect --bootstrap 2>/dev/null) " == *[[:space:]]"$one"[,*[:space:]]* ]] ;;
        *) [[ -e /proc/sys/fs/binfmt_misc/qemu-${QEMU[$one]} ]] ;;
    esac || die "--platform $one: $builder cannot run its programs on this $(uname -m); build on such a machine, or register an emulator (qemu-user-static, binfmt-support)"
done
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

build=("$builder" build)
name=--tag
if [[ -n $platform ]]; then
    build+=(--platform "$platform")
    case $several$builder in
        docker) build=(docker buildx build --load --platform "$platform") ;;
        1docker) build=(docker buildx build --push --platform "$platform") ;;
        1*) name=--manifest ;; # --tag would name the image of the last platform alone
    esac
fi
build+=("$name" "$tag" --file "$root/Dockerfile"
    --build-arg "VERSION=$version" --build-arg "COMMIT=$commit$dirty")
[[ -z $base ]] || build+=(--build-arg "BASE_IMAGE=$base")
# The OCI format has no HEALTHCHECK; --layers is the cache, which buildah leaves off by default.
[[ $builder == docker ]] || build+=(--format docker --layers)
[[ $name != --manifest ]] || "$builder" manifest rm "$tag" &>/dev/null || true # or the old images stay in it
"${build[@]}" "$@" "$root"
echo "build_image.sh: built $tag ($commit$dirty)"
: "${base:=$(sed -n 's/^ARG BASE_IMAGE=//p' "$root/Dockerfile")}"
if [[ $base != *@* ]]; then
    name=$base
    [[ ${base##*/} != *:* ]] || name=${base%:*} # the colon of a tag, not that of a port
    case $several$builder in
        docker | 1docker) digest=(docker buildx imagetools inspect --format '{{.Manifest.Digest}}') ;;
        podman) digest=(podman image inspect --format '{{.Digest}}') ;;
        buildah) digest=(buildah inspect --type image --format '{{.FromImageDigest}}') ;;
        *) digest=(false) ;; # what these know is one platform's
    esac
    if found=$("${digest[@]}" "$base" 2>/dev/null) && [[ $found == sha256:* ]]; then
        echo "build_image.sh: its base is --base $name@$found"
    else
        echo "build_image.sh: $builder does not know the digest of its base, $base"
    fi
fi

case ${push:+$several$builder} in
    '' | 1docker) ;; # pushed by its build
    1*) "$builder" manifest push --all "$tag" "docker://$tag" ;;
    *) "$builder" push "$tag" ;;
esac

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
