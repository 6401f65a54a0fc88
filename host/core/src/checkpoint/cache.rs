//! Names of models: paths, and ids that the local Hugging Face cache may know.
//!
//! Layout of the cache: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>. A model
//! `org/name` is the directory `models--org--name`, with `refs/main` holding a commit and
//! `snapshots/<commit>` its files, mostly links into `blobs`.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::CheckpointError;
use super::directory::Directory;
use super::error::shown;
use super::file::{io_error, is_plain_file_name};
use super::unfinished::unfinished;
use crate::cancel::CancelToken;

/// The variables that say where the cache is, apart from the process, so that tests and embedding
/// applications can give their own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheEnvironment {
    /// `HF_HUB_CACHE`, or its old name `HUGGINGFACE_HUB_CACHE`: the cache itself.
    pub hf_hub_cache: Option<PathBuf>,
    /// `HF_HOME`: the cache is its subdirectory `hub`.
    pub hf_home: Option<PathBuf>,
    /// `XDG_CACHE_HOME`: the cache is its subdirectory `huggingface/hub`.
    pub xdg_cache_home: Option<PathBuf>,
    /// The home directory: the cache is its subdirectory `.cache/huggingface/hub`.
    pub home: Option<PathBuf>,
}

impl CacheEnvironment {
    /// Returns what the environment of this process says.
    pub fn from_process() -> CacheEnvironment {
        CacheEnvironment::from_variables(|name| std::env::var_os(name))
    }

    pub(crate) fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> CacheEnvironment {
        let path = |name: &str| {
            let value = variable(name).filter(|value| !value.is_empty())?;
            Some(PathBuf::from(value))
        };
        CacheEnvironment {
            hf_hub_cache: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")),
            hf_home: path("HF_HOME"),
            xdg_cache_home: path("XDG_CACHE_HOME"),
            home: home(cfg!(windows), path),
        }
    }

    /// Returns the directory with one `models--*` for every model, existing or not.
    pub fn cache(&self) -> Option<PathBuf> {
        match &self.hf_hub_cache {
            Some(cache) => Some(self.expanded(cache)),
            None => Some(self.hugging_face_home()?.join("hub")),
        }
    }

    /// Returns the directory that holds the cache and the token unless they are elsewhere.
    pub fn hugging_face_home(&self) -> Option<PathBuf> {
        if let Some(home) = &self.hf_home {
            return Some(self.expanded(home));
        }
        let caches = match (&self.xdg_cache_home, &self.home) {
            (Some(xdg), _) => self.expanded(xdg),
            (None, Some(home)) => home.join(".cache"),
            (None, None) => return None,
        };
        Some(caches.join("huggingface"))
    }

    /// huggingface_hub expands a leading `~` in all of its variables.
    pub(crate) fn expanded(&self, path: &Path) -> PathBuf {
        match (path.strip_prefix("~"), &self.home) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => path.to_path_buf(),
        }
    }
}

/// The home directory, as Python and so huggingface_hub finds it: on Windows `HOME` is what some shells
/// set, and not asked.
fn home(is_windows: bool, path: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    if !is_windows {
        return path("HOME");
    }
    path("USERPROFILE").or_else(|| {
        let mut home = path("HOMEDRIVE").unwrap_or_default().into_os_string();
        home.push(path("HOMEPATH")?);
        Some(home.into())
    })
}

/// Returns the path of a model: the name itself where it exists, else what the local Hugging Face
/// cache of this process's environment holds under the name. The network is never asked.
///
/// # Errors
/// A [`CheckpointError`] that says what was looked for and where.
pub fn resolve(model: &str) -> Result<PathBuf, CheckpointError> {
    resolve_with(model, &CacheEnvironment::from_process())
}

/// Returns the same as [`resolve`] with an environment that the caller gives.
///
/// # Errors
/// As for [`resolve`].
pub fn resolve_with(
    model: &str,
    environment: &CacheEnvironment,
) -> Result<PathBuf, CheckpointError> {
    resolve_revision(model, None, environment)
}

/// Returns the same as [`resolve_with`] for one revision of the model: a branch, a tag or a commit.
///
/// # Errors
/// As for [`resolve`]; and a path that is not an entry of a cache has no revisions.
pub fn resolve_revision(
    model: &str,
    revision: Option<&str>,
    environment: &CacheEnvironment,
) -> Result<PathBuf, CheckpointError> {
    let path = Path::new(model);
    if !model.is_empty() && path.exists() {
        return match revision {
            _ if is_cache_entry(path) => snapshot(path, model, revision),
            Some(revision) => Err(CheckpointError::RevisionOfPath {
                path: path.into(),
                revision: revision.into(),
            }),
            None => Ok(path.into()),
        };
    }
    let Some(entry) = entry_name(model) else {
        // What is spelled as a path was meant as one.
        return Err(
            if path.is_absolute() || model.starts_with(['.', '~', '/', '\\']) {
                CheckpointError::NotFound { path: path.into() }
            } else {
                CheckpointError::NotAModelName {
                    model: model.into(),
                }
            },
        );
    };
    let Some(cache) = environment.cache() else {
        return Err(CheckpointError::NoCache {
            model: model.into(),
        });
    };
    let entry = cache.join(entry);
    if !entry.is_dir() {
        return Err(CheckpointError::NotInCache {
            model: model.into(),
            looked_for: entry,
        });
    }
    snapshot(&entry, model, revision)
}

/// Whether the text can be a revision. It becomes part of paths and URLs, so that no part of it may
/// lead elsewhere.
pub(crate) fn is_revision(text: &str) -> bool {
    text.len() <= 255
        && text.split('/').all(is_plain_file_name)
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._/-+@=".contains(&b))
}

/// Name of the cache's directory for a model id; `None` for what cannot be an id.
/// Rules: huggingface_hub `validate_repo_id`.
pub(crate) fn entry_name(model: &str) -> Option<String> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && !part.contains("--")
            && !part.contains("..")
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    if model.len() > 96 {
        return None;
    }
    match model.split_once('/') {
        Some((organization, name)) => {
            (part(organization) && part(name)).then(|| format!("models--{organization}--{name}"))
        }
        None => part(model).then(|| format!("models--{model}")),
    }
}

/// Whether the directory is a model's entry in a cache, rather than a model.
fn is_cache_entry(path: &Path) -> bool {
    let named = path
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("models--"));
    named && path.join("snapshots").is_dir()
}

/// The snapshot of an entry: that of the revision; else that of `refs/main`, else the only one.
fn snapshot(entry: &Path, model: &str, revision: Option<&str>) -> Result<PathBuf, CheckpointError> {
    let bad = |problem: String| CheckpointError::BadCacheEntry {
        path: entry.into(),
        problem,
    };
    let not_ended = || {
        let unfinished = unfinished([&*entry.join("blobs")])?;
        Some(CheckpointError::DownloadNotEnded {
            path: entry.into(),
            files: unfinished.files,
            bytes: unfinished.bytes,
        })
    };
    let snapshots = entry.join("snapshots");
    let name = revision.unwrap_or("main");
    if !is_revision(name) {
        return Err(CheckpointError::NotARevision {
            revision: name.into(),
        });
    }
    let reference = entry.join("refs").join(name);
    if !reference.is_dir()
        && let Some(text) = read_reference(entry, name)?
    {
        let commit = text.trim();
        if !is_plain_file_name(commit) {
            return Err(bad(format!("refs/{name} holds '{}'", shown(commit))));
        }
        let snapshot = snapshots.join(commit);
        return if snapshot.is_dir() {
            check_inside(entry, snapshot)
        } else {
            Err(not_ended().unwrap_or_else(|| {
                bad(format!(
                    "refs/{name} names the snapshot {commit}, which is not there"
                ))
            }))
        };
    }
    if let Some(revision) = revision {
        let snapshot = snapshots.join(revision);
        return if is_plain_file_name(revision) && snapshot.is_dir() {
            check_inside(entry, snapshot)
        } else {
            Err(CheckpointError::RevisionNotInCache {
                model: model.into(),
                revision: revision.into(),
                looked_for: reference,
            })
        };
    }
    let mut found = Vec::new();
    match fs::read_dir(&snapshots) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(io_error("list", &snapshots)(error)),
        Ok(list) => {
            for item in list.take(1000) {
                let path = item.map_err(io_error("list", &snapshots))?.path();
                if path.is_dir() {
                    found.push(path);
                }
            }
        }
    }
    match found.len() {
        1 => check_inside(entry, found.remove(0)),
        0 => Err(not_ended()
            .unwrap_or_else(|| bad("it holds no snapshot; download the model again".into()))),
        n => Err(bad(format!(
            "it holds {n} snapshots and no refs/main; give the path of one of them"
        ))),
    }
}

/// The text of a reference; `None` where there is none.
fn read_reference(entry: &Path, name: &str) -> Result<Option<String>, CheckpointError> {
    let references = entry.join("refs");
    if !references.is_dir() {
        return Ok(None);
    }
    let references = check_inside(entry, references)?;
    Directory::open(&references)?.read_text(name, "a reference (bytes)", 1024, &CancelToken::new())
}

/// A directory of an entry that is there, and lies in it with all links followed. The entry itself
/// may be a link: users move models to other disks.
fn check_inside(entry: &Path, directory: PathBuf) -> Result<PathBuf, CheckpointError> {
    let real = |path: &Path| fs::canonicalize(path).map_err(io_error("open", path));
    let (entry, target) = (real(entry)?, real(&directory)?);
    if target.starts_with(&entry) {
        Ok(directory)
    } else {
        Err(CheckpointError::LeadsOut {
            path: directory,
            target,
            allowed: vec![entry],
        })
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// A cache with `org/name`, its snapshots and what refs/main holds.
    fn cache(snapshots: &[&str], main: Option<&str>) -> (TempDir, CacheEnvironment, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let entry = dir.path().join("hub").join("models--org--name");
        fs::create_dir_all(entry.join("snapshots")).unwrap();
        for snapshot in snapshots {
            fs::create_dir_all(entry.join("snapshots").join(snapshot)).unwrap();
        }
        if let Some(main) = main {
            fs::create_dir_all(entry.join("refs")).unwrap();
            fs::write(entry.join("refs").join("main"), main).unwrap();
        }
        let environment = CacheEnvironment {
            hf_home: Some(dir.path().into()),
            ..CacheEnvironment::default()
        };
        (dir, environment, entry)
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_would_have_it() {
        let mut environment = CacheEnvironment::default();
        assert_eq!(environment.cache(), None);
        environment.home = Some("/home/u".into());
        assert_eq!(
            environment.cache(),
            Some("/home/u/.cache/huggingface/hub".into())
        );
        environment.xdg_cache_home = Some("/x".into());
        assert_eq!(environment.cache(), Some("/x/huggingface/hub".into()));
        environment.hf_home = Some("~/hf".into());
        assert_eq!(environment.cache(), Some("/home/u/hf/hub".into()));
        environment.hf_hub_cache = Some("/c".into());
        assert_eq!(environment.cache(), Some("/c".into()));
    }

    #[test]
    fn variables_are_read_by_their_names() {
        let environment = CacheEnvironment::from_variables(|name| match name {
            "HUGGINGFACE_HUB_CACHE" => Some("/old".into()),
            "HF_HOME" => Some("".into()),
            "HOME" if !cfg!(windows) => Some("/home/u".into()),
            "USERPROFILE" if cfg!(windows) => Some("/home/u".into()),
            _ => None,
        });
        assert_eq!(environment.hf_hub_cache, Some("/old".into()));
        assert_eq!(environment.hf_home, None);
        assert_eq!(environment.home, Some("/home/u".into()));
    }

    #[test]
    fn the_home_directory_is_that_of_the_system() {
        let home = |is_windows: bool, set: &[(&str, &str)]| {
            super::home(is_windows, |name| {
                let found = set.iter().find(|(n, _)| *n == name)?;
                Some(found.1.into())
            })
        };
        let both = [("HOME", "/c/Users/u"), ("USERPROFILE", r"C:\Users\u")];
        assert_eq!(home(false, &both), Some("/c/Users/u".into()));
        assert_eq!(home(true, &both), Some(r"C:\Users\u".into()));
        assert_eq!(home(true, &both[..1]), None);
        let parts = [("HOMEDRIVE", "H:"), ("HOMEPATH", r"\u")];
        assert_eq!(home(true, &parts), Some(r"H:\u".into()));
    }

    #[test]
    fn an_id_leads_to_the_snapshot_of_main() {
        let (_dir, environment, entry) = cache(&["abc", "def"], Some("def\n"));
        let expected = entry.join("snapshots").join("def");
        assert_eq!(resolve_with("org/name", &environment).unwrap(), expected);
        // The entry and the snapshot can be given as paths too.
        let path = entry.to_str().unwrap();
        assert_eq!(resolve_with(path, &environment).unwrap(), expected);
        let path = expected.to_str().unwrap();
        assert_eq!(resolve_with(path, &environment).unwrap(), expected);
    }

    #[test]
    fn a_revision_is_a_reference_or_a_commit() {
        let (_dir, environment, entry) = cache(&["abc", "def", "ghi"], Some("def"));
        fs::create_dir_all(entry.join("refs").join("pr")).unwrap();
        fs::write(entry.join("refs").join("pr").join("1"), "ghi").unwrap();
        for (revision, commit) in [("main", "def"), ("abc", "abc"), ("pr/1", "ghi")] {
            for model in ["org/name", entry.to_str().unwrap()] {
                assert_eq!(
                    resolve_revision(model, Some(revision), &environment).unwrap(),
                    entry.join("snapshots").join(commit)
                );
            }
        }
        for revision in ["v2", "pr"] {
            let error = resolve_revision("org/name", Some(revision), &environment).unwrap_err();
            assert!(
                matches!(error, CheckpointError::RevisionNotInCache { .. }),
                "{error:?}"
            );
        }
        for revision in ["", "..", "../../x", "a//b", "/a", "a b", "a?b", "a%2Fb"] {
            let error = resolve_revision("org/name", Some(revision), &environment).unwrap_err();
            assert!(
                matches!(error, CheckpointError::NotARevision { .. }),
                "{error:?}"
            );
        }
        let path = entry.join("snapshots").join("abc");
        let error = resolve_revision(path.to_str().unwrap(), Some("main"), &environment);
        assert!(matches!(error, Err(CheckpointError::RevisionOfPath { .. })));
    }

    #[test]
    fn without_main_the_only_snapshot_is_taken_and_several_are_an_error() {
        let (_dir, environment, entry) = cache(&["abc"], None);
        assert_eq!(
            resolve_with("org/name", &environment).unwrap(),
            entry.join("snapshots").join("abc")
        );
        for (snapshots, main) in [
            (&["abc", "def"][..], None),
            (&[], None),
            (&["abc"], Some("gone")),
            (&["abc"], Some("../../..")),
            (&["abc"], Some("")),
        ] {
            let (_dir, environment, _) = cache(snapshots, main);
            let error = resolve_with("org/name", &environment).unwrap_err();
            assert!(
                matches!(error, CheckpointError::BadCacheEntry { .. }),
                "{snapshots:?} {main:?}: {error:?}"
            );
        }
    }

    #[cfg(unix)]
    #[test]
    fn an_entry_may_be_a_link_and_nothing_in_it_may_lead_out() {
        use std::os::unix::fs::symlink;

        let (dir, environment, entry) = cache(&["abc"], Some("abc"));
        let moved = dir.path().join("moved");
        fs::rename(&entry, &moved).unwrap();
        symlink(&moved, &entry).unwrap();
        let snapshot = resolve_with("org/name", &environment).unwrap();
        assert_eq!(snapshot, entry.join("snapshots").join("abc"));

        // A second name for a snapshot of the same entry.
        symlink("abc", moved.join("snapshots").join("def")).unwrap();
        assert!(resolve_revision("org/name", Some("def"), &environment).is_ok());

        let outside = dir.path().join("outside");
        for directory in ["snapshots/abc", "refs"] {
            fs::create_dir_all(outside.join(directory)).unwrap();
        }
        fs::write(outside.join("refs").join("main"), "abc").unwrap();
        let leads_out = |revision: Option<&str>| {
            let error = resolve_revision("org/name", revision, &environment).unwrap_err();
            assert!(
                matches!(error, CheckpointError::LeadsOut { .. }),
                "{error:?}"
            );
        };
        symlink(outside.join("snapshots/abc"), moved.join("snapshots/out")).unwrap();
        leads_out(Some("out"));
        fs::write(moved.join("refs").join("v1"), "out").unwrap();
        leads_out(Some("v1"));
        symlink(outside.join("refs/main"), moved.join("refs/v2")).unwrap();
        leads_out(Some("v2"));
        // Whole directories.
        fs::remove_dir_all(moved.join("refs")).unwrap();
        symlink(outside.join("refs"), moved.join("refs")).unwrap();
        leads_out(None);
        fs::remove_file(moved.join("refs")).unwrap();
        fs::remove_dir_all(moved.join("snapshots")).unwrap();
        symlink(outside.join("snapshots"), moved.join("snapshots")).unwrap();
        leads_out(None);
    }

    #[test]
    fn what_is_not_found_is_named_with_where_it_was_looked_for() {
        let (_dir, environment, entry) = cache(&["abc"], Some("abc"));
        let error = resolve_with("org/other", &environment).unwrap_err();
        let expected = entry.with_file_name("models--org--other");
        assert!(
            matches!(&error, CheckpointError::NotInCache { looked_for, .. } if *looked_for == expected),
            "{error:?}"
        );
        assert!(error.to_string().contains("models--org--other"), "{error}");
        assert!(matches!(
            resolve_with("org/name", &CacheEnvironment::default()),
            Err(CheckpointError::NoCache { .. })
        ));
        assert!(matches!(
            resolve_with("/no/such/path", &environment),
            Err(CheckpointError::NotFound { .. })
        ));
        // On Windows the second is the directory that we are in.
        let upwards = if cfg!(windows) { "a/b/../c" } else { "a/.." };
        for model in ["", "a/b/c", upwards, "org/na me", "org/x--y", "a\u{1b}[2J"] {
            assert!(
                matches!(
                    resolve_with(model, &environment),
                    Err(CheckpointError::NotAModelName { .. })
                ),
                "{model:?}"
            );
        }
    }
}
