#!/bin/sh
# Builds pin_layer.py into OUT/pin_layer.wasm, and multiply.py into OUT/multiply.wasm. The tool is installed once, in OUT/venv.
#
#     build.sh OUT
#
# Exit status 3: the tool cannot be installed here.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P)
out=${1:?usage: build.sh OUT}
tool=componentize-py==0.25.1

mkdir -p "$out"
out=$(CDPATH= cd -- "$out" && pwd -P)
if [ "$(cat "$out/venv/tool" 2>/dev/null)" != "$tool" ]; then
    rm -rf "$out/venv"
    python3 -m venv "$out/venv" || exit 3
    "$out/venv/bin/pip" install --quiet --disable-pip-version-check --retries 1 --timeout 10 \
        "$tool" || exit 3
    echo "$tool" >"$out/venv/tool"
fi
# The bindings that the policy imports; componentize-py makes its own again in the next step.
rm -rf "$out/bindings"
"$out/venv/bin/componentize-py" -d "$here/../../../wit" -w policy bindings "$out/bindings"
"$out/venv/bin/componentize-py" -d "$here/../../../wit" -w policy componentize --stub-wasi \
    -p "$here" pin_layer -o "$out/pin_layer.wasm"
"$out/venv/bin/componentize-py" -d "$here/../../../wit" -w program componentize --stub-wasi \
    -p "$here" multiply -o "$out/multiply.wasm"
