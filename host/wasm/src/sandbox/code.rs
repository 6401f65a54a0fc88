//! Compiled code: native, and so to be trusted as this program itself.
#![allow(unsafe_code)] // wasmtime cannot check native code; here is why it need not.

use wasmtime::Engine;
use wasmtime::component::Component;

use super::{GuestFailure, Limits};
use tightfit::types::Bytes;

/// Code that this program's own compiler has made, here or in a child, and that nobody else can
/// have changed since. Only [`child`](super::child) and [`cache`](super::cache) make one of bytes.
#[derive(Debug)]
pub(super) struct Code(Vec<u8>);

/// The section in which wasmtime describes what it has compiled. Read, it takes up to 50 times as
/// much memory.
const DESCRIPTION: &[u8] = b".wasmtime.info";

/// Bytes that a description takes at least, and how much of a component it takes at most. A policy's
/// takes 4 %; a few lines can describe a type of a million parts.
const SHORT_DESCRIPTION: u64 = 256 << 10;
const DESCRIBED_BY: u64 = 2;

/// Bytes that code takes at least, and how many there may be for each of the component. A policy takes
/// four times its own.
const SHORT_CODE: u64 = 1 << 20;
const COMPILED_FROM: u64 = 16;

/// What keeps a guest of `guest` bytes from being loaded that is compiled to `have`: it has to be
/// in proportion to the limits, and to the guest.
pub(super) fn check_length(have: u64, guest: usize, limits: &Limits) -> Result<(), GuestFailure> {
    let limit = limits.compiled;
    if have > limit {
        return Err(GuestFailure::Compiled { limit });
    }
    let most = SHORT_CODE.saturating_add(COMPILED_FROM.saturating_mul(guest as u64));
    if have > most {
        let reason = format!(
            "compiled, it takes more than {}, which is out of proportion to its size",
            Bytes(most)
        );
        return Err(GuestFailure::NotAComponent { reason });
    }
    Ok(())
}

impl Code {
    /// Takes over bytes.
    ///
    /// # Safety
    /// They are what `Engine::precompile_component` or `Component::serialize` gave, unchanged. For
    /// which version of wasmtime and which configuration is checked when they are loaded.
    pub(super) unsafe fn new(bytes: Vec<u8>) -> Code {
        Code(bytes)
    }

    /// Compiles a component here.
    ///
    /// # Errors
    /// When it is not valid.
    pub(super) fn compile(engine: &Engine, component: &[u8]) -> wasmtime::Result<Code> {
        engine.precompile_component(component).map(Code)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Checks that what it takes is in proportion to the limits, and to the bytes of the guest that
    /// it was compiled from.
    ///
    /// # Errors
    /// [`GuestFailure::Compiled`], [`GuestFailure::NotAComponent`].
    pub(super) fn check(&self, guest: usize, limits: &Limits) -> Result<(), GuestFailure> {
        check_length(self.0.len() as u64, guest, limits)?;
        let have = section_bytes(&self.0, DESCRIPTION).unwrap_or(0);
        let most = SHORT_DESCRIPTION + guest as u64 / DESCRIBED_BY;
        if have > most {
            let reason = format!(
                "its types and instances take {have} bytes to describe, at most {most} for one of its size"
            );
            return Err(GuestFailure::NotAComponent { reason });
        }
        Ok(())
    }

    /// Makes it a component.
    ///
    /// # Errors
    /// When it was compiled by another version of wasmtime, or for another configuration or machine.
    pub(super) fn load(&self, engine: &Engine) -> wasmtime::Result<Component> {
        // SAFETY: they came out of wasmtime's compiler and are unchanged, as `Code::new` demands.
        unsafe { Component::deserialize(engine, &self.0) }
    }
}

/// Returns the bytes of a section of an ELF file for 64 bits; wasmtime writes no other for the
/// machines that we compile for. `None` where there is none of this name.
fn section_bytes(elf: &[u8], name: &[u8]) -> Option<u64> {
    let at = |start: u64, length: u64| {
        let range =
            usize::try_from(start).ok()?..usize::try_from(start.checked_add(length)?).ok()?;
        elf.get(range)
    };
    // Written by this machine, in its own byte order.
    let u16_at = |start| Some(u16::from_ne_bytes(*at(start, 2)?.first_chunk()?));
    let u32_at = |start| Some(u32::from_ne_bytes(*at(start, 4)?.first_chunk()?));
    let u64_at = |start| Some(u64::from_ne_bytes(*at(start, 8)?.first_chunk()?));
    let headers = u64_at(0x28)?;
    let (size, count, names) = (u16_at(0x3a)?, u16_at(0x3c)?, u16_at(0x3e)?);
    let header = |index: u16| headers.checked_add(u64::from(index) * u64::from(size));
    let names = u64_at(header(names)?.checked_add(0x18)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let start = names.checked_add(u64::from(u32_at(header)?))?;
        let is_it = at(start, name.len() as u64 + 1)?.strip_prefix(name)? == [0];
        let bytes = u64_at(header.checked_add(0x20)?)?;
        is_it.then_some(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::run::{Reservation, config};

    fn code() -> Code {
        let engine = Engine::new(&config(512 << 10, Reservation::Whole)).unwrap();
        Code::compile(&engine, b"\0asm\x0d\0\x01\0").unwrap()
    }

    #[test]
    fn the_description_is_found_in_what_wasmtime_writes() {
        let code = code();
        let bytes = section_bytes(code.bytes(), DESCRIPTION).unwrap();
        assert!((1..4096).contains(&bytes), "{bytes}");
        assert_eq!(section_bytes(code.bytes(), b".nothing"), None);
        code.check(8, &Limits::default()).unwrap();
    }

    #[test]
    fn what_is_no_elf_file_has_no_sections() {
        let whole = code().0;
        for length in [0, 1, 0x28, 0x40, whole.len() / 2, whole.len() - 1] {
            section_bytes(&whole[..length], DESCRIPTION);
        }
        assert_eq!(section_bytes(&[0xff; 4096], DESCRIPTION), None);
    }
}
