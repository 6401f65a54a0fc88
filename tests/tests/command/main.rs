//! The command `tightfit`, run as users run it.

mod drivers;
mod formats;
#[cfg(target_os = "linux")]
mod interrupts;
mod pictures;
mod policies;
mod reports;
mod saves;
mod scenarios;
mod statuses;
