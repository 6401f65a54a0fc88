//! Attacks by links: a checkpoint that names files of whoever opens it as its own.

use std::os::unix::fs::symlink;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;

const CONFIG: &[u8] = br#"{"model_type":"mine"}"#;

/// A directory `m` with a checkpoint, and `private` beside it with files of the user's.
struct Attack {
    dir: TempDir,
}

impl Attack {
    fn new() -> Attack {
        let dir = dir();
        for name in ["m", "private"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        write(&dir, "m/model.safetensors", &vectors(&[("a", 1)]));
        write(&dir, "m/config.json", CONFIG);
        write(&dir, "private/config.json", br#"{"secret":1}"#);
        write(
            &dir,
            "private/model.safetensors",
            &vectors(&[("secret", 1)]),
        );
        Attack { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes `name` a link, whatever it was.
    fn link(&self, name: &str, target: impl AsRef<Path>) {
        let path = self.path(name);
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    fn open(&self) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open(self.path("m"))
    }

    #[track_caller]
    fn leads_out(&self, name: &str) {
        match self.open() {
            Err(CheckpointError::LeadsOut { path, .. }) => {
                assert_eq!(path, self.path("m").join(name));
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

fn fifo(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::from(0o600), 0).unwrap();
}

#[test]
fn links_inside_of_the_checkpoint_are_followed() {
    let attack = Attack::new();
    fs::rename(attack.path("m/config.json"), attack.path("m/real.json")).unwrap();
    fs::create_dir(attack.path("m/sub")).unwrap();
    fs::write(attack.path("m/sub/deep.json"), CONFIG).unwrap();
    attack.link("m/sub/up.json", "../real.json");
    for target in [
        "real.json",
        "./real.json",
        "../m/real.json",
        "../private/../m/real.json",
        "sub/deep.json",
        "sub/up.json",
    ] {
        attack.link("m/config.json", target);
        let checkpoint = attack.open().unwrap_or_else(|e| panic!("{target}: {e}"));
        assert!(checkpoint.config().is_some(), "{target}");
    }
    attack.link("m/config.json", attack.path("m/real.json"));
    assert!(attack.open().unwrap().config().is_some());
    // Out and back in: it is the end that counts.
    attack.link("private/back", attack.path("m/real.json"));
    attack.link("m/config.json", "../private/back");
    assert!(attack.open().unwrap().config().is_some());
}

#[test]
fn a_directory_may_be_reached_through_links() {
    let attack = Attack::new();
    attack.link("m/config.json", "real.json");
    fs::write(attack.path("m/real.json"), CONFIG).unwrap();
    attack.link("here", "m");
    attack.link("there", "here");
    for path in [
        "here",
        "there",
        "there/.",
        "private/../there",
        "there/model.safetensors",
    ] {
        let checkpoint = Checkpoint::open(attack.path(path)).unwrap();
        assert_eq!(names(&checkpoint), ["a"]);
        assert!(checkpoint.config().is_some(), "{path}");
    }
}

#[test]
fn links_out_of_the_checkpoint_are_refused() {
    for target in [
        "../private/config.json",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "/dev/fd/0",
        "../private",
        "/",
        "..",
        // Beside it, with a name that begins like its own.
        "../model/config.json",
    ] {
        let attack = Attack::new();
        fs::create_dir(attack.path("model")).unwrap();
        fs::write(attack.path("model/config.json"), CONFIG).unwrap();
        attack.link("m/config.json", target);
        attack.leads_out("config.json");
    }
    let attack = Attack::new();
    attack.link("m/config.json", attack.path("private/config.json"));
    attack.leads_out("config.json");
    // Over several links, in directories too.
    attack.link("m/step", "../private");
    attack.link("m/config.json", "step/config.json");
    attack.leads_out("config.json");
    attack.link("m/second", "step/config.json");
    attack.link("m/config.json", "second");
    attack.leads_out("config.json");
    let error = attack.open().unwrap_err().to_string();
    for part in ["m/config.json", "private/config.json", "in \""] {
        assert!(error.contains(part), "it lacks {part}: {error}");
    }
}

#[test]
fn whether_there_is_something_at_the_end_of_a_link_is_not_told() {
    let attack = Attack::new();
    for target in [
        "../private/nothing",
        "../nothing/nothing",
        "/nothing",
        "../m/../nothing",
        "/etc/passwd/nothing",
    ] {
        attack.link("m/config.json", target);
        attack.leads_out("config.json");
    }
    // A dangling link inside is as good as no file, for such are left by tools that tidy up.
    attack.link("m/config.json", "nothing");
    assert!(attack.open().unwrap().config().is_none());
    // In a circle.
    attack.link("m/config.json", "config.json");
    assert_error!(attack.open().unwrap_err(), CheckpointError::Io { .. });
}

#[test]
fn weights_and_indices_that_are_links_out_are_refused() {
    let attack = Attack::new();
    attack.link("m/model.safetensors", "../private/model.safetensors");
    attack.leads_out("model.safetensors");
    fs::remove_file(attack.path("m/model.safetensors")).unwrap();
    // The only file, whatever its name.
    attack.link("m/x.safetensors", "../private/model.safetensors");
    attack.leads_out("x.safetensors");
    fs::remove_file(attack.path("m/x.safetensors")).unwrap();
    // One of a set.
    let set = [
        "s-00001-of-00002.safetensors",
        "s-00002-of-00002.safetensors",
    ];
    fs::write(attack.path("m").join(set[0]), vectors(&[("a", 1)])).unwrap();
    attack.link(&format!("m/{}", set[1]), "../private/model.safetensors");
    attack.leads_out(set[1]);
    // The index itself, and a shard that it names.
    let index = json!({"weight_map": {"a": set[0], "secret": set[1]}}).to_string();
    let name = "model.safetensors.index.json";
    fs::write(attack.path("private").join(name), &index).unwrap();
    attack.link(&format!("m/{name}"), Path::new("../private").join(name));
    attack.leads_out(name);
    fs::remove_file(attack.path("m").join(name)).unwrap();
    fs::write(attack.path("m").join(name), &index).unwrap();
    attack.leads_out(set[1]);
    attack.link(&format!("m/{}", set[1]), "../private/nothing");
    attack.leads_out(set[1]);
    // Inside, it is missing.
    attack.link(&format!("m/{}", set[1]), "nothing");
    assert_error!(
        attack.open().unwrap_err(),
        CheckpointError::MissingShard { .. }
    );
}

#[test]
fn what_is_hidden_is_not_reached_through_links() {
    let attack = Attack::new();
    fs::create_dir(attack.path("m/.git")).unwrap();
    fs::write(attack.path("m/.git/config"), CONFIG).unwrap();
    fs::write(attack.path("m/.env"), CONFIG).unwrap();
    for target in [".git/config", ".env"] {
        attack.link("m/config.json", target);
        attack.leads_out("config.json");
    }
    // In a hidden directory, everything is.
    fs::remove_file(attack.path("m/config.json")).unwrap();
    fs::rename(attack.path("m"), attack.path(".m")).unwrap();
    fs::write(attack.path(".m/real.json"), CONFIG).unwrap();
    attack.link(".m/config.json", "real.json");
    let checkpoint = Checkpoint::open(attack.path(".m")).unwrap();
    assert!(checkpoint.config().is_some());
}

#[test]
fn a_link_that_the_user_names_is_followed_and_what_lies_beside_it_is_not() {
    let attack = Attack::new();
    attack.link("m/mine.safetensors", "../private/model.safetensors");
    let path = attack.path("m/mine.safetensors");
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(names(&checkpoint), ["secret"]);
    // The configuration is the one beside the link.
    assert_eq!(
        checkpoint.config().unwrap().model_type.as_deref(),
        Some("mine")
    );
    attack.link("m/config.json", "../private/config.json");
    assert_error!(
        Checkpoint::open(&path).unwrap_err(),
        CheckpointError::LeadsOut { path, .. } if path.ends_with("m/config.json")
    );
    // An index that is named leads to shards beside it, and to no others.
    let index = json!({"weight_map": {"secret": "s.safetensors"}}).to_string();
    fs::write(attack.path("private/x.safetensors.index.json"), index).unwrap();
    attack.link(
        "m/x.safetensors.index.json",
        "../private/x.safetensors.index.json",
    );
    attack.link("m/s.safetensors", "../private/model.safetensors");
    assert_error!(
        Checkpoint::open(attack.path("m/x.safetensors.index.json")).unwrap_err(),
        CheckpointError::LeadsOut { path, .. } if path.ends_with("s.safetensors")
    );
}

#[test]
fn pipes_devices_and_directories_are_no_files_and_do_not_block() {
    for name in [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ] {
        let attack = Attack::new();
        let path = attack.path("m").join(name);
        let is_no_file = || {
            assert_error!(
                attack.open().unwrap_err(),
                CheckpointError::NotAFile { path } if path.ends_with(name)
            );
        };
        let _ = fs::remove_file(&path);
        fifo(&path);
        is_no_file();
        attack.link(&format!("m/{name}"), "pipe");
        fifo(&attack.path("m/pipe"));
        is_no_file();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        is_no_file();
        fs::remove_dir(&path).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        is_no_file();
        drop(socket);
        // The directory itself.
        attack.link(&format!("m/{name}"), ".");
        is_no_file();
    }
    let attack = Attack::new();
    fifo(&attack.path("m/pipe.safetensors"));
    assert_error!(
        Checkpoint::open(attack.path("m/pipe.safetensors")).unwrap_err(),
        CheckpointError::NotAFile { .. }
    );
}

/// The attacker's `config.json` is a file and a link in turns while it is opened.
#[test]
fn what_was_checked_is_what_is_opened() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let attack = Attack::new();
    attack.link("m/out", "../private/config.json");
    fs::create_dir(attack.path("m/in")).unwrap();
    fs::write(attack.path("m/in/config.json"), CONFIG).unwrap();
    attack.link("m/away", "../private");
    attack.link("m/config.json", "sub/config.json");
    let done = AtomicBool::new(false);
    let swap = |from: &str| {
        attack.link("m/next", from);
        fs::rename(attack.path("m/next"), attack.path("m/sub")).unwrap();
    };
    swap("in");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                swap("away");
                swap("in");
            }
        });
        for _ in 0..3000 {
            if let Ok(checkpoint) = attack.open()
                && let Some(config) = checkpoint.config()
            {
                assert!(!config.text.contains("secret"));
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_shard_that_was_closed_is_not_opened_again_as_something_else() {
    let attack = Attack::new();
    let path = attack.path("m/model.safetensors");
    let directory = Arc::new(Directory::open(&attack.path("m")).unwrap());
    let source = Source::In(directory, "model.safetensors".to_owned());
    let mut shard = Shard::open(source).unwrap();
    shard.close();
    let read = || shard.read_at(0, &mut [0; 8]);
    read().unwrap();
    attack.link("m/model.safetensors", "../private/model.safetensors");
    assert_error!(
        read().unwrap_err(),
        ReadFailure::Other(CheckpointError::LeadsOut { .. })
    );
    fs::remove_file(&path).unwrap();
    fifo(&path);
    assert_error!(
        read().unwrap_err(),
        ReadFailure::Other(CheckpointError::NotAFile { .. })
    );
    fs::remove_file(&path).unwrap();
    fs::write(&path, vectors(&[("b", 1)])).unwrap();
    assert_error!(
        read().unwrap_err(),
        ReadFailure::Other(CheckpointError::Changed { .. })
    );
}

/// The snapshot of `models--org--name`, whose files are links into its blobs; and another model.
fn cached() -> Attack {
    let attack = Attack::new();
    for model in ["mine", "other"] {
        let entry = format!("models--org--{model}");
        for name in ["blobs", "snapshots/abc/sub"] {
            fs::create_dir_all(attack.path(&entry).join(name)).unwrap();
        }
        let blobs = attack.path(&entry).join("blobs");
        fs::write(blobs.join("w"), vectors(&[(model, 1)])).unwrap();
        fs::write(blobs.join("c"), CONFIG).unwrap();
        let snapshot = format!("{entry}/snapshots/abc");
        attack.link(&format!("{snapshot}/model.safetensors"), "../../blobs/w");
        attack.link(&format!("{snapshot}/config.json"), "../../blobs/c");
        attack.link(
            &format!("{snapshot}/sub/model.safetensors"),
            "../../../blobs/w",
        );
        attack.link(&format!("{snapshot}/sub/config.json"), "../../../blobs/c");
    }
    attack
}

const SNAPSHOT: &str = "models--org--mine/snapshots/abc";

#[test]
fn blobs_of_the_same_cache_entry_belong_to_a_snapshot() {
    let attack = cached();
    attack.link("alias", SNAPSHOT);
    for path in [SNAPSHOT, &format!("{SNAPSHOT}/sub"), "alias"] {
        for file in ["", "model.safetensors"] {
            let checkpoint = Checkpoint::open(attack.path(path).join(file)).unwrap();
            assert_eq!(names(&checkpoint), ["mine"]);
            assert!(checkpoint.config().is_some(), "{path}");
        }
    }
    // A blob that is gone makes the file one that is not there.
    fs::remove_file(attack.path("models--org--mine/blobs/c")).unwrap();
    let checkpoint = Checkpoint::open(attack.path(SNAPSHOT)).unwrap();
    assert!(checkpoint.config().is_none());
}

#[test]
fn blobs_of_other_models_and_blobs_that_lead_out_do_not() {
    let refused = |attack: &Attack| {
        assert_error!(
            Checkpoint::open(attack.path(SNAPSHOT)).unwrap_err(),
            CheckpointError::LeadsOut { path, allowed, .. }
                if path.ends_with("config.json") && !allowed.is_empty()
        );
    };
    let attack = cached();
    let config = format!("{SNAPSHOT}/config.json");
    for target in [
        "../../../models--org--other/blobs/c",
        "../../../models--org--other/snapshots/abc/config.json",
        "../../../private/config.json",
        "../../../private/nothing",
        "../../refs/main",
    ] {
        attack.link(&config, target);
        refused(&attack);
    }
    // The link is as it should be, and the blob is a link.
    let attack = cached();
    attack.link(
        "models--org--mine/blobs/c",
        attack.path("private/config.json"),
    );
    refused(&attack);
    // All blobs are another's.
    let attack = cached();
    fs::remove_dir_all(attack.path("models--org--mine/blobs")).unwrap();
    attack.link("models--org--mine/blobs", "../models--org--other/blobs");
    refused(&attack);
    // A directory that only looks a little like a snapshot has no blobs.
    let attack = cached();
    fs::rename(attack.path("models--org--mine"), attack.path("org--mine")).unwrap();
    assert_error!(
        Checkpoint::open(attack.path("org--mine/snapshots/abc")).unwrap_err(),
        CheckpointError::LeadsOut { .. }
    );
}
