//! What the operating system says of this process.

/// Returns the most resident memory that this process has had, in bytes; `None` where the system
/// does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    // There this would be anybody's file.
    if cfg!(windows) {
        return None;
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}
