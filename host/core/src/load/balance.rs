//! How weights for a GPU are shared out between the processor's kernels and the GPU's.
//!
//! Both ways read the checkpoint. Then the processor either quantizes, which takes its time, and
//! sends 4 bits; or it sends 16 bits, which takes the bus its time, and the GPU quantizes in next to
//! none. Neither is faster everywhere, and often a mixture is faster than both: it ends when the
//! processor and the bus are done at the same moment. So `auto` does not choose one but looks for
//! that mixture, by the only figure that counts: the bytes that the load itself gets done in a second.
//!
//! With eight workers and more `auto` leaves floats to the processor, which quantizes from its page cache
//! about as fast as it copies, where it has kernels in vectors. Otherwise it begins with the share that most
//! machines end with: none for the GPU, or half where codes of another method have to be decoded, and
//! without vectors. Then the share changes by a step after every few chunks: on in the same direction as long as
//! the rate rises, back by half as much when it falls.
//! Where one of them does everything, the other is tried again, less and less often.
//! Chunks just after a step are not measured: they find the queues as they were before. The bytes
//! are the same either way.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Where weights for a GPU are quantized. The bytes are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QuantizeOn {
    /// On the processor, so that 4 bits are sent.
    Cpu,
    /// On the GPU, by its own kernels. What they need beside the results is taken from where plain
    /// tensors go later, or, where there is too little of that, reserved for the time of the load
    /// beyond what was planned.
    Gpu,
    /// On both, shared out by what the load measures; never with more memory than planned. Floats are
    /// the processor's alone where there are eight workers or more, and it has vectors. Starts
    /// on the processor alone while the driver compiles the kernels, and stays there where they
    /// cannot be had.
    #[default]
    Auto,
}

impl fmt::Display for QuantizeOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            QuantizeOn::Cpu => "cpu",
            QuantizeOn::Gpu => "gpu",
            QuantizeOn::Auto => "auto",
        })
    }
}

impl FromStr for QuantizeOn {
    type Err = String;

    fn from_str(text: &str) -> Result<QuantizeOn, String> {
        [QuantizeOn::Cpu, QuantizeOn::Gpu, QuantizeOn::Auto]
            .into_iter()
            .find(|place| place.to_string() == text)
            .ok_or_else(|| format!("'{text}' is none of cpu, gpu and auto"))
    }
}

/// Who quantizes a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Host,
    Device,
}

/// Chunks of each worker between two steps, and those of them that are measured.
const WINDOW: usize = 8;
const MEASURED: usize = 6;

const LARGEST_STEP: f64 = 1.0 / 8.0;
const SMALLEST_STEP: f64 = 1.0 / 16.0;

/// Steps that are left out at most before the side that does nothing is tried again.
const MOST_PATIENCE: u32 = 32;

/// With fewer workers as many chunks are measured as with so many: their shares are whole chunks.
const FEWEST_WORKERS: usize = 8;

/// The shares of one device.
#[derive(Debug)]
pub(super) struct Balance {
    workers: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The share of bytes that the device is to quantize.
    share: f64,
    /// What it changes by; less than zero where it falls.
    step: f64,
    /// Bytes that the device has yet to be given for its share, or has been given too many.
    owed: f64,
    /// Bytes a second when it was measured last.
    rate: f64,
    /// Steps to be left out, and how many the next time.
    rest: u32,
    patience: u32,
    /// Chunks since then, the bytes of those that are measured, and when these began.
    chunks: usize,
    bytes: f64,
    start: Duration,
}

impl Balance {
    /// For a load by this many workers, which begins with this share.
    pub(super) fn new(workers: usize, share: f64) -> Balance {
        Balance {
            workers: workers.max(FEWEST_WORKERS),
            state: Mutex::new(State {
                share,
                step: if share > 0.0 {
                    LARGEST_STEP
                } else {
                    SMALLEST_STEP
                },
                owed: 0.0,
                rate: 0.0,
                rest: 0,
                patience: 1,
                chunks: 0,
                bytes: 0.0,
                start: Duration::ZERO,
            }),
        }
    }

    /// Who is to quantize the next this many bytes.
    pub(super) fn choose(&self, bytes: usize) -> Side {
        let mut state = self.lock();
        let bytes = bytes as f64;
        state.owed += state.share * bytes;
        if state.owed >= bytes / 2.0 {
            state.owed -= bytes;
            Side::Device
        } else {
            Side::Host
        }
    }

    /// Notes that this many bytes have been quantized or sent, at a time since some beginning.
    pub(super) fn record(&self, bytes: usize, at: Duration) {
        let mut state = self.lock();
        state.chunks += 1;
        if state.chunks <= self.workers * (WINDOW - MEASURED) {
            state.start = at;
            return;
        }
        state.bytes += bytes as f64;
        if state.chunks >= self.workers * WINDOW {
            let seconds = at.saturating_sub(state.start).as_secs_f64();
            let rate = state.bytes / seconds.max(f64::MIN_POSITIVE);
            state.take_step(rate);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take_step(&mut self, rate: f64) {
        (self.chunks, self.bytes) = (0, 0.0);
        let fell = rate < self.rate;
        self.rate = rate;
        if self.rest > 0 {
            self.rest -= 1;
            return;
        }
        let size = self.step.abs();
        self.step = match fell {
            true => -self.step.signum() * (size / 2.0).max(SMALLEST_STEP),
            false => self.step.signum() * (size * 1.5).min(LARGEST_STEP),
        };
        let next = self.share + self.step;
        self.share = next.clamp(0.0, 1.0);
        if next <= 0.0 || next >= 1.0 {
            // One of them does everything. The other is tried again, but less and less often.
            self.step = -self.step.signum() * SMALLEST_STEP;
            self.rest = self.patience;
            self.patience = (self.patience * 2).min(MOST_PATIENCE);
        }
    }
}

#[cfg(test)]
#[path = "balance_tests.rs"]
mod tests;
