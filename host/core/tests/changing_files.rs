//! Files that are cut, overwritten or replaced while they are loaded: what is loaded is right, or there is an
//! error, and whoever does it is not held up. Weights may be looked at in the page cache meanwhile, where
//! a file cut short would be a signal.
#![cfg(target_os = "linux")]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use tightfit::checkpoint::{Checkpoint, CheckpointError};
use tightfit::device::{Device, HostDevice};
use tightfit::load::{LoadError, LoadOptions, load};
use tightfit::model::Model;
use tightfit::plan::{PartKind, Plan};
use tightfit::types::{BlockSize, Format, Placement};

/// A matrix that is quantized and one that is not, 6 MiB of bf16 each.
fn write(path: &Path) {
    const EACH: usize = 6 << 20;
    let tensor = |start: usize| {
        let end = start + EACH;
        format!(r#"{{"dtype":"BF16","shape":[2048,1536],"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!(r#"{{"a":{},"b":{}}}"#, tensor(0), tensor(EACH));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    let mut state = 1_u32;
    for _ in 0..EACH {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Of magnitudes from 2^-7 to 2.
        let bits = (state >> 31 << 15) | (0x3C00 + ((state >> 16) & 0x03FF));
        file.extend((bits as u16).to_le_bytes());
    }
    fs::write(path, file).unwrap();
}

fn load_all(path: &Path, opened: impl FnOnce()) -> Result<Model, LoadError> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::sim(0, 1 << 30))];
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    let nf4 = Format::Nf4 {
        block_size: BlockSize::DEFAULT,
        double_quantized: false,
    };
    let placements = [nf4, Format::Stored].map(|format| Placement {
        device: Some(0),
        format,
    });
    let plan = Plan::new(checkpoint.tensors(), &[], &infos, &placements, &[0]).unwrap();
    opened();
    let options = LoadOptions::default().with_threads(2);
    let result = load(&checkpoint, &plan, &devices, &options);
    if result.is_err() {
        assert_eq!(devices[0].usage().reserved.now, 0);
    }
    result
}

/// All that is loaded.
fn bytes(model: &Model) -> Vec<Vec<u8>> {
    let kinds = [PartKind::Codes, PartKind::Absmax, PartKind::Data];
    let parts = model
        .tensors()
        .flat_map(|tensor| kinds.map(|kind| tensor.part(kind)));
    parts.flatten().map(<[u8]>::to_vec).collect()
}

/// What is done to a file, and how.
type Attack = (&'static str, fn(&Path));

#[test]
fn a_file_that_changes_under_a_load_is_an_error_and_not_a_signal() {
    let attacks: [Attack; 5] = [
        ("cut", |path| {
            let file = OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(6 << 20).unwrap();
        }),
        ("emptied", |path| fs::write(path, []).unwrap()),
        ("overwritten", |path| {
            let file = OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&vec![0; 12 << 20], 1000).unwrap();
        }),
        ("appended to", |path| {
            let mut file = OpenOptions::new().append(true).open(path).unwrap();
            file.write_all(&[0; 10]).unwrap();
        }),
        ("replaced", |path| {
            let other = path.with_extension("other");
            fs::write(&other, [7; 1000]).unwrap();
            fs::rename(other, path).unwrap();
        }),
    ];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    write(&path);
    let start = Instant::now();
    let truth = bytes(&load_all(&path, || {}).unwrap());
    let takes = start.elapsed();
    let mut errors = 0;
    for (what, attack) in attacks {
        for turn in 0..12 {
            write(&path);
            // Later than the clock of the file system can mistake for the same time.
            thread::sleep(Duration::from_millis(20));
            thread::scope(|scope| {
                let attacked = || {
                    let path = &path;
                    scope.spawn(move || {
                        thread::sleep(takes * turn / 12);
                        let start = Instant::now();
                        attack(path);
                        assert!(start.elapsed() < Duration::from_secs(2), "{what}");
                    });
                };
                match load_all(&path, attacked) {
                    Ok(model) => assert!(bytes(&model) == truth, "{what}"),
                    Err(LoadError::Checkpoint(
                        CheckpointError::CutShort { .. } | CheckpointError::Changed { .. },
                    )) if what != "replaced" => errors += 1,
                    Err(error) => panic!("{what}: {error}"),
                }
            });
        }
    }
    assert!(errors > 0, "no load was met");
}
