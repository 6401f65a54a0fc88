//! What is checked of a policy's bytes before anything is compiled.

use tightfit_wasm::policy::precheck_component;
use tightfit_wasm::sandbox::Limits;
use wasmparser::{Parser, Payload};

/// Checks a component, or a core module that becomes one.
pub fn component(data: &[u8]) -> bool {
    let limits = Limits::default()
        .with_component(64 << 10)
        .with_function(1 << 10);
    let Ok(component) = precheck_component(data, &limits) else {
        return false;
    };
    assert!(data.len() as u64 <= limits.component);
    assert!(Parser::is_component(&component));
    for payload in Parser::new(0).parse_all(data) {
        if let Payload::CodeSectionEntry(body) = payload.expect("it was read before") {
            assert!(body.range().len() as u64 <= limits.function);
        }
    }
    true
}
