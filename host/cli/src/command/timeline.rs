//! `tightfit load --timeline`: what a load reserved and wrote, as it went on.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tightfit::Progress;
use tightfit::device::Device;
use tightfit::plan::Plan;

use crate::draw::{Lane, Timeline};

/// Points that are kept of a lane: of twice as many every other one goes.
const MOST_POINTS: usize = 4096;

/// Watches a load.
pub(crate) struct Recorder {
    begun: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lanes: Vec<Watched>,
    /// When memory had been reserved, and was about to be written.
    loading: Duration,
}

#[derive(Default)]
struct Watched {
    lane: Lane,
    /// Bytes written until now.
    written: u64,
    /// Between points at least.
    apart: f64,
}

impl Watched {
    fn step(&mut self, at: f64, bytes: u64, reserved: u64) {
        if self.lane.reserved.last().map(|&(_, bytes)| bytes) != Some(reserved) {
            self.lane.reserved.push((at, reserved));
        }
        self.written += bytes;
        let points = &mut self.lane.written;
        match points.last_mut() {
            // Workers come here in any order.
            Some(last) if at < last.0 + self.apart => last.1 = self.written,
            _ => points.push((at, self.written)),
        }
        if points.len() > 2 * MOST_POINTS {
            let mut number = 0;
            points.retain(|_| {
                number += 1;
                number % 2 == 0
            });
            self.apart = at / MOST_POINTS as f64;
        }
    }
}

impl Recorder {
    /// Begins now.
    pub(crate) fn new() -> Recorder {
        Recorder {
            begun: Instant::now(),
            state: Mutex::default(),
        }
    }

    /// Memory has been reserved for the plan.
    pub(crate) fn reserved(&self, plan: &Plan, devices: &[Box<dyn Device>]) {
        let now = self.begun.elapsed();
        let mut state = self.state();
        state.loading = now;
        let lanes = plan.devices.iter().zip(devices).map(|(planned, device)| {
            let reserved = (now.as_secs_f64(), device.usage().reserved.now);
            Watched {
                lane: Lane {
                    name: planned.device.name.clone(),
                    planned: planned.size.reserved,
                    reserved: vec![(0.0, 0), reserved],
                    written: vec![(now.as_secs_f64(), 0)],
                },
                ..Watched::default()
            }
        });
        state.lanes = lanes.collect();
    }

    /// A step has been made.
    pub(crate) fn step(&self, progress: Progress, devices: &[Box<dyn Device>]) {
        let Some(number) = progress.device else {
            return;
        };
        let Some(device) = devices.get(number as usize) else {
            return;
        };
        let reserved = device.usage().reserved.now;
        let mut state = self.state();
        // Under the lock, so that points are in order.
        let at = self.begun.elapsed().as_secs_f64();
        if let Some(lane) = state.lanes.get_mut(number as usize) {
            lane.step(at, progress.bytes_written, reserved);
        }
    }

    /// The load is over, which had so much staging: from when memory was reserved until now.
    pub(crate) fn finish(&self, title: String, staging: u64, limit: u64) -> Timeline {
        let seconds = self.begun.elapsed().as_secs_f64();
        let mut state = self.state();
        let mut lanes: Vec<Lane> = std::mem::take(&mut state.lanes)
            .into_iter()
            .map(|watched| watched.lane)
            .collect();
        lanes.push(Lane {
            name: "staging".to_owned(),
            planned: limit,
            reserved: vec![
                (0.0, 0),
                (state.loading.as_secs_f64(), staging),
                (seconds, 0),
            ],
            written: Vec::new(),
        });
        Timeline {
            title,
            seconds,
            lanes,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_load_has_no_more_points_and_all_of_its_bytes() {
        let mut watched = Watched::default();
        for step in 0..100_000_u32 {
            watched.step(f64::from(step) / 1e3, 10, 7);
        }
        let points = &watched.lane.written;
        assert!(points.len() <= 2 * MOST_POINTS, "{}", points.len());
        assert_eq!(points.last().unwrap().1, 1_000_000);
        assert!(points.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(watched.lane.reserved, [(0.0, 7)]);
    }
}
