//! The interfaces called directly, as wasmtime would: no guest, no engine.

mod buffers;
mod checkpoints;
mod ends;
mod linear;
mod models;
mod nf4;

use std::path::Path;

use tempfile::TempDir;
use wasmtime::component::{Resource, ResourceTableError};

use super::bindings::tightfit::host::buffers::{HostBuffer as _, Place};
use super::bindings::tightfit::host::checkpoints::HostCheckpoint as _;
use super::bindings::tightfit::host::{errors, types};
use super::view::MOST_BYTES;
use super::*;
use tightfit::device::HostDevice;
use tightfit::testing::{Source, source, write_checkpoint};
use tightfit::types::DType;

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;

/// What a store holds for one program.
struct Program {
    context: ProgramCtx,
    table: ResourceTable,
}

/// Two simulated devices.
fn devices() -> Arc<[Box<dyn Device>]> {
    let device = |index| Box::new(HostDevice::sim(index, 64 * MIB)) as Box<dyn Device>;
    (0..2).map(device).collect()
}

impl Program {
    /// On devices of its own.
    fn new(quota: u64) -> Program {
        Program::on(&devices(), quota)
    }

    fn on(devices: &Arc<[Box<dyn Device>]>, quota: u64) -> Program {
        Program::with(ProgramCtx::new(Arc::clone(devices), quota))
    }

    fn with(context: ProgramCtx) -> Program {
        Program {
            context,
            table: ResourceTable::new(),
        }
    }

    /// One call.
    fn call(&mut self) -> ProgramCtxView<'_> {
        ProgramCtxView {
            context: &mut self.context,
            table: &mut self.table,
        }
    }

    fn allocate(&mut self, device: u32, bytes: u64) -> Resource<Buffer> {
        done(self.call().allocate(device, bytes))
    }

    /// A buffer that holds this.
    fn buffer_of(&mut self, bytes: &[u8]) -> Resource<Buffer> {
        let buffer = self.allocate(0, bytes.len() as u64);
        for (number, piece) in bytes.chunks(MOST_BYTES).enumerate() {
            let offset = (number * MOST_BYTES) as u64;
            done(self.call().write(again(&buffer), offset, piece.to_vec()));
        }
        buffer
    }

    /// Everything that a buffer holds.
    fn bytes(&mut self, buffer: &Resource<Buffer>) -> Vec<u8> {
        let length = self.call().length(again(buffer)).unwrap();
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < length {
            let offset = bytes.len() as u64;
            let piece = (length - offset).min(MOST_BYTES as u64);
            bytes.extend(done(self.call().read(again(buffer), offset, piece)));
        }
        bytes
    }

    fn open(&mut self, name: &str) -> Resource<OpenCheckpoint> {
        done(self.call().open(name.to_owned()))
    }

    fn free(&mut self, buffer: Resource<Buffer>) {
        wit_buffers::HostBuffer::drop(&mut self.call(), buffer).unwrap();
    }

    fn close(&mut self, checkpoint: Resource<OpenCheckpoint>) {
        wit_checkpoints::HostCheckpoint::drop(&mut self.call(), checkpoint).unwrap();
    }

    fn unload(&mut self, model: Resource<LoadedModel>) {
        wit_models::HostModel::drop(&mut self.call(), model).unwrap();
    }

    fn usage(&self) -> Usage {
        self.context.usage(0).unwrap()
    }
}

/// The same handle for another call.
fn again<T: 'static>(handle: &Resource<T>) -> Resource<T> {
    Resource::new_borrow(handle.rep())
}

fn place(buffer: &Resource<Buffer>, offset: u64) -> Place {
    Place {
        buffer: again(buffer),
        offset,
    }
}

#[track_caller]
fn done<T>(result: Result<T, CallError>) -> T {
    result.unwrap_or_else(|error| panic!("{error:?}"))
}

/// What a program is told.
#[track_caller]
fn told<T: std::fmt::Debug>(result: Result<T, CallError>) -> errors::Error {
    match result {
        Err(CallError::Guest(error)) => error,
        other => panic!("it is not told anything: {other:?}"),
    }
}

#[track_caller]
fn invalid<T: std::fmt::Debug>(result: Result<T, CallError>) -> String {
    match told(result) {
        errors::Error::InvalidArgument(message) => message,
        other => panic!("it is something else: {other:?}"),
    }
}

/// Bytes needed and left.
#[track_caller]
fn over_quota<T: std::fmt::Debug>(result: Result<T, CallError>) -> (u64, u64) {
    match told(result) {
        errors::Error::QuotaExceeded(shortage) => (shortage.need, shortage.have),
        other => panic!("it is something else: {other:?}"),
    }
}

/// Weights of some kinds, the same on every run.
fn sources() -> Vec<Source> {
    vec![
        source("matrix", DType::Bf16, &[517, 331]),
        source("single", DType::F32, &[64, 1031]),
        source("ids", DType::I64, &[13]),
        source("large", DType::Bf16, &[1031, 2049]),
    ]
}

/// A checkpoint of these weights in a directory.
fn checkpoint() -> TempDir {
    let directory = TempDir::new().unwrap();
    write_checkpoint(directory.path(), &sources());
    directory
}

/// A program that may open this as `model`.
fn with_model(path: &Path, quota: u64) -> Program {
    Program::with(ProgramCtx::new(devices(), quota).grant("model", path))
}
