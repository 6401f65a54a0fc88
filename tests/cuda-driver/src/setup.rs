//! How the stand-in is to behave. Written as text: it crosses from one copy of this crate to
//! another, or into another process.

use std::fmt;
use std::str::FromStr;

/// How the stand-in is to behave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// Bytes of each device.
    pub devices: Vec<u64>,
    /// Whether devices have virtual memory, and the caller's memory can be registered.
    pub virtual_memory: bool,
    /// What pages come in, in bytes.
    pub granularity: u64,
    /// Which call fails, counted from 1, and all after it if `for_good`.
    pub fail_at: Option<u64>,
    /// Which calls are counted for that: those made while this device's context is current. All, if there is none.
    pub fail_on: Option<usize>,
    /// And those of this name. All, if it is empty.
    pub fail_call: String,
    /// With this error.
    pub error: u32,
    /// Whether all later calls fail, too.
    pub for_good: bool,
    /// Bytes that every device says are free but does not have.
    pub hidden: u64,
    /// Bytes that somebody else takes just before pages are created for the first time.
    pub stolen: u64,
    /// Whether the driver cannot compile any module.
    pub refuses_modules: bool,
    /// Which CUDA the driver is of, as it says so: 12030 for 12.3.
    pub version: i32,
    /// Whether devices have no memory of their own.
    pub integrated: bool,
    /// Whether their memory is a node of the host's.
    pub numa_node: bool,
    /// Where the books go when the process ends; empty for nowhere.
    pub report: String,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            devices: vec![1 << 30],
            virtual_memory: true,
            granularity: 2 << 20,
            fail_at: None,
            fail_on: None,
            fail_call: String::new(),
            error: 719,
            for_good: false,
            hidden: 0,
            stolen: 0,
            refuses_modules: false,
            version: 12_030,
            integrated: false,
            numa_node: false,
            report: String::new(),
        }
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices: Vec<String> = self.devices.iter().map(u64::to_string).collect();
        write!(
            f,
            "{};{};{};{};{};{};{};{};{};{};{};{};{};{};{}",
            devices.join(","),
            self.virtual_memory,
            self.granularity,
            self.fail_at.unwrap_or(0),
            self.fail_on.map_or(0, |device| device + 1),
            self.fail_call,
            self.error,
            self.for_good,
            self.hidden,
            self.stolen,
            self.refuses_modules,
            self.version,
            self.integrated,
            self.numa_node,
            self.report,
        )
    }
}

impl FromStr for Setup {
    type Err = String;

    fn from_str(text: &str) -> Result<Setup, String> {
        let mut fields = text.splitn(15, ';');
        let mut next = || {
            fields
                .next()
                .ok_or_else(|| format!("'{text}' is too short"))
        };
        fn read<T: FromStr>(field: &str) -> Result<T, String> {
            field
                .parse()
                .map_err(|_| format!("'{field}' cannot be read"))
        }
        Ok(Setup {
            devices: next()?
                .split(',')
                .filter(|bytes| !bytes.is_empty())
                .map(read)
                .collect::<Result<_, _>>()?,
            virtual_memory: read(next()?)?,
            granularity: read(next()?)?,
            fail_at: Some(read(next()?)?).filter(|&at| at > 0),
            fail_on: read::<usize>(next()?)?.checked_sub(1),
            fail_call: next()?.to_owned(),
            error: read(next()?)?,
            for_good: read(next()?)?,
            hidden: read(next()?)?,
            stolen: read(next()?)?,
            refuses_modules: read(next()?)?,
            version: read(next()?)?,
            integrated: read(next()?)?,
            numa_node: read(next()?)?,
            report: next()?.to_owned(),
        })
    }
}
