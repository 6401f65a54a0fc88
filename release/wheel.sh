#!/usr/bin/env bash
# Makes the wheel for one target, for all versions of Python that the package supports.
#
#     release/wheel.sh TARGET OUT
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=release/common.sh
. release/common.sh

target=$1
out=$2
needs maturin "pip install -r release/requirements.txt"
# The wheel holds what is linked into it, so also its licences.
trap 'rm -f host/python/LICENSE*' EXIT
cp LICENSE-APACHE LICENSE-MIT host/python/
runtimes_of_zig
python3 release/describe.py "$target" tightfit-python --sbom /dev/null \
    --licences host/python/LICENSES-THIRD-PARTY.txt "${runtimes[@]}"
# Another linker: what is compiled for archives would be compiled again, every time.
target_dir=$target_dir/wheels
export CARGO_TARGET_DIR=$target_dir
rustup target add "$target"
cargo fetch --locked
reproducible
maturin build --profile dist --locked --target "$target" --zig --compatibility "manylinux_${RELEASE_GLIBC/./_}" \
    --manifest-path host/python/Cargo.toml --out "$out"
