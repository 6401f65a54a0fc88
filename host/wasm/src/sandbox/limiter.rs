//! What a store asks before a memory or a table is made or grows.

use wasmtime::ResourceLimiter;

use super::{Failure, Limits, space};

/// Sums all memories and all tables of a store: wasmtime's own limits are for each of them. What
/// would grow past its own maximum does not grow, and is not counted.
#[derive(Debug)]
pub(super) struct Limiter {
    memory: u64,
    memory_limit: u64,
    elements: u64,
    elements_limit: u64,
    memories: usize,
    tables: usize,
    instances: usize,
}

impl Limiter {
    pub(super) fn new(limits: &Limits) -> Limiter {
        Limiter {
            memory: 0,
            memory_limit: limits.memory,
            elements: 0,
            elements_limit: limits.table_elements,
            memories: limits.memories,
            tables: limits.tables,
            instances: limits.instances,
        }
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let need = grown(self.memory, current, desired);
        let limit = self.memory_limit;
        if need > limit {
            return Err(Failure::Memory { need, limit }.into());
        }
        self.memory = need;
        Ok(true)
    }

    /// It was allowed to grow and could not: for want of this process's memory, which is not for the
    /// guest to make out.
    fn memory_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        match space::is_short(&error) {
            true => Err(space::failure(format_args!("{error:#}")).into()),
            false => Ok(()),
        }
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let need = grown(self.elements, current, desired);
        let limit = self.elements_limit;
        if need > limit {
            return Err(Failure::Tables { need, limit }.into());
        }
        self.elements = need;
        Ok(true)
    }

    fn instances(&self) -> usize {
        self.instances
    }

    fn tables(&self) -> usize {
        self.tables
    }

    fn memories(&self) -> usize {
        self.memories
    }
}

/// The sum once one of its parts has grown.
fn grown(sum: u64, current: usize, desired: usize) -> u64 {
    sum.saturating_add((desired as u64).saturating_sub(current as u64))
}
