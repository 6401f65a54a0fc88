#!/usr/bin/env bash
# Unpacks an archive where nothing else is and runs what is in it: the command, and a program in C.
#
#     release/try.sh ARCHIVE [ROOT]
#
# ROOT is a system of its own, for example of `debootstrap --variant=minbase bookworm ROOT`; without it, a folder
# with nothing but the C library: this system's, or under QEMU that of Debian's libc6-arm64-cross. An archive for
# Windows runs under Wine. CC compiles the program in C, for the system's C library: for an older one
# CC='python-zig cc -target x86_64-linux-gnu.2.17 -lunwind'.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=release/common.sh
. release/common.sh

archive=$(realpath "$1")
name=$(basename "$archive" | sed 's/\.\(tar\.gz\|zip\)$//')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cross=/usr/aarch64-linux-gnu

main() {
    case $name in
    *-windows-gnu) windows ;;
    *) linux "$1" ;;
    esac
    run "$tightfit" --version
    run "$tightfit" demo
    run "$tightfit" synth qwen2.5-7b "$models/7b" --headers-only --quiet
    run "$tightfit" plan "$models/7b" --device sim:8GiB
    run "$tightfit" synth demo "$models/demo" --quiet
    program
    echo "$name: runs${1:+ in $1}"
}

linux() {
    compiler=${CC:-cc}
    emulator=()
    root=${1:-$work/root}
    mkdir -p "$root/tmp" "$root/proc" "$root/opt"
    if foreign; then
        needs qemu-aarch64-static "apt-get install qemu-user-static"
        compiler=${CC:-aarch64-linux-gnu-gcc}
        # As a kernel does that knows of it.
        emulator=(/qemu)
        cp "$(command -v qemu-aarch64-static)" "$root/qemu"
    fi
    tar -xzf "$archive" -C "$root/opt"
    [ -n "$1" ] || bare
    models=/tmp/tightfit-try
    rm -rf "${root:?}$models"
    mkdir "$root$models"
    unpacked=$root/opt/$name
    tightfit=/opt/$name/bin/tightfit
}

foreign() {
    [[ $name == *-aarch64-* && $(uname -m) != aarch64 ]]
}

# The C library, and what else the command needs.
bare() {
    local file files
    if foreign; then
        mkdir "$root/lib"
        cp -L "$cross"/lib/{ld-linux-aarch64,libc,libm,libdl,libpthread,librt,libutil}.so.[0-9] "$root/lib/"
        return
    fi
    files=$(ldd "$root/opt/$name/bin/tightfit" | grep -o '/[^ ]*')
    for file in $files; do
        mkdir -p "$root$(dirname "$file")"
        cp -L "$file" "$root$file"
    done
}

windows() {
    # msvcrt does not know the formats of C11.
    compiler=${CC:-x86_64-w64-mingw32-gcc -D__USE_MINGW_ANSI_STDIO=1}
    own_wine "$work/wine"
    python3 -m zipfile -e "$archive" "$work"
    unpacked=$work/$name
    tightfit=$unpacked/bin/tightfit.exe
    models=$work/models
    mkdir "$models"
}

# A command in there, with its own processes, and nothing of this environment.
run() {
    printf '$ %s\n' "${*//$work/...}" >&2
    case $name in
    *-windows-gnu) timeout 600 wine "$@" </dev/null ;;
    *)
        local as_root=()
        [ "$(id -u)" = 0 ] || as_root=(--map-root-user)
        # shellcheck disable=SC2016
        unshare "${as_root[@]}" --mount --pid --fork -- \
            bash -c 'mount -t proc proc "$1/proc" && exec env -i PATH=/usr/sbin:/usr/bin HOME=/tmp LD_LIBRARY_PATH="$2" chroot "$1" "${@:3}"' \
            - "$root" "/opt/$name/lib" "${emulator[@]}" "$@"
        ;;
    esac
}

# The example in C, with each of the libraries. It prints what it has loaded.
program() {
    local tensor=model.layers.0.mlp.up_proj.weight link command static
    read -ra command <<<"$compiler"
    if ! command -v "${command[0]}" >/dev/null; then
        echo "not compiled: the program in C, without ${command[0]}"
        return
    fi
    read -ra static <<<"$(sed -n 's/^Libs.private: //p' "$unpacked/lib/pkgconfig/tightfit.pc")"
    for link in -ltightfit_c "$unpacked/lib/libtightfit_c.a"; do
        "${command[@]}" -std=c11 -static-libgcc -I "$unpacked/include" "$unpacked/share/doc/tightfit/examples/load.c" \
            -L "$unpacked/lib" "$link" "${static[@]}" -o "$unpacked/bin/example.exe"
        run "${tightfit%/*}/example.exe" "$models/demo" auto "$tensor" sim:1GiB
    done
}

main "${2-}"
