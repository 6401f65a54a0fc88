//! NVIDIA GPUs, through their driver alone: no toolkit to build, and no driver needed to run without
//! them.

#[allow(unsafe_code)] // Calls a C library; see there.
mod driver;

use std::sync::{Arc, Mutex, PoisonError};

use super::host::OfHostMemory;
use super::{
    Attached, Device, DeviceAddress, DeviceBytes, DeviceError, DeviceInfo, DeviceKind, Multiplier,
    PageLocked, Piece, Quantizer, Queue, Reservation, WRITER_BUFFERS, Workspace, Writer,
};
use crate::memory::{Ledger, LedgerEntry, ReservationSize, Usage};
use driver::{
    Context, CudaPageLocked, CudaQueue, DeviceMemory, Kept, KernelModule, KernelMultiplier,
    KernelQuantizer, Staging, WorkspaceMemory,
};

/// What devices without virtual memory round to.
const PLAIN_GRANULARITY: u64 = 2 << 20;

/// `cuda:<index>`: one GPU.
#[derive(Debug)]
pub struct CudaDevice {
    gpu: Arc<Gpu>,
    /// The driver's last word on free memory.
    last: Mutex<Last>,
}

/// What a device shares with its reservations.
#[derive(Debug)]
struct Gpu {
    /// Dropped, and with that unloaded, before the context.
    kernels: Arc<KernelModule>,
    products: Arc<KernelModule>,
    decoder: Arc<KernelModule>,
    experts: Arc<KernelModule>,
    context: Arc<Context>,
    /// Bytes that the user allows; by default all there are.
    limit: Option<u64>,
    total: u64,
    granularity: u64,
    has_virtual_memory: bool,
    ledger: Arc<Ledger>,
}

#[derive(Debug)]
struct Last {
    free: u64,
    /// Why it could not be asked since: the next reservation says so.
    failure: Option<DeviceError>,
}

impl CudaDevice {
    /// Returns how many devices the driver has.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] without a driver, with one too old, or without devices.
    pub fn count() -> Result<u32, DeviceError> {
        driver::device_count()
    }

    /// Returns the device with the driver's number `index`, of which at most `capacity` bytes may
    /// be used; by default all that are free.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] when it is not there, [`DeviceError::Driver`] when it cannot be
    /// used.
    pub fn open(index: u32, capacity: Option<u64>) -> Result<CudaDevice, DeviceError> {
        let context = Arc::new(Context::retain(index)?);
        let granularity = context.virtual_granularity()?;
        let (free, total) = context.memory()?;
        Ok(CudaDevice {
            gpu: Arc::new(Gpu {
                kernels: Arc::new(KernelModule::quantizing(&context)),
                products: Arc::new(KernelModule::products(&context)),
                decoder: Arc::new(KernelModule::decoder(&context)),
                experts: Arc::new(KernelModule::experts(&context)),
                context,
                limit: capacity,
                total,
                granularity: granularity.unwrap_or(PLAIN_GRANULARITY),
                has_virtual_memory: granularity.is_some(),
                ledger: Arc::default(),
            }),
            last: Mutex::new(Last {
                free,
                failure: None,
            }),
        })
    }
}

impl CudaDevice {
    /// The device as one whose free memory is the host's too, if it is.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] when the driver refuses to say.
    pub(super) fn of_host_memory(&self) -> Result<Option<Arc<dyn OfHostMemory>>, DeviceError> {
        let shares = self.gpu.context.shares_host_memory()?;
        Ok(shares.then(|| Arc::clone(&self.gpu) as Arc<dyn OfHostMemory>))
    }
}

impl OfHostMemory for Gpu {
    fn available(&self) -> u64 {
        let rest = self
            .capacity()
            .saturating_sub(self.ledger.usage().reserved.now);
        match self.context.memory() {
            Ok((free, _)) => free.min(rest),
            // The next reservation of the device says so.
            Err(_) => rest,
        }
    }
}

impl Gpu {
    fn capacity(&self) -> u64 {
        self.limit.unwrap_or(self.total).min(self.total)
    }

    fn out_of_memory(&self, need: u64, have: u64) -> DeviceError {
        DeviceError::OutOfMemory {
            device: self.context.name().to_owned(),
            need,
            have,
        }
    }

    /// Takes memory. Where there is too little, the error says how much the driver has.
    fn take(&self, bytes: u64) -> Result<Option<Arc<DeviceMemory>>, DeviceError> {
        let len = usize::try_from(bytes).map_err(|_| self.out_of_memory(bytes, self.total))?;
        let taken = match (len, self.has_virtual_memory) {
            (0, _) => return Ok(None),
            (_, true) => DeviceMemory::take_virtual(&self.context, len),
            (_, false) => DeviceMemory::take_plain(&self.context, len),
        };
        match taken {
            Ok(memory) => Ok(Some(Arc::new(memory))),
            Err(error) if is_out_of_memory(&error) => Err(match self.context.memory() {
                // Others have taken it since it was asked about.
                Ok((free, _)) if free < bytes => self.out_of_memory(bytes, free),
                // Free, it says, and yet it does not give it.
                _ => error,
            }),
            Err(error) => Err(error),
        }
    }

    /// Enters a reservation in the ledger, and takes its memory.
    fn reserve(
        &self,
        size: ReservationSize,
    ) -> Result<(Option<Arc<DeviceMemory>>, LedgerEntry), DeviceError> {
        let (free, _) = self.context.memory()?;
        if size.reserved > free {
            return Err(self.out_of_memory(size.reserved, free));
        }
        let entry = Ledger::enter(&self.ledger, size, self.capacity())
            .map_err(|have| self.out_of_memory(size.reserved, have))?;
        Ok((self.take(size.reserved)?, entry))
    }
}

fn is_out_of_memory(error: &DeviceError) -> bool {
    matches!(
        error,
        DeviceError::Driver {
            out_of_memory: true,
            ..
        }
    )
}

impl Device for CudaDevice {
    fn info(&self) -> DeviceInfo {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match self.gpu.context.memory() {
            Ok((free, _)) => last.free = free,
            Err(error) => last.failure = Some(error),
        }
        let gpu = &self.gpu;
        let used = gpu.ledger.usage().reserved.now;
        DeviceInfo {
            name: gpu.context.name().to_owned(),
            kind: DeviceKind::Cuda,
            capacity: gpu.capacity(),
            available: last.free.min(gpu.capacity().saturating_sub(used)),
            granularity: gpu.granularity,
        }
    }

    fn reserve(&self, size: ReservationSize) -> Result<Box<dyn Reservation>, DeviceError> {
        let failure = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            last.failure.take()
        };
        if let Some(failure) = failure {
            return Err(failure);
        }
        let (memory, entry) = self.gpu.reserve(size)?;
        Ok(Box::new(CudaReservation {
            memory,
            gpu: Arc::clone(&self.gpu),
            _entry: entry,
        }))
    }

    fn usage(&self) -> Usage {
        self.gpu.ledger.usage()
    }

    fn queue(&self) -> Result<Option<Arc<dyn Queue>>, DeviceError> {
        let queue = {
            let Gpu {
                kernels,
                products,
                experts,
                decoder,
                ..
            } = &*self.gpu;
            CudaQueue::new([kernels, products, experts, decoder])?
        };
        Ok(Some(Arc::new(queue)))
    }
}

#[derive(Debug)]
struct CudaReservation {
    /// Given back before the ledger's entry is struck out: fields drop in this order.
    memory: Option<Arc<DeviceMemory>>,
    gpu: Arc<Gpu>,
    _entry: LedgerEntry,
}

impl CudaReservation {
    /// Memory for kernels; `None` for nothing.
    fn workspace(&self, place: Workspace) -> Result<Option<WorkspaceMemory>, DeviceError> {
        match place {
            Workspace::Within { offset, len } => {
                let Some(memory) = &self.memory else {
                    return Ok(None);
                };
                let end = offset.saturating_add(len);
                if end > memory.len() {
                    return Err(DeviceError::OutOfBounds {
                        device: self.gpu.context.name().to_owned(),
                        offset,
                        end,
                        len: memory.len(),
                    });
                }
                Ok(Some(WorkspaceMemory {
                    memory: Arc::clone(memory),
                    start: offset,
                    len,
                    _entry: None,
                }))
            }
            Workspace::Beside { len } => {
                let reserved = len.max(1).next_multiple_of(self.gpu.granularity);
                let (memory, entry) = self.gpu.reserve(ReservationSize {
                    requested: len,
                    padded: len,
                    reserved,
                })?;
                Ok(memory.map(|memory| WorkspaceMemory {
                    memory,
                    start: 0,
                    len: reserved,
                    _entry: Some(entry),
                }))
            }
        }
    }

    /// Memory for kernels with these bytes in it, and behind them whatever was there.
    fn filled(
        &self,
        place: Workspace,
        bytes: &[u8],
    ) -> Result<Option<WorkspaceMemory>, DeviceError> {
        let Some(workspace) = self.workspace(place)? else {
            return Ok(None);
        };
        if bytes.len() as u64 > workspace.len {
            return Err(DeviceError::OutOfBounds {
                device: self.gpu.context.name().to_owned(),
                offset: workspace.start,
                end: workspace.start + bytes.len() as u64,
                len: workspace.start + workspace.len,
            });
        }
        let buffers = CudaPageLocked::new(&self.gpu.context, WRITER_BUFFERS * bytes.len())?;
        let mut writer = Staging::new(&workspace.memory, Box::new(buffers))?;
        writer.stage()?[..bytes.len()].copy_from_slice(bytes);
        writer.write(&[Piece {
            start: 0,
            len: bytes.len(),
            offset: workspace.start,
        }])?;
        writer.finish()?;
        Ok(Some(workspace))
    }
}

impl Reservation for CudaReservation {
    fn len(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.len())
    }

    fn host_memory_mut(&mut self) -> Option<&mut [u8]> {
        None
    }

    fn host_memory(&self) -> Option<&[u8]> {
        None
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        match &self.memory {
            Some(memory) => memory.read(offset, out),
            None if offset == 0 && out.is_empty() => Ok(()),
            None => Err(DeviceError::OutOfBounds {
                device: self.gpu.context.name().to_owned(),
                offset,
                end: offset.saturating_add(out.len() as u64),
                len: 0,
            }),
        }
    }

    fn page_lock(&self, bytes: usize) -> Result<Option<Box<dyn PageLocked>>, DeviceError> {
        match &self.memory {
            Some(memory) => {
                let locked = CudaPageLocked::new(memory.context(), bytes)?;
                Ok(Some(Box::new(locked)))
            }
            None => Ok(None),
        }
    }

    fn attach(&self) -> Result<Option<Box<dyn Attached + '_>>, DeviceError> {
        let current = self.gpu.context.enter()?;
        Ok(Some(Box::new(current)))
    }

    fn writer(&self, buffers: Box<dyn PageLocked>) -> Result<Option<Box<dyn Writer>>, DeviceError> {
        match &self.memory {
            Some(memory) => Ok(Some(Box::new(Staging::new(memory, buffers)?))),
            None => Ok(None),
        }
    }

    fn quantizer(&self, workspace: Workspace) -> Result<Option<Arc<dyn Quantizer>>, DeviceError> {
        let Some(results) = &self.memory else {
            return Ok(None);
        };
        let Some(workspace) = self.workspace(workspace)? else {
            return Ok(None);
        };
        let quantizer = KernelQuantizer::new(&self.gpu.kernels, results, workspace);
        Ok(Some(Arc::new(quantizer)))
    }

    fn multiplier(
        &self,
        constants: &[u8],
        place: Workspace,
    ) -> Result<Option<Arc<dyn Multiplier>>, DeviceError> {
        let Some(weights) = &self.memory else {
            return Ok(None);
        };
        let constants = match constants {
            [] => None,
            constants => self.filled(place, constants)?,
        };
        let multiplier =
            KernelMultiplier::new(&self.gpu.products, &self.gpu.experts, weights, constants)?;
        Ok(Some(Arc::new(multiplier)))
    }

    fn cleared(&self, place: Workspace) -> Result<Option<DeviceBytes>, DeviceError> {
        let Some(memory) = self.workspace(place)? else {
            return Ok(None);
        };
        let (Workspace::Within { len, .. } | Workspace::Beside { len }) = place;
        let bytes = usize::try_from(len).map_err(|_| self.gpu.out_of_memory(len, memory.len))?;
        memory.memory.clear(memory.start, bytes)?;
        let address = DeviceAddress {
            ordinal: self.gpu.context.ordinal(),
            pointer: memory.memory.address() + memory.start,
        };
        Ok(Some(DeviceBytes::new(address, len, Arc::new(memory))))
    }

    fn range(&self, offset: u64, len: u64) -> Result<Option<DeviceBytes>, DeviceError> {
        let Some(memory) = &self.memory else {
            return Ok(None);
        };
        let end = offset.saturating_add(len);
        if end > memory.len() {
            return Err(DeviceError::OutOfBounds {
                device: self.gpu.context.name().to_owned(),
                offset,
                end,
                len: memory.len(),
            });
        }
        let address = DeviceAddress {
            ordinal: self.gpu.context.ordinal(),
            pointer: memory.address() + offset,
        };
        let kept = Kept(Arc::clone(memory));
        Ok(Some(DeviceBytes::new(address, len, Arc::new(kept))))
    }

    fn address(&self) -> Option<DeviceAddress> {
        Some(DeviceAddress {
            ordinal: self.gpu.context.ordinal(),
            pointer: self.memory.as_ref()?.address(),
        })
    }
}
