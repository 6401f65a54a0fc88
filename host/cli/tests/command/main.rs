//! The command `tightfit`, run as users run it.

mod colors;
mod formats;
#[cfg(unix)]
mod help;
#[cfg(target_os = "linux")]
mod interrupts;
mod json;
mod kinds;
#[cfg(target_os = "linux")]
mod outputs;
mod pictures;
mod policies;
mod programs;
#[cfg(target_os = "linux")]
mod proportion;
mod ranks;
mod reports;
mod saves;
mod scenarios;
mod statuses;
