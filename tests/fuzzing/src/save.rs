//! Directories that are saved: what lies beside the weights, and links in place of any file.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;
use tightfit::checkpoint::Checkpoint;
use tightfit::save::{MAX_COMPANION_BYTES, SaveOptions, Saved, save};
use tightfit::types::{DType, Format, Placement};

use crate::checkpoint::assert_printable;

/// What every file outside of the checkpoint holds, and none in it.
const SECRET: &[u8] = b"of somebody else";
/// Directories between the temporary one and everything else: more than a link goes up.
const DEPTH: &str = "1/2/3/4/5/6";
/// Most parts of a link's target.
const PARTS: u8 = 6;
/// Most things that are made.
const STEPS: usize = 24;

/// Names in the checkpoint's directory.
const NAMES: [&str; 14] = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "vocab.txt",
    "spiece.model",
    "chat_template.jinja",
    "qwen.tiktoken",
    "codes.bpe",
    ".hidden.json",
    "line\nbreak.txt",
    "weights.bin",
    "part",
    ".git",
];
/// What a link's target is made of, beside the names.
const STEPS_OF_LINKS: [&str; 8] = [
    "..",
    ".",
    "m",
    "private",
    "blobs",
    "snapshots",
    "models--o--n",
    "models--o--other",
];
const SIZES: [u64; 6] = [0, 2, 6, 8, 1 << 62, 1 << 63];

/// The input, read from the front; zeros at its end.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn next(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    fn of<'l>(&mut self, list: &[&'l str]) -> &'l str {
        list[usize::from(self.next()) % list.len()]
    }

    /// A name from the list or, rarely, any.
    fn name(&mut self) -> Vec<u8> {
        let choice = self.next();
        if choice < 250 {
            return NAMES[usize::from(choice) % NAMES.len()].into();
        }
        let length = self.next() % 12 + 1;
        let mut name: Vec<u8> = (0..length).map(|_| self.next()).collect();
        name.retain(|byte| !matches!(byte, 0 | b'/'));
        name.extend(b".txt");
        name
    }
}

/// Where everything lies.
struct World {
    _temporary: TempDir,
    root: PathBuf,
    /// The checkpoint's directory.
    directory: PathBuf,
}

impl World {
    fn new(is_snapshot: bool) -> World {
        let temporary = tempfile::tempdir().expect("there is room for files");
        let root = temporary.path().join(DEPTH);
        let directory = root.join(match is_snapshot {
            true => "models--o--n/snapshots/m",
            false => "m",
        });
        for path in [
            directory.clone(),
            root.join("private"),
            root.join("models--o--n/blobs"),
            root.join("models--o--other/blobs"),
        ] {
            fs::create_dir_all(path).expect("directories can be made");
        }
        for place in ["", "private", "models--o--other", "models--o--other/blobs"] {
            for name in &NAMES[..6] {
                fs::write(root.join(place).join(name), SECRET).expect("files can be written");
            }
        }
        World {
            _temporary: temporary,
            root,
            directory,
        }
    }

    /// Makes what the next choices say, in place of what was there.
    fn make(&self, choices: &mut Choices<'_>) {
        let kind = choices.next();
        let name = choices.name();
        // Blobs of the snapshot; of a plain directory they are nobody's.
        let place = match choices.next() % 4 {
            0 => self.root.join("models--o--n/blobs"),
            1 => self.directory.join("part"),
            _ => self.directory.clone(),
        };
        let path = place.join(OsStr::from_bytes(&name));
        if !place.is_dir() || place.is_symlink() {
            return;
        }
        remove(&path);
        match kind % 8 {
            0 => fs::create_dir(&path).expect("directories can be made"),
            1 => mknodat(CWD, &path, FileType::Fifo, Mode::from(0o600), 0)
                .expect("pipes can be made"),
            2 => {
                let file = File::create(&path).expect("files can be made");
                let more = u64::from(choices.next()) << 32;
                file.set_len(MAX_COMPANION_BYTES + 1 + more)
                    .expect("files can be sparse");
            }
            3..=5 => {
                let mut target = PathBuf::new();
                if choices.next().is_multiple_of(4) {
                    target.push(&self.root);
                }
                for _ in 0..choices.next() % PARTS {
                    match choices.next() % 3 {
                        0 => target.push(OsStr::from_bytes(&choices.name())),
                        _ => target.push(choices.of(&STEPS_OF_LINKS)),
                    }
                }
                if !target.as_os_str().is_empty() {
                    symlink(target, &path).expect("links can be made");
                }
            }
            _ => {
                let text = vec![b'{'; usize::from(choices.next())];
                fs::write(&path, text).expect("files can be written");
                let mode = u32::from(choices.next()) << 4 | 0o400;
                fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777))
                    .expect("modes can be set");
            }
        }
    }
}

fn remove(path: &Path) {
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        // Not a full one: there is nothing new in it.
        let _ = fs::remove_dir_all(path);
    } else {
        let _ = fs::remove_file(path);
    }
}

/// Everything below a directory: what it is, its mode, and its bytes if it is small.
fn everything(path: &Path) -> BTreeMap<PathBuf, (u32, u64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut directories = vec![path.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("it is a directory") {
            let path = entry.expect("it can be listed").path();
            let metadata = fs::symlink_metadata(&path).expect("it is there");
            let bytes = match metadata.is_file() && metadata.len() < 1 << 16 {
                true => fs::read(&path).expect("it can be read"),
                false => Vec::new(),
            };
            if metadata.is_dir() {
                directories.push(path.clone());
            }
            found.insert(path, (metadata.mode(), metadata.len(), bytes));
        }
    }
    found
}

/// A weight, and a stack of experts of this shape.
fn weights(shape: [u64; 3]) -> Vec<u8> {
    let length = match DType::Bf16.tensor_bytes(&shape) {
        Some(bytes) if bytes < 4096 => bytes,
        _ => return weights([2, 6, 8]),
    };
    let header = format!(
        r#"{{"a.weight":{{"dtype":"BF16","shape":[8,8],"data_offsets":[0,128]}},"mlp.experts.gate_up_proj":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[128,{}]}}}}"#,
        128 + length
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..128 + length).map(|_| 0));
    bytes
}

/// Saves a directory. The first four bytes say whether it is a snapshot of the Hugging Face cache,
/// and the shape of a stack of experts; then follow files, directories, pipes and links, each with
/// its name and what it is.
pub fn save_directory(data: &[u8]) -> bool {
    let mut choices = Choices(data);
    let world = World::new(choices.next() % 2 == 1);
    let shape = [0; 3].map(|_| SIZES[usize::from(choices.next()) % SIZES.len()]);
    let directory = &world.directory;
    fs::write(directory.join("model.safetensors"), weights(shape)).expect("files can be written");
    fs::write(directory.join("config.json"), r#"{"hidden_size":8}"#).expect("files can be written");
    for _ in 0..STEPS {
        if choices.0.is_empty() {
            break;
        }
        world.make(&mut choices);
    }

    let before = everything(&world.root);
    let target = world.root.join("out");
    let result = open_and_save(directory, &target);
    let after = everything(&world.root);
    match result {
        Ok(saved) => {
            assert_saved(directory, &target, &saved, &after);
            let rest = after
                .into_iter()
                .filter(|(path, _)| !path.starts_with(&target));
            assert!(
                rest.eq(before),
                "something else than the target has changed"
            );
            true
        }
        Err(error) => {
            assert_printable(&error);
            assert!(after == before, "something was left after: {error}");
            false
        }
    }
}

fn open_and_save(directory: &Path, target: &Path) -> Result<Saved, String> {
    let checkpoint = Checkpoint::open(directory).map_err(|error| error.to_string())?;
    let placement = |dtype: DType| Placement {
        device: Some(0),
        format: match dtype.is_quantizable() {
            true => Format::NF4_DOUBLE,
            false => Format::Stored,
        },
    };
    let tensors = checkpoint.tensors().iter();
    let placements: Vec<Placement> = tensors.map(|tensor| placement(tensor.dtype)).collect();
    let options = SaveOptions::default().with_threads(1);
    save(&checkpoint, &placements, target, &options).map_err(|error| error.to_string())
}

fn assert_saved(
    directory: &Path,
    target: &Path,
    saved: &Saved,
    after: &BTreeMap<PathBuf, (u32, u64, Vec<u8>)>,
) {
    let regular = FileType::RegularFile.as_raw_mode();
    let mut written = BTreeSet::new();
    for (path, (mode, length, bytes)) in after {
        let Ok(name) = path.strip_prefix(target) else {
            continue;
        };
        let is_folder = FileType::from_raw_mode(*mode) == FileType::Directory;
        if name.as_os_str().is_empty() || is_folder {
            continue;
        }
        assert_eq!(mode & !0o644, regular, "{path:?} has mode {mode:o}");
        assert!(*length <= MAX_COMPANION_BYTES, "{path:?}");
        let is_secret = bytes.windows(SECRET.len()).any(|window| window == SECRET);
        assert!(!is_secret, "{path:?} was not in the checkpoint");
        written.insert(name.to_str().expect("it is Unicode").to_owned());
    }
    // What can be opened again is complete.
    let again = Checkpoint::open(target).unwrap_or_else(|error| panic!("{error}"));
    assert!(again.find("a.weight").is_some());

    // Every file beside the weights is copied, or said to be left out.
    let extensions = ["json", "txt", "model", "jinja", "tiktoken", "bpe"];
    let mut told: BTreeSet<String> = saved
        .left_out
        .iter()
        .map(|left| left.file.clone())
        .collect();
    assert!(told.is_disjoint(&written));
    for left in &saved.left_out {
        assert_printable(&left.to_string());
    }
    told.extend(written);
    for entry in fs::read_dir(directory).expect("it is a directory") {
        let name = entry.expect("it can be listed").file_name();
        let name = name.to_string_lossy();
        let belongs = extensions.iter().any(|end| {
            name.strip_suffix(end)
                .is_some_and(|stem| stem.ends_with('.'))
        });
        let is_written = ["config.json", "model.safetensors.index.json"].contains(&&*name);
        if belongs && !is_written && !name.starts_with('.') && !name.ends_with(".index.json") {
            assert!(told.contains(&*name), "{name:?} was dropped without a word");
        }
    }
}
