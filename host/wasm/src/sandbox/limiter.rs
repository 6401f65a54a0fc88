//! What a store asks before a memory or a table is made or grows.

use wasmtime::ResourceLimiter;

use super::{GuestFailure, Limits, space};

/// Sums all memories and all tables of a store: wasmtime's own limits are for each of them. What
/// would grow past its own maximum does not grow, and is not counted.
#[derive(Debug)]
pub(super) struct Limiter {
    memory: Sum,
    elements: Sum,
    memories: usize,
    tables: usize,
    instances: usize,
}

/// Bytes of all memories together, or elements of all tables.
#[derive(Debug)]
struct Sum {
    now: u64,
    limit: u64,
}

impl Sum {
    fn up_to(limit: u64) -> Sum {
        Sum { now: 0, limit }
    }

    /// Enters that one of them grows; returns whether it may.
    ///
    /// # Errors
    /// `failure`, of what is needed and what is allowed.
    fn grow(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
        failure: impl FnOnce(u64, u64) -> GuestFailure,
    ) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let more = (desired as u64).saturating_sub(current as u64);
        let need = self.now.saturating_add(more);
        if need > self.limit {
            return Err(failure(need, self.limit).into());
        }
        self.now = need;
        Ok(true)
    }
}

impl Limiter {
    pub(super) fn new(limits: &Limits) -> Limiter {
        Limiter {
            memory: Sum::up_to(limits.memory),
            elements: Sum::up_to(limits.table_elements),
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
        let failure = |need, limit| GuestFailure::Memory { need, limit };
        self.memory.grow(current, desired, maximum, failure)
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
        let failure = |need, limit| GuestFailure::Tables { need, limit };
        self.elements.grow(current, desired, maximum, failure)
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
