//! A program's calls of the host in any order and with any arguments.

mod input;
mod linear;
mod memory;
mod seeds;
#[cfg(test)]
mod tests;
mod transformer;
mod written;

use std::cell::Cell;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;
use tightfit::device::{Device, HostDevice};
use tightfit_wasm::wit::program::bindings::tightfit::host::buffers::{HostBuffer as _, Place};
use tightfit_wasm::wit::program::bindings::tightfit::host::sliced_models;
use tightfit_wasm::wit::program::{
    Buffer, CallError, LoadedModel, OpenCheckpoint, ProgramCtx, ProgramCtxView, output,
};
use wasmtime::component::{Resource, ResourceTable};

use input::Input;
pub use seeds::program_seeds;

/// Calls in one sequence, at most: more find nothing that fewer do not, and take longer.
const MOST_CALLS: usize = 300;

/// What devices have, each: a list may hold all of it.
const DEVICE_BYTES: u64 = 2 << 20;

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
    /// Where what it says comes out, if anybody listens.
    said: Option<Receiver<String>>,
    /// Whether what calls write is compared with what they say that they do, which takes its time.
    watches: bool,
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

/// Tensors of the checkpoint, the first of which is of integers.
const TENSORS: usize = 7;

/// What lies beside its weights.
const TOKENIZER: &[u8] = br#"{"model":{}}"#;

/// A checkpoint with a tie that is stored, a matrix, a stack of experts and their router, a vector, and a tensor that
/// cannot be quantized.
fn checkpoint() -> &'static TempDir {
    static DIRECTORY: OnceLock<TempDir> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("there is room for files");
        let config = br#"{"tie_word_embeddings":true,"num_hidden_layers":1}"#;
        std::fs::write(directory.path().join("config.json"), config).expect("files can be written");
        std::fs::write(directory.path().join("tokenizer.json"), TOKENIZER)
            .expect("files can be written");
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
                "model.layers.0.mlp.experts.gate_up_proj",
                tensor(Dtype::BF16, &[4, 16, 32], &bytes),
            ),
            (
                "model.layers.0.mlp.gate.weight",
                tensor(Dtype::BF16, &[4, 32], &bytes[..256]),
            ),
            (
                "model.norm.weight",
                tensor(Dtype::BF16, &[32], &bytes[..64]),
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

/// Whether something of these lengths would compute for seconds. What has far more is for the host to refuse.
fn is_long(lengths: impl IntoIterator<Item = u64>) -> bool {
    let lengths = lengths.into_iter().map(u128::from);
    (1 << 25..1 << 45).contains(&lengths.fold(1, u128::saturating_mul))
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
    let flags = input.byte();
    let device = |index| Box::new(HostDevice::sim(index, DEVICE_BYTES)) as Box<dyn Device>;
    let devices: Arc<[Box<dyn Device>]> = (0..2).map(device).collect();
    let mut context = ProgramCtx::new(Arc::clone(&devices), quota)
        .grant("model", checkpoint().path())
        .load_with(Some(1), Some(64 << 10));
    let mut said = None;
    if flags & 1 != 0 {
        let (output, receiver) = output();
        context = context.with_output(output);
        said = Some(receiver);
    }
    let mut table = ResourceTable::new();
    // Room for every call to give handles.
    table.set_max_capacity(4 * MOST_CALLS);
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
        said,
        watches: flags & 2 != 0,
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
            offset: self.input.offset(),
        }
    }

    fn checkpoint(&mut self) -> Resource<OpenCheckpoint> {
        Resource::new_borrow(self.pick(Kind::Checkpoint))
    }

    fn model(&mut self) -> Resource<LoadedModel> {
        Resource::new_borrow(self.pick(Kind::Model))
    }

    /// Bytes of a buffer, all of which there are.
    fn read(&mut self, place: &Place, bytes: u64) -> Vec<u8> {
        let buffer = Resource::new_borrow(place.buffer.rep());
        self.view().read(buffer, place.offset, bytes).unwrap()
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
        match self.input.byte() % 52 {
            call @ 0..=26 => self.call_memory(call),
            call @ 27..=34 => self.call_linear(call - 27),
            call @ 35..=46 => self.call_transformer(call - 35),
            47 => self.several_buffers(),
            50 => self.load_slices(),
            51 => {
                let (model, tensor) = (self.model(), self.input.index());
                let result = sliced_models::Host::get_piece(&mut self.view(), model, tensor);
                if let Some(Some(piece)) = self.done(result) {
                    assert!(!piece.ranges.is_empty());
                }
            }
            _ => self.look_beside_weights(),
        }
    }

    /// Takes buffers for operands, and fills some of them.
    fn several_buffers(&mut self) {
        for _ in 0..1 + self.input.byte() % 4 {
            let kind = self.input.byte();
            let bytes = 64 << (kind % 8);
            let result = self.view().allocate(0, bytes);
            let Some(buffer) = self.done(result) else {
                return;
            };
            let rep = buffer.rep();
            self.buffers.push(rep);
            if kind >= 128 {
                let content = self.input.bytes();
                let result = self.view().write(Resource::new_borrow(rep), 0, content);
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
