//! What is checked of a guest's bytes before anything is compiled: one pass over its sections.

use std::collections::BTreeSet;

use wasmparser::{BinaryReaderError, Parser, Payload};

use super::instances::Counter;
use super::{GuestFailure, Limits, Wasi};
use crate::world::World;

/// Checks sizes, counts, and what is imported and exported.
///
/// # Errors
/// [`GuestFailure::NotAComponent`], [`GuestFailure::TooLarge`], [`GuestFailure::TooMany`], [`GuestFailure::Tables`],
/// [`GuestFailure::Memory`], [`GuestFailure::WrongWorld`].
pub(super) fn check(
    bytes: &[u8],
    world: &World,
    wasi: Wasi,
    limits: &Limits,
) -> Result<(), GuestFailure> {
    check_size("file", bytes.len() as u64, limits.component)?;
    if !bytes.starts_with(b"\0asm") {
        return Err(not_a_component(
            "not a WebAssembly binary (text and precompiled code are not accepted)",
        ));
    }
    if !Parser::is_component(bytes) && !Parser::is_core_wasm(bytes) {
        return Err(not_a_component("an unknown version of WebAssembly"));
    }
    let mut exports = Vec::new();
    let mut imports = BTreeSet::new();
    let mut instances = Counter::default();
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload.map_err(damaged)?;
        instances.read(&payload).map_err(damaged)?;
        check_count("modules", instances.modules(), limits.modules)?;
        match &payload {
            Payload::CodeSectionEntry(body) => {
                let range = body.range();
                let bytes = (range.end - range.start) as u64;
                check_size("largest function", bytes, limits.function)?;
            }
            Payload::ComponentImportSection(section) if instances.depth() == 1 => {
                for import in section.clone() {
                    let name = import.map_err(damaged)?.name.name;
                    world
                        .check_import(name, wasi)
                        .map_err(GuestFailure::WrongWorld)?;
                    imports.insert(name);
                    check_count("imports", imports.len() as u64, limits.imports)?;
                }
            }
            Payload::ComponentExportSection(section) if instances.depth() == 1 => {
                for export in section.clone() {
                    let name = export.map_err(damaged)?.name.name;
                    world.check_export(name).map_err(GuestFailure::WrongWorld)?;
                    exports.push(name);
                }
            }
            // A core module names interfaces as the component will that is made of it.
            Payload::ImportSection(section) if instances.depth() == 1 => {
                for import in section.clone().into_imports() {
                    let name = import.map_err(damaged)?.module;
                    if is_interface(name) || name == "wasi_snapshot_preview1" {
                        world
                            .check_import(name, wasi)
                            .map_err(GuestFailure::WrongWorld)?;
                        imports.insert(name);
                        check_count("imports", imports.len() as u64, limits.imports)?;
                    }
                }
            }
            Payload::ExportSection(section) if instances.depth() == 1 => {
                for export in section.clone() {
                    let name = export.map_err(damaged)?.name;
                    let interface = name.split('#').next().unwrap_or(name);
                    world
                        .check_export(interface)
                        .map_err(GuestFailure::WrongWorld)?;
                }
            }
            _ => {}
        }
    }
    let Some(sum) = instances.sum() else {
        return Err(not_a_component(
            "it instantiates components that it is given, or modules, which this host does not link",
        ));
    };
    check_count("instances", sum.instances, limits.instances)?;
    let (need, limit) = (instances.laid_out(), limits.table_elements);
    if need > limit {
        return Err(GuestFailure::Tables { need, limit });
    }
    let (need, limit) = (sum.bytes, limits.memory);
    if need > limit {
        return Err(GuestFailure::Memory { need, limit });
    }
    if Parser::is_component(bytes) {
        world
            .check_exports(exports.iter().copied())
            .map_err(GuestFailure::WrongWorld)?;
    }
    Ok(())
}

/// Returns whether a core module's import is of an interface, and not of what tools make up for
/// themselves, such as `[export]` and `env`.
fn is_interface(name: &str) -> bool {
    name.contains(':') && name.contains('/') && !name.starts_with('[')
}

fn not_a_component(reason: &str) -> GuestFailure {
    GuestFailure::NotAComponent {
        reason: reason.to_owned(),
    }
}

fn damaged(error: BinaryReaderError) -> GuestFailure {
    not_a_component(&format!("damaged: {error}"))
}

fn check_count(what: &'static str, have: u64, limit: usize) -> Result<(), GuestFailure> {
    if have > limit as u64 {
        return Err(GuestFailure::TooMany { what, limit });
    }
    Ok(())
}

fn check_size(what: &'static str, have: u64, limit: u64) -> Result<(), GuestFailure> {
    if have > limit {
        return Err(GuestFailure::TooLarge { what, have, limit });
    }
    Ok(())
}
