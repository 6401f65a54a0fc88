//! What programs have of a GPU through WIT, against the same kernels launched by hand, in one run.
//!
//! `cargo bench -p tightfit-wasm --bench program_gpu`; takes about 2.5 GiB of `cuda:0`.
//!
//! The functions are called as wasmtime calls them, without a guest: crossing the boundary is what
//! `--bench sandbox` measures. Prints
//!
//! - `nf4.quantize` of 1 GiB of bf16, as wall time of calls that give the number of non-finite blocks, beside the
//!   time of a kernel in a row of kernels, and beside the way through the processor, in pieces, which was the only one
//!   before and is taken still where a source begins between elements;
//! - what a call of `linear.multiply` of one row takes of the host's time beside giving the same product to the
//!   device's queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tightfit::device::{
    Device, DeviceBytes, MatrixShape, Operation, Product, Quantization, Queue, QueuedProduct,
    QueuedScales, QueuedWeights, Reservation, open_devices,
};
use tightfit::kernels::{BlockSize, FloatType, QuantType};
use tightfit::memory::ReservationSize;
use tightfit_wasm::wit::program::bindings::tightfit::host::{buffers, linear, nf4, types};
use tightfit_wasm::wit::program::{Buffer, CallError, ProgramCtx, ProgramCtxView, Weight};
use wasmtime::component::{Resource, ResourceTable};

type Failure = Box<dyn std::error::Error>;

const BYTES: u64 = 1 << 30;
const ELEMENTS: u64 = BYTES / 2;
const REPEATS: usize = 21;
/// Kernels that are given before any is waited for.
const ROW: usize = 8;
const GIB: f64 = (1u64 << 30) as f64;

fn main() -> Result<(), Failure> {
    let devices = match open_devices(&["cuda:0".parse()?]) {
        Ok(devices) => devices,
        Err(error) => {
            println!("not run: {error}");
            return Ok(());
        }
    };
    let by_hand = kernels_by_hand(&*devices[0])?;
    println!(
        "kernel by hand        {:8.3} ms, {:7.1} GiB/s of bf16",
        milliseconds(by_hand),
        GIB / (1u64 << 30) as f64 / by_hand.as_secs_f64()
    );
    let devices: Arc<[Box<dyn Device>]> = devices.into();
    let mut program = Program {
        context: ProgramCtx::new(Arc::clone(&devices), u64::MAX),
        table: ResourceTable::new(),
    };
    let through_wit = program.quantize(0, REPEATS)?;
    println!(
        "nf4.quantize          {:8.3} ms, {:.1} % of the kernel's speed",
        milliseconds(through_wit),
        100.0 * by_hand.as_secs_f64() / through_wit.as_secs_f64()
    );
    let by_processor = program.quantize(1, 3)?;
    println!(
        "by the processor      {:8.3} ms, {:.0} times as long",
        milliseconds(by_processor),
        by_processor.as_secs_f64() / through_wit.as_secs_f64()
    );
    drop(program);
    products(&devices)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Memory of a device, cut up.
struct Memory {
    reservation: Box<dyn Reservation>,
    next: u64,
}

impl Memory {
    fn take(device: &dyn Device, bytes: u64) -> Result<Memory, Failure> {
        let reserved = bytes.next_multiple_of(device.info().granularity);
        let size = ReservationSize {
            requested: bytes,
            padded: bytes,
            reserved,
        };
        Ok(Memory {
            reservation: device.reserve(size)?,
            next: 0,
        })
    }

    fn piece(&mut self, bytes: u64) -> Result<DeviceBytes, Failure> {
        let start = self.next;
        self.next = (start + bytes).next_multiple_of(256);
        Ok(self.reservation.range(start, bytes)?.ok_or("no GPU")?)
    }
}

fn queue_of(device: &dyn Device) -> Result<Arc<dyn Queue>, Failure> {
    Ok(device.queue()?.ok_or("the device has no queue")?)
}

/// The time of one kernel in a row of them.
fn kernels_by_hand(device: &dyn Device) -> Result<Duration, Failure> {
    let queue = queue_of(device)?;
    let mut memory = Memory::take(device, BYTES + ELEMENTS / 2 + ELEMENTS / 16 + 4096)?;
    let operation = Operation::Quantize(Quantization {
        float: FloatType::Bf16,
        block_size: BlockSize::DEFAULT,
        elements: ELEMENTS as usize,
        source: memory.piece(BYTES)?,
        codes: memory.piece(ELEMENTS / 2)?,
        absmax: memory.piece(ELEMENTS / 16)?,
        nonfinite: memory.piece(8)?,
    });
    let Operation::Quantize(given) = &operation else {
        return Err("it is quantized".into());
    };
    fill(&*queue, &given.source)?;
    queue.give(&Operation::Clear(given.nonfinite.clone()))?;
    queue.give(&operation)?;
    queue.finish()?;
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let start = Instant::now();
        for _ in 0..ROW {
            queue.give(&operation)?;
        }
        queue.finish()?;
        times.push(start.elapsed() / ROW as u32);
    }
    Ok(median(times))
}

/// Finite numbers that differ.
fn numbers(bytes: usize) -> Vec<u8> {
    let mut state = 1u64;
    let number = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        ((state >> 48) as u16 & 0xbfff).to_le_bytes()
    };
    (0..bytes / 2).flat_map(number).collect()
}

fn fill(queue: &dyn Queue, target: &DeviceBytes) -> Result<(), Failure> {
    let piece = numbers(4 << 20);
    for start in (0..target.bytes()).step_by(piece.len()) {
        let place = target.slice(start, piece.len() as u64).ok_or("outside")?;
        queue.write(&place, &piece)?;
    }
    Ok(queue.finish()?)
}

/// What a store has of a program.
struct Program {
    context: ProgramCtx,
    table: ResourceTable,
}

fn told(error: CallError) -> Failure {
    format!("{error:?}").into()
}

impl Program {
    fn call(&mut self) -> ProgramCtxView<'_> {
        ProgramCtxView {
            context: &mut self.context,
            table: &mut self.table,
        }
    }

    fn allocate(&mut self, bytes: u64) -> Result<Resource<Buffer>, Failure> {
        buffers::HostBuffer::allocate(&mut self.call(), 0, bytes).map_err(told)
    }

    fn write(&mut self, buffer: &Resource<Buffer>, bytes: &[u8]) -> Result<(), Failure> {
        let buffer = Resource::new_borrow(buffer.rep());
        buffers::HostBuffer::write(&mut self.call(), buffer, 0, bytes.to_vec()).map_err(told)
    }

    /// Calls of `nf4.quantize`, of a source that begins at this byte.
    fn quantize(&mut self, offset: u64, repeats: usize) -> Result<Duration, Failure> {
        let source = self.allocate(BYTES + offset)?;
        let codes = self.allocate(ELEMENTS / 2)?;
        let absmax = self.allocate(ELEMENTS / 16)?;
        let piece = numbers(4 << 20);
        for start in (0..BYTES).step_by(piece.len()) {
            let source = Resource::new_borrow(source.rep());
            let call = &mut self.call();
            buffers::HostBuffer::write(call, source, start + offset, piece.clone())
                .map_err(told)?;
        }
        let mut times = Vec::new();
        for _ in 0..=repeats {
            let start = Instant::now();
            let places = [at(&source, offset), at(&codes, 0), at(&absmax, 0)];
            let [source, codes, absmax] = places;
            let (call, bf16) = (&mut self.call(), types::Dtype::Bf16);
            nf4::Host::quantize(call, source, bf16, ELEMENTS, 64, codes, absmax).map_err(told)?;
            times.push(start.elapsed());
        }
        // The first one has memory cleared that was never written.
        times.remove(0);
        for buffer in [source, codes, absmax] {
            buffers::HostBuffer::drop(&mut self.call(), buffer)?;
        }
        Ok(median(times))
    }
}

fn at(buffer: &Resource<Buffer>, offset: u64) -> buffers::Place {
    buffers::Place {
        buffer: Resource::new_borrow(buffer.rep()),
        offset,
    }
}

/// Products of one row: the host's time of a call, and of giving the same by hand.
fn products(devices: &Arc<[Box<dyn Device>]>) -> Result<(), Failure> {
    const CALLS: u32 = 2000;
    let (outputs, inputs) = (4096u64, 4096u64);
    let elements = outputs * inputs;
    let queue = queue_of(&*devices[0])?;
    let mut memory = Memory::take(&*devices[0], elements / 2 + elements / 16 + (64 << 20))?;
    let shape = MatrixShape {
        experts: None,
        outputs: outputs as usize,
        inputs: inputs as usize,
        block_size: BlockSize::DEFAULT,
    };
    let product = Product {
        float: FloatType::Bf16,
        rows: 1,
        by_row: false,
        transposed: false,
    };
    let workspace = memory.piece(queue.workspace_bytes(&product, &shape))?;
    queue.give(&Operation::Clear(workspace.clone()))?;
    let operation = Operation::Multiply(QueuedProduct {
        weights: QueuedWeights {
            quant_type: QuantType::Nf4,
            shape,
            codes: memory.piece(elements / 2)?,
            scales: QueuedScales::Absmax(memory.piece(elements / 16)?),
        },
        product,
        x: memory.piece(2 * inputs)?,
        experts: None,
        bias: None,
        y: memory.piece(2 * outputs)?,
        workspace: Some(workspace),
    });
    let by_hand = median(
        (0..5)
            .map(|_| {
                queue.finish()?;
                let start = Instant::now();
                for _ in 0..CALLS / 20 {
                    queue.give(&operation)?;
                }
                Ok(start.elapsed() / (CALLS / 20))
            })
            .collect::<Result<_, Failure>>()?,
    );
    queue.finish()?;

    let mut program = Program {
        context: ProgramCtx::new(Arc::clone(devices), u64::MAX),
        table: ResourceTable::new(),
    };
    let codes = program.allocate(elements / 2)?;
    let absmax = program.allocate(elements / 16)?;
    let (x, y) = (
        program.allocate(2 * inputs)?,
        program.allocate(2 * outputs)?,
    );
    program.write(&x, &numbers(2 * inputs as usize))?;
    let nf4 = types::QuantType::Nf4;
    let lengths = vec![outputs, inputs];
    let weight = linear::HostWeight::from_codes(
        &mut program.call(),
        nf4,
        lengths,
        64,
        at(&codes, 0),
        at(&absmax, 0),
    );
    let weight: Resource<Weight> = weight.map_err(told)?;
    let given = || linear::Product {
        weight: Resource::new_borrow(weight.rep()),
        input: at(&x, 0),
        rows: 1,
        float: types::Dtype::Bf16,
        bias: None,
        output: at(&y, 0),
        experts: None,
        rounding: linear::Rounding::Fastest,
    };
    linear::Host::multiply(&mut program.call(), vec![given()]).map_err(told)?;
    let mut times = Vec::new();
    for _ in 0..5 {
        linear::Host::finish(&mut program.call()).map_err(told)?;
        let start = Instant::now();
        for _ in 0..CALLS / 20 {
            linear::Host::multiply(&mut program.call(), vec![given()]).map_err(told)?;
        }
        times.push(start.elapsed() / (CALLS / 20));
    }
    let call = median(times);
    linear::Host::finish(&mut program.call()).map_err(told)?;
    println!(
        "linear.multiply, a row {:7.2} us of the host's time a call; {:.2} us to give the same by hand",
        call.as_secs_f64() * 1e6,
        by_hand.as_secs_f64() * 1e6
    );
    Ok(())
}
