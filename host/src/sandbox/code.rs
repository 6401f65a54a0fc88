//! Compiled code: native, and so to be trusted as this program itself.
#![allow(unsafe_code)] // wasmtime cannot check native code; here is why it need not.

use wasmtime::Engine;
use wasmtime::component::Component;

/// Code that this program's own compiler has made, here or in a child, and that nobody else can
/// have changed since. Only [`child`](super::child) and [`cache`](super::cache) make one.
#[derive(Debug)]
pub(super) struct Code(Vec<u8>);

impl Code {
    /// Takes over bytes.
    ///
    /// # Safety
    /// They are what `Engine::precompile_component` or `Component::serialize` gave, unchanged. For
    /// which version of wasmtime and which configuration is checked when they are loaded.
    pub(super) unsafe fn new(bytes: Vec<u8>) -> Code {
        Code(bytes)
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
