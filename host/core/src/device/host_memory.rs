//! How much memory this process may still take, as the operating system tells it.

#[cfg(not(windows))]
use std::fs;

/// Total and available memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostMemory {
    pub(super) total: u64,
    pub(super) available: u64,
}

impl HostMemory {
    /// What counts where nobody tells: the operating system has the last word.
    const UNLIMITED: HostMemory = HostMemory {
        total: i64::MAX as u64,
        available: i64::MAX as u64,
    };

    /// Asks the system for what is free, and may be promised to this process.
    #[cfg(windows)]
    pub(super) fn now() -> HostMemory {
        crate::windows::memory().map_or(HostMemory::UNLIMITED, |(total, available)| HostMemory {
            total,
            available,
        })
    }

    /// Reads `/proc/meminfo` and the control group's limit (version 2); where neither can be read,
    /// memory counts as unlimited.
    #[cfg(not(windows))]
    pub(super) fn now() -> HostMemory {
        let machine = fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| parse_meminfo(&text))
            .unwrap_or(HostMemory::UNLIMITED);
        let number = |file: &str| {
            fs::read_to_string(format!("/sys/fs/cgroup/{file}"))
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
        };
        match number("memory.max") {
            None => machine,
            Some(limit) => {
                let used = number("memory.current").unwrap_or(0);
                // Page cache counts as used but is given up under pressure.
                let cached = fs::read_to_string("/sys/fs/cgroup/memory.stat")
                    .ok()
                    .and_then(|text| field(&text, "inactive_file"))
                    .unwrap_or(0);
                HostMemory {
                    total: machine.total.min(limit),
                    available: machine
                        .available
                        .min(limit.saturating_sub(used.saturating_sub(cached))),
                }
            }
        }
    }
}

#[cfg(not(windows))]
fn parse_meminfo(text: &str) -> Option<HostMemory> {
    Some(HostMemory {
        total: field(text, "MemTotal:")?.checked_mul(1024)?,
        available: field(text, "MemAvailable:")?.checked_mul(1024)?,
    })
}

/// The number after `name` at the start of a line.
#[cfg(not(windows))]
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

#[cfg(all(test, not(windows)))]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kibibytes() {
        let text = "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(
            parse_meminfo(text),
            Some(HostMemory {
                total: 16 << 20,
                available: 8 << 20
            })
        );
        assert_eq!(parse_meminfo("MemTotal: 5 kB\n"), None);
        assert_eq!(parse_meminfo("MemTotal: lots\nMemAvailable: 1 kB"), None);
    }
}
