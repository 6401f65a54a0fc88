//! What a store asks before a memory or a table is made or grows.

use wasmtime::ResourceLimiter;

use super::{Failure, Limits};

/// Sums all memories and all tables of a store: wasmtime's own limits are for each of them.
#[derive(Debug)]
pub(super) struct Limiter {
    memory: u64,
    memory_limit: u64,
    tables: u64,
    tables_limit: u64,
}

impl Limiter {
    pub(super) fn new(limits: &Limits) -> Limiter {
        Limiter {
            memory: 0,
            memory_limit: limits.memory,
            tables: 0,
            tables_limit: limits.table_elements,
        }
    }
}

/// Component-model adapters and language runtimes bring many small core instances.
const INSTANCES: usize = 256;
const TABLES: usize = 256;
/// Every toolchain's component has one; a second only helps to get around a limit.
const MEMORIES: usize = 1;

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let need = grown(self.memory, current, desired);
        let limit = self.memory_limit;
        if need > limit {
            return Err(Failure::Memory { need, limit }.into());
        }
        self.memory = need;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let need = grown(self.tables, current, desired);
        let limit = self.tables_limit;
        if need > limit {
            return Err(Failure::Tables { need, limit }.into());
        }
        self.tables = need;
        Ok(true)
    }

    fn instances(&self) -> usize {
        INSTANCES
    }

    fn tables(&self) -> usize {
        TABLES
    }

    fn memories(&self) -> usize {
        MEMORIES
    }
}

/// The sum once one of its parts has grown.
fn grown(sum: u64, current: usize, desired: usize) -> u64 {
    sum.saturating_add((desired as u64).saturating_sub(current as u64))
}
