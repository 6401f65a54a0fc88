//! Saving that is stopped midway, by the library's own means.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;
use tightfit::Progress;
use tightfit::cancel::CancelToken;
use tightfit::checkpoint::CheckpointError;
use tightfit::save::{SaveError, SaveOptions, save};
use tightfit_tests::golden::GoldenModel;
use tightfit_tests::loading::Planned;
use tightfit_tests::models;
use tightfit_tests::saving::{files, names, save_planned, small_shards};

/// A model of some megabytes in `m`, planned.
fn planned(directory: &Path) -> Planned {
    models::write_decoder(&directory.join("m"), 4, 256);
    Planned::new(&directory.join("m"), &["sim:1GiB"], &[])
}

#[track_caller]
fn has_only_the_model(directory: &Path) {
    assert_eq!(names(directory), ["m".to_owned()].into());
}

#[test]
fn a_save_that_is_cancelled_at_any_moment_leaves_nothing() {
    let directory = TempDir::new().unwrap();
    let planned = planned(directory.path());
    let target = directory.path().join("new/out");
    for percent in [0, 1, 20, 50, 80, 99, 100] {
        let cancel = CancelToken::new();
        let report = |progress: Progress| {
            if progress.bytes_done * 100 >= progress.bytes_total * percent {
                cancel.cancel();
            }
        };
        let options = small_shards()
            .with_cancel(cancel.clone())
            .with_progress(&report);
        let result = save_planned(&planned, &target, &options);
        assert!(
            matches!(result, Err(SaveError::Cancelled)),
            "{percent} %: {result:?}"
        );
        has_only_the_model(directory.path());
    }
}

#[test]
fn a_source_that_is_cut_short_meanwhile_is_an_error_and_leaves_nothing() {
    let directory = TempDir::new().unwrap();
    let planned = planned(directory.path());
    let weights = directory.path().join("m/model.safetensors");
    let length = fs::metadata(&weights).unwrap().len();
    let file = fs::File::options().write(true).open(&weights).unwrap();
    // After a first piece.
    let cut = |_| file.set_len(length / 4).unwrap();
    let options = SaveOptions::default().with_progress(&cut);
    let target = directory.path().join("out");
    let error = save_planned(&planned, &target, &options).unwrap_err();
    // What is still there has changed, what is not is cut short: it depends on what is read next.
    let SaveError::Checkpoint(error) = error else {
        panic!("{error:?}");
    };
    assert!(
        matches!(
            &error,
            CheckpointError::CutShort { .. } | CheckpointError::Changed { .. }
        ),
        "{error:?}"
    );
    has_only_the_model(directory.path());
}

#[test]
fn what_appears_at_the_target_meanwhile_is_not_replaced() {
    let directory = TempDir::new().unwrap();
    let planned = planned(directory.path());
    let target = directory.path().join("out");
    let report = |_: Progress| {
        fs::create_dir_all(&target).unwrap();
        fs::write(target.join("mine"), "text").unwrap();
    };
    let options = SaveOptions::default().with_progress(&report);
    let error = save_planned(&planned, &target, &options).unwrap_err();
    assert!(matches!(&error, SaveError::Exists { .. }), "{error:?}");
    assert_eq!(names(&target), ["mine".to_owned()].into());
    let both = ["m", "out"].map(str::to_owned);
    assert_eq!(names(directory.path()), both.into());
}

#[test]
fn progress_never_goes_back_and_ends_at_the_whole() {
    let golden = GoldenModel::unpack("qwen3_moe");
    for source in ["bf16", "nf4_dq"] {
        let planned = Planned::new(&golden.path(source), &["sim:1GiB"], &[]);
        let (last, whole) = (AtomicU64::new(0), AtomicU64::new(0));
        let report = |progress: Progress| {
            let before = last.swap(progress.bytes_done, Ordering::Relaxed);
            assert!(before <= progress.bytes_done, "{source}");
            whole.store(progress.bytes_total, Ordering::Relaxed);
        };
        let options = small_shards().with_threads(1).with_progress(&report);
        save_planned(&planned, &golden.path("out").join(source), &options).unwrap();
        assert_eq!(last.into_inner(), whole.into_inner(), "{source}");
    }
}

#[test]
fn threads_and_staging_do_not_change_a_byte() {
    let golden = GoldenModel::unpack("qwen3_5_moe");
    let planned = Planned::new(
        &golden.path("bf16"),
        &["sim:1GiB"],
        &[("double-quant", "true")],
    );
    let mut first = None;
    for (threads, staging_bytes) in [(1, 64 << 10), (2, 1 << 20), (5, 64 << 20)] {
        let options = small_shards()
            .with_threads(threads)
            .with_staging_bytes(staging_bytes);
        let target = golden.path("out").join(threads.to_string());
        save_planned(&planned, &target, &options).unwrap();
        let written = files(&target);
        assert!(
            *first.get_or_insert_with(|| written.clone()) == written,
            "{threads} threads"
        );
    }
}

#[test]
fn placements_of_another_checkpoint_are_refused() {
    let directory = TempDir::new().unwrap();
    let planned = planned(directory.path());
    let target = directory.path().join("out");
    let result = save(&planned.checkpoint, &[], &target, &SaveOptions::default());
    assert!(matches!(result, Err(SaveError::OtherPlan)), "{result:?}");
    has_only_the_model(directory.path());
}
