//! What the sandbox says that WASI declares is what wasmtime's own WASI has.

use tightfit_foreign_host::Host;
use tightfit_tests::wasi;

#[test]
fn the_sandbox_knows_wasi_as_wasmtime_does() {
    // What components export, and what wasmtime does not give unless it is asked to or does not have.
    let left_out = ["run", "network-error-code", "display", "utc-offset"];
    let policy = wasi::importing_all_but(&left_out);
    let host = Host::new(&policy, false).unwrap_or_else(|error| panic!("{error:#}"));
    host.planner().unwrap_or_else(|error| panic!("{error:#}"));
}
