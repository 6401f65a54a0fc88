//! What a program has chosen: a list of files, and some of a checkpoint's tensors.

use super::*;

const INDEX: &str = r#"{"weight_map":{"a":"s2.safetensors","b":"s1.safetensors"}}"#;

fn open(files: &[PathBuf]) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::open_files(files, &OpenOptions::default())
}

#[test]
fn a_list_of_files_is_a_checkpoint_whatever_lies_beside_them() {
    let dir = dir();
    let first = write(&dir, "b.safetensors", &vectors(&[("x", 1)]));
    let second = write(&dir, "a.safetensors", &vectors(&[("y", 1)]));
    write(&dir, "model.safetensors", &vectors(&[("z", 1)]));
    write(&dir, "config.json", br#"{"architectures":["A"]}"#);
    let checkpoint = open(&[first.clone(), second]).unwrap();
    assert_eq!(names(&checkpoint), ["x", "y"]);
    assert_eq!(checkpoint.path(), dir.path());
    let config = checkpoint.config().unwrap();
    assert_eq!(config.architecture.as_deref(), Some("A"));
    assert_eq!(open(std::slice::from_ref(&first)).unwrap().path(), first);
}

#[test]
fn an_index_of_just_these_files_says_which_copy_counts() {
    let dir = dir();
    let first = write(&dir, "s1.safetensors", &vectors(&[("a", 1), ("b", 2)]));
    let second = write(&dir, "s2.safetensors", &vectors(&[("a", 3)]));
    let files = [first.clone(), second];
    assert_error!(
        open(&files).unwrap_err(),
        CheckpointError::DuplicateTensor { tensor, .. } if tensor == "a"
    );
    write(&dir, "model.safetensors.index.json", INDEX.as_bytes());
    let checkpoint = open(&files).unwrap();
    assert_eq!(names(&checkpoint), ["b", "a"]);
    assert_eq!(checkpoint.tensors()[1].shape, [3]);
    // Of other files it says nothing.
    assert_eq!(names(&open(&[first]).unwrap()), ["a", "b"]);
}

#[test]
fn what_is_no_list_of_weights_is_an_error() {
    let dir = dir();
    let file = write(&dir, "model.safetensors", &vectors(&[("x", 1)]));
    let other = write(&dir, "config.json", b"{}");
    assert_error!(open(&[]).unwrap_err(), CheckpointError::NoFiles);
    assert_error!(
        open(&[file.clone(), other]).unwrap_err(),
        CheckpointError::NotACheckpoint { .. }
    );
    assert_error!(
        open(&[file.clone(), dir.path().join("gone.safetensors")]).unwrap_err(),
        CheckpointError::NotFound { .. }
    );
    assert_error!(
        open(&[dir.path().to_owned()]).unwrap_err(),
        CheckpointError::NotAFile { .. }
    );
    assert_error!(
        open(&[file.clone(), file.clone()]).unwrap_err(),
        CheckpointError::DuplicateTensor { .. }
    );
    assert_error!(
        open(&vec![file; MAX_SHARDS + 1]).unwrap_err(),
        CheckpointError::TooLarge { .. }
    );
}

#[test]
fn what_is_left_out_is_not_there_and_the_rest_is_as_it_was() {
    let dir = tied(4, None);
    let whole = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(whole.ties().len(), 1);
    let same = whole.filtered(|_| true);
    assert_eq!(same.tensors(), whole.tensors());
    assert_eq!(same.ties(), whole.ties());
    assert_eq!(same.source_bytes(), whole.source_bytes());
    assert_eq!(same.config_json(), whole.config_json());

    let head = whole.find("lm_head.weight").unwrap();
    let table = whole.find("model.embed_tokens.weight").unwrap();
    let without_head = whole.filtered(|index| index != head);
    assert_eq!(names(&without_head), ["model.embed_tokens.weight"]);
    assert_eq!(without_head.find("lm_head.weight"), None);
    assert_eq!(without_head.ties()[0].alias_tensor, None);
    assert_eq!(without_head.ties()[0].tensor, 0);
    assert_eq!(without_head.source_bytes(), whole.source_bytes() / 2);
    let (mut a, mut b) = ([0; 2048], [0; 2048]);
    without_head.read_tensor(0, 0, &mut a).unwrap();
    whole.read_tensor(table, 0, &mut b).unwrap();
    assert_eq!(a, b);

    let without_table = whole.filtered(|index| index != table);
    assert_eq!(names(&without_table), ["lm_head.weight"]);
    assert_eq!(without_table.ties(), []);
    assert_eq!(whole.filtered(|_| false).tensors(), []);
}
