//! A program's calls of the host in any order and with any arguments.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;
use tightfit::device::{Device, HostDevice};
use tightfit_wasm::wit::bindings::tightfit::host::types;
use tightfit_wasm::wit::program::bindings::tightfit::host::buffers::{HostBuffer, Place};
use tightfit_wasm::wit::program::bindings::tightfit::host::checkpoints::HostCheckpoint;
use tightfit_wasm::wit::program::bindings::tightfit::host::linear::{
    Host as _, HostWeight, Product, Rounding,
};
use tightfit_wasm::wit::program::bindings::tightfit::host::models::{HostModel, PartKind};
use tightfit_wasm::wit::program::bindings::tightfit::host::nf4::Host as _;
use tightfit_wasm::wit::program::{
    Buffer, CallError, LoadedModel, OpenCheckpoint, ProgramCtx, ProgramCtxView, Weight,
};
use wasmtime::component::{Resource, ResourceTable};

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

/// A program and what it knows of itself.
struct Program<'a> {
    input: Input<'a>,
    context: ProgramCtx,
    table: ResourceTable,
    devices: Arc<[Box<dyn Device>]>,
    quota: u64,
    buffers: Vec<u32>,
    checkpoints: Vec<u32>,
    models: Vec<u32>,
    weights: Vec<u32>,
    /// Whether a handle of this call is none that there is.
    forged: bool,
    /// Calls that gave more than an error.
    went_well: Cell<usize>,
}

#[derive(Clone, Copy)]
enum Kind {
    Buffer,
    Checkpoint,
    Model,
    Weight,
}

/// A checkpoint with a tie that is stored, a matrix, and a tensor that cannot be quantized.
fn checkpoint() -> &'static TempDir {
    static DIRECTORY: OnceLock<TempDir> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("there is room for files");
        let config = br#"{"tie_word_embeddings":true,"num_hidden_layers":1}"#;
        std::fs::write(directory.path().join("config.json"), config).expect("files can be written");
        let bytes: Vec<u8> = (0..4096).map(|i| (i % 251) as u8).collect();
        let tensor = |dtype, shape: &[usize], bytes| {
            TensorView::new(dtype, shape.to_vec(), bytes).expect("the length is right")
        };
        let tensors = [
            (
                "model.embed_tokens.weight",
                tensor(Dtype::BF16, &[64, 32], &bytes),
            ),
            ("lm_head.weight", tensor(Dtype::BF16, &[64, 32], &bytes)),
            (
                "model.layers.0.mlp.up_proj.weight",
                tensor(Dtype::F32, &[32, 32], &bytes),
            ),
            (
                "model.position_ids",
                tensor(Dtype::I64, &[16], &bytes[..128]),
            ),
        ];
        let file = directory.path().join("model.safetensors");
        safetensors::serialize_to_file(tensors, None, &file).expect("files can be written");
        directory
    })
}

/// Carries out the calls that the input says, and checks after each that the books are right; at the
/// end, that nothing is left. Whether a call went well.
pub fn program(data: &[u8]) -> bool {
    calls_that_went_well(data) > 0
}

/// Gives how many of the calls did more than to say what is wrong with them.
fn calls_that_went_well(data: &[u8]) -> usize {
    let mut input = Input(data);
    let quota = u64::from(input.byte()) * 16 * 1024;
    let device = |index| Box::new(HostDevice::sim(index, 2 << 20)) as Box<dyn Device>;
    let devices: Arc<[Box<dyn Device>]> = (0..2).map(device).collect();
    let context = ProgramCtx::new(Arc::clone(&devices), quota)
        .grant("model", checkpoint().path())
        .load_with(Some(1), Some(64 << 10));
    let mut table = ResourceTable::new();
    // Room for every call to give a handle.
    table.set_max_capacity(MOST_CALLS);
    let mut program = Program {
        input,
        context,
        table,
        devices,
        quota,
        buffers: Vec::new(),
        checkpoints: Vec::new(),
        models: Vec::new(),
        weights: Vec::new(),
        forged: false,
        went_well: Cell::new(0),
    };
    for _ in 0..MOST_CALLS {
        if program.input.0.is_empty() {
            break;
        }
        program.call();
        program.check();
    }
    let Program {
        context,
        table,
        devices,
        went_well,
        ..
    } = program;
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

impl Program<'_> {
    fn view(&mut self) -> ProgramCtxView<'_> {
        ProgramCtxView {
            context: &mut self.context,
            table: &mut self.table,
        }
    }

    fn handles(&self, kind: Kind) -> &[u32] {
        match kind {
            Kind::Buffer => &self.buffers,
            Kind::Checkpoint => &self.checkpoints,
            Kind::Model => &self.models,
            Kind::Weight => &self.weights,
        }
    }

    /// One of the handles, or now and then a number.
    fn pick(&mut self, kind: Kind) -> u32 {
        let choice = self.input.byte();
        let picked = match self.handles(kind) {
            [] => None,
            handles => Some(handles[usize::from(choice) % handles.len()]),
        };
        match picked {
            Some(handle) if choice < 250 => handle,
            _ => {
                let number = u32::from(self.input.byte());
                self.forged |= !self.handles(kind).contains(&number);
                number
            }
        }
    }

    fn buffer(&mut self) -> Resource<Buffer> {
        Resource::new_borrow(self.pick(Kind::Buffer))
    }

    fn place(&mut self) -> Place {
        Place {
            buffer: self.buffer(),
            offset: self.input.number(),
        }
    }

    fn checkpoint(&mut self) -> Resource<OpenCheckpoint> {
        Resource::new_borrow(self.pick(Kind::Checkpoint))
    }

    fn model(&mut self) -> Resource<LoadedModel> {
        Resource::new_borrow(self.pick(Kind::Model))
    }

    fn weight(&mut self) -> Resource<Weight> {
        Resource::new_borrow(self.pick(Kind::Weight))
    }

    fn product(&mut self) -> Product {
        let weight = self.weight();
        let (input, rows, float) = (self.place(), self.input.number() as u32, self.input.dtype());
        let output = self.place();
        let more = self.input.byte();
        let place = |it: &mut Self, bit: u8| (more & bit != 0).then(|| it.place());
        Product {
            weight,
            input,
            rows,
            float,
            bias: place(self, 1),
            output,
            experts: place(self, 2),
            rounding: match more & 4 {
                0 => Rounding::Fastest,
                _ => Rounding::ByRow,
            },
        }
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
        match self.input.byte() % 33 {
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
                self.forget(rep);
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
                self.forget(rep);
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
                self.forget(rep);
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
            27 => {
                let (model, tensor) = (self.model(), self.input.index());
                let result = self.view().of(model, tensor);
                if let Some(weight) = self.done(result) {
                    self.weights.push(weight.rep());
                }
            }
            28 => {
                let lengths = usize::from(self.input.byte() % 5);
                let shape = (0..lengths).map(|_| self.input.number()).collect();
                let (block, nf4) = (self.input.block_size(), types::QuantType::Nf4);
                let (codes, absmax) = (self.place(), self.place());
                let result = self.view().from_codes(nf4, shape, block, codes, absmax);
                if let Some(weight) = self.done(result) {
                    self.weights.push(weight.rep());
                }
            }
            29 | 30 => {
                let count = self.input.byte() % 3;
                let products = (0..count).map(|_| self.product()).collect();
                let result = self.view().multiply(products);
                self.done(result);
            }
            31 => {
                let (weight, rows) = (self.weight(), self.input.number() as u32);
                let again = Resource::new_borrow(weight.rep());
                let result = self.view().shape(weight);
                self.done(result.map_err(CallError::Trap));
                let result = self.view().scratch_bytes(again, rows);
                self.done(result.map_err(CallError::Trap));
                let result = self.view().finish();
                self.done(result);
            }
            32 => {
                let rep = self.weight().rep();
                let result = HostWeight::drop(&mut self.view(), Resource::new_own(rep));
                self.done(result.map_err(CallError::Trap));
                self.forget(rep);
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

    /// A forged handle may be that of something else, which a store would not let a program drop;
    /// without a store it is gone.
    fn forget(&mut self, handle: u32) {
        for handles in [
            &mut self.buffers,
            &mut self.checkpoints,
            &mut self.models,
            &mut self.weights,
        ] {
            handles.retain(|&other| other != handle);
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

    /// What the host says that the program has is what it has.
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
        // Weights keep what was dropped.
        assert!(held == requested || (held < requested && !self.weights.is_empty()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 2000,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn any_sequence_of_calls_leaves_the_books_right(
            data in prop::collection::vec(any::<u8>(), 0..2000)
        ) {
            calls_that_went_well(&data);
        }
    }

    /// A sequence that reaches what chance seldom does: a model that is loaded, looked at and read.
    #[test]
    fn a_sequence_that_makes_sense_works() {
        let nf4_on_first = [60, 5, 1];
        let stored_on_first = [60, 1];
        let mut input = vec![255, 14, 0];
        input.extend([19, 0, 0]);
        // Integers come first in the file.
        input.extend(stored_on_first);
        input.extend(nf4_on_first.repeat(3));
        input.extend([0, 0]);
        input.extend([
            22, 0, 0, 0, 23, 0, 1, 1, 0, 100, 25, 0, 1, 0, 100, 2, 21, 0, 16, 0,
        ]);
        // Opened, loaded, looked up twice, read twice, unloaded, closed.
        assert_eq!(calls_that_went_well(&input), 8);
    }

    /// The same for products: a weight that is made, used and outlives its buffers.
    #[test]
    fn products_that_make_sense_work() {
        let mut input = vec![255];
        // Codes, scales, input, output.
        for bytes in [32, 4, 127, 100] {
            input.extend([0, 0, bytes]);
        }
        // Of [1, 16], with blocks of 64: one row of f32 numbers.
        input.extend([28, 2, 1, 16, 1, 0, 0, 1, 0]);
        input.extend([29, 1, 0, 2, 0, 1, 2, 3, 0, 4]);
        input.extend([4, 0, 4, 0, 29, 1, 0, 0, 0, 1, 2, 1, 0, 4, 31, 0, 1, 32, 0]);
        // Four buffers, a weight, a product, two dropped, a product, three looks at it, and it is dropped.
        assert_eq!(calls_that_went_well(&input), 13);
    }
}
