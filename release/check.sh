#!/usr/bin/env bash
# Checks an archive: what its binaries need, what they tell of the machine that built them, what is said about
# their crates, and that C programs, shells and manual pages are served.
#
#     release/check.sh ARCHIVE
#
# With TIGHTFIT_UNIFIED=1 it was made of what tests compile, which needs this system's libraries and names its
# paths.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=release/common.sh
. release/common.sh

archive=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

main() {
    unpack
    python3 release/verify.py "$unpacked" "$archive"
    if [ -z "${TIGHTFIT_UNIFIED-}" ]; then
        nothing_of_this_machine
    fi
    case $unpacked in
    *-linux-gnu) linux ;;
    *-windows-gnu) windows ;;
    esac
    c_programs
    bash -c '. "$1" && complete -p tightfit' - "$unpacked/share/bash-completion/completions/tightfit" >/dev/null
    if command -v zsh >/dev/null; then
        zsh -fc 'fpath=("$1" $fpath); autoload -U compinit; compinit -D; [ "$_comps[tightfit]" = _tightfit ]' \
            - "$unpacked/share/zsh/site-functions"
    fi
    if command -v fish >/dev/null; then
        # shellcheck disable=SC2016
        fish --no-config -c 'source $argv[1]; and complete -c tightfit | grep -q plan' \
            "$unpacked/share/fish/vendor_completions.d/tightfit.fish"
    fi
    if command -v groff >/dev/null; then
        groff -man -Tutf8 -ww -z "$unpacked"/share/man/man1/*.1 2>"$work/groff"
        [ ! -s "$work/groff" ] || fail "manual pages: $(head -n 3 "$work/groff")"
    fi
    echo "$(basename "$archive"): good"
}

unpack() {
    case $archive in
    *.zip) python3 -m zipfile -e "$archive" "$work/unpacked" ;;
    *) mkdir "$work/unpacked" && tar -xzf "$archive" -C "$work/unpacked" ;;
    esac
    unpacked=$(echo "$work"/unpacked/*)
    [ -d "$unpacked" ] || fail "$archive has not one directory"
}

# Not where it was built.
nothing_of_this_machine() {
    local path
    for path in "$PWD" "$target_dir" "${CARGO_HOME:-$HOME/.cargo}" "$(rustc --print sysroot)"; do
        # A name that stands for something else, too.
        [ ${#path} -gt 4 ] || continue
        if grep -rlF -- "$path" "$unpacked"; then
            fail "$path is in what was packed"
        fi
    done
}

linux() {
    local file newest allowed='libc|libm|libdl|libpthread|librt|libutil|ld-linux-[a-z0-9-]*'
    [ -z "${TIGHTFIT_UNIFIED-}" ] || allowed+='|libgcc_s'
    for file in "$unpacked/bin/tightfit" "$unpacked/lib/libtightfit_c.so"; do
        if readelf -d "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | grep -vE "^($allowed)\.so\.[0-9]+$"; then
            fail "$file needs a library that not every system has"
        fi
        newest=$(readelf --dyn-syms -W "$file" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)
        echo "$(basename "$file") needs $newest"
        if [ -z "${TIGHTFIT_UNIFIED-}" ] &&
            [ "$(printf '%s\n' "GLIBC_$RELEASE_GLIBC" "$newest" | sort -V | tail -n 1)" != "GLIBC_$RELEASE_GLIBC" ]; then
            fail "$file needs a newer glibc than $RELEASE_GLIBC"
        fi
    done
    # What the header declares, and nothing else.
    nm -D --defined-only "$unpacked/lib/libtightfit_c.so" | sed 's/.* //' | sort >"$work/exported"
    grep -oE '\btightfit_[a-z0-9_]+\(' "$unpacked/include/tightfit.h" | tr -d '(' | sort -u >"$work/declared"
    diff "$work/declared" "$work/exported" || fail "the shared library does not export what the header declares"
}

windows() {
    local file
    local system='kernel32|ntdll|ws2_32|userenv|bcrypt|bcryptprimitives|advapi32|shell32|ole32|combase|msvcrt'
    system+='|api-ms-win-[a-z0-9-]*'
    for file in "$unpacked/bin/tightfit.exe" "$unpacked/bin/tightfit_c.dll"; do
        if x86_64-w64-mingw32-objdump -p "$file" | sed -n 's/.*DLL Name: //p' | grep -viE "^($system)\.dll$"; then
            fail "$file needs a library that Windows does not have"
        fi
    done
}

# The example, found as packages are: by pkg-config and by CMake, linked to either library.
c_programs() {
    local run=() compiler=cc model=$work/model example=$unpacked/share/doc/tightfit/examples/load.c
    local cmake=(-DCMAKE_BUILD_TYPE=Release) definitions=()
    case $unpacked in
    *-windows-*)
        compiler=x86_64-w64-mingw32-gcc
        run=(wine)
        # msvcrt does not know the formats of C11.
        definitions=(-D__USE_MINGW_ANSI_STDIO=1)
        cmake+=(-DCMAKE_SYSTEM_NAME=Windows "-DCMAKE_C_FLAGS=${definitions[0]}")
        ;;
    *-"$(uname -m)"-*) ;;
    *-aarch64-*)
        compiler=aarch64-linux-gnu-gcc
        run=(qemu-aarch64-static -L /usr/aarch64-linux-gnu)
        cmake+=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64)
        ;;
    esac
    if ! command -v "$compiler" >/dev/null || ! command -v "${run[0]:-true}" >/dev/null; then
        echo "not compiled: the C example, without $compiler, or what runs its programs here"
        return
    fi
    [[ $unpacked != *-windows-* ]] || own_wine "$work/wine"
    make_model
    if command -v pkg-config >/dev/null; then
        local flags
        export PKG_CONFIG_PATH=$unpacked/lib/pkgconfig PKG_CONFIG_LIBDIR=
        [ "$(pkg-config --modversion tightfit)" = "$version" ] || fail "pkg-config says another version"
        read -ra flags < <(pkg-config --cflags --libs tightfit)
        "$compiler" -std=c11 "${definitions[@]}" -o "$work/shared" "$example" "${flags[@]}"
        read -ra flags < <(pkg-config --static --cflags --libs tightfit)
        "$compiler" -std=c11 "${definitions[@]}" -o "$work/static" "$example" "${flags[@]/-ltightfit_c/-l:libtightfit_c.a}"
        loads "$work/shared" && loads "$work/static"
    else
        echo "not checked: pkg-config, which is not there"
    fi
    if command -v cmake >/dev/null; then
        mkdir "$work/project"
        cp "$example" "$work/project/load.c"
        cat >"$work/project/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.16)
project(example C)
set(CMAKE_C_STANDARD 11)
find_package(tightfit ${version%.*} REQUIRED)
add_executable(shared load.c)
target_link_libraries(shared tightfit::tightfit)
add_executable(static load.c)
target_link_libraries(static tightfit::static)
END
        cmake -S "$work/project" -B "$work/project/build" -DCMAKE_PREFIX_PATH="$unpacked" \
            -DCMAKE_FIND_ROOT_PATH="$unpacked" -DCMAKE_C_COMPILER="$compiler" "${cmake[@]}" >"$work/cmake"
        cmake --build "$work/project/build" >>"$work/cmake" || { cat "$work/cmake" >&2 && fail "CMake"; }
        loads "$work/project/build/shared" && loads "$work/project/build/static"
    else
        echo "not checked: CMake, which is not there"
    fi
}

# One small tensor, in bf16.
make_model() {
    mkdir "$model"
    python3 - "$model/model.safetensors" <<'END'
import json, struct, sys
header = json.dumps({"a.weight": {"dtype": "BF16", "shape": [64, 64], "data_offsets": [0, 8192]}}).encode()
with open(sys.argv[1], "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + b"\x80\x3f" * 4096)
END
}

loads() {
    local program=$1 printed
    # Windows looks for libraries beside the program.
    if [[ $unpacked == *-windows-* ]]; then
        cp "$program.exe" "$unpacked/bin/"
        program=$unpacked/bin/${program##*/}.exe
    fi
    printed=$(LD_LIBRARY_PATH=$unpacked/lib timeout 300 "${run[@]}" "$program" "$model" auto a.weight sim:1MiB </dev/null) ||
        fail "$program ended with $?"
    # Ones come back as they were.
    grep -q '^4096 elements, sum 4096' <<<"$printed" || fail "$program says: $printed"
}

main "$@"
