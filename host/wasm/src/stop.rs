//! What ends a program's calls of the host. Fuel and epochs only interrupt code of the guest.

use std::time::Instant;

use tightfit::cancel::CancelToken;

/// Asked before every call and every piece of a long one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    pub(crate) cancel: CancelToken,
    pub(crate) deadline: Option<Instant>,
}

/// Why a program's call of the host was ended; the cause of the trap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// Its time is up.
    #[error("the deadline has passed")]
    Deadline,
    /// The host was asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl Stop {
    /// For what the library does: used when the program is to end, for either reason.
    pub(crate) fn token(&self) -> CancelToken {
        match self.deadline {
            Some(deadline) => self.cancel.until(deadline),
            None => self.cancel.clone(),
        }
    }

    /// Returns the reason, after [`Stop::token`] has ended something.
    pub(crate) fn reason(&self) -> Stopped {
        self.check().err().unwrap_or(Stopped::Cancelled)
    }

    /// Checks that the program may go on.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn check(&self) -> Result<(), Stopped> {
        if self.cancel.is_cancelled() {
            return Err(Stopped::Cancelled);
        }
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(Stopped::Deadline),
            _ => Ok(()),
        }
    }
}
