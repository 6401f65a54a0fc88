//! Who holds how much: the ledger of a device, and the staging buffers of the host.

mod ledger;
mod process;
mod staging;

pub use ledger::{Gauge, Ledger, LedgerEntry, ReservationSize, Usage};
pub use process::peak_rss_bytes;
pub use staging::{DEFAULT_STAGING, StagingError, StagingRing};
