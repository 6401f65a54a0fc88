//! Writing a checkpoint: one thread makes numbers, the caller's writes them, both several MiB at a
//! time; and nothing is left behind when it does not come to an end.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::created::Created;
use super::error::{SynthError, io_error};
use super::model::{Model, Tensor};
use super::preset::Preset;
use super::random::{self, Source, Tables};
use super::shards::{self, Shard};
use crate::cancel::CancelToken;
use crate::progress::{Progress, ReportProgress};

/// Bytes that are made and written at a time.
pub(super) const CHUNK: usize = 4 << 20;
/// Buffers in all: one being filled, one being written, one waiting.
const BUFFERS: usize = 3;

/// How a checkpoint is written.
#[non_exhaustive]
pub struct SynthOptions<'a> {
    /// Write headers only and leave the weights as holes in the files, which read as zeros and
    /// cost no disk where the file system can do that.
    pub headers_only: bool,
    /// Another seed gives other weights.
    pub seed: u64,
    /// A shard has at most this many bytes of weights, unless a single tensor has more.
    pub shard_bytes: u64,
    /// Called after every few MiB.
    pub progress: ReportProgress<'a>,
    /// Looked at before every chunk.
    pub cancel: CancelToken,
}

impl Default for SynthOptions<'_> {
    /// Weights of seed 0, in shards of 5 GB as huggingface_hub cuts them.
    fn default() -> Self {
        SynthOptions {
            headers_only: false,
            seed: 0,
            shard_bytes: 5_000_000_000,
            progress: &|_| {},
            cancel: CancelToken::new(),
        }
    }
}

tightfit_common::setters!([<'a>] SynthOptions<'a>:
    with_headers_only: headers_only, bool;
    with_seed: seed, u64;
    with_shard_bytes: shard_bytes, u64;
    with_progress: progress, ReportProgress<'a>;
    with_cancel: cancel, CancelToken;
);

/// What has been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Files with weights.
    pub shards: usize,
    /// Bytes of these files, headers included and holes too.
    pub bytes: u64,
    /// Tensors.
    pub tensors: usize,
}

/// Writes a checkpoint of a preset into a directory that is empty or does not exist.
///
/// # Errors
/// [`SynthError`]; whatever was created has been removed again, and only that.
pub fn write(
    preset: Preset,
    directory: impl AsRef<Path>,
    options: &SynthOptions<'_>,
) -> Result<Written, SynthError> {
    write_model(&preset.into(), directory, options)
}

/// [`write()`] for a model that is no preset.
///
/// # Errors
/// As for [`write()`], and [`SynthError::Unsupported`] for types in which there are no such
/// [`Values`](super::Values), unless no weights are written.
pub fn write_model(
    model: &Model,
    directory: impl AsRef<Path>,
    options: &SynthOptions<'_>,
) -> Result<Written, SynthError> {
    let tables = (!options.headers_only).then(Tables::new);
    let sources = tables.as_ref().map(|tables| tables.sources(&model.tensors));
    let sources = sources.transpose()?;
    let shards = shards::cut(&model.tensors, options.shard_bytes)?;
    let index = shards::index(&shards, &model.tensors)?;
    let total = shards
        .iter()
        .try_fold(0u64, |sum, shard| sum.checked_add(shard.length))
        .ok_or_else(|| SynthError::Unsupported {
            problem: "its size in bytes does not fit in 64 bits".into(),
        })?;

    let mut created = Created::directory(directory.as_ref())?;
    let mut progress = Steps {
        done: 0,
        total,
        options,
    };
    progress.add(0)?;
    match sources {
        Some(sources) => {
            let weights = Weights {
                tensors: &model.tensors,
                sources: &sources,
                seed: options.seed,
            };
            write_weights(&mut created, weights, &shards, &mut progress)?;
        }
        None => {
            for shard in &shards {
                let (path, mut file) = created.file(&shard.file)?;
                file.write_all(&shard.header)
                    .map_err(io_error("write", &path))?;
                // On other systems files are.
                #[cfg(windows)]
                let _ = crate::windows::make_sparse(&file);
                file.set_len(shard.length)
                    .map_err(io_error("extend", &path))?;
                progress.add(shard.length)?;
            }
        }
    }
    // Last, so that what has an index and a configuration is complete.
    if let Some(index) = index {
        created.text("model.safetensors.index.json", &index)?;
    }
    created.text("config.json", &model.config_json)?;
    created.keep();
    Ok(Written {
        shards: shards.len(),
        bytes: total,
        tensors: model.tensors.len(),
    })
}

/// What the weights are made from.
#[derive(Clone, Copy)]
struct Weights<'a> {
    tensors: &'a [Tensor],
    /// As many.
    sources: &'a [Source<'a>],
    seed: u64,
}

fn write_weights(
    created: &mut Created,
    weights: Weights<'_>,
    shards: &[Shard],
    progress: &mut Steps<'_>,
) -> Result<(), SynthError> {
    thread::scope(|scope| {
        // Buffers go round: filled by the other thread, written by this one. Whichever ends first
        // drops its channels, which ends the other.
        let (to_fill, empty) = sync_channel(BUFFERS);
        let (filled, to_write) = sync_channel(BUFFERS);
        for _ in 0..BUFFERS {
            // There is room for all of them.
            let _ = to_fill.send(Vec::new());
        }
        thread::Builder::new()
            .name("tightfit-synth".into())
            .spawn_scoped(scope, move || {
                generate(weights, shards, &empty, &filled);
            })
            .map_err(io_error("start a thread for", created.path()))?;
        write_shards(created, shards, &to_write, &to_fill, progress)
    })
}

/// Makes the data of all shards in order, in chunks of whole elements that end with their shard.
fn generate(
    weights: Weights<'_>,
    shards: &[Shard],
    empty: &Receiver<Vec<u8>>,
    filled: &SyncSender<Vec<u8>>,
) {
    for shard in shards {
        let mut left = shard.length - shard.header.len() as u64;
        let mut parts = weights.parts(shard);
        let mut part = parts.next();
        while left > 0 {
            let Ok(mut buffer) = empty.recv() else {
                return;
            };
            buffer.resize(left.min(CHUNK as u64) as usize, 0);
            let mut rest = buffer.as_mut_slice();
            while let Some(current) = &mut part {
                rest = current.fill(rest);
                if current.next < current.end {
                    break;
                }
                part = parts.next();
            }
            // Less than an element may be left, which begins the next chunk.
            let unused = rest.len();
            buffer.truncate(buffer.len() - unused);
            left -= buffer.len() as u64;
            if filled.send(buffer).is_err() {
                return;
            }
        }
    }
}

impl<'a> Weights<'a> {
    /// The tensors of a shard, of which nothing is made yet.
    fn parts(self, shard: &Shard) -> impl Iterator<Item = Part<'a>> {
        let tensors = self.tensors[shard.tensors.clone()].iter();
        let sources = self.sources[shard.tensors.clone()].iter();
        tensors.zip(sources).map(move |(tensor, &source)| Part {
            source,
            key: random::key(self.seed, &tensor.name),
            next: 0,
            // Checked when the shards were cut.
            end: tensor.elements().unwrap_or(0),
        })
    }
}

/// A tensor that is partly made.
struct Part<'a> {
    source: Source<'a>,
    key: u64,
    next: u64,
    end: u64,
}

impl Part<'_> {
    /// Makes as many elements as there are and as fit; returns the room behind them.
    fn fill<'b>(&mut self, room: &'b mut [u8]) -> &'b mut [u8] {
        let width = self.source.width();
        let count = (self.end - self.next).min(room.len() as u64 / width);
        let (out, rest) = room.split_at_mut((count * width) as usize);
        self.source.fill(self.key, self.next, out);
        self.next += count;
        rest
    }
}

fn write_shards(
    created: &mut Created,
    shards: &[Shard],
    to_write: &Receiver<Vec<u8>>,
    to_fill: &SyncSender<Vec<u8>>,
    progress: &mut Steps<'_>,
) -> Result<(), SynthError> {
    for shard in shards {
        let (path, mut file) = created.file(&shard.file)?;
        file.write_all(&shard.header)
            .map_err(io_error("write", &path))?;
        progress.add(shard.header.len() as u64)?;
        let mut left = shard.length - shard.header.len() as u64;
        while left > 0 {
            let Ok(buffer) = to_write.recv() else {
                // It ends early only by a panic, which the scope passes on.
                return Ok(());
            };
            file.write_all(&buffer).map_err(io_error("write", &path))?;
            left -= buffer.len() as u64;
            progress.add(buffer.len() as u64)?;
            // After the last chunk nobody waits for it.
            let _ = to_fill.send(buffer);
        }
    }
    Ok(())
}

/// How far the work is, and whether it shall go on.
struct Steps<'a> {
    done: u64,
    total: u64,
    options: &'a SynthOptions<'a>,
}

impl Steps<'_> {
    fn add(&mut self, bytes: u64) -> Result<(), SynthError> {
        self.options.cancel.check()?;
        self.done += bytes;
        (self.options.progress)(Progress::new(self.done, self.total));
        Ok(())
    }
}
