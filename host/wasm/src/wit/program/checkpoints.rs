//! The interface `checkpoints`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use wasmtime::component::Resource;

use super::bindings::tightfit::host::{checkpoints, errors, types};
use super::error::CallError;
use super::view::{list_bytes, place};
use super::{ProgramCtx, ProgramCtxView};
use crate::memory::Buffer;
use crate::stop::Stop;
use crate::wit::{TEXT_LIMIT, convert};
use tightfit::checkpoint::{COMPANIONS, Checkpoint, CheckpointError, Companion, OpenOptions};
use tightfit::text::truncate;

/// Tensors, or ties, that are given in one call.
const MOST_ITEMS: usize = 4096;

/// The checkpoints that a program may open.
#[derive(Debug, Default)]
pub(super) struct Grants(BTreeMap<String, Grant>);

#[derive(Debug)]
struct Grant {
    path: PathBuf,
    /// While it is open, opening it again gives the same: what a program can make the host keep does
    /// not grow with the number of its handles.
    open: Weak<Checkpoint>,
}

/// A checkpoint as a program has opened it.
#[derive(Debug)]
pub struct OpenCheckpoint(pub(super) Arc<Checkpoint>);

impl Grants {
    pub(super) fn add(&mut self, name: String, path: PathBuf) {
        let open = Weak::new();
        self.0.insert(name, Grant { path, open });
    }

    pub(super) fn open(
        &mut self,
        mut name: String,
        stop: &Stop,
    ) -> Result<Arc<Checkpoint>, CallError> {
        let Some(grant) = self.0.get_mut(&name) else {
            truncate(&mut name, TEXT_LIMIT);
            return Err(CallError::not_found(format_args!(
                "no checkpoint has been granted as '{name}'"
            )));
        };
        if let Some(open) = grant.open.upgrade() {
            return Ok(open);
        }
        let checkpoint = match Checkpoint::open_with(
            &grant.path,
            &OpenOptions::default().with_cancel(stop.token()),
        ) {
            Err(CheckpointError::Cancelled) => return Err(stop.reason().into()),
            other => Arc::new(other?),
        };
        grant.open = Arc::downgrade(&checkpoint);
        Ok(checkpoint)
    }
}

/// Returns the items of a batch.
fn batch<T>(items: &[T], first: u32, count: u32) -> &[T] {
    let (first, count) = (first as usize, (count as usize).min(MOST_ITEMS));
    let items = items.get(first..).unwrap_or_default();
    &items[..count.min(items.len())]
}

impl ProgramCtxView<'_> {
    /// A file beside the weights; none where there is no such file.
    fn companion(
        &mut self,
        checkpoint: &Resource<OpenCheckpoint>,
        name: &str,
    ) -> Result<Option<Companion>, CallError> {
        let (_, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(checkpoint)?;
        if !COMPANIONS.contains(&name) {
            return Err(CallError::invalid(format_args!(
                "only these files beside the weights are read: {}",
                COMPANIONS.join(", ")
            )));
        }
        match checkpoint.companion(name) {
            Err(CheckpointError::TooLarge { have, limit, .. }) => {
                let message = format!("{name} has {have} bytes: at most {limit} are read");
                Err(CallError::Guest(errors::Error::BadCheckpoint(message)))
            }
            other => Ok(other?),
        }
    }
}

impl checkpoints::Host for ProgramCtxView<'_> {
    fn get_names(&mut self) -> wasmtime::Result<Vec<String>> {
        let (context, _) = self.begin()?;
        Ok(context.grants.0.keys().cloned().collect())
    }
}

impl checkpoints::HostCheckpoint for ProgramCtxView<'_> {
    fn open(&mut self, name: String) -> Result<Resource<OpenCheckpoint>, CallError> {
        let (context, table) = self.begin()?;
        let ProgramCtx { grants, stop, .. } = context;
        let checkpoint = grants.open(name, stop)?;
        Ok(table.push(OpenCheckpoint(checkpoint))?)
    }

    fn config_json(&mut self, checkpoint: Resource<OpenCheckpoint>) -> wasmtime::Result<String> {
        let (_, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(&checkpoint)?;
        let config = checkpoint.config();
        Ok(config.map_or_else(|| "{}".to_owned(), |config| config.strict_text().to_owned()))
    }

    fn tensor_count(&mut self, checkpoint: Resource<OpenCheckpoint>) -> wasmtime::Result<u32> {
        let (_, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(&checkpoint)?;
        Ok(u32::try_from(checkpoint.tensors().len())?)
    }

    fn tensors(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        first: u32,
        count: u32,
    ) -> wasmtime::Result<Vec<types::Tensor>> {
        let (_, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(&checkpoint)?;
        let tensors = batch(checkpoint.tensors(), first, count);
        Ok(tensors.iter().map(convert::tensor).collect())
    }

    fn find(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        name: String,
    ) -> wasmtime::Result<Option<u32>> {
        let (_, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(&checkpoint)?;
        Ok(checkpoint.find(&name).map(convert::index))
    }

    fn ties(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        first: u32,
        count: u32,
    ) -> wasmtime::Result<Vec<checkpoints::Tie>> {
        let (_, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(&checkpoint)?;
        let ties = batch(checkpoint.ties(), first, count).iter();
        let tie = |tie: &tightfit::checkpoint::Tie| checkpoints::Tie {
            tensor: convert::index(tie.tensor),
            alias: tie.alias.clone(),
            alias_tensor: tie.alias_tensor.map(convert::index),
        };
        Ok(ties.map(tie).collect())
    }

    fn read_tensor(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        tensor: u32,
        start: u64,
        bytes: u64,
        target: Resource<Buffer>,
        offset: u64,
    ) -> Result<(), CallError> {
        let (_, table) = self.begin()?;
        let OpenCheckpoint(checkpoint) = table.get(&checkpoint)?;
        let checkpoint = Arc::clone(checkpoint);
        let tensors = checkpoint.tensors();
        let index = tensor as usize;
        let Some(info) = tensors.get(index) else {
            return Err(CallError::invalid(format_args!(
                "there is no tensor number {tensor}: there are {} (from 0)",
                tensors.len()
            )));
        };
        if start.checked_add(bytes).is_none_or(|end| end > info.bytes) {
            return Err(CallError::invalid(format_args!(
                "{bytes} bytes from {start} on lie outside of tensor '{}', which has {}",
                info.name, info.bytes
            )));
        }
        self.fill(&place(target, offset), bytes, |_, from, piece| {
            Ok(checkpoint.read_tensor(index, start + from, piece)?)
        })
    }

    fn companion_bytes(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        name: String,
    ) -> Result<Option<u64>, CallError> {
        let file = self.companion(&checkpoint, &name)?;
        Ok(file.map(|file| file.bytes()))
    }

    fn read_companion(
        &mut self,
        checkpoint: Resource<OpenCheckpoint>,
        name: String,
        start: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, CallError> {
        let Some(file) = self.companion(&checkpoint, &name)? else {
            return Err(CallError::not_found(format_args!(
                "the checkpoint has no {name}"
            )));
        };
        if start
            .checked_add(bytes)
            .is_none_or(|end| end > file.bytes())
        {
            return Err(CallError::invalid(format_args!(
                "{bytes} bytes from {start} on lie outside of {name}, which has {}",
                file.bytes()
            )));
        }
        let mut out = vec![0; list_bytes(bytes)?];
        file.read(start, &mut out)?;
        Ok(out)
    }

    fn drop(&mut self, checkpoint: Resource<OpenCheckpoint>) -> wasmtime::Result<()> {
        self.table.delete(checkpoint)?;
        Ok(())
    }
}
