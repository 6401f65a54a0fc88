//! What a policy may use, and the limiter that enforces memory and tables.

use std::time::Duration;

use wasmtime::ResourceLimiter;

/// What a policy may use. The defaults let policies written in any language plan the largest
/// models, and stop everything else within seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Fuel (about one unit an instruction) for a call, whatever the model.
    pub fuel: u64,
    /// Fuel for each tensor of the request on top. An interpreted language takes up to 325,000.
    pub fuel_per_tensor: u64,
    /// Wall-clock time of one call.
    pub deadline: Duration,
    /// Bytes of all its memories together.
    pub memory: u64,
    /// Elements of all its tables together.
    pub table_elements: u64,
    /// Bytes of stack.
    pub stack: usize,
    /// Bytes that one call between guest and host may carry to the host.
    pub host_call_bytes: usize,
    /// Bytes of the component.
    pub component: u64,
    /// Bytes of a single function: compile time grows faster than linearly with it.
    pub function: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            fuel: 1_000_000_000,
            fuel_per_tensor: 500_000,
            deadline: Duration::from_secs(10),
            memory: 256 << 20,
            table_elements: 100_000,
            stack: 512 << 10,
            host_call_bytes: 32 << 20,
            component: 32 << 20,
            function: 512 << 10,
        }
    }
}

/// A limit of [`Limiter`] that was exceeded; kept as the cause of the trap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Exceeded {
    #[error("memory: {need} bytes wanted, {limit} allowed")]
    Memory { need: u64, limit: u64 },
    #[error("tables: {need} elements wanted, {limit} allowed")]
    Tables { need: u64, limit: u64 },
}

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
        let need = self
            .memory
            .saturating_add((desired as u64).saturating_sub(current as u64));
        if need > self.memory_limit {
            return Err(Exceeded::Memory {
                need,
                limit: self.memory_limit,
            }
            .into());
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
        let need = self
            .tables
            .saturating_add((desired as u64).saturating_sub(current as u64));
        if need > self.tables_limit {
            return Err(Exceeded::Tables {
                need,
                limit: self.tables_limit,
            }
            .into());
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
