//! The shares on machines that are simulated: nothing here looks at a clock.

use std::collections::VecDeque;

use super::*;

/// A machine: seconds for a chunk.
#[derive(Debug, Clone, Copy)]
struct Machine {
    workers: usize,
    /// A worker's, to read and quantize it.
    quantize: f64,
    /// A worker's, to read and send it.
    send: f64,
    /// The bus's, for its 16 bits; for its 4 bits and scales it takes 9 of 32 parts.
    bus: f64,
}

const CHUNK: usize = 1 << 20;
const BUFFERS: usize = 2;

/// In which a share is found, wherever it begins.
const WINDOWS: usize = 12;

impl Machine {
    /// Seconds that the bus takes for what a chunk sends.
    fn transfer(&self, side: Side) -> f64 {
        match side {
            Side::Host => self.bus * 9.0 / 32.0,
            Side::Device => self.bus,
        }
    }

    /// Seconds for this many chunks. Workers have buffers that the bus empties one after the other.
    fn load(&self, chunks: usize, choose: impl Fn() -> Side, record: impl Fn(f64)) -> f64 {
        let mut free_at = vec![0.0f64; self.workers];
        let mut at_work = vec![None; self.workers];
        let mut sending = vec![VecDeque::new(); self.workers];
        let (mut bus_free_at, mut left) = (0.0f64, chunks);
        loop {
            let free = (0..self.workers)
                .filter(|&worker| left > 0 || at_work[worker].is_some())
                .min_by(|&a, &b| free_at[a].total_cmp(&free_at[b]));
            let Some(worker) = free else {
                return bus_free_at;
            };
            let start = free_at[worker];
            if let Some(side) = at_work[worker].take() {
                bus_free_at = bus_free_at.max(start) + self.transfer(side);
                sending[worker].push_back(bus_free_at);
                record(start);
            }
            if left == 0 {
                continue;
            }
            left -= 1;
            let side = choose();
            let begin = match sending[worker].len() {
                BUFFERS => f64::max(start, sending[worker].pop_front().unwrap()),
                _ => start,
            };
            free_at[worker] = begin
                + match side {
                    Side::Host => self.quantize,
                    Side::Device => self.send,
                };
            at_work[worker] = Some(side);
        }
    }

    /// Seconds if the device always has this share.
    fn with_share(&self, chunks: usize, share: f64) -> f64 {
        let balance = Balance::new(self.workers, share);
        self.load(chunks, || balance.choose(CHUNK), |_| {})
    }

    /// Seconds, and the share at the end.
    fn balanced(&self, chunks: usize, share: f64) -> (f64, f64) {
        let balance = Balance::new(self.workers, share);
        let time = self.load(
            chunks,
            || balance.choose(CHUNK),
            |at| balance.record(CHUNK, Duration::from_secs_f64(at)),
        );
        let share = balance.lock().share;
        (time, share)
    }
}

#[test]
fn a_share_is_what_the_device_gets_in_any_sizes() {
    for share in [0.0, 0.1, 0.5, 0.75, 1.0] {
        let balance = Balance::new(4, share);
        let (mut on_device, mut all) = (0usize, 0usize);
        for index in 0..1000usize {
            let bytes = 1 + index * 7919 % 5000;
            all += bytes;
            if balance.choose(bytes) == Side::Device {
                on_device += bytes;
            }
        }
        let have = on_device as f64 / all as f64;
        assert!((have - share).abs() < 0.01, "{share}: {have}");
    }
}

#[test]
fn with_half_the_first_chunks_go_both_ways() {
    let balance = Balance::new(4, 0.5);
    let sides: Vec<Side> = (0..4).map(|_| balance.choose(CHUNK)).collect();
    assert_eq!(sides, [Side::Device, Side::Host, Side::Device, Side::Host]);
}

#[test]
fn on_any_machine_the_shares_come_close_to_the_best_fixed_ones() {
    for workers in [1, 2, 16] {
        for quantize in [100e-6, 400e-6, 2000e-6] {
            for send in [60e-6, 130e-6, 500e-6] {
                for bus in [5e-6, 19e-6, 40e-6, 90e-6, 600e-6] {
                    let machine = Machine {
                        workers,
                        quantize,
                        send,
                        bus,
                    };
                    let chunks = 8000;
                    let best = (0..=16)
                        .map(|share| machine.with_share(chunks, f64::from(share) / 16.0))
                        .fold(f64::INFINITY, f64::min);
                    // Looking for it takes some windows, at the rate of the slower one at worst.
                    let slower = machine
                        .with_share(chunks, 0.0)
                        .max(machine.with_share(chunks, 1.0));
                    let windows = WINDOWS * WINDOW * workers.max(FEWEST_WORKERS);
                    let search = slower * windows as f64 / chunks as f64;
                    for begin in [0.0, 0.5] {
                        let (time, share) = machine.balanced(chunks, begin);
                        assert!(
                            time < 1.1 * best + search,
                            "{machine:?}: {time} s with {share} at the end, the best {best} s"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn where_only_one_way_makes_sense_it_is_taken() {
    let machine = Machine {
        workers: 4,
        quantize: 400e-6,
        send: 100e-6,
        bus: 5e-6,
    };
    let (_, share) = machine.balanced(2000, 0.5);
    assert!(share > 0.95, "a fast bus: {share}");
    let slow_bus = Machine {
        bus: 400e-6,
        ..machine
    };
    let (_, share) = slow_bus.balanced(2000, 0.5);
    assert!(share < 0.1, "a slow bus: {share}");
    let slow_driver = Machine {
        send: 500e-6,
        ..machine
    };
    let (_, share) = slow_driver.balanced(2000, 0.5);
    assert!(share < 0.1, "a driver that costs more: {share}");
}

#[test]
fn names_are_read_as_they_are_written() {
    for place in [QuantizeOn::Cpu, QuantizeOn::Gpu, QuantizeOn::Auto] {
        assert_eq!(place.to_string().parse(), Ok(place));
    }
    assert!("GPU".parse::<QuantizeOn>().is_err());
}
