//! Who holds how much: the ledger of a device, the pieces of a range, and the staging buffers of the
//! host.

mod ledger;
mod pool;
mod process;
mod staging;

pub use ledger::{Gauge, Ledger, LedgerEntry, ReservationSize, Usage};
pub use pool::{Allocation, ForeignAllocation, Pool};
pub use process::peak_rss_bytes;
pub use staging::{DEFAULT_STAGING, StagingError, StagingRing};
