#!/bin/sh
# Compiles the GPU kernels to PTX and machine code, which the crate embeds.
#
#     kernels/cuda/build.sh            compile and replace what is there
#     kernels/cuda/build.sh --check    compile and compare; fails when something is stale
#
# Needs python3 with pip, on Linux x86-64, and nothing of CUDA: the compiler, NVRTC, is fetched from
# PyPI at two versions and checked. PTX is made by that of CUDA 12.0 on purpose, since drivers take PTX
# of their own CUDA version and of older ones. Machine code for 9.0 is made by that of 12.4, which every
# driver for CUDA 12 runs too: the older one lets the tensor cores wait for each decoded step
# (linear_many.cuh). The bytes are the same in whatever directory they are built.
#
# --check skips, and says why, only where the compiler cannot be fetched or cannot run.
set -eu

package=nvidia-cuda-nvrtc-cu12

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

# Fetches the compiler of a version, whose wheel has this name and digest.
fetch() {
    version=$1 wheel=$2 sha256=$3
    verified() {
        echo "$sha256  $cache/$wheel" | sha256sum --check --status 2>/dev/null
    }
    verified && return
    rm -f "$cache/$wheel"
    log=$cache/download.log
    if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --platform manylinux1_x86_64 --platform manylinux2014_x86_64 --dest "$cache" "$package==$version" \
        >"$log" 2>&1; then
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
}

# Compiles these results with the compiler that was fetched last.
build() {
    names=$(python3 "$directory/compile.py" "$cache/$wheel" "$built" "$@")
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
}

built=$cache/built
rm -rf "$built"
mkdir "$built"
fetch 12.0.140 nvidia_cuda_nvrtc_cu12-12.0.140-py3-none-manylinux1_x86_64.whl \
    8e94e991d85c422de4da87bdc7472fdc1364367bd4aace7000b559cd33122071
build nf4.ptx linear.ptx.zlib linear.sm_75.cubin.zlib linear.sm_80.cubin.zlib
fetch 12.4.127 nvidia_cuda_nvrtc_cu12-12.4.127-py3-none-manylinux2014_x86_64.whl \
    a178759ebb095827bd30ef56598ec182b85547f1508941a3d560eb7ea1fbf338
build linear.sm_90a.cubin.zlib
