//! What wit-bindgen makes of `wit/`. Use the names that the crate re-exports instead.
#![allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "generated"
)]

// A module says which world it is for, and exports all of that world.
#[cfg(not(feature = "slices"))]
wit_bindgen::generate!({
    path: "wit",
    world: "policy",
    pub_export_macro: true,
    default_bindings_module: "tightfit_guest::bindings",
    runtime_path: "::tightfit_guest::bindings::rt",
    additional_derives: [PartialEq, Eq],
    generate_all,
});

#[cfg(feature = "slices")]
wit_bindgen::generate!({
    path: "wit",
    world: "slicing-policy",
    pub_export_macro: true,
    default_bindings_module: "tightfit_guest::bindings",
    runtime_path: "::tightfit_guest::bindings::rt",
    additional_derives: [PartialEq, Eq],
    generate_all,
});

#[doc(hidden)]
pub use wit_bindgen::rt;
