//! Who holds how much: the ledger of a device, and the staging buffers of the host.

mod ledger;
mod staging;

pub use ledger::{Gauge, Ledger, ReservationSize, Usage};
pub use staging::{DEFAULT_STAGING, StagingError, StagingRing};
