//! Windows show what the files have, whatever is done to these; and nothing is left behind.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::fs::FallocateFlags;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tempfile::TempDir;

use super::Mappings;
use super::leased::LeasedFile;
use crate::checkpoint::{Checkpoint, CheckpointError};

/// What is mapped counts against a limit of the process: one test at a time.
pub(super) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A checkpoint of one file with this many bytes of weights, on each kind of file system here that
/// has leases: at least one.
pub(super) fn checkpoint(bytes: usize) -> Vec<(TempDir, Checkpoint)> {
    let directories = [std::env::temp_dir(), "/dev/shm".into()];
    let mut checkpoints = Vec::new();
    for directory in directories {
        let Ok(directory) = tempfile::tempdir_in(directory) else {
            continue;
        };
        let path = directory.path().join(NAME);
        write(&path, &file(bytes));
        if LeasedFile::is_possible(&File::open(&path).unwrap()) {
            checkpoints.push((directory, Checkpoint::open(&path).unwrap()));
        }
    }
    assert!(!checkpoints.is_empty(), "no file system here has leases");
    checkpoints
}

const NAME: &str = "model.safetensors";

/// Written by this user alone, whatever the umask is.
fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
}

fn file(bytes: usize) -> Vec<u8> {
    let header =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    let mut state = 1_u64;
    file.extend((0..bytes).map(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    }));
    file
}

/// Without waiting for a lease.
pub(super) fn open_to_write(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NONBLOCK);
    options.open(path)
}

/// Whether a page of the file is mapped in this process.
fn is_mapped(path: &Path) -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.contains(path.to_str().unwrap())
}

fn locked_kilobytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmLck"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

/// Nothing of the file is left: no mapping, no locked memory, and no lease, so that it is opened to
/// write at once.
fn assert_given_back(path: &Path) {
    assert!(!is_mapped(path));
    assert_eq!(locked_kilobytes(), 0);
    open_to_write(path).unwrap();
}

#[test]
fn windows_have_the_bytes_of_the_file() {
    let _alone = alone();
    for (directory, checkpoint) in checkpoint(3 << 20) {
        let path = directory.path().join(NAME);
        let length = checkpoint.shards()[0].length();
        let mappings = checkpoint.map();
        let at = |part: f64| (part * length as f64) as u64;
        proptest!(|(a in 0.0..=1.0_f64, b in 0.0..=1.0_f64)| {
            let (start, end) = (at(a.min(b)), at(a.max(b)));
            let mut read = vec![0; (end - start) as usize];
            checkpoint.read_at(0, start, &mut read).unwrap();
            match mappings.window(0, start, read.len()) {
                Some(window) => {
                    prop_assert!(window[..] == read[..]);
                    window.finish().unwrap();
                }
                None => prop_assert!(read.is_empty()),
            }
        });
        let whole = mappings.window(0, 0, length as usize).unwrap();
        assert!(whole[..] == fs::read(&path).unwrap()[..]);
        // Others that overlap end before, and after.
        let within = mappings.window(0, 4095, 8194).unwrap();
        mappings.window(0, 4096, 4096).unwrap().finish().unwrap();
        assert!(within[..] == whole[4095..][..8194]);
        whole.finish().unwrap();
        assert_eq!(within.len(), 8194);
        within.finish().unwrap();
        assert!(is_mapped(&path));
        drop(mappings);
        assert_given_back(&path);
    }
}

#[test]
fn what_does_not_lie_in_the_file_has_no_window() {
    let _alone = alone();
    for (_directory, checkpoint) in checkpoint(10_000) {
        let length = checkpoint.shards()[0].length();
        let mappings = checkpoint.map();
        for (offset, bytes) in [
            (0, 0),
            (length, 0),
            (length, 1),
            (length - 1, 2),
            (0, length as usize + 1),
            (0, usize::MAX),
            (u64::MAX, 1),
            (u64::MAX, usize::MAX),
            (1 << 40, 1 << 20),
        ] {
            assert!(mappings.window(0, offset, bytes).is_none());
        }
        assert!(mappings.window(0, length - 1, 1).is_some());
    }
}

#[test]
fn threads_share_mappings() {
    let _alone = alone();
    for (directory, checkpoint) in checkpoint(6 << 20) {
        let path = directory.path().join(NAME);
        let truth = fs::read(&path).unwrap();
        let mappings = checkpoint.map();
        let taken = AtomicUsize::new(0);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (mappings, truth, taken) = (&mappings, &truth, &taken);
                scope.spawn(move || {
                    for turn in 0..200 {
                        let start = (turn * 7919 * 31 + thread * 65_537) % (truth.len() - 300_000);
                        // Where another thread is releasing there may be none.
                        if let Some(window) = mappings.window(0, start as u64, 300_000) {
                            assert!(window[..] == truth[start..][..300_000]);
                            window.finish().unwrap();
                            taken.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert!(taken.load(Ordering::Relaxed) > 100);
        drop(mappings);
        assert_given_back(&path);
    }
}

/// What somebody does to a file, and what becomes of reading.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Attack {
    TruncatePath,
    CutToHalf,
    Overwrite,
    /// With a hole, which keeps the length.
    Punch,
    Grow,
    /// Opened to read, and cut.
    CutByReader,
    Replace,
    Unlink,
}

use Attack::{CutByReader, CutToHalf, Grow, Overwrite, Punch, Replace, TruncatePath, Unlink};

impl Attack {
    const ALL: [Attack; 8] = [
        TruncatePath,
        CutToHalf,
        Overwrite,
        Punch,
        Grow,
        CutByReader,
        Replace,
        Unlink,
    ];

    /// Another file is at the path afterwards, or none; the one that was opened is as it was.
    fn leaves_the_file_alone(self) -> bool {
        matches!(self, Replace | Unlink)
    }

    fn run(self, path: &Path) {
        let writing = || OpenOptions::new().write(true).open(path).unwrap();
        match self {
            TruncatePath => {
                // Named, not opened.
                let path = CString::new(path.as_os_str().as_bytes()).unwrap();
                #[allow(unsafe_code, reason = "std has it for open files only")]
                // SAFETY: a C string that lives meanwhile.
                let result = unsafe { libc::truncate(path.as_ptr(), 0) };
                assert_eq!(result, 0);
            }
            CutToHalf => {
                let file = writing();
                file.set_len(file.metadata().unwrap().len() / 2).unwrap();
            }
            Overwrite => {
                let file = writing();
                let zeros = vec![0; file.metadata().unwrap().len() as usize];
                file.write_all_at(&zeros, 0).unwrap();
            }
            Punch => {
                let file = writing();
                let length = file.metadata().unwrap().len();
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file, how, 0, length).unwrap();
            }
            Grow => {
                let mut options = OpenOptions::new();
                let mut file = options.append(true).open(path).unwrap();
                file.write_all(&[1; 100]).unwrap();
            }
            CutByReader => {
                use rustix::fs::{Mode, OFlags, open};
                open(path, OFlags::RDONLY | OFlags::TRUNC, Mode::empty()).unwrap();
            }
            Replace => {
                let other = path.with_extension("other");
                fs::write(&other, [7; 1000]).unwrap();
                fs::rename(other, path).unwrap();
            }
            Unlink => fs::remove_file(path).unwrap(),
        }
    }
}

/// How long an attack may be held up.
const SOON: Duration = Duration::from_secs(1);

/// An attack on a file that others may write to, if `shared`. The kind of lease differs: only a stricter
/// one keeps readers from cutting.
fn each_attack(run: impl Fn(Attack, &Path, &Checkpoint, &[u8])) {
    let _alone = alone();
    for attack in Attack::ALL {
        for shared in [false, true] {
            if attack == CutByReader && !shared {
                // Only who has the file might do it: `lease_for`.
                continue;
            }
            for (directory, checkpoint) in checkpoint(3 << 20) {
                let path = directory.path().join(NAME);
                let mode = if shared { 0o666 } else { 0o644 };
                fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
                let truth = fs::read(&path).unwrap();
                run(attack, &path, &checkpoint, &truth);
                if attack != Unlink {
                    assert_given_back(&path);
                }
                assert!(!is_mapped(directory.path()));
            }
        }
    }
}

/// After an attack there are no windows, and reading says what happened; or nothing has to the file.
fn assert_noticed(attack: Attack, mappings: &Mappings, checkpoint: &Checkpoint, truth: &[u8]) {
    let mut read = vec![0; truth.len() - 5];
    let result = checkpoint.read_at(0, 5, &mut read);
    if attack.leaves_the_file_alone() {
        result.unwrap();
        assert!(read[..] == truth[5..]);
        let window = mappings.window(0, 5, 1 << 20).unwrap();
        assert!(window[..] == truth[5..][..1 << 20]);
        window.finish().unwrap();
        return;
    }
    assert!(mappings.window(0, 5, 1000).is_none(), "{attack:?}");
    let error = result.unwrap_err();
    let expected = matches!(
        error,
        CheckpointError::Changed { .. } | CheckpointError::CutShort { .. }
    );
    assert!(expected, "{attack:?}: {error:?}");
}

#[test]
fn a_file_that_has_changed_has_no_windows() {
    each_attack(|attack, path, checkpoint, truth| {
        attack.run(path);
        assert_noticed(attack, &checkpoint.map(), checkpoint, truth);
    });
}

#[test]
fn a_file_that_changes_between_windows_has_none_any_more() {
    each_attack(|attack, path, checkpoint, truth| {
        let mappings = checkpoint.map();
        mappings.window(0, 3, 100_000).unwrap().finish().unwrap();
        let start = Instant::now();
        attack.run(path);
        assert!(start.elapsed() < SOON, "{attack:?}");
        assert_noticed(attack, &mappings, checkpoint, truth);
    });
}

#[test]
fn a_window_keeps_its_bytes_while_somebody_wants_to_change_them() {
    each_attack(|attack, path, checkpoint, truth| {
        let mappings = checkpoint.map();
        let window = mappings.window(0, 3, 2 << 20).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let attacking = scope.spawn(|| {
                attack.run(path);
                done.store(true, Ordering::SeqCst);
            });
            // So long that somebody has noticed; on a busy machine the attack itself may be late.
            thread::sleep(Duration::from_millis(60));
            let begun = Instant::now();
            while !attack.leaves_the_file_alone()
                && mappings.window(0, 3, 1000).is_some()
                && begun.elapsed() < SOON
            {
                thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(
                done.load(Ordering::SeqCst),
                attack.leaves_the_file_alone(),
                "{attack:?}"
            );
            assert!(window[..] == truth[3..][..2 << 20]);
            assert_eq!(
                mappings.window(0, 3, 1000).is_some(),
                attack.leaves_the_file_alone()
            );
            window.finish().unwrap();
            let start = Instant::now();
            attacking.join().unwrap();
            assert!(start.elapsed() < SOON, "{attack:?}");
        });
        assert_noticed(attack, &mappings, checkpoint, truth);
    });
}

/// Ends the other threads of a test that fails too.
struct EndOnDrop<'e>(&'e AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn threads_that_take_windows_see_right_bytes_or_an_error() {
    each_attack(|attack, path, checkpoint, truth| {
        let mappings = checkpoint.map();
        let (ended, seen) = (AtomicBool::new(false), AtomicUsize::new(0));
        let all = Barrier::new(4);
        thread::scope(|scope| {
            for thread in 0..3 {
                let (mappings, ended, seen, all) = (&mappings, &ended, &seen, &all);
                scope.spawn(move || {
                    all.wait();
                    for turn in 0.. {
                        if ended.load(Ordering::SeqCst) {
                            break;
                        }
                        let start = (turn * 7919 + thread * 1_000_003) % (truth.len() - 500_000);
                        let Some(window) = mappings.window(0, start as u64, 500_000) else {
                            continue;
                        };
                        let same = window[..] == truth[start..][..500_000];
                        // A window that was taken in time may be finished in time: then it was right.
                        match window.finish() {
                            Ok(()) => assert!(same, "{attack:?}"),
                            Err(CheckpointError::Changed { .. }) => {}
                            Err(error) => panic!("{attack:?}: {error}"),
                        }
                        seen.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            let _end = EndOnDrop(&ended);
            all.wait();
            let start = Instant::now();
            while seen.load(Ordering::SeqCst) < 20 {
                assert!(start.elapsed() < 20 * SOON);
                thread::yield_now();
            }
            let start = Instant::now();
            attack.run(path);
            assert!(start.elapsed() < SOON, "{attack:?}");
            thread::sleep(Duration::from_millis(5));
        });
        assert_noticed(attack, &mappings, checkpoint, truth);
    });
}

#[test]
fn a_file_that_somebody_may_write_to_already_has_no_windows() {
    let _alone = alone();
    for (directory, checkpoint) in checkpoint(1 << 20) {
        let path = directory.path().join(NAME);
        let mut options = OpenOptions::new();
        let writing = options.read(true).write(true).open(&path).unwrap();
        assert!(checkpoint.map().window(0, 0, 1000).is_none());
        // A mapping needs no open descriptor.
        #[allow(
            unsafe_code,
            reason = "a mapping of our own file, which nobody looks at"
        )]
        // SAFETY: as above.
        let mapping = unsafe { memmap2::MmapMut::map_mut(&writing).unwrap() };
        drop(writing);
        assert!(checkpoint.map().window(0, 0, 1000).is_none());
        drop(mapping);
        assert!(checkpoint.map().window(0, 0, 1000).is_some());
    }
}

#[test]
fn one_opened_file_has_one_lease_and_others_share_where_they_may() {
    let _alone = alone();
    for (directory, first) in checkpoint(1 << 20) {
        let path = directory.path().join(NAME);
        let take = |mappings: &Mappings| mappings.window(0, 9, 1000).is_some();
        let (mappings, again) = (first.map(), first.map());
        assert!(take(&mappings));
        assert!(!take(&again));
        // What only this user writes is leased to all who read.
        let second = Checkpoint::open(&path).unwrap();
        let others = second.map();
        assert!(take(&others) && take(&mappings));
        drop(mappings);
        assert!(take(&others));
        assert!(take(&first.map()));
        // Else to one, and whoever opens it gets it.
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        drop(others);
        assert!(!take(&first.map()));
        drop(second);
        let mappings = first.map();
        assert!(take(&mappings));
        let start = Instant::now();
        let second = Checkpoint::open(&path).unwrap();
        assert!(start.elapsed() < SOON);
        assert!(!take(&mappings));
        let mut read = [0; 1000];
        first.read_at(0, 9, &mut read).unwrap();
        second.read_at(0, 9, &mut read).unwrap();
    }
}

#[test]
fn a_file_system_that_nobody_vouches_for_has_no_leases() {
    assert!(!LeasedFile::is_possible(
        &File::open("/proc/self/status").unwrap()
    ));
}

/// In a process of its own, because the limit is a process's.
#[test]
fn what_cannot_be_locked_has_no_windows() {
    let _alone = alone();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = "checkpoint::mapped::linux::tests::what_may_not_be_locked";
    command.args(["--exact", name, "--ignored", "--nocapture"]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "changes limits of its process, for the test above"]
fn what_may_not_be_locked() {
    for (directory, checkpoint) in checkpoint(1 << 20) {
        let path = directory.path().join(NAME);
        assert!(checkpoint.map().window(0, 0, 1000).is_some());
        // Who may lock without limit keeps that otherwise.
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, sets).unwrap();
        let limit = |bytes| Rlimit {
            current: Some(bytes),
            maximum: None,
        };
        let before = rustix::process::getrlimit(Resource::Memlock);
        for bytes in [0, 4096, 1 << 20] {
            let maximum = before.maximum;
            setrlimit(
                Resource::Memlock,
                Rlimit {
                    maximum,
                    ..limit(bytes)
                },
            )
            .unwrap();
            let mappings = checkpoint.map();
            assert!(mappings.window(0, 0, 1000).is_none());
            assert_given_back(&path);
            let mut read = [0; 1000];
            checkpoint.read_at(0, 0, &mut read).unwrap();
        }
        setrlimit(Resource::Memlock, before).unwrap();
    }
}
