# Recipes for work on Tightfit: `just --list`. Each is a line that can be typed as well.

# All tests, as README names them.
test:
    cargo test --workspace --release --locked

# Tests of one target, for example `just one command saves`.
one target *filter:
    cargo test --locked --test {{ target }} -- {{ filter }}

# Unit tests of one package, for example `just unit tightfit load::tests`.
unit package *filter:
    cargo test --locked -p {{ package }} --lib -- {{ filter }}

# What is quick to find out before a commit.
quick:
    cargo fmt --all --check
    sh wit/vendor.sh --check
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Builds the built-in policies and copies them to where the host embeds them from.
guests:
    sh guest/policies/build.sh

# Makes the GPU kernels' PTX and machine code anew.
ptx:
    bash kernels/cuda/build.sh

# Writes what tests compare with its sources: the C header, the interface's reference and package.
bless:
    sh wit/vendor.sh
    TIGHTFIT_BLESS_HEADER=1 cargo test --locked --test header
    TIGHTFIT_BLESS_WIT=1 cargo test --locked --test wit

# Licences, sources and duplicates of the dependencies, and what is known of their vulnerabilities.
deny *checks:
    cargo deny --locked check {{ checks }}

# Everything that CI does, or the steps that are named.
ci *steps:
    .ci/run {{ steps }}
