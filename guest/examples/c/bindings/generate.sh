#!/bin/sh
# Makes the files beside it from wit/ again: cargo install wit-bindgen-cli --version 0.61.1 --locked
set -eu
cd "$(dirname -- "$0")"
wit-bindgen c ../../../../wit --world policy --out-dir .
wit-bindgen c ../../../../wit --world program --out-dir .
