//! Core modules, as wit-bindgen and cargo give them, made components.
//!
//! Such a module carries a description of the world that it is made for. It is not read: what
//! decodes such descriptions was written for one's own compiler's output, and overflows its stack
//! over a hostile one. This host knows its worlds, and puts its own description in its place.

use std::borrow::Cow;
use std::collections::HashSet;

use wasmparser::{BinaryReaderError, ExportSectionReader, Parser, Payload};

use crate::sandbox::GuestFailure;
use crate::world::World;

/// How sections are called that describe a world.
const DESCRIPTION: &str = "component-type";

/// Returns the input itself if it is a component; a core module with a description of this world, as
/// [`World::component_type`] has it, instead of its own.
pub(crate) fn described<'a>(
    bytes: &'a [u8],
    world: &World,
) -> Result<Cow<'a, [u8]>, BinaryReaderError> {
    if Parser::is_component(bytes) {
        return Ok(Cow::Borrowed(bytes));
    }
    let names = export_names(bytes)?;
    let component_type = world.component_type_of(names.iter().copied());
    let mut described = Vec::with_capacity(bytes.len() + component_type.len() + 64);
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload?;
        match &payload {
            Payload::Version { range, .. } => described.extend_from_slice(&bytes[range.clone()]),
            Payload::CustomSection(section) if section.name().starts_with(DESCRIPTION) => {}
            Payload::ExportSection(exports) => {
                let exports = named_as_here(bytes, exports.clone(), world)?;
                section(&mut described, 7, &[&exports]);
            }
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

/// The exports, with this host's version of an interface in the place of one that matches it. A
/// component's exports are found by versions that match, and so are a core module's imports; only the
/// exports of a core module would have to be of one version to the letter.
fn named_as_here(
    bytes: &[u8],
    exports: ExportSectionReader<'_>,
    world: &World,
) -> Result<Vec<u8>, BinaryReaderError> {
    let end = exports.range().end;
    let exports: Vec<_> = exports
        .into_iter_with_offsets()
        .collect::<Result<_, BinaryReaderError>>()?;
    let mut names: HashSet<Cow<'_, str>> = (exports.iter())
        .map(|(_, export)| export.name.into())
        .collect();
    let mut section = Vec::with_capacity(bytes.len().min(1 << 12));
    number(&mut section, exports.len());
    for (index, (start, export)) in exports.iter().enumerate() {
        let renamed = world
            .export_here(export.name)
            // What a module exports under both names stays as it is.
            .filter(|name| names.insert(name.clone().into()));
        let name = renamed.as_deref().unwrap_or(export.name);
        number(&mut section, name.len());
        section.extend_from_slice(name.as_bytes());
        // Behind the name, which its length comes before, is what is exported.
        let item = &bytes[*start..exports.get(index + 1).map_or(end, |(next, _)| *next)];
        let length = item.iter().take_while(|&&byte| byte > 0x7f).count() + 1;
        section.extend_from_slice(&item[length + export.name.len()..]);
    }
    Ok(section)
}

fn section(module: &mut Vec<u8>, id: u8, parts: &[&[u8]]) {
    module.push(id);
    number(module, parts.iter().map(|part| part.len()).sum());
    parts.iter().for_each(|part| module.extend_from_slice(part));
}

/// Writes a number as LEB128.
fn number(bytes: &mut Vec<u8>, mut number: usize) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
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
/// [`GuestFailure::NotAComponent`] where it is damaged, or imports or exports what neither policies nor
/// programs do.
pub fn component_from_module(bytes: &[u8]) -> Result<Vec<u8>, GuestFailure> {
    let not_a_component = |reason| GuestFailure::NotAComponent { reason };
    let described = world(bytes)
        .and_then(|world| described(bytes, world))
        .map_err(|error| not_a_component(format!("damaged: {error}")))?;
    let component = component(&described).map_err(not_a_component)?;
    Ok(component.into_owned())
}

/// Returns the world that a core module is made for, by what it exports.
fn world(bytes: &[u8]) -> Result<&'static World, BinaryReaderError> {
    let is_run = |name: &&str| name.starts_with("tightfit:host/run@");
    Ok(
        match !Parser::is_component(bytes) && export_names(bytes)?.iter().any(is_run) {
            true => &World::PROGRAM,
            false => &World::POLICY,
        },
    )
}

/// Returns the names of a core module's exports.
fn export_names(module: &[u8]) -> Result<Vec<&str>, BinaryReaderError> {
    let mut names = Vec::new();
    for payload in Parser::new(0).parse_all(module) {
        if let Payload::ExportSection(exports) = payload? {
            for export in exports {
                names.push(export?.name);
            }
        }
    }
    Ok(names)
}
