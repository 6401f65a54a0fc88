//! A device's order of work: one stream, what it may be using, and how much of it is under way.

mod decoder;
mod nf4;
mod products;

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::CUdeviceptr;
use tightfit_kernels::cuda::linear::Gpu;

use super::stream::{Event, Stream};
use super::{Context, CudaPageLocked, DeviceMemory, KernelModule, WorkspaceMemory, twice};
use crate::device::queue::Operand;
use crate::device::{DeviceBytes, DeviceError, MOST_WORK, MatrixShape, Operation, Product, Queue};

/// Bytes that are copied from the host at once.
const WRITTEN: usize = 256 << 10;
/// Parts of the work that are under way beside the one being given.
const MARKS: usize = 2;

/// Does what it is given one after the other, in a stream of its own.
#[derive(Debug)]
pub(in crate::device::cuda) struct CudaQueue {
    quantizing: Arc<KernelModule>,
    products: Arc<KernelModule>,
    decoder: Arc<KernelModule>,
    experts: Arc<KernelModule>,
    gpu: OnceLock<Gpu>,
    /// Dropped, with the work waited for, before the kernels.
    state: ManuallyDrop<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    stream: Stream,
    /// What the stream may be using: kept until it is done.
    used: Used,
    /// Whether the stream has been given anything since it was last waited for.
    is_busy: bool,
    /// [`Operation::work`] since the last mark.
    work: u64,
    /// Points in the stream that work was given before, in turn.
    marks: [Event; MARKS],
    next_mark: usize,
    /// Taken when something is first written.
    buffers: Option<[Buffer; 2]>,
    next_buffer: usize,
}

/// Page-locked memory that the device reads.
#[derive(Debug)]
struct Buffer {
    bytes: CudaPageLocked,
    /// Recorded after its last copy.
    copied: Event,
    /// Whether the event says nothing, because recording it has failed.
    is_unknown: bool,
}

impl CudaQueue {
    pub(in crate::device::cuda) fn new(
        [quantizing, products, experts, decoder]: [&Arc<KernelModule>; 4],
    ) -> Result<CudaQueue, DeviceError> {
        let context = quantizing.context();
        let state = State {
            stream: Stream::new(context)?,
            used: Used::default(),
            is_busy: false,
            work: 0,
            marks: [Event::new(context)?, Event::new(context)?],
            next_mark: 0,
            buffers: None,
            next_buffer: 0,
        };
        Ok(CudaQueue {
            quantizing: Arc::clone(quantizing),
            products: Arc::clone(products),
            decoder: Arc::clone(decoder),
            experts: Arc::clone(experts),
            gpu: OnceLock::new(),
            state: ManuallyDrop::new(Mutex::new(state)),
        })
    }

    fn context(&self) -> &Arc<Context> {
        self.quantizing.context()
    }

    /// What launches of products depend on.
    fn gpu(&self) -> Result<Gpu, DeviceError> {
        match self.gpu.get() {
            Some(gpu) => Ok(*gpu),
            None => {
                let gpu = super::launch::gpu_of(self.context())?;
                Ok(*self.gpu.get_or_init(|| gpu))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done by a panic: what is called does not.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn operand(&self, reason: String) -> DeviceError {
        DeviceError::Operand {
            device: self.context().name().to_owned(),
            reason,
        }
    }

    /// The memory that a range is of, in which it lies.
    fn memory<'a>(&self, bytes: &'a DeviceBytes) -> Result<&'a Arc<DeviceMemory>, DeviceError>
    where
        Self: 'a,
    {
        let found = bytes.memory().downcast_ref::<Kept>();
        let memory = match found {
            Some(Kept(memory)) => Some(memory),
            None => {
                let workspace = bytes.memory().downcast_ref::<WorkspaceMemory>();
                workspace.map(|workspace| &workspace.memory)
            }
        };
        let memory = memory.filter(|memory| Arc::ptr_eq(memory.context(), self.context()));
        let memory = memory
            .ok_or_else(|| self.operand("an operand is in another device's memory".to_owned()))?;
        // Whoever made it may have said anything.
        let start = bytes.address().pointer.checked_sub(memory.address());
        let len = usize::try_from(bytes.bytes()).unwrap_or(usize::MAX);
        memory.at(start.unwrap_or(u64::MAX), len)?;
        Ok(memory)
    }

    /// Checks an operation's operands, and keeps their memory.
    ///
    /// Says whether it may begin before what the stream was given has ended, because none of that writes what its
    /// kernels read before they wait.
    fn keep(
        &self,
        state: &mut State,
        operation: &Operation,
        operands: &[Operand],
    ) -> Result<bool, DeviceError> {
        let checked = operation.check_operands(operands);
        checked.map_err(|reason| self.operand(reason))?;
        let memory = operands.iter().map(|operand| self.memory(operand.bytes));
        let memory = memory.collect::<Result<Vec<_>, DeviceError>>()?;
        let overlaps = match operation {
            Operation::Decode(_) => true,
            Operation::Multiply(_) => !operands.iter().zip(&memory).any(|(operand, memory)| {
                operand.is_weight && state.used.is_written(memory, operand.bytes)
            }),
            _ => false,
        };
        for (operand, memory) in operands.iter().zip(memory) {
            state.used.keep(memory, operand.bytes, operand.is_written);
        }
        Ok(overlaps)
    }
}

/// What keeps a range of a reservation.
#[derive(Debug)]
pub(in crate::device::cuda) struct Kept(pub(in crate::device::cuda) Arc<DeviceMemory>);

/// The memory that a stream may be using.
#[derive(Debug, Default)]
struct Used {
    /// By address, with what of it may be being written.
    memory: HashMap<usize, (Arc<DeviceMemory>, Vec<Range<CUdeviceptr>>)>,
}

/// Ranges of one memory that are told apart; of more the whole counts as written.
const MOST_WRITTEN: usize = 64;

impl Used {
    fn keep(&mut self, memory: &Arc<DeviceMemory>, bytes: &DeviceBytes, is_written: bool) {
        let entry = self.memory.entry(Arc::as_ptr(memory).addr());
        let (_, written) = entry.or_insert_with(|| (Arc::clone(memory), Vec::new()));
        let range = range_of(bytes);
        let is_in =
            |known: &Range<CUdeviceptr>| known.start <= range.start && range.end <= known.end;
        if is_written && !written.iter().any(is_in) {
            if written.len() == MOST_WRITTEN {
                written.clear();
                written.push(0..CUdeviceptr::MAX);
            } else {
                written.push(range);
            }
        }
    }

    fn is_written(&self, memory: &Arc<DeviceMemory>, bytes: &DeviceBytes) -> bool {
        let range = range_of(bytes);
        let known = self.memory.get(&Arc::as_ptr(memory).addr());
        known.is_some_and(|(_, written)| {
            let mut written = written.iter();
            written.any(|known| known.start < range.end && range.start < known.end)
        })
    }
}

fn range_of(bytes: &DeviceBytes) -> Range<CUdeviceptr> {
    let start = bytes.address().pointer;
    start..start.saturating_add(bytes.bytes())
}

impl State {
    /// Waits until as little is under way as to give more. The context is current.
    fn make_room(&mut self, work: u64) -> Result<(), DeviceError> {
        self.work = self.work.saturating_add(work);
        if self.work < MOST_WORK {
            return Ok(());
        }
        let mark = &self.marks[self.next_mark];
        // One that was never recorded is past already.
        mark.synchronize()?;
        mark.record(&self.stream)?;
        self.next_mark = (self.next_mark + 1) % MARKS;
        self.work = 0;
        Ok(())
    }

    fn drain(&mut self) -> Result<(), DeviceError> {
        if !self.is_busy {
            return Ok(());
        }
        self.stream.synchronize()?;
        self.is_busy = false;
        self.work = 0;
        self.used.memory.clear();
        for buffer in self.buffers.iter_mut().flatten() {
            buffer.is_unknown = false;
        }
        Ok(())
    }

    /// The buffer to be filled next, which no device reads.
    fn buffer(&mut self, context: &Arc<Context>) -> Result<&mut Buffer, DeviceError> {
        if self.buffers.is_none() {
            let mut locked = CudaPageLocked::new(context, 2 * WRITTEN)?;
            let mut buffer = || {
                Ok::<_, DeviceError>(Buffer {
                    bytes: locked.cut(WRITTEN),
                    copied: Event::new(context)?,
                    is_unknown: false,
                })
            };
            self.buffers = Some([buffer()?, buffer()?]);
        }
        let next = self.next_buffer;
        let is_unknown = |buffers: &[Buffer; 2]| buffers[next].is_unknown;
        if self.buffers.as_ref().is_some_and(is_unknown) {
            self.drain()?;
        }
        self.next_buffer = (next + 1) % 2;
        match &mut self.buffers {
            Some(buffers) => {
                buffers[next].copied.synchronize()?;
                Ok(&mut buffers[next])
            }
            None => Err(super::unavailable(
                context.name(),
                "internal error: there are no buffers".to_owned(),
            )),
        }
    }
}

impl Queue for CudaQueue {
    fn give(&self, operation: &Operation) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let _current = self.context().enter()?;
        let operands = operation.operands();
        let overlaps = self.keep(&mut state, operation, &operands)?;
        state.make_room(operation.work_of(&operands))?;
        state.is_busy = true;
        let stream = &state.stream;
        match operation {
            Operation::Clear(target) => self.clear(stream, target),
            Operation::Copy { source, target } => self.copy(stream, source, target),
            Operation::Quantize(of) => self.quantize(stream, of),
            Operation::Dequantize(of) => self.dequantize(stream, of),
            Operation::AbsmaxMean(of) => self.absmax_mean(stream, of),
            Operation::QuantizeAbsmax(of) => self.quantize_absmax(stream, of),
            Operation::DequantizeAbsmax(of) => self.dequantize_absmax(stream, of),
            Operation::Multiply(product) => self.multiply(stream, product, overlaps),
            Operation::Decode(given) => self.decode(stream, given, overlaps),
        }
    }

    fn write(&self, target: &DeviceBytes, bytes: &[u8]) -> Result<(), DeviceError> {
        if target.bytes() != bytes.len() as u64 {
            let have = bytes.len();
            return Err(self.operand(format!("{have} bytes for {}", target.bytes())));
        }
        let memory = self.memory(target)?;
        let mut state = self.lock();
        let context = self.context();
        let _current = context.enter()?;
        state.used.keep(memory, target, true);
        state.make_room(target.bytes())?;
        let mut to: CUdeviceptr = target.address().pointer;
        for piece in bytes.chunks(WRITTEN) {
            let raw = state.stream.raw;
            state.is_busy = true;
            let buffer = state.buffer(context)?;
            buffer.bytes.bytes()[..piece.len()].copy_from_slice(piece);
            buffer.is_unknown = true;
            // SAFETY: the bytes lie inside the buffer, which nobody writes or frees before the stream or the
            // event has been waited for, and go to bytes inside of memory that is kept as long. Stream and
            // memory are of the context that is current.
            let code = unsafe {
                let source = buffer.bytes.as_ptr().cast();
                (context.api.cuMemcpyHtoDAsync_v2)(to, source, piece.len(), raw)
            };
            context.check("cuMemcpyHtoDAsync", piece.len() as u64, code)?;
            let last = (state.next_buffer + 1) % 2;
            let State {
                stream, buffers, ..
            } = &mut *state;
            if let Some(buffers) = buffers {
                buffers[last].copied.record(stream)?;
                buffers[last].is_unknown = false;
            }
            to += piece.len() as u64;
        }
        Ok(())
    }

    fn read(&self, source: &DeviceBytes, out: &mut [u8]) -> Result<(), DeviceError> {
        if source.bytes() != out.len() as u64 {
            let have = out.len();
            return Err(self.operand(format!("{have} bytes for {}", source.bytes())));
        }
        let memory = self.memory(source)?;
        self.lock().drain()?;
        memory.read(source.address().pointer - memory.address(), out)
    }

    fn finish(&self) -> Result<(), DeviceError> {
        self.lock().drain()
    }

    fn workspace_bytes(&self, product: &Product, shape: &MatrixShape) -> u64 {
        self.workspace(product, shape)
    }

    fn decode_workspace_bytes(&self, operation: &tightfit_kernels::decoder::Operation) -> u64 {
        let gpu = self.gpu().ok();
        let call = gpu.and_then(|gpu| tightfit_kernels::cuda::decoder::call(operation, gpu).ok());
        call.flatten()
            .map_or(0, |call| call.launch.workspace_bytes as u64)
    }
}

impl Drop for CudaQueue {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.is_busy
            && let Err(error) = twice(|| state.stream.synchronize())
        {
            // The device may go on using them: rather lost than given to somebody else.
            tracing::warn!("{error}, buffers are not given back");
            std::mem::forget(std::mem::take(&mut state.used));
            std::mem::forget(state.buffers.take());
        }
        // SAFETY: dropped here and nowhere else, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.state) };
    }
}
