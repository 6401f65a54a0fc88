//! The interface as a package: documented, and what is made of it is what is committed.

use std::fs;

use tightfit_tests::wit_package::{WitPackage, directory};

/// Set to write what is made of the interface instead of comparing it.
const BLESS: &str = "TIGHTFIT_BLESS_WIT";

#[track_caller]
fn is_committed(name: &str, made: &[u8]) {
    let path = directory().join(name);
    if std::env::var_os(BLESS).is_some() {
        fs::write(&path, made).unwrap();
    }
    assert!(
        fs::read(&path).is_ok_and(|committed| committed == made),
        "{} is stale: run this test with {BLESS}=1 and commit it",
        path.display()
    );
}

#[test]
fn everything_is_documented() {
    let missing = WitPackage::parse(&directory()).undocumented();
    assert!(missing.is_empty(), "nothing is said about {missing:?}");
}

#[test]
fn the_reference_is_what_the_sources_give() {
    let reference = WitPackage::parse(&directory()).reference();
    is_committed("REFERENCE.md", reference.as_bytes());
}

#[test]
fn the_package_is_what_the_sources_give() {
    let package = WitPackage::parse(&directory());
    let binary = package.binary();
    is_committed("tightfit-host.wasm", &binary);
    // Nothing is lost in it, not even the documentation.
    let decoded = wit_component::decode(&binary).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(
        WitPackage::decoded(decoded).reference(),
        package.reference()
    );
}
