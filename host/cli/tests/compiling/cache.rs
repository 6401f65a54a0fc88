use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use tightfit::policy::Policy;
use tightfit_tests::command::Scratchpad;
use tightfit_tests::guests::{HOSTILE, Handwritten};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::{Cache, CacheError, SandboxOptions};
use tightfit_wasm::sandbox::{GuestFailure, Limits};

use super::{alone, open, program, works};

fn cache(path: &Path) -> Arc<Cache> {
    Arc::new(Cache::open(path, Cache::MOST_BYTES).unwrap())
}

/// Compiles here and keeps it.
fn keeping(cache: &Arc<Cache>) -> SandboxOptions {
    SandboxOptions::default().with_cache(Some(Arc::clone(cache)))
}

/// Cannot compile: what opens with this came out of the cache.
fn kept_only(cache: &Arc<Cache>) -> SandboxOptions {
    keeping(cache).with_compiler(program("/nowhere/compiler", &[]))
}

#[track_caller]
fn is_not_kept(cache: &Arc<Cache>) {
    let failure = open(HOSTILE, kept_only(cache)).unwrap_err();
    assert!(matches!(failure, GuestFailure::Host { .. }), "{failure:?}");
}

/// The entries, without the key.
fn entries(path: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(path).unwrap().map(|file| file.unwrap().path());
    let mut entries: Vec<_> = files.filter(|path| !path.ends_with("key")).collect();
    entries.sort();
    entries
}

/// A cache with the hostile policy in it, and the path of its entry.
fn filled(directory: &TempDir) -> (Arc<Cache>, PathBuf) {
    let path = directory.path().join("deep/compiled");
    let cache = cache(&path);
    works(keeping(&cache));
    let entries = entries(&path);
    assert_eq!(entries.len(), 1, "{entries:?}");
    (cache, entries[0].clone())
}

#[test]
fn what_was_compiled_once_is_not_compiled_again() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (first, entry) = filled(&directory);
    works(kept_only(&first));
    // Nor by another process.
    works(kept_only(&cache(entry.parent().unwrap())));
    // Only this user can look into it.
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(entry.parent().unwrap()), 0o700);
    assert_eq!(mode(&entry), 0o600);
    assert_eq!(mode(&entry.with_file_name("key")), 0o600);
}

#[test]
fn another_policy_or_another_setup_is_another_entry() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (cache, entry) = filled(&directory);
    let other = Handwritten::default().module();
    let failure = open(&other, kept_only(&cache)).unwrap_err();
    assert!(matches!(failure, GuestFailure::Host { .. }), "{failure:?}");
    open(&other, keeping(&cache)).unwrap();
    assert_eq!(entries(entry.parent().unwrap()).len(), 2);
    open(&other, kept_only(&cache)).unwrap();
}

#[test]
fn limits_hold_for_what_is_kept() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (cache, _) = filled(&directory);
    let limits = Limits::default().with_function(16);
    let options = kept_only(&cache).with_limits(limits);
    let failure = open(HOSTILE, options).unwrap_err();
    assert!(
        matches!(failure, GuestFailure::TooLarge { limit: 16, .. }),
        "{failure:?}"
    );
}

#[test]
fn an_entry_that_was_changed_is_not_used() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (cache, entry) = filled(&directory);
    let whole = fs::read(&entry).unwrap();
    let step = whole.len() / 60;
    for at in (0..whole.len())
        .step_by(step)
        .chain([0, 31, 32, whole.len() - 1])
    {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        fs::write(&entry, changed).unwrap();
        is_not_kept(&cache);
    }
    for length in (0..whole.len())
        .step_by(step)
        .chain([0, 1, 31, 32, whole.len() - 1])
    {
        fs::write(&entry, &whole[..length]).unwrap();
        is_not_kept(&cache);
    }
    fs::write(&entry, [&whole[..], b"more"].concat()).unwrap();
    is_not_kept(&cache);
    // It is made anew, and good from then on.
    works(keeping(&cache));
    works(kept_only(&cache));
    assert_eq!(fs::read(&entry).unwrap(), whole);
}

#[test]
fn an_entry_of_another_policy_or_another_user_is_not_used() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (mine, entry) = filled(&directory);
    // Whole and sealed, but for another policy.
    open(&Handwritten::default().module(), keeping(&mine)).unwrap();
    let others = entries(entry.parent().unwrap());
    let other = others.iter().find(|path| **path != entry).unwrap();
    let original = fs::read(&entry).unwrap();
    fs::copy(other, &entry).unwrap();
    is_not_kept(&mine);
    // Whole, but sealed with another key.
    let elsewhere = TempDir::new().unwrap();
    let (_, foreign) = filled(&elsewhere);
    assert_eq!(foreign.file_name(), entry.file_name());
    fs::copy(foreign, &entry).unwrap();
    is_not_kept(&mine);
    // What others may have written to, what is elsewhere, and what is no file.
    fs::write(&entry, &original).unwrap();
    works(kept_only(&mine));
    for mode in [0o620, 0o602, 0o640, 0o604] {
        fs::set_permissions(&entry, Permissions::from_mode(mode)).unwrap();
        is_not_kept(&mine);
    }
    fs::remove_file(&entry).unwrap();
    let aside = directory.path().join("aside");
    fs::write(&aside, &original).unwrap();
    fs::set_permissions(&aside, Permissions::from_mode(0o600)).unwrap();
    symlink(&aside, &entry).unwrap();
    is_not_kept(&mine);
    fs::remove_file(&entry).unwrap();
    fs::create_dir(&entry).unwrap();
    is_not_kept(&mine);
    // Nothing of this keeps policies from working.
    works(keeping(&mine));
}

#[test]
fn a_directory_that_is_not_this_users_alone_is_not_used() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("compiled");
    let problem = || match Cache::open(&path, Cache::MOST_BYTES) {
        Err(CacheError::NotPrivate { problem, .. }) => problem,
        other => panic!("{other:?}"),
    };
    fs::create_dir(&path).unwrap();
    for mode in [0o755, 0o770, 0o701, 0o777] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        assert!(problem().contains("others have access"), "{}", problem());
    }
    fs::remove_dir(&path).unwrap();
    let aside = directory.path().join("aside");
    fs::create_dir(&aside).unwrap();
    fs::set_permissions(&aside, Permissions::from_mode(0o700)).unwrap();
    symlink(&aside, &path).unwrap();
    assert!(problem().contains("symbolic link"), "{}", problem());
    fs::remove_file(&path).unwrap();
    fs::write(&path, "").unwrap();
    assert!(Cache::open(&path, Cache::MOST_BYTES).is_err());
}

#[test]
fn a_key_that_others_can_read_is_not_used_and_one_that_is_cut_short_is_replaced() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (_, entry) = filled(&directory);
    let path = entry.parent().unwrap();
    let key = entry.with_file_name("key");
    fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    let error = Cache::open(path, Cache::MOST_BYTES).unwrap_err();
    assert!(matches!(error, CacheError::NotPrivate { .. }), "{error}");
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    works(kept_only(&cache(path)));
    fs::write(&key, [1; 16]).unwrap();
    let replaced = cache(path);
    assert_eq!(fs::read(&key).unwrap().len(), 32);
    is_not_kept(&replaced);
    works(keeping(&replaced));
    works(kept_only(&replaced));
}

#[test]
fn what_was_not_used_for_longest_makes_room() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (_, entry) = filled(&directory);
    let path = entry.parent().unwrap();
    // Room for the hostile policy and for little more.
    let bytes = fs::metadata(&entry).unwrap().len();
    let small = Arc::new(Cache::open(path, bytes + 1).unwrap());
    works(kept_only(&small));
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    let file = fs::File::options().write(true).open(&entry).unwrap();
    file.set_modified(long_ago).unwrap();
    open(&Handwritten::default().module(), keeping(&small)).unwrap();
    let left = entries(path);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_ne!(left[0], entry);
    is_not_kept(&small);
    // The key has stayed.
    open(&Handwritten::default().module(), kept_only(&small)).unwrap();
}

#[test]
fn use_keeps_an_entry_young() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (cache, entry) = filled(&directory);
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let file = fs::File::options().write(true).open(&entry).unwrap();
    file.set_modified(long_ago).unwrap();
    works(kept_only(&cache));
    assert!(fs::metadata(&entry).unwrap().modified().unwrap() > long_ago);
}

#[test]
fn threads_and_processes_share_it() {
    let _alone = alone();
    let mut scratchpad = Scratchpad::new();
    let cached = scratchpad.path("xdg");
    scratchpad.set("XDG_CACHE_HOME", cached.to_str().unwrap());
    fs::write(scratchpad.path("hostile.wasm"), HOSTILE).unwrap();
    thread::scope(|scope| {
        let show = |_| {
            scope.spawn(|| {
                scratchpad
                    .run(&["policy", "show", "hostile.wasm"])
                    .succeeds()
            })
        };
        let shown: Vec<_> = (0..6).map(show).collect();
        for shown in shown {
            assert!(shown.join().unwrap().stdout.starts_with("hostile 1.0.0"));
        }
    });
    let path = cached.join("tightfit/compiled");
    assert_eq!(entries(&path).len(), 1, "{:?}", entries(&path));
    let cache = cache(&path);
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let policy = WasmPolicy::new("test.wasm", HOSTILE, kept_only(&cache)).unwrap();
                assert_eq!(policy.describe().unwrap().name, "hostile");
            });
        }
    });
    // Built-in policies are kept too; nothing is with --no-cache.
    scratchpad.run(&["policy", "show", "auto"]).succeeds();
    assert_eq!(entries(&path).len(), 2);
    fs::remove_dir_all(&cached).unwrap();
    scratchpad
        .run(&["policy", "show", "auto", "--no-cache"])
        .succeeds();
    assert!(!cached.exists());
}

#[test]
fn the_command_works_without_a_cache_and_says_when_it_is_unsafe() {
    let _alone = alone();
    let mut scratchpad = Scratchpad::new();
    let cached = scratchpad.path("xdg");
    scratchpad.set("XDG_CACHE_HOME", cached.to_str().unwrap());
    let compiled = cached.join("tightfit/compiled");
    fs::create_dir_all(&compiled).unwrap();
    fs::set_permissions(&compiled, Permissions::from_mode(0o777)).unwrap();
    let outcome = scratchpad.run(&["policy", "show", "auto"]);
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("others have access"), "{outcome:?}");
    assert!(entries(&compiled).is_empty());
    // A place that cannot be written to is nobody's fault.
    scratchpad.set("XDG_CACHE_HOME", "/proc/nowhere");
    scratchpad.run(&["policy", "show", "auto"]).succeeds();
}

/// A policy with this much data, which takes as much when it is compiled.
fn with_data(bytes: usize) -> Vec<u8> {
    let data: String = (0..bytes)
        .map(|at| char::from(b'a' + (at % 23) as u8))
        .collect();
    let policy = Handwritten {
        extra: format!(r#"(data (i32.const 4096) "{data}")"#),
        ..Handwritten::default()
    };
    policy.module()
}

#[test]
fn what_is_large_does_not_drive_out_the_others() {
    let _alone = alone();
    let directory = TempDir::new().unwrap();
    let (_, entry) = filled(&directory);
    let path = entry.parent().unwrap();
    let bytes = fs::metadata(&entry).unwrap().len();
    // Room for the hostile policy and three small ones; then a large one comes, and one that is
    // larger than all that there is room for.
    let room = Arc::new(Cache::open(path, 5 * bytes).unwrap());
    let small: Vec<_> = (1..4).map(|size| with_data(size * 16)).collect();
    for policy in &small {
        open(policy, keeping(&room)).unwrap();
    }
    let before = entries(path);
    assert_eq!(before.len(), 4);
    for large in [5 * bytes - 100_000, 6 * bytes] {
        let large = with_pages(large);
        open(&large, keeping(&room)).unwrap();
        assert_eq!(entries(path), before);
        let failure = open(&large, kept_only(&room)).unwrap_err();
        assert!(matches!(failure, GuestFailure::Host { .. }), "{failure:?}");
    }
    // What is not so large takes the place of what was not used for longest.
    works(kept_only(&room));
}

/// The same for more data than the memory of other policies has room for.
fn with_pages(bytes: u64) -> Vec<u8> {
    let data = "abcdefghijklmnop".repeat(bytes as usize / 16);
    let policy = Handwritten {
        extra: format!(r#"(data $kept "{data}") (func (data.drop $kept))"#),
        ..Handwritten::default()
    };
    policy.module()
}

#[test]
fn a_key_that_is_damaged_is_replaced_and_told_of_once() {
    let _alone = alone();
    let mut scratchpad = Scratchpad::new();
    let cached = scratchpad.path("xdg");
    scratchpad.set("XDG_CACHE_HOME", cached.to_str().unwrap());
    let key = cached.join("tightfit/compiled/key");
    let show = || scratchpad.run(&["policy", "show", "auto"]);
    show().succeeds();
    for damaged in [&b""[..], &[1; 16], &[1; 33], &[1; 100_000]] {
        fs::write(&key, damaged).unwrap();
        let outcome = show();
        assert_eq!(outcome.status, Some(0), "{outcome:?}");
        assert!(outcome.stderr.contains("key"), "{outcome:?}");
        assert_eq!(fs::read(&key).unwrap().len(), 32);
        // What the old one had sealed is made anew, with a word or without.
        show();
        show().succeeds();
    }
    // Another key of the right length is not to be told from the right one, but what it sealed is.
    fs::write(&key, [7; 32]).unwrap();
    let outcome = show();
    assert!(outcome.stderr.contains("not from here"), "{outcome:?}");
    show().succeeds();
    // What is not to be replaced is told with what to do about it.
    fs::remove_file(&key).unwrap();
    fs::create_dir(&key).unwrap();
    let outcome = show();
    assert_eq!(outcome.status, Some(0), "{outcome:?}");
    for words in ["no regular file", "'key'", "removed"] {
        assert!(outcome.stderr.contains(words), "{outcome:?}");
    }
}
