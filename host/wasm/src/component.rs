//! Core modules, as wit-bindgen and cargo give them, made components.
//!
//! Such a module carries a description of the world that it is made for. It is not read: what
//! decodes such descriptions was written for one's own compiler's output, and overflows its stack
//! over a hostile one. This host knows its worlds, and puts its own description in its place.

use std::borrow::Cow;

use wasmparser::{BinaryReaderError, Parser, Payload};

use crate::sandbox::Failure;
use crate::wit::{bindings, program};

/// How sections are called that describe a world.
const DESCRIPTION: &str = "component-type";

/// Returns the input itself if it is a component; a core module with a description of this world,
/// encoded as wit-component does, instead of its own.
pub(crate) fn described<'a>(
    bytes: &'a [u8],
    component_type: &[u8],
) -> Result<Cow<'a, [u8]>, BinaryReaderError> {
    if Parser::is_component(bytes) {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut described = Vec::with_capacity(bytes.len() + component_type.len() + 64);
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload?;
        match &payload {
            Payload::Version { range, .. } => described.extend_from_slice(&bytes[range.clone()]),
            Payload::CustomSection(section) if section.name().starts_with(DESCRIPTION) => {}
            _ => {
                if let Some((id, range)) = payload.as_section() {
                    section(&mut described, id, &[&bytes[range]]);
                }
            }
        }
    }
    let name = [&[DESCRIPTION.len() as u8], DESCRIPTION.as_bytes()].concat();
    section(&mut described, 0, &[&name, component_type]);
    Ok(Cow::Owned(described))
}

fn section(module: &mut Vec<u8>, id: u8, parts: &[&[u8]]) {
    module.push(id);
    let mut length: usize = parts.iter().map(|part| part.len()).sum();
    while length > 0x7f {
        module.push(length as u8 | 0x80);
        length >>= 7;
    }
    module.push(length as u8);
    parts.iter().for_each(|part| module.extend_from_slice(part));
}

/// Returns a component ready to be compiled: what [`described`] gave, wrapped into one if it is a
/// core module.
///
/// # Errors
/// What keeps a core module from being made a component.
pub(crate) fn component(described: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    if Parser::is_component(described) {
        return Ok(Cow::Borrowed(described));
    }
    wit_component::ComponentEncoder::default()
        .module(described)
        .and_then(|encoder| encoder.validate(true).encode())
        .map(Cow::Owned)
        .map_err(|error| {
            format!(
                "a core module that cannot be made a component (was it built with the SDK or wit-bindgen?): {error:#}"
            )
        })
}

/// Returns the bytes of the component that a core module makes: what `cargo build` gives for a policy
/// or a program that uses the SDK, and other compilers with wit-bindgen. A component is given back as
/// it is.
///
/// The [`sandbox`](crate::sandbox) takes either and needs no such call. It is for hosts that have a
/// compiler of their own; no limits are checked here.
///
/// # Errors
/// [`Failure::NotAComponent`] where it is damaged, or imports or exports what neither policies nor
/// programs do.
pub fn component_from_module(bytes: &[u8]) -> Result<Vec<u8>, Failure> {
    let not_a_component = |reason| Failure::NotAComponent { reason };
    let described = component_type(bytes)
        .and_then(|component_type| described(bytes, component_type))
        .map_err(|error| not_a_component(format!("damaged: {error}")))?;
    let component = component(&described).map_err(not_a_component)?;
    Ok(component.into_owned())
}

/// Returns the description of the world that a core module is made for, by what it exports.
fn component_type(bytes: &[u8]) -> Result<&'static [u8], BinaryReaderError> {
    if !Parser::is_component(bytes) {
        for payload in Parser::new(0).parse_all(bytes) {
            let Payload::ExportSection(exports) = payload? else {
                continue;
            };
            for export in exports {
                if export?.name.starts_with("tightfit:host/run@") {
                    return Ok(program::bindings::COMPONENT_TYPE);
                }
            }
        }
    }
    Ok(bindings::COMPONENT_TYPE)
}
