//! Names the shared library for releases, which install it under its version.

fn main() {
    println!("cargo::rerun-if-env-changed=TIGHTFIT_SONAME");
    // Not by default: programs that are linked in a clone look for the file that cargo writes.
    if let Ok(name) = std::env::var("TIGHTFIT_SONAME") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,{name}");
    }
}
