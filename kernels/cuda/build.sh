#!/bin/sh
# Compiles the GPU kernels to PTX and machine code, which the crate embeds.
#
#     kernels/cuda/build.sh            compile and replace what is there
#     kernels/cuda/build.sh --check    compile and compare; fails when something is stale
#
# Needs python3 with pip, on Linux x86-64, and nothing of CUDA: the compiler, NVRTC, is fetched from
# PyPI at one version and checked. It is of CUDA 12.0 on purpose, since drivers take PTX of their
# own CUDA version and of older ones. The bytes are the same in whatever directory they are built.
#
# --check skips, and says why, only where the compiler cannot be fetched or cannot run.
set -eu

package=nvidia-cuda-nvrtc-cu12
version=12.0.140
wheel=nvidia_cuda_nvrtc_cu12-$version-py3-none-manylinux1_x86_64.whl
sha256=8e94e991d85c422de4da87bdc7472fdc1364367bd4aace7000b559cd33122071

check=false
case "${1-}" in
    "") ;;
    --check) check=true ;;
    *)
        echo "usage: $0 [--check]" >&2
        exit 2
        ;;
esac

# Without the compiler a check is skipped, and building fails.
give_up() {
    if $check; then
        echo "$0: skipped: $1"
        exit 0
    fi
    echo "$0: $1" >&2
    exit 1
}

[ "$(uname -sm)" = "Linux x86_64" ] || give_up "NVRTC is pinned for Linux x86_64 only, this is $(uname -sm)"
python3 -m pip --version >/dev/null 2>&1 || give_up "python3 with pip is needed"

directory=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P)
root=$(CDPATH= cd -- "$directory/../.." && pwd -P)
cache=${CARGO_TARGET_DIR:-$root/target}/nvrtc
mkdir -p "$cache"

verified() {
    echo "$sha256  $cache/$wheel" | sha256sum --check --status 2>/dev/null
}

if ! verified; then
    rm -f "$cache/$wheel"
    log=$cache/download.log
    if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --platform manylinux1_x86_64 --dest "$cache" "$package==$version" >"$log" 2>&1; then
        cat "$log" >&2
        # Only a network that is not there is a reason to skip.
        if grep -qiE 'connection|name resolution|timed out|unreachable|from versions: none' "$log"; then
            give_up "$package $version cannot be downloaded"
        fi
        exit 1
    fi
    if ! verified; then
        echo "$0: $cache/$wheel is not the $package $version that is pinned" >&2
        exit 1
    fi
fi

built=$cache/built
rm -rf "$built"
mkdir "$built"
names=$(python3 "$directory/compile.py" "$cache/$wheel" "$built")
for name in $names; do
    if ! $check; then
        cp "$built/$name" "$directory/$name"
        echo "kernels/cuda/$name: $(wc -c <"$built/$name" | tr -d ' ') bytes"
    elif ! python3 "$directory/compile.py" --same "$built/$name" "$directory/$name"; then
        echo "$0: kernels/cuda/$name is not what the sources compile to" >&2
        echo "run kernels/cuda/build.sh and commit the result" >&2
        exit 1
    fi
done
