#!/usr/bin/env bash
# Makes the archive of one target from what was compiled, and beside it a list of what is in it (CycloneDX).
#
#     release/pack.sh TARGET COMPILED OUT [COMMAND]
#
# COMPILED is the folder where cargo has put the command and the C library, OUT is for the archive. COMMAND is
# a `tightfit` that runs here, to write completions and manual pages; by default the compiled one. With
# TIGHTFIT_UNIFIED=1 the whole workspace was compiled at once, as for tests.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=release/common.sh
. release/common.sh

target=$1
compiled=$2
out=$3
name=tightfit-$version-$target
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/$name
lib=$stage/lib
doc=$stage/share/doc/tightfit

main() {
    mkdir -p "$out" "$stage/bin" "$stage/include" "$lib" "$doc/examples"
    case $target in
    *-linux-gnu) linux ;;
    *-windows-gnu) windows ;;
    *) fail "there are no releases for $target" ;;
    esac
    static_library
    cp host/c/include/tightfit.h "$stage/include/"
    cp host/c/examples/*.c "$doc/examples/"
    cp README.md CHANGELOG.md SECURITY.md LICENSE-APACHE LICENSE-MIT "$doc/"
    for_linkers
    for_shells "${4:-$stage/bin/tightfit}"
    python3 release/describe.py "$target" "${packages[@]}" \
        --sbom "$doc/tightfit.cdx.json" --licences "$doc/LICENSES-THIRD-PARTY.txt" \
        "${runtimes[@]}" ${TIGHTFIT_UNIFIED:+--workspace}
    cp "$doc/tightfit.cdx.json" "$out/$name.cdx.json"
    python3 release/archive.py "$stage" "$out/$name$suffix"
    echo "$out/$name$suffix"
}

# Without the debugging information of Rust's library, which is half of it. What objects of one crate share is
# named after a hash, which comments in generated sources change, with the paths in them; here, after its place.
static_library() {
    local sysroot file=$lib/libtightfit_c.a
    cp "$compiled/libtightfit_c.a" "$file"
    names_in "$file" | awk '
        match($1, /[.]llvm[.][0-9]+/) && !($1 in known) && !/^ [.]rela[.]/ {
            hash = substr($1, RSTART, RLENGTH)
            if (!(hash in place)) place[hash] = ++places
            renamed = $1 "=" substr($1, 1, RSTART - 1) ".shared." place[hash] substr($1, RSTART + RLENGTH)
            print /^ / ? "--rename-section=" renamed : "--redefine-sym=" renamed
            known[$1] = 1
        }' >"$work/renamed"
    sysroot=$(rustc --print sysroot)
    LD_LIBRARY_PATH=$sysroot/lib "$sysroot/lib/rustlib/$(rustc --print host-tuple)/bin/rust-objcopy" \
        --strip-debug "@$work/renamed" "$file"
}

# Of symbols, then of sections, which bear their names with ELF: those begin with a blank.
names_in() {
    nm -p "$1" 2>/dev/null | awk '{ print $NF }'
    [[ $target != *-linux-* ]] || readelf -SW "$1" | grep -o ' \.[^ ]*'
}

linux() {
    local soname shared
    suffix=.tar.gz
    cp "$compiled/tightfit" "$stage/bin/"
    soname=$(readelf -d "$compiled/libtightfit_c.so" | sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p')
    if [ -n "$soname" ]; then
        shared=libtightfit_c.so.$version
        ln -s "$shared" "$lib/$soname"
        ln -s "$soname" "$lib/libtightfit_c.so"
        cmake_shared="IMPORTED_SONAME \"$soname\"\n    "
    else
        shared=libtightfit_c.so
        cmake_shared="IMPORTED_NO_SONAME TRUE\n    "
    fi
    cp "$compiled/libtightfit_c.so" "$lib/$shared"
    cmake_shared+="IMPORTED_LOCATION \"\${_tightfit_prefix}/lib/$shared\""
    system=(pthread dl m)
    runtimes=()
    # What unwinds the stack comes from somewhere.
    if ! readelf -d "$stage/bin/tightfit" | grep -q 'NEEDED.*libgcc_s'; then
        runtimes_of_zig
    fi
}

windows() {
    suffix=.zip
    cp "$compiled/tightfit.exe" "$compiled/tightfit_c.dll" "$stage/bin/"
    cp "$compiled/libtightfit_c.dll.a" "$lib/"
    cmake_shared="IMPORTED_LOCATION \"\${_tightfit_prefix}/bin/tightfit_c.dll\"\n    "
    cmake_shared+="IMPORTED_IMPLIB \"\${_tightfit_prefix}/lib/libtightfit_c.dll.a\""
    system=(advapi32 bcrypt ntdll userenv ws2_32 kernel32)
    local gcc
    gcc=$(x86_64-w64-mingw32-gcc -dumpversion)
    # Debian's files, which name all authors.
    runtimes=(--runtime gcc-runtime "$gcc" "GPL-3.0-or-later WITH GCC-exception-3.1"
        /usr/share/doc/gcc-mingw-w64-base/copyright
        --runtime mingw-w64-runtime "$(dpkg-query -f '${source:Upstream-Version}' -W mingw-w64-common)" "ZPL-2.1"
        /usr/share/doc/mingw-w64-common/copyright)
}

# What pkg-config and CMake find the C library by.
for_linkers() {
    local flags="${system[*]/#/-l}" libraries file
    libraries=$(IFS=';' && echo "${system[*]}")
    mkdir -p "$lib/pkgconfig" "$lib/cmake/tightfit"
    for file in tightfit.pc tightfit-config.cmake tightfit-config-version.cmake; do
        sed -e "s|@VERSION@|$version|; s|@REPOSITORY@|$repository|; s|@SYSTEM_FLAGS@|$flags|" \
            -e "s|@MAJOR@|${abi%.*}|; s|@MINOR@|${abi#*.}|" \
            -e "s|@CMAKE_SYSTEM@|$libraries|; s|@CMAKE_SHARED@|$cmake_shared|" \
            "release/files/$file.in" >"$work/$file"
    done
    mv "$work/tightfit.pc" "$lib/pkgconfig/"
    mv "$work"/tightfit-config*.cmake "$lib/cmake/tightfit/"
}

# Where each shell looks, below /usr, /usr/local or ~/.local.
for_shells() {
    local command=$1 shells=$stage/share
    mkdir -p "$shells/bash-completion/completions" "$shells/zsh/site-functions" \
        "$shells/fish/vendor_completions.d" "$shells/elvish/lib" "$shells/powershell" "$shells/man"
    "$command" completions bash >"$shells/bash-completion/completions/tightfit"
    "$command" completions zsh >"$shells/zsh/site-functions/_tightfit"
    "$command" completions fish >"$shells/fish/vendor_completions.d/tightfit.fish"
    "$command" completions elvish >"$shells/elvish/lib/tightfit.elv"
    "$command" completions powershell >"$shells/powershell/tightfit.ps1"
    "$command" man "$shells/man/man1"
}

main "$@"
