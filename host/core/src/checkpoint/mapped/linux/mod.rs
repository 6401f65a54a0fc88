//! Which files are mapped, the windows into them, and the thread that looks after their leases.

#[cfg(test)]
mod benchmark;
mod blocks;
mod leased;
#[cfg(test)]
mod tests;

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, getpid};

use crate::checkpoint::{CheckpointError, Shard};
use leased::{LeasedFile, Piece, block_notices};

/// How long whoever wants to write to a file is held up where no window is taken meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A checkpoint's files, each mapped when it is first asked for. Shareable between threads; windows
/// take no lock.
#[derive(Debug)]
pub(crate) struct Mappings {
    files: Arc<Files>,
    locked: bool,
    watcher: OnceLock<Option<Watcher>>,
}

#[derive(Debug)]
struct Files {
    shards: Arc<[Shard]>,
    /// For each shard: not asked for yet, cannot be had, or had at one time.
    leased: Box<[OnceLock<Option<LeasedFile>>]>,
    /// Where the mappings are: in no process that was forked from it.
    process: Pid,
}

/// The thread that notices when somebody wants to write to a file.
#[derive(Debug)]
struct Watcher {
    ended: Arc<AtomicBool>,
    /// Its number for the system, to which notices are addressed.
    id: Pid,
    thread: Option<JoinHandle<()>>,
}

impl Mappings {
    /// Without `locked` a page may be taken back between being read and being seen, when memory is short;
    /// that it can be read a second time nobody promises.
    pub(in crate::checkpoint::mapped) fn new(shards: Arc<[Shard]>, locked: bool) -> Mappings {
        let leased = shards.iter().map(|_| OnceLock::new()).collect();
        let process = getpid();
        Mappings {
            files: Arc::new(Files {
                shards,
                leased,
                process,
            }),
            locked,
            watcher: OnceLock::new(),
        }
    }

    /// The bytes of a file from `offset` on, read, or `None` where they have to be read by
    /// [`Checkpoint::read_at`](crate::checkpoint::Checkpoint::read_at), which tells what is wrong if
    /// anything is.
    ///
    /// A window is to be held for milliseconds: whoever wants to write to the file waits for it. Whoever
    /// holds one must not open the file, in this thread or in one that it waits for.
    ///
    /// # Panics
    /// When there is no such shard.
    pub(crate) fn window(&self, shard: usize, offset: u64, length: usize) -> Option<Window<'_>> {
        let files = &*self.files;
        // A process that was forked from the one that has the mappings has none.
        if length == 0 || getpid() != files.process {
            return None;
        }
        let shard_of = &files.shards[shard];
        let leased = files.leased[shard].get_or_init(|| self.lease(shard_of));
        let taken = Instant::now();
        let piece = leased.as_ref()?.piece(offset, length)?;
        Some(Window {
            piece,
            shard: shard_of,
            taken,
        })
    }

    fn lease(&self, shard: &Shard) -> Option<LeasedFile> {
        // Before there is a thread: most files that cannot be mapped are on one file system.
        let kept = shard.kept()?;
        if !LeasedFile::is_possible(&kept.file) {
            return None;
        }
        let watcher = self.watcher.get_or_init(|| Watcher::start(&self.files));
        LeasedFile::new(
            shard,
            kept,
            self.locked,
            watcher.as_ref()?.id,
            self.files.process,
        )
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        if getpid() != self.files.process {
            return;
        }
        if let Some(Some(watcher)) = self.watcher.get_mut() {
            watcher.ended.store(true, Ordering::Relaxed);
            if let Some(thread) = watcher.thread.take() {
                thread.thread().unpark();
                // It does not panic; if it did, the files are given back all the same.
                let _ = thread.join();
            }
        }
    }
}

impl Watcher {
    /// `None` where the system has no thread to give.
    fn start(files: &Arc<Files>) -> Option<Watcher> {
        let (tell, told) = mpsc::sync_channel(1);
        let ended = Arc::new(AtomicBool::new(false));
        let (files, until) = (files.clone(), ended.clone());
        let thread = thread::Builder::new()
            .name("tightfit-leases".into())
            .spawn(move || {
                if !block_notices() || tell.send(rustix::thread::gettid()).is_err() {
                    return;
                }
                while !until.load(Ordering::Relaxed) {
                    thread::park_timeout(LOOK_EVERY);
                    for leased in files.leased.iter().filter_map(OnceLock::get).flatten() {
                        leased.look();
                    }
                }
            })
            .ok()?;
        let id = told.recv().ok()?;
        Some(Watcher {
            ended,
            id,
            thread: Some(thread),
        })
    }
}

/// Bytes of a file where the page cache has them. They do not change and stay readable for as long as
/// the window is there.
#[derive(Debug)]
pub(crate) struct Window<'m> {
    piece: Piece<'m>,
    shard: &'m Shard,
    taken: Instant,
}

impl Window<'_> {
    /// Gives the window back, and says whether what was seen through it is what the file had when the
    /// checkpoint was opened.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] when it is not, [`CheckpointError::Io`] when the file cannot be
    /// asked.
    pub(crate) fn finish(self) -> Result<(), CheckpointError> {
        // The lease was there when the window was taken. If somebody has wanted it since, he still waits,
        // but for whom the system's patience has ended.
        if !self.piece.holds(self.taken) {
            return Err(self.shard.changed());
        }
        self.shard.check_unchanged(self.piece.file())
    }
}

impl Deref for Window<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.piece
    }
}
