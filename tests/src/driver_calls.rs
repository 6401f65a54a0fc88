//! A driver's calls of the host in any order and with any arguments, decoded from bytes: what a fuzzer
//! calls, and a property test.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use tempfile::TempDir;
use tightfit::device::{Device, HostDevice};
use tightfit::wit::bindings::tightfit::host::types;
use tightfit::wit::driver::bindings::tightfit::host::buffers::{Host as _, HostBuffer, Place};
use tightfit::wit::driver::bindings::tightfit::host::checkpoints::{Host as _, HostCheckpoint};
use tightfit::wit::driver::bindings::tightfit::host::devices::Host as _;
use tightfit::wit::driver::bindings::tightfit::host::models::{Host as _, HostModel, PartKind};
use tightfit::wit::driver::bindings::tightfit::host::nf4::Host as _;
use tightfit::wit::driver::{
    Buffer, CallError, DriverContext, DriverContextView, LoadedModel, OpenCheckpoint,
};
use wasmtime::component::{Resource, ResourceTable};

use crate::models::write_awkward;

/// Calls in one sequence, at most: more find nothing that fewer do not, and take longer.
const MOST_CALLS: usize = 300;

/// What is left of the input. Where there is nothing, it is zeros.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    /// Mostly something that makes sense, now and then an edge, now and then anything.
    fn number(&mut self) -> u64 {
        match self.byte() {
            kind @ 0..=127 => u64::from(kind),
            128..=199 => u64::from(u16::from_le_bytes([self.byte(), self.byte()])),
            200..=219 => u64::MAX - u64::from(self.byte()),
            220..=239 => 1 << (self.byte() % 64),
            240..=255 => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    fn index(&mut self) -> u32 {
        match self.byte() {
            kind @ 0..=249 => u32::from(kind % 6),
            _ => self.number() as u32,
        }
    }

    fn dtype(&mut self) -> types::Dtype {
        match self.byte() % 6 {
            0 => types::Dtype::I64,
            1 => types::Dtype::F16,
            2 => types::Dtype::F32,
            _ => types::Dtype::Bf16,
        }
    }

    fn block_size(&mut self) -> u32 {
        match self.byte() {
            kind @ 0..=239 => 32 << (kind % 8),
            _ => self.number() as u32,
        }
    }

    fn format(&mut self) -> types::Format {
        match self.byte() % 8 {
            0 => types::Format::Cast(self.dtype()),
            1..=3 => types::Format::Stored,
            kind => types::Format::Nf4(types::Nf4Format {
                block_size: self.block_size(),
                double_quantized: kind % 2 == 0,
            }),
        }
    }

    fn part(&mut self) -> PartKind {
        match self.byte() % 4 {
            0 => PartKind::Data,
            1 => PartKind::Codes,
            2 => PartKind::Absmax,
            _ => PartKind::NestedAbsmax,
        }
    }
}

/// A driver and what it knows of itself.
struct Driver<'a> {
    input: Input<'a>,
    context: DriverContext,
    table: ResourceTable,
    devices: Arc<[Box<dyn Device>]>,
    quota: u64,
    buffers: Vec<u32>,
    checkpoints: Vec<u32>,
    models: Vec<u32>,
    /// Whether a handle of this call is none that there is.
    forged: bool,
    /// Calls that gave more than an error.
    went_well: Cell<usize>,
}

fn checkpoint() -> &'static TempDir {
    static DIRECTORY: OnceLock<TempDir> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let directory = TempDir::new().unwrap();
        write_awkward(directory.path());
        directory
    })
}

/// Carries out the calls that the input says, and checks after each that the books are right; at the
/// end, that nothing is left. Gives the number of calls that went well.
///
/// # Panics
/// When they are not, or a call ends in a trap although its handles are the driver's.
pub fn exercise(input: &[u8]) -> usize {
    let mut input = Input(input);
    let quota = u64::from(input.byte()) * 16 * 1024;
    let device = |index| Box::new(HostDevice::sim(index, 2 << 20)) as Box<dyn Device>;
    let devices: Arc<[Box<dyn Device>]> = (0..2).map(device).collect();
    let context = DriverContext::new(Arc::clone(&devices), quota)
        .grant("model", checkpoint().path())
        .load_with(Some(1), Some(64 << 10));
    let mut table = ResourceTable::new();
    // Room for every call to give a handle.
    table.set_max_capacity(MOST_CALLS);
    let mut driver = Driver {
        input,
        context,
        table,
        devices,
        quota,
        buffers: Vec::new(),
        checkpoints: Vec::new(),
        models: Vec::new(),
        forged: false,
        went_well: Cell::new(0),
    };
    for _ in 0..MOST_CALLS {
        if driver.input.0.is_empty() {
            break;
        }
        driver.call();
        driver.check();
    }
    let Driver {
        context,
        table,
        devices,
        went_well,
        ..
    } = driver;
    drop((context, table));
    for device in devices.iter() {
        let usage = device.usage();
        assert_eq!(
            usage.requested.now + usage.padded.now + usage.reserved.now,
            0
        );
    }
    went_well.get()
}

impl Driver<'_> {
    fn view(&mut self) -> DriverContextView<'_> {
        DriverContextView {
            context: &mut self.context,
            table: &mut self.table,
        }
    }

    /// One of the handles, or now and then a number.
    fn pick(&mut self, handles: fn(&Driver<'_>) -> &Vec<u32>) -> u32 {
        let choice = self.input.byte();
        let picked = match handles(self).as_slice() {
            [] => None,
            handles => Some(handles[usize::from(choice) % handles.len()]),
        };
        match picked {
            Some(handle) if choice < 250 => handle,
            _ => {
                let number = u32::from(self.input.byte());
                self.forged |= !handles(self).contains(&number);
                number
            }
        }
    }

    fn buffer(&mut self) -> Resource<Buffer> {
        Resource::new_borrow(self.pick(|driver| &driver.buffers))
    }

    fn place(&mut self) -> Place {
        Place {
            buffer: self.buffer(),
            offset: self.input.number(),
        }
    }

    fn checkpoint(&mut self) -> Resource<OpenCheckpoint> {
        Resource::new_borrow(self.pick(|driver| &driver.checkpoints))
    }

    fn model(&mut self) -> Resource<LoadedModel> {
        Resource::new_borrow(self.pick(|driver| &driver.models))
    }

    /// What a call gave, if it was more than an error.
    fn done<T>(&self, result: Result<T, CallError>) -> Option<T> {
        match result {
            Ok(value) => {
                self.went_well.set(self.went_well.get() + 1);
                Some(value)
            }
            Err(CallError::Guest(_)) => None,
            Err(CallError::Trap(trap)) => {
                assert!(self.forged, "a trap that nobody has deserved: {trap:#}");
                None
            }
        }
    }

    fn call(&mut self) {
        self.forged = false;
        match self.input.byte() % 27 {
            0..=3 => {
                let (device, bytes) = (self.input.index(), self.input.number());
                let result = self.view().allocate(device % 3, bytes);
                if let Some(buffer) = self.done(result) {
                    self.buffers.push(buffer.rep());
                }
            }
            4 => {
                let rep = self.buffer().rep();
                let result = HostBuffer::drop(&mut self.view(), Resource::new_own(rep));
                self.done(result.map_err(CallError::Trap));
                self.buffers.retain(|&other| other != rep);
            }
            5 | 6 => {
                let (buffer, offset) = (self.buffer(), self.input.number());
                let bytes = vec![self.input.byte(); (self.input.number() % 70_000) as usize];
                let result = self.view().write(buffer, offset, bytes);
                self.done(result);
            }
            7 => {
                let buffer = self.buffer();
                let (offset, bytes) = (self.input.number(), self.input.number());
                let result = self.view().read(buffer, offset, bytes);
                if let Some(read) = self.done(result) {
                    assert_eq!(read.len() as u64, bytes);
                }
            }
            8 => {
                let (to, from) = (self.buffer(), self.buffer());
                let [offset, start, bytes] = std::array::from_fn(|_| self.input.number());
                let result = self.view().copy_from(to, offset, from, start, bytes);
                self.done(result);
            }
            9 => {
                let (source, dtype, elements) =
                    (self.place(), self.input.dtype(), self.input.number());
                let (block, codes, absmax) = (self.input.block_size(), self.place(), self.place());
                let result = self
                    .view()
                    .quantize(source, dtype, elements, block, codes, absmax);
                self.done(result);
            }
            10 => {
                let bytes = vec![self.input.byte(); (self.input.number() % 70_000) as usize];
                let (dtype, block) = (self.input.dtype(), self.input.block_size());
                let (codes, absmax) = (self.place(), self.place());
                let result = self
                    .view()
                    .quantize_bytes(bytes, dtype, block, codes, absmax);
                self.done(result);
            }
            11 => {
                let (codes, absmax, elements) = (self.place(), self.place(), self.input.number());
                let (block, dtype) = (self.input.block_size(), self.input.dtype());
                let target = self.place();
                let fp4 = types::QuantType::Fp4;
                let view = &mut self.view();
                let result = view.dequantize(fp4, codes, absmax, elements, block, dtype, target);
                self.done(result);
            }
            12 => {
                let (absmax, count) = (self.place(), self.input.number());
                let (codes, nested) = (self.place(), self.place());
                let result = self.view().quantize_absmax(absmax, count, codes, nested);
                self.done(result);
            }
            13 => {
                let (codes, nested) = (self.place(), self.place());
                let mean = f32::from_bits(self.input.number() as u32);
                let (count, absmax) = (self.input.number(), self.place());
                let result = self
                    .view()
                    .dequantize_absmax(codes, nested, mean, count, absmax);
                self.done(result);
            }
            14 | 15 => {
                let name =
                    ["model", "model", "model", "/model"][usize::from(self.input.byte() % 4)];
                let result = self.view().open(name.to_owned());
                if let Some(open) = self.done(result) {
                    self.checkpoints.push(open.rep());
                }
            }
            16 => {
                let rep = self.checkpoint().rep();
                let result = HostCheckpoint::drop(&mut self.view(), Resource::new_own(rep));
                self.done(result.map_err(CallError::Trap));
                self.checkpoints.retain(|&other| other != rep);
            }
            17 => self.look_at_checkpoint(),
            18 => {
                let (open, tensor) = (self.checkpoint(), self.input.index());
                let (start, bytes) = (self.input.number(), self.input.number());
                let (buffer, offset) = (self.buffer(), self.input.number());
                let view = &mut self.view();
                let result = view.read_tensor(open, tensor, start, bytes, buffer, offset);
                self.done(result);
            }
            19 | 20 => self.load(),
            21 => {
                let rep = self.model().rep();
                let result = HostModel::drop(&mut self.view(), Resource::new_own(rep));
                self.done(result.map_err(CallError::Trap));
                self.models.retain(|&other| other != rep);
            }
            22 => {
                let (model, tensor) = (self.model(), self.input.index());
                let result = self.view().get_tensor(model, tensor);
                self.done(result);
                let model = self.model();
                let name = "lm_head.weight".to_owned();
                let result = HostModel::find(&mut self.view(), model, name);
                self.done(result.map_err(CallError::Trap));
            }
            23 => {
                let (model, tensor, part) = (self.model(), self.input.index(), self.input.part());
                let (start, bytes) = (self.input.number(), self.input.number());
                let result = self.view().read_part(model, tensor, part, start, bytes);
                if let Some(read) = self.done(result) {
                    assert_eq!(read.len() as u64, bytes);
                }
            }
            24 => {
                let (model, tensor, part) = (self.model(), self.input.index(), self.input.part());
                let (start, bytes) = (self.input.number(), self.input.number());
                let (buffer, offset) = (self.buffer(), self.input.number());
                let view = &mut self.view();
                let result = view.read_part_into(model, tensor, part, start, bytes, buffer, offset);
                self.done(result);
            }
            25 => {
                let (model, tensor) = (self.model(), self.input.index());
                let (first, count, to) =
                    (self.input.number(), self.input.number(), self.input.dtype());
                let result = self.view().read_elements(model, tensor, first, count, to);
                self.done(result);
            }
            _ => {
                let (model, tensor) = (self.model(), self.input.index());
                let (first, count, to) =
                    (self.input.number(), self.input.number(), self.input.dtype());
                let (buffer, offset) = (self.buffer(), self.input.number());
                let view = &mut self.view();
                let result =
                    view.read_elements_into(model, tensor, first, count, to, buffer, offset);
                self.done(result);
            }
        }
    }

    fn look_at_checkpoint(&mut self) {
        let rep = self.checkpoint().rep();
        let (first, count) = (self.input.index(), self.input.index());
        let open = || Resource::new_borrow(rep);
        let tensors = self.view().tensors(open(), first, count);
        let tensors = self.done(tensors.map_err(CallError::Trap));
        assert!(tensors.is_none_or(|tensors| tensors.len() <= count as usize));
        let ties = self.view().ties(open(), first, count);
        self.done(ties.map_err(CallError::Trap));
        let config = self.view().config_json(open());
        self.done(config.map_err(CallError::Trap));
    }

    fn load(&mut self) {
        let open = self.checkpoint();
        let placements = match self.input.byte() {
            // As many as there are tensors.
            0..=239 => 4,
            other => usize::from(other - 240),
        };
        let placements = (0..placements)
            .map(|_| types::Placement {
                device: match self.input.byte() {
                    0..=50 => None,
                    250..=255 => Some(self.input.index()),
                    device => Some(u32::from(device % 2)),
                },
                format: self.input.format(),
            })
            .collect();
        let headroom = match self.input.byte() {
            0..=250 => vec![0, u64::from(self.input.byte())],
            _ => vec![self.input.number(); usize::from(self.input.byte() % 4)],
        };
        let result = self.view().load(open, placements, headroom);
        if let Some(model) = self.done(result) {
            self.models.push(model.rep());
        }
    }

    /// What the host says that the driver has is what it has.
    fn check(&mut self) {
        let mut reserved = 0;
        let mut requested = 0;
        for index in 0..self.devices.len() {
            let usage = self.context.usage(index).unwrap();
            assert!(usage.requested.now <= usage.padded.now, "{usage:?}");
            assert!(usage.padded.now <= usage.reserved.now, "{usage:?}");
            assert_eq!(self.devices[index].usage().reserved.now, usage.reserved.now);
            reserved += usage.reserved.now;
            requested += usage.requested.now;
        }
        assert_eq!(self.context.reserved().now, reserved);
        assert!(self.context.reserved().peak <= self.quota);
        let mut held = 0;
        for &buffer in &self.buffers {
            let buffer: Resource<Buffer> = Resource::new_borrow(buffer);
            held += self.table.get(&buffer).unwrap().bytes();
        }
        for &model in &self.models {
            let model: Resource<LoadedModel> = Resource::new_borrow(model);
            let plan = self.table.get(&model).unwrap().model().plan();
            held += plan
                .devices
                .iter()
                .map(|device| device.size.requested)
                .sum::<u64>();
        }
        assert_eq!(held, requested);
    }
}
