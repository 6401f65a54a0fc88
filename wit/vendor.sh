#!/bin/sh
# Copies the interface into every package that is published with it: a package holds its own files only.
#
#     wit/vendor.sh            copy
#     wit/vendor.sh --check    compare; fails when a copy is not what is here
set -eu
cd "$(dirname "$0")/.."

for package in host/wasm guest guest/program; do
    if [ "${1-}" != --check ]; then
        rm -rf "$package/wit"
        mkdir "$package/wit"
        cp wit/*.wit "$package/wit/"
    elif ! diff -r --exclude vendor.sh --exclude README.md --exclude REFERENCE.md --exclude '*.wasm' \
        wit "$package/wit"; then
        echo "$0: $package/wit is not what wit/ holds: run wit/vendor.sh and commit the result" >&2
        exit 1
    fi
done
