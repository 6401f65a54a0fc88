//! What is checked of a policy's bytes before anything is compiled.

use std::borrow::Cow;

use wasmparser::{Parser, Payload};

use super::{Failure, Limits};

/// A component ready to be compiled: the input itself, or a core module wrapped into one.
///
/// # Errors
/// [`Failure::NotAPolicy`] or [`Failure::TooLarge`].
pub fn component<'a>(bytes: &'a [u8], limits: &Limits) -> Result<Cow<'a, [u8]>, Failure> {
    let not_a_policy = |reason: &str| Failure::NotAPolicy {
        reason: reason.to_owned(),
    };
    check_size("file", bytes.len() as u64, limits.component)?;
    if !bytes.starts_with(b"\0asm") {
        return Err(not_a_policy(
            "not a WebAssembly binary (text and precompiled code are not accepted)",
        ));
    }
    check_functions(bytes, limits)?;
    if Parser::is_component(bytes) {
        return Ok(Cow::Borrowed(bytes));
    }
    if !Parser::is_core_wasm(bytes) {
        return Err(not_a_policy("an unknown version of WebAssembly"));
    }
    // What wit-bindgen and cargo give: a core module that carries its component type.
    wit_component::ComponentEncoder::default()
        .module(bytes)
        .and_then(|encoder| encoder.validate(true).encode())
        .map(Cow::Owned)
        .map_err(|error| Failure::NotAPolicy {
            reason: format!(
                "a core module that cannot be made a component (was it built with the SDK or wit-bindgen?): {error:#}"
            ),
        })
}

fn check_size(what: &'static str, have: u64, limit: u64) -> Result<(), Failure> {
    if have > limit {
        return Err(Failure::TooLarge { what, have, limit });
    }
    Ok(())
}

fn check_functions(bytes: &[u8], limits: &Limits) -> Result<(), Failure> {
    for payload in Parser::new(0).parse_all(bytes) {
        match payload {
            Ok(Payload::CodeSectionEntry(body)) => {
                let range = body.range();
                check_size(
                    "largest function",
                    (range.end - range.start) as u64,
                    limits.function,
                )?;
            }
            Ok(_) => {}
            Err(error) => {
                return Err(Failure::NotAPolicy {
                    reason: format!("damaged: {error}"),
                });
            }
        }
    }
    Ok(())
}
