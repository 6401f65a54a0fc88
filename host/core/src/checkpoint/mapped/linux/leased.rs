//! A file that is mapped under a lease. The only `unsafe` of `checkpoint`.
//!
//! What the system promises is in fcntl(2), "Leases". Two things are not there. A lease to read is
//! not broken by who opens a file to read and to cut it to nothing at once (`O_RDONLY | O_TRUNC`),
//! only one to write is, which every other opening breaks. And a notice goes to the
//! process that holds the lease, whose default is to end it, unless another owner is named before.
#![allow(unsafe_code)]

use std::fs::{self, File, Metadata};
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libc::{F_GETLEASE, F_RDLCK, F_SETLEASE, F_UNLCK, F_WRLCK, c_int};
use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags};
use rustix::param::page_size;
use rustix::process::{Pid, geteuid, getpid};

use super::blocks::Blocks;
use crate::checkpoint::Shard;
use crate::checkpoint::file::Kept;

/// Not in `libc` for these systems; from `asm-generic/fcntl.h`, which both processors use.
const F_SETSIG: c_int = 10;
const F_SETOWN_EX: c_int = 15;
const F_OWNER_TID: c_int = 0;

/// `struct f_owner_ex`.
#[repr(C)]
struct Owner {
    kind: c_int,
    id: c_int,
}

/// Ignored unless a handler is installed, and blocked in the only thread that gets it.
const NOTICE: c_int = libc::SIGURG;

/// Windows are held for milliseconds; where the system waits less than this for a lease, there are none.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// File systems whose files are written by this machine only, through opened files that break leases:
/// ext2 to ext4, XFS, Btrfs and tmpfs. Not those of a network or FUSE, where others write. Not
/// overlayfs, which cuts the file underneath without a word to its leases.
const FILE_SYSTEMS: [u64; 4] = [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994];

/// In `users`: nobody may come any more.
const CLOSED: u64 = 1 << 63;
/// In `users`: the mapping and the lease are gone.
const GONE: u64 = 1 << 62;

/// A file, its mapping, and the lease that this stands on.
#[derive(Debug)]
pub(super) struct LeasedFile {
    kept: Arc<Kept>,
    lease: c_int,
    patience: Duration,
    address: NonNull<u8>,
    length: usize,
    page: usize,
    blocks: Blocks,
    /// How many pieces are out, and [`CLOSED`] and [`GONE`].
    users: AtomicU64,
    process: Pid,
}

// SAFETY: the address is of a mapping that any thread may read and unmap; `users` says when.
unsafe impl Send for LeasedFile {}
// SAFETY: as above.
unsafe impl Sync for LeasedFile {}

impl LeasedFile {
    /// Whether a file may be mapped at all, by the file system that it is on and by who else may
    /// write there.
    pub(super) fn is_possible(file: &File) -> bool {
        // Linux's own NFS server cuts a file for its clients without a word to leases.
        rustix::fs::fstatfs(file).is_ok_and(|of| FILE_SYSTEMS.contains(&(of.f_type as u64)))
            && !fs::read_to_string("/proc/net/rpc/nfsd").is_ok_and(|text| serves(&text))
    }

    /// Maps a file, if it is as it was when it was opened and nobody else is about to write to it. Notices
    /// go to the thread `watcher`, which has them blocked.
    pub(super) fn new(
        shard: &Shard,
        kept: &Arc<Kept>,
        locked: bool,
        watcher: Pid,
        process: Pid,
    ) -> Option<LeasedFile> {
        let file = &kept.file;
        let length = usize::try_from(shard.length()).ok().filter(|&n| n > 0)?;
        let patience = patience().filter(|&time| time >= LEAST_PATIENCE)?;
        // Of the same opened file there is one lease.
        if kept.leased.swap(true, Ordering::SeqCst) {
            return None;
        }
        let lease = lease_for(&file.metadata().ok()?);
        if !take_lease(file, lease, watcher) {
            kept.leased.store(false, Ordering::SeqCst);
            return None;
        }
        // From here on nobody writes. Dropped, it gives back what there is.
        let mut leased = LeasedFile {
            kept: kept.clone(),
            lease,
            patience,
            address: NonNull::dangling(),
            length: 0,
            page: page_size(),
            blocks: Blocks::default(),
            users: AtomicU64::new(CLOSED),
            process,
        };
        shard.check_unchanged(file).ok()?;
        leased.map(length, locked)?;
        leased.users = AtomicU64::new(0);
        Some(leased)
    }

    fn map(&mut self, length: usize, locked: bool) -> Option<()> {
        // SAFETY: a new mapping, wherever there is room.
        let address = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::SHARED,
                &self.kept.file,
                0,
            )
        };
        let address = address.ok()?;
        self.address = NonNull::new(address.cast())?;
        self.length = length;
        self.blocks = Blocks::new(self.address.addr().get(), length);
        // A process that is forked has no windows, and shares the lease of this one.
        self.advise(0, length, Advice::LinuxDontFork)?;
        // What is not in the cache is read ahead, as it is by reads.
        self.advise(0, length, Advice::Sequential)?;
        if locked {
            // What is populated stays until it is released. This counts against `RLIMIT_MEMLOCK` in whole.
            // SAFETY: the whole of a mapping that is ours.
            unsafe { rustix::mm::mlock_with(address, length, MlockFlags::ONFAULT) }.ok()?;
        }
        // Whether the system knows both.
        let first = length.min(self.page);
        self.advise(0, first, Advice::LinuxPopulateRead)?;
        self.advise(0, first, Advice::LinuxDontneedLocked)
    }

    fn advise(&self, start: usize, length: usize, advice: Advice) -> Option<()> {
        debug_assert!(start.is_multiple_of(self.page) && start + length <= self.length);
        // SAFETY: in the mapping, and of what `advise` is called with nothing changes what it holds.
        unsafe {
            let address = self.address.as_ptr().add(start);
            rustix::mm::madvise(address.cast(), length, advice).ok()
        }
    }

    /// Bytes of the file, populated and locked. `None` where they do not lie in it, cannot be read, or
    /// somebody wants to write to it.
    pub(super) fn piece(&self, offset: u64, length: usize) -> Option<Piece<'_>> {
        let start = usize::try_from(offset).ok()?;
        let end = start
            .checked_add(length)
            .filter(|&end| end <= self.length)?;
        let user = self.enter()?;
        if !self.look() {
            return None;
        }
        if !self.blocks.enter(start..end) {
            return None;
        }
        let piece = Piece { user, start, end };
        let first = start / self.page * self.page;
        self.advise(first, end - first, Advice::LinuxPopulateRead)?;
        Some(piece)
    }

    /// Keeps the mapping from going, unless it is about to.
    fn enter(&self) -> Option<User<'_>> {
        let users = self.users.fetch_add(1, Ordering::SeqCst);
        let user = User(self);
        (users & CLOSED == 0).then_some(user)
    }

    /// Whether nobody wants to write to the file. Else there are no pieces any more.
    pub(super) fn look(&self) -> bool {
        if self.users.load(Ordering::SeqCst) & CLOSED != 0 {
            return false;
        }
        let holds = has_lease(&self.kept.file, self.lease);
        if !holds {
            self.close();
        }
        holds
    }

    fn close(&self) {
        self.users.fetch_or(CLOSED, Ordering::SeqCst);
        self.end();
    }

    /// Gives mapping and lease back if it is closed and nobody is in: whoever is last does it.
    fn end(&self) {
        let last =
            self.users
                .compare_exchange(CLOSED, CLOSED | GONE, Ordering::SeqCst, Ordering::SeqCst);
        if last.is_err() {
            return;
        }
        if self.length > 0 {
            // SAFETY: nobody is in, and nobody comes any more.
            let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.length) };
        }
        give_back_lease(&self.kept.file);
        self.kept.leased.store(false, Ordering::SeqCst);
    }
}

impl Drop for LeasedFile {
    fn drop(&mut self) {
        // In a forked process there is no mapping, and the lease is the other's.
        if getpid() == self.process {
            self.close();
        }
    }
}

/// Somebody for whom the mapping stays.
#[derive(Debug)]
struct User<'f>(&'f LeasedFile);

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::SeqCst);
        self.0.end();
    }
}

/// Bytes of a mapping, which stays as long as they are there.
#[derive(Debug)]
pub(super) struct Piece<'f> {
    user: User<'f>,
    start: usize,
    end: usize,
}

impl<'f> Piece<'f> {
    fn of(&self) -> &'f LeasedFile {
        self.user.0
    }

    pub(super) fn file(&self) -> &'f File {
        &self.of().kept.file
    }

    /// Whether nobody can have written to the file since then, when there was a lease.
    pub(super) fn holds(&self, since: Instant) -> bool {
        self.of().look() || since.elapsed() < self.of().patience
    }
}

impl Deref for Piece<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the mapping, which stays while there is a user. The bytes do not change
        // and stay readable because nobody can open the file to write before the lease is given
        // back, which happens after; and because they are locked.
        unsafe {
            let first = self.of().address.as_ptr().add(self.start);
            slice::from_raw_parts(first, self.end - self.start)
        }
    }
}

impl Drop for Piece<'_> {
    fn drop(&mut self) {
        let of = self.of();
        of.blocks.leave(self.start..self.end, |unused| {
            // If it fails they are released with the mapping.
            let _ = of.advise(unused.start, unused.len(), Advice::LinuxDontneedLocked);
        });
    }
}

/// Which lease keeps everybody from writing who might. One to read leaves other readers alone; but it
/// is blind for a way of cutting a file that only who may write to it has. Where that is nobody but this
/// user and root, it is enough.
fn lease_for(file: &Metadata) -> c_int {
    let by_others = file.mode() & 0o022 != 0;
    let by_owner = file.uid() != 0 && file.uid() != geteuid().as_raw();
    if by_others || by_owner {
        F_WRLCK
    } else {
        F_RDLCK
    }
}

/// Whether an NFS server has threads, by what the system says of it.
fn serves(statistics: &str) -> bool {
    let threads = statistics.lines().find_map(|line| line.strip_prefix("th "));
    let number = threads.and_then(|threads| threads.split_whitespace().next());
    number != Some("0")
}

/// How long the system waits for a lease; `None` where it does not say.
fn patience() -> Option<Duration> {
    let text = fs::read_to_string("/proc/sys/fs/lease-break-time").ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

fn take_lease(file: &File, lease: c_int, watcher: Pid) -> bool {
    let owner = Owner {
        kind: F_OWNER_TID,
        id: watcher.as_raw_nonzero().get(),
    };
    let file = file.as_raw_fd();
    // An owner that is set stays: the notice never goes to the whole process.
    // SAFETY: calls of an open file with an integer, and a structure that lives meanwhile.
    unsafe {
        libc::fcntl(file, F_SETOWN_EX, &raw const owner) == 0
            && libc::fcntl(file, F_SETSIG, NOTICE) == 0
            && libc::fcntl(file, F_SETLEASE, lease) == 0
    }
}

/// Whether there is this lease, and nobody wants it away.
fn has_lease(file: &File, lease: c_int) -> bool {
    // SAFETY: a call of an open file.
    unsafe { libc::fcntl(file.as_raw_fd(), F_GETLEASE) == lease }
}

fn give_back_lease(file: &File) {
    // It may have been taken already.
    // SAFETY: a call of an open file with an integer.
    unsafe { libc::fcntl(file.as_raw_fd(), F_SETLEASE, F_UNLCK) };
}

/// Keeps notices from ever being delivered to the calling thread.
pub(super) fn block_notices() -> bool {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is initialized by the first call; only this thread's mask changes.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr()) == 0
            && libc::sigaddset(set.as_mut_ptr(), NOTICE) == 0
            && libc::sigaddset(set.as_mut_ptr(), libc::SIGIO) == 0
            && libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut()) == 0
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::super::tests::{alone, checkpoint, open_to_write};
    use super::*;

    #[test]
    fn an_nfs_server_is_known_by_its_threads() {
        let text = |threads| format!("rc 0 0 0\nio 0 0\nth {threads} 0 0.000\nra 0\n");
        assert!(!serves(&text(0)));
        assert!(serves(&text(8)));
        assert!(serves(&text(10)));
        // Who says nothing of them may have some.
        assert!(serves("rc 0 0 0\n"));
        assert!(serves(""));
    }

    /// A file that is not waited for long: as if the process had been stopped for longer than that.
    #[test]
    fn what_was_seen_for_longer_than_the_system_waits_counts_for_nothing() {
        let _alone = alone();
        for (directory, checkpoint) in checkpoint(1 << 20) {
            let path = directory.path().join("model.safetensors");
            let shard = &checkpoint.shards()[0];
            let watcher = rustix::thread::gettid();
            assert!(block_notices());
            let take =
                || LeasedFile::new(shard, shard.kept().unwrap(), true, watcher, getpid()).unwrap();

            let leased = take();
            let piece = leased.piece(9, 1000).unwrap();
            let writing = || open_to_write(&path);
            let error = writing().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            assert!(piece.holds(Instant::now()));
            let long_ago = Instant::now().checked_sub(leased.patience).unwrap();
            assert!(!piece.holds(long_ago));
            // The mapping outlives its closing, the lease outlives the mapping.
            assert!(leased.piece(9, 1000).is_none());
            assert_eq!(writing().unwrap_err().kind(), ErrorKind::WouldBlock);
            assert_eq!(piece.len(), 1000);
            drop(piece);
            writing().unwrap();
            drop(leased);

            // Without anybody who asked it is never too long.
            let leased = take();
            assert!(leased.piece(9, 1000).unwrap().holds(long_ago));
            drop(leased);
            // Nothing was written.
            assert!(shard.check_unchanged(&shard.kept().unwrap().file).is_ok());
        }
    }

    /// A process that is forked has neither windows nor a say over the lease.
    #[test]
    fn a_forked_process_has_no_windows_and_takes_none_away() {
        let _alone = alone();
        for (directory, checkpoint) in checkpoint(1 << 20) {
            let path = directory.path().join("model.safetensors");
            let mappings = checkpoint.map();
            mappings.window(0, 9, 1000).unwrap().finish().unwrap();
            // SAFETY: the child ends before it returns to the test.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let has_none = mappings.window(0, 9, 1000).is_none();
                drop(mappings);
                // SAFETY: ends the process.
                unsafe { libc::_exit(i32::from(!has_none)) };
            }
            let mut status = 1;
            // SAFETY: waits for a process of ours.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0);
            let window = mappings.window(0, 9, 1000).unwrap();
            assert_eq!(
                open_to_write(&path).unwrap_err().kind(),
                ErrorKind::WouldBlock
            );
            assert_eq!(window.len(), 1000);
            window.finish().unwrap();
        }
    }
}
