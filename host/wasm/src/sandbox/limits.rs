//! What a guest may use.

use std::time::Duration;

use tightfit::types::parse_bytes;

/// What a guest may use. The defaults let policies written in any language plan the largest
/// models, and stop everything else within seconds.
///
/// ```
/// use std::time::Duration;
/// use tightfit_wasm::sandbox::Limits;
///
/// let limits = Limits::default()
///     .with_deadline(Duration::from_secs(1))
///     .with_memory(64 << 20);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Limits {
    /// Fuel (about one unit an instruction) for a call, whatever the model.
    pub fuel: u64,
    /// Fuel for each tensor of the request on top. An interpreted language takes up to 325,000.
    pub fuel_per_tensor: u64,
    /// Wall-clock time of one call.
    pub deadline: Duration,
    /// Bytes of all its memories together, and of all its instances besides them.
    pub memory: u64,
    /// Number of memories it may have. Every toolchain's component has one.
    pub memories: usize,
    /// Elements of all its tables together; those that are laid out while compiling, also of modules
    /// that are not instantiated.
    pub table_elements: u64,
    /// Number of tables it may have.
    pub tables: usize,
    /// Number of instances, of core modules and of components, it may be made of: Rust takes 5,
    /// Python up to 108.
    pub instances: usize,
    /// Number of core modules it may hold, instantiated or not.
    pub modules: usize,
    /// Number of interfaces it may import.
    pub imports: usize,
    /// Bytes of stack.
    pub stack: usize,
    /// Bytes that one call between guest and host may carry to the host, as the host holds them. At
    /// its peak the call takes at most three times as much of the host's memory.
    pub host_call_bytes: usize,
    /// Handles that it may hold at the same time.
    pub handles: usize,
    /// Resources that the host may keep for it at the same time.
    pub resources: usize,
    /// Bytes of messages that are passed on for one call, as they are shown: escaped, and
    /// [`MESSAGE_BYTES`](crate::wit::MESSAGE_BYTES) more for each. What comes after the message that
    /// reaches it is dropped.
    pub log_bytes: usize,
    /// Bytes that are kept of one text of the guest that is shown: a message, a description, a
    /// refusal, the name of an import, what the compiler or a trap says of it. What is longer is cut.
    pub text_bytes: usize,
    /// Number of settings it may describe.
    pub settings: usize,
    /// Bytes of the component.
    pub component: u64,
    /// Bytes of a single function: compile time grows faster than linearly with it.
    pub function: u64,
    /// Time for compiling it, where that is done by [`Compiler::Child`](super::Compiler::Child).
    pub compile_time: Duration,
    /// Bytes of address space for compiling it, where that is done by
    /// [`Compiler::Child`](super::Compiler::Child).
    pub compile_memory: u64,
    /// Bytes of what it is compiled to: for Python and JavaScript about 40 MB. While it is loaded twice
    /// as much is in use.
    pub compiled: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            fuel: 1_000_000_000,
            fuel_per_tensor: 500_000,
            deadline: Duration::from_secs(10),
            memory: 256 << 20,
            memories: 1,
            table_elements: 100_000,
            tables: 256,
            instances: 256,
            modules: 256,
            imports: 256,
            stack: 512 << 10,
            host_call_bytes: 32 << 20,
            handles: 10_000,
            resources: 10_000,
            log_bytes: 64 << 10,
            text_bytes: 4 << 10,
            settings: 256,
            component: 32 << 20,
            function: 512 << 10,
            compile_time: Duration::from_secs(60),
            compile_memory: 2 << 30,
            compiled: 128 << 20,
        }
    }
}

tightfit_common::setters!([] Limits:
    with_fuel: fuel, u64;
    with_fuel_per_tensor: fuel_per_tensor, u64;
    with_deadline: deadline, Duration;
    with_memory: memory, u64;
    with_memories: memories, usize;
    with_table_elements: table_elements, u64;
    with_tables: tables, usize;
    with_instances: instances, usize;
    with_modules: modules, usize;
    with_imports: imports, usize;
    with_stack: stack, usize;
    with_host_call_bytes: host_call_bytes, usize;
    with_handles: handles, usize;
    with_resources: resources, usize;
    with_log_bytes: log_bytes, usize;
    with_text_bytes: text_bytes, usize;
    with_settings: settings, usize;
    with_component: component, u64;
    with_function: function, u64;
    with_compile_time: compile_time, Duration;
    with_compile_memory: compile_memory, u64;
    with_compiled: compiled, u64;
);

/// A limit that cannot be set so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadLimit {
    /// There is no limit of this name.
    #[error("there is no limit '{name}' that can be set (there are: {})", Limits::NAMES.join(", "))]
    Unknown {
        /// The name.
        name: String,
    },
    /// The value is none for this limit.
    #[error("limit '{name}' cannot be '{value}': it must be {allowed}")]
    Value {
        /// The name.
        name: String,
        /// The value.
        value: String,
        /// What it can be.
        allowed: &'static str,
    },
}

/// Longer than anyone waits, and short enough to add to any point in time.
const LONGEST: f64 = 86_400.0;

impl Limits {
    /// Returns the fuel for a call about this many tensors.
    pub(crate) fn fuel_for(&self, tensors: usize) -> u64 {
        self.fuel_per_tensor
            .saturating_mul(tensors as u64)
            .saturating_add(self.fuel)
    }

    /// What [`Limits::set`] can set. Not the stack: how much there is of it depends on the thread.
    pub const NAMES: [&str; 21] = [
        "fuel",
        "fuel-per-tensor",
        "deadline",
        "memory",
        "memories",
        "table-elements",
        "tables",
        "instances",
        "modules",
        "imports",
        "host-call-bytes",
        "handles",
        "resources",
        "log-bytes",
        "text-bytes",
        "settings",
        "component",
        "function",
        "compile-time",
        "compile-memory",
        "compiled",
    ];

    /// Sets one limit, given as people write it: units of fuel, elements and other counts as whole
    /// numbers, times in seconds, the rest in bytes such as `512MiB`.
    ///
    /// # Errors
    /// When there is no such limit, or the value is none for it.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), BadLimit> {
        let bad = |allowed| BadLimit::Value {
            name: name.to_owned(),
            value: value.to_owned(),
            allowed,
        };
        let count = || {
            let count = value.trim().parse::<u64>();
            count.map_err(|_| bad("a whole number"))
        };
        let bytes = || {
            let bytes = parse_bytes(value);
            bytes.map_err(|_| bad("a number of bytes such as 512MiB"))
        };
        let seconds = || {
            let seconds = value.trim().trim_end_matches('s').trim_end().parse();
            match seconds {
                Ok(seconds) if (0.0..=LONGEST).contains(&seconds) => {
                    Ok(Duration::from_secs_f64(seconds))
                }
                _ => Err(bad("seconds from 0 to 86400, such as 30 or 0.5")),
            }
        };
        let size = |given: u64| usize::try_from(given).unwrap_or(usize::MAX);
        match name {
            "fuel" => self.fuel = count()?,
            "fuel-per-tensor" => self.fuel_per_tensor = count()?,
            "deadline" => self.deadline = seconds()?,
            "memory" => self.memory = bytes()?,
            "memories" => self.memories = size(count()?),
            "table-elements" => self.table_elements = count()?,
            "tables" => self.tables = size(count()?),
            "instances" => self.instances = size(count()?),
            "modules" => self.modules = size(count()?),
            "imports" => self.imports = size(count()?),
            "host-call-bytes" => self.host_call_bytes = size(bytes()?),
            "handles" => self.handles = size(count()?),
            "resources" => self.resources = size(count()?),
            "log-bytes" => self.log_bytes = size(bytes()?),
            "text-bytes" => self.text_bytes = size(bytes()?),
            "settings" => self.settings = size(count()?),
            "component" => self.component = bytes()?,
            "function" => self.function = bytes()?,
            "compile-time" => self.compile_time = seconds()?,
            "compile-memory" => self.compile_memory = bytes()?,
            "compiled" => self.compiled = bytes()?,
            _ => {
                return Err(BadLimit::Unknown {
                    name: name.to_owned(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_limit_can_be_set_and_no_other() {
        for name in Limits::NAMES {
            let mut limits = Limits::default();
            limits.set(name, "12345").unwrap();
            assert_ne!(limits, Limits::default(), "{name}");
        }
        let mut limits = Limits::default();
        for name in ["stack", "Fuel", ""] {
            let error = limits.set(name, "1").unwrap_err();
            assert!(matches!(error, BadLimit::Unknown { .. }), "{error}");
        }
        assert_eq!(limits, Limits::default());
    }

    #[test]
    fn values_are_read_with_their_units() {
        let mut limits = Limits::default();
        limits.set("memory", "1.5GiB").unwrap();
        limits.set("deadline", " 2.5 s").unwrap();
        assert_eq!(limits.memory, 3 << 29);
        assert_eq!(limits.deadline, Duration::from_millis(2500));
        for (name, value) in [
            ("fuel", "1GiB"),
            ("fuel", "-1"),
            ("fuel-per-tensor", "18446744073709551616"),
            ("memory", "much"),
            ("deadline", "NaN"),
            ("deadline", "inf"),
            ("deadline", "-1"),
            ("deadline", "86401"),
            ("deadline", ""),
            ("compile-time", "soon"),
            ("handles", "1MiB"),
        ] {
            let error = limits.set(name, value).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
    }
}
