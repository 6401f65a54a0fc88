//! How slow a server may be.

use std::time::Duration;

/// Bytes that have to come in a second, averaged over a whole window: what a modem brings. With less
/// a model takes weeks, and a server that sends a byte now and then would never be given up.
const LEAST_PER_SECOND: u64 = 4 << 10;

/// Counts what comes in while it is waited for. Time that goes by for other reasons, such as a slow
/// disk, does not count.
#[derive(Debug)]
pub(super) struct Pace {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

/// What came in a window that was not enough.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooSlow {
    pub(super) seconds: u64,
    pub(super) need: u64,
    pub(super) have: u64,
}

impl Pace {
    pub(super) fn new(window: Duration) -> Pace {
        Pace {
            window,
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    /// Notes that this many bytes came after so long.
    ///
    /// # Errors
    /// [`TooSlow`] when a window is over.
    pub(super) fn came(&mut self, bytes: u64, after: Duration) -> Result<(), TooSlow> {
        self.waited += after;
        self.bytes += bytes;
        if self.waited < self.window {
            return Ok(());
        }
        // A single wait may have been longer than the window.
        let need = LEAST_PER_SECOND.saturating_mul(self.waited.as_secs().max(1));
        let (seconds, have) = (self.waited.as_secs(), self.bytes);
        *self = Pace::new(self.window);
        match have < need {
            true => Err(TooSlow {
                seconds,
                need,
                have,
            }),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_drip_is_given_up_after_one_window() {
        let mut pace = Pace::new(30 * SECOND);
        let given_up = (1..).find_map(|second| Some((second, pace.came(1, SECOND).err()?)));
        let slow = TooSlow {
            seconds: 30,
            need: 30 << 12,
            have: 30,
        };
        assert_eq!(given_up, Some((30, slow)));
    }

    #[test]
    fn a_pause_is_made_up_for_in_its_window() {
        let mut pace = Pace::new(30 * SECOND);
        for _ in 0..100 {
            assert_eq!(pace.came(0, 20 * SECOND), Ok(()));
            assert_eq!(pace.came(30 << 12, 10 * SECOND), Ok(()));
        }
        // What came in an earlier window counts for nothing in the next.
        assert_eq!(pace.came(1 << 40, 30 * SECOND), Ok(()));
        assert_eq!(pace.came(1, 29 * SECOND), Ok(()));
        assert!(pace.came(1, SECOND).is_err());
    }

    #[test]
    fn a_fast_server_is_never_too_slow() {
        let mut pace = Pace::new(SECOND);
        for _ in 0..10_000 {
            assert_eq!(pace.came(1 << 20, Duration::from_millis(10)), Ok(()));
        }
    }
}
