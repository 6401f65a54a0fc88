//! Quantizing by a device's own kernels what is copied to it.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUdeviceptr;
use tightfit_kernels::{KernelError, NESTED_BLOCK_SIZE, blocks, cuda, packed_bytes};

use super::stream::Event;
use super::{DeviceMemory, KernelModule, Staging, unavailable};
use crate::device::{
    DeviceError, PageLocked, Piece, QuantizeJob, Quantizer, QuantizingWriter, ScalePlace,
    ScalesJob, Staged, Writer,
};
use crate::memory::LedgerEntry;

/// Sums that the last kernel takes.
const LAST_SUMS: usize = 256;

/// Memory that only kernels use.
#[derive(Debug)]
pub(in crate::device::cuda) struct WorkspaceMemory {
    /// That of the results, or other.
    pub(in crate::device::cuda) memory: Arc<DeviceMemory>,
    /// First byte in it.
    pub(in crate::device::cuda) start: u64,
    /// Length in bytes.
    pub(in crate::device::cuda) len: u64,
    /// Struck out after the memory has been given back: fields drop in this order.
    pub(in crate::device::cuda) _entry: Option<LedgerEntry>,
}

impl WorkspaceMemory {
    /// The address of `len` bytes at `offset`, which lie inside.
    pub(super) fn at(&self, offset: u64, len: usize) -> Result<CUdeviceptr, DeviceError> {
        let end = offset.saturating_add(len as u64);
        if end > self.len {
            return Err(DeviceError::OutOfBounds {
                device: self.memory.context().name().to_owned(),
                offset,
                end,
                len: self.len,
            });
        }
        self.memory.at(self.start.saturating_add(offset), len)
    }
}

/// The kernels at work on one piece of memory.
#[derive(Debug, Clone)]
pub(in crate::device::cuda) struct KernelQuantizer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    kernels: Arc<KernelModule>,
    results: Arc<DeviceMemory>,
    workspace: WorkspaceMemory,
    /// Of every worker, recorded after each time it has started to write scales to the workspace.
    started: Mutex<Vec<Arc<Event>>>,
}

impl KernelQuantizer {
    /// For results in `results`.
    pub(in crate::device::cuda) fn new(
        kernels: &Arc<KernelModule>,
        results: &Arc<DeviceMemory>,
        workspace: WorkspaceMemory,
    ) -> KernelQuantizer {
        KernelQuantizer {
            shared: Arc::new(Shared {
                kernels: Arc::clone(kernels),
                results: Arc::clone(results),
                workspace,
                started: Mutex::default(),
            }),
        }
    }
}

impl Shared {
    /// The address of `len` bytes of results at `offset`, none of which are the workspace's.
    fn result(&self, offset: u64, len: usize) -> Result<CUdeviceptr, DeviceError> {
        let address = self.results.at(offset, len)?;
        let (start, end) = (
            self.workspace.start,
            self.workspace.start + self.workspace.len,
        );
        let is_within = Arc::ptr_eq(&self.results, &self.workspace.memory);
        if is_within && offset < end && offset.saturating_add(len as u64) > start {
            return Err(DeviceError::OutOfBounds {
                device: self.results.context().name().to_owned(),
                offset,
                end: offset.saturating_add(len as u64),
                len: start,
            });
        }
        Ok(address)
    }

    fn refused(&self, error: KernelError) -> DeviceError {
        unavailable(self.results.context().name(), error.to_string())
    }
}

impl Quantizer for KernelQuantizer {
    fn prepare(&self) -> Result<(), DeviceError> {
        self.shared.kernels.compile()
    }

    fn is_prepared(&self) -> bool {
        self.shared.kernels.are_ready()
    }

    fn worker(
        &self,
        buffers: Box<dyn PageLocked>,
    ) -> Result<Box<dyn QuantizingWriter>, DeviceError> {
        let staging = Staging::new(&self.shared.results, buffers)?;
        let started = Arc::new(Event::polled(self.shared.results.context())?);
        let mut all = self
            .shared
            .started
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.push(Arc::clone(&started));
        drop(all);
        Ok(Box::new(QuantizingStaging {
            staging,
            started,
            shared: Arc::clone(&self.shared),
        }))
    }

    fn clear(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        let shared = &self.shared;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        shared.workspace.at(offset, len)?;
        shared
            .workspace
            .memory
            .clear(shared.workspace.start + offset, len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        let workspace = &self.shared.workspace;
        workspace.at(offset, out.len())?;
        workspace.memory.read(workspace.start + offset, out)
    }
}

/// Buffers that are copied to the workspace and quantized from there, in one stream.
#[derive(Debug)]
struct QuantizingStaging {
    /// Dropped first: it waits for the stream.
    staging: Staging,
    started: Arc<Event>,
    shared: Arc<Shared>,
}

impl Writer for QuantizingStaging {
    fn stage(&mut self) -> Result<&mut [u8], DeviceError> {
        self.staging.stage()
    }

    fn write(&mut self, pieces: &[Piece]) -> Result<(), DeviceError> {
        self.staging.write(pieces)
    }

    fn finish(&mut self) -> Result<(), DeviceError> {
        self.staging.finish()
    }

    fn release(self: Box<Self>) -> Result<Box<dyn PageLocked>, DeviceError> {
        Box::new(self.staging).release()
    }
}

impl QuantizingWriter for QuantizingStaging {
    fn quantize(&mut self, job: &QuantizeJob) -> Result<(), DeviceError> {
        let shared = &self.shared;
        let workspace = &shared.workspace;
        let bytes = job.staged.bytes(job.elements);
        let staged = workspace.at(job.source, bytes)?;
        let scales = 4 * blocks(job.elements, job.block_size);
        // Those that all kernels have.
        let [elements, block_size, codes, absmax, nonfinite] = [
            job.elements as u64,
            job.block_size.elements() as u64,
            shared.result(job.codes, packed_bytes(job.elements))?,
            match job.absmax {
                ScalePlace::Reservation(offset) => shared.result(offset, scales)?,
                ScalePlace::Workspace(offset) => workspace.at(offset, scales)?,
            },
            workspace.at(job.nonfinite, 8)?,
        ];
        let launch = match &job.staged {
            Staged::Floats(float) => cuda::quantize_nf4(*float, job.elements),
            Staged::Codes { float, run, .. } => cuda::quantize_source(*float, run, job.elements),
        };
        let launch = launch.map_err(|error| shared.refused(error))?;
        let source = Piece {
            start: 0,
            len: bytes,
            offset: workspace.start + job.source,
        };
        self.staging.copy(&[(&workspace.memory, source)])?;
        let _current = shared.kernels.context().enter()?;
        self.staging.is_busy = true;
        let (kernels, stream) = (&shared.kernels, &self.staging.stream);
        match job.staged {
            Staged::Floats(_) => {
                let arguments = [staged, elements, block_size, codes, absmax, nonfinite];
                // SAFETY: source and scales in the workspace, codes and scales among the results, and
                // the count are as long as the kernel needs; `staging` keeps both memories until the
                // stream is done: its own is that of the results, and the other has just been copied
                // to.
                unsafe { kernels.launch(stream, launch, arguments) }?;
            }
            Staged::Codes { run, scales, .. } => {
                let scales = staged + scales as u64;
                let [
                    kind,
                    row_bytes,
                    columns,
                    tile_rows,
                    tile_columns,
                    row,
                    column,
                ] = run.arguments();
                let arguments = [
                    staged,
                    scales,
                    kind,
                    row_bytes,
                    columns,
                    tile_rows,
                    tile_columns,
                    row,
                    column,
                    elements,
                    block_size,
                    codes,
                    absmax,
                    nonfinite,
                ];
                // SAFETY: as above; codes and scales of the source are within what is staged.
                unsafe { kernels.launch(stream, launch, arguments) }?;
            }
        }
        match job.absmax {
            ScalePlace::Reservation(_) => Ok(()),
            ScalePlace::Workspace(_) => self.started.record(&self.staging.stream),
        }
    }

    fn write_scaled(&mut self, pieces: &[Piece], scales: &Piece) -> Result<(), DeviceError> {
        let shared = &self.shared;
        shared.workspace.at(scales.offset, scales.len)?;
        let scales = Piece {
            offset: shared.workspace.start + scales.offset,
            ..*scales
        };
        let mut all: Vec<_> = pieces
            .iter()
            .map(|&piece| (&shared.results, piece))
            .collect();
        all.push((&shared.workspace.memory, scales));
        self.staging.copy(&all)?;
        let _current = shared.kernels.context().enter()?;
        self.started.record(&self.staging.stream)
    }

    fn quantize_scales(&mut self, job: &ScalesJob) -> Result<(), DeviceError> {
        let shared = &self.shared;
        let (kernels, workspace) = (&shared.kernels, &shared.workspace);
        let n = job.scales;
        let absmax = workspace.at(job.absmax, n.saturating_mul(4))?;
        let mean = workspace.at(job.mean, 4)?;
        let sums_bytes = usize::try_from(ScalesJob::sums_bytes(n as u64)).unwrap_or(usize::MAX);
        let mut sums = workspace.at(job.sums, sums_bytes)?;
        let mut count = cuda::sums(n);
        let mut next = sums + 8 * count as u64;
        let codes = shared.result(job.codes, n)?;
        let nested = shared.result(job.nested, 4 * n.div_ceil(NESTED_BLOCK_SIZE))?;
        let checked = |launch: Result<_, _>| launch.map_err(|error| shared.refused(error));

        self.staging.keep(&workspace.memory);
        self.staging.is_busy = true;
        let stream = &self.staging.stream;
        {
            let _current = kernels.context().enter()?;
            let all = shared.started.lock();
            for started in all.unwrap_or_else(PoisonError::into_inner).iter() {
                stream.wait_for(started)?;
            }
            let launch = checked(cuda::sum_absmax(n))?;
            // SAFETY: here and below: lengths have been checked above, sums of sums lie behind the
            // sums, and `staging` keeps the memory until the stream is done. Every kernel reads
            // what earlier ones in the stream have written.
            unsafe { kernels.launch(stream, launch, [absmax, n as u64, sums]) }?;
            while count > LAST_SUMS {
                let launch = checked(cuda::sum_sums(count))?;
                // SAFETY: as above. Later sums are fewer than those they take the place of.
                unsafe { kernels.launch(stream, launch, [sums, count as u64, next]) }?;
                (sums, next) = (next, sums);
                count = cuda::sums(count);
            }
            // SAFETY: as above.
            unsafe { kernels.launch(stream, cuda::mean(), [sums, count as u64, n as u64, mean]) }?;
            let launch = checked(cuda::quantize_absmax(n))?;
            // SAFETY: as above.
            unsafe { kernels.launch(stream, launch, [absmax, n as u64, mean, codes, nested]) }?;
        }
        self.staging.finish()
    }
}
