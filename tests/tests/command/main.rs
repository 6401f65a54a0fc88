//! The command `tightfit`, run as users run it.

mod drivers;
mod formats;
#[cfg(target_os = "linux")]
mod interrupts;
mod pictures;
mod policies;
#[cfg(target_os = "linux")]
mod proportion;
mod reports;
mod saves;
mod scenarios;
mod statuses;
