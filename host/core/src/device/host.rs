//! Devices whose memory is the host's: `cpu`, and `sim`, an accelerator to plan and test with.

use std::fmt;
use std::sync::Arc;

use memmap2::MmapMut;

use super::host_memory::HostMemory;
use super::{Device, DeviceError, DeviceInfo, DeviceKind, Reservation};
use crate::memory::{Ledger, LedgerEntry, ReservationSize, Usage};

/// The page size that every platform we run on has or divides.
const PAGE: u64 = 4096;

/// `cpu` or `sim`: memory is mapped anonymously in one piece per reservation.
#[derive(Debug)]
pub struct HostDevice {
    name: String,
    kind: DeviceKind,
    capacity: u64,
    ledger: Arc<Ledger>,
    /// Devices whose memory is taken from the host's.
    beside: Vec<Arc<dyn OfHostMemory>>,
}

/// A device whose free memory the host's system counts as free, too.
pub(super) trait OfHostMemory: Send + Sync + fmt::Debug {
    /// Bytes that the device may still take.
    fn available(&self) -> u64;
}

impl HostDevice {
    /// What reservations are rounded up to.
    pub(super) const GRANULARITY: u64 = PAGE;

    /// Host memory; `capacity` in bytes, by default all the machine has.
    pub fn cpu(capacity: Option<u64>) -> HostDevice {
        let total = HostMemory::now().total;
        HostDevice {
            name: "cpu".to_owned(),
            kind: DeviceKind::Cpu,
            capacity: capacity.unwrap_or(total),
            ledger: Arc::default(),
            beside: Vec::new(),
        }
    }

    /// Returns the simulated accelerator `sim:<index>` with `capacity` bytes.
    pub fn sim(index: usize, capacity: u64) -> HostDevice {
        HostDevice {
            name: format!("sim:{index}"),
            kind: DeviceKind::Sim,
            capacity,
            ledger: Arc::default(),
            beside: Vec::new(),
        }
    }

    /// Leaves to other devices what they may take.
    pub(super) fn beside(self, beside: Vec<Arc<dyn OfHostMemory>>) -> HostDevice {
        HostDevice { beside, ..self }
    }

    /// Bytes of the host that are free, and that no other device counts as its own.
    fn host_available(&self) -> u64 {
        let others = self.beside.iter().map(|device| device.available());
        let others = others.fold(0, u64::saturating_add);
        HostMemory::now().available.saturating_sub(others)
    }

    fn out_of_memory(&self, need: u64, have: u64) -> DeviceError {
        DeviceError::OutOfMemory {
            device: self.name.clone(),
            need,
            have,
        }
    }
}

impl Device for HostDevice {
    fn info(&self) -> DeviceInfo {
        let free = self
            .capacity
            .saturating_sub(self.ledger.usage().reserved.now);
        DeviceInfo {
            name: self.name.clone(),
            kind: self.kind,
            capacity: self.capacity,
            // A simulated device is planned for as if it were there, whatever this machine has.
            available: match self.kind {
                DeviceKind::Cpu => free.min(self.host_available()),
                DeviceKind::Sim | DeviceKind::Cuda => free,
            },
            granularity: PAGE,
        }
    }

    fn reserve(&self, size: ReservationSize) -> Result<Box<dyn Reservation>, DeviceError> {
        let host = self.host_available();
        if size.reserved > host {
            return Err(self.out_of_memory(size.reserved, host));
        }
        let entry = Ledger::enter(&self.ledger, size, self.capacity)
            .map_err(|have| self.out_of_memory(size.reserved, have))?;
        let refused = |source| DeviceError::Refused {
            device: self.name.clone(),
            call: "mmap",
            bytes: size.reserved,
            source,
        };
        let length = usize::try_from(size.reserved)
            .map_err(|_| self.out_of_memory(size.reserved, usize::MAX as u64))?;
        let memory = match length {
            0 => None,
            _ => Some(MmapMut::map_anon(length).map_err(refused)?),
        };
        #[cfg(target_os = "linux")]
        if let Some(memory) = &memory {
            // Fewer page faults while loading and fewer TLB misses later. Refusal costs only time.
            let _ = memory.advise(memmap2::Advice::HugePage);
        }
        Ok(Box::new(HostReservation {
            memory,
            device: self.name.clone(),
            _entry: entry,
        }))
    }

    fn usage(&self) -> Usage {
        self.ledger.usage()
    }
}

#[derive(Debug)]
struct HostReservation {
    /// Unmapped before the ledger's entry is struck out: fields drop in this order.
    memory: Option<MmapMut>,
    device: String,
    _entry: LedgerEntry,
}

impl Reservation for HostReservation {
    fn len(&self) -> u64 {
        self.memory.as_deref().map_or(0, <[u8]>::len) as u64
    }

    fn host_memory_mut(&mut self) -> Option<&mut [u8]> {
        Some(self.memory.as_deref_mut().unwrap_or_default())
    }

    fn host_memory(&self) -> Option<&[u8]> {
        Some(self.memory.as_deref().unwrap_or_default())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        let memory = self.memory.as_deref().unwrap_or_default();
        let start = usize::try_from(offset).ok();
        match start.and_then(|start| memory.get(start..start.checked_add(out.len())?)) {
            Some(bytes) => {
                out.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(DeviceError::OutOfBounds {
                device: self.device.clone(),
                offset,
                end: offset.saturating_add(out.len() as u64),
                len: memory.len() as u64,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(bytes: u64) -> ReservationSize {
        ReservationSize {
            requested: bytes,
            padded: bytes,
            reserved: bytes.next_multiple_of(PAGE),
        }
    }

    #[test]
    fn a_sim_has_the_capacity_it_was_given_and_not_a_byte_more() {
        let sim = HostDevice::sim(0, 10 * PAGE);
        let first = sim.reserve(size(6 * PAGE)).unwrap();
        assert_eq!(sim.info().available, 4 * PAGE);
        let error = sim.reserve(size(4 * PAGE + 1)).unwrap_err();
        assert!(
            matches!(error, DeviceError::OutOfMemory { need, have, .. }
                if need == 5 * PAGE && have == 4 * PAGE),
            "{error}"
        );
        let second = sim.reserve(size(4 * PAGE)).unwrap();
        assert_eq!(sim.info().available, 0);
        drop((first, second));
        let usage = sim.usage();
        assert_eq!(usage.reserved.now, 0);
        assert_eq!(usage.reserved.peak, 10 * PAGE);
    }

    #[test]
    fn what_another_device_may_take_is_left_to_it() {
        #[derive(Debug)]
        struct Takes(u64);
        impl OfHostMemory for Takes {
            fn available(&self) -> u64 {
                self.0
            }
        }
        let total = HostMemory::now().total;
        let cpu = |takes: &[u64]| {
            let beside = takes.iter().map(|&bytes| Arc::new(Takes(bytes)) as Arc<_>);
            HostDevice::cpu(None).beside(beside.collect())
        };
        assert!(cpu(&[]).info().available > 0);
        assert!(cpu(&[total / 4, total / 2]).info().available <= total / 4);
        for takes in [&[total][..], &[u64::MAX, 1]] {
            let cpu = cpu(takes);
            assert_eq!(cpu.info().available, 0);
            let error = cpu.reserve(size(1)).unwrap_err();
            assert!(
                matches!(error, DeviceError::OutOfMemory { have: 0, .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn reads_outside_a_reservation_are_errors() {
        let sim = HostDevice::sim(0, 1 << 20);
        let mut reservation = sim.reserve(size(PAGE)).unwrap();
        reservation.host_memory_mut().unwrap()[4095] = 7;
        let mut byte = [0];
        reservation.read(4095, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        for offset in [4096, u64::MAX] {
            assert!(matches!(
                reservation.read(offset, &mut byte),
                Err(DeviceError::OutOfBounds { .. })
            ));
        }
    }

    #[test]
    fn an_empty_reservation_is_fine() {
        let reservation = HostDevice::cpu(None).reserve(size(0)).unwrap();
        assert!(reservation.is_empty());
        reservation.read(0, &mut []).unwrap();
    }

    #[test]
    fn more_than_the_machine_has_is_refused_before_it_is_mapped() {
        let sim = HostDevice::sim(0, u64::MAX);
        let error = sim.reserve(size(1 << 60)).unwrap_err();
        assert!(
            matches!(
                error,
                DeviceError::OutOfMemory { .. } | DeviceError::Refused { .. }
            ),
            "{error}"
        );
        assert_eq!(sim.usage().reserved.now, 0);
    }
}
