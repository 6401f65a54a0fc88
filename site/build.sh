#!/usr/bin/env bash
# Builds the site into target/site/book and checks its links. MDBOOK is mdBook's program, if it is not `mdbook`.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
cargo build --release --locked --bin tightfit --example site
rm -rf "$target/site"
"$target/release/examples/site" write "$target/release/tightfit" "$target/site"
"${MDBOOK:-mdbook}" build "$target/site"
"$target/release/examples/site" check "$target/site/book"
