//! What wit-bindgen makes of `wit/`. Use the names that the crate re-exports instead.
#![allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "generated"
)]

wit_bindgen::generate!({
    path: "wit",
    world: "program",
    pub_export_macro: true,
    default_bindings_module: "tightfit_program::bindings",
    runtime_path: "::tightfit_program::bindings::rt",
    generate_all,
});

#[doc(hidden)]
pub use wit_bindgen::rt;
