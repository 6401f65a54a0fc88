//! The committed header is what the sources give.

use std::path::Path;

/// Set to write the header instead of comparing it.
const BLESS: &str = "TIGHTFIT_BLESS_HEADER";

#[test]
fn the_header_is_what_the_sources_give() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    // From there it follows the modules; named too, they would be declared twice.
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/lib.rs"))
        .generate()
        .unwrap()
        .write(&mut made);
    let path = root.join("include/tightfit.h");
    if std::env::var_os(BLESS).is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let committed = std::fs::read(&path).unwrap_or_default();
    assert!(
        made == committed,
        "{} is stale: run this test with {BLESS}=1 and commit it",
        path.display()
    );
}
