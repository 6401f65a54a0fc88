//! Where models are downloaded from, into what, and as whom.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HubError;
use super::address::Origin;
use crate::checkpoint::{CacheEnvironment, CheckpointError};

/// A server that says nothing for this long is given up, unless the user says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);
/// Seconds that a user may say at most.
const MOST_PATIENCE: u64 = 86_400;

/// A hub and a cache. Its `Debug` output keeps the token to itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Hub {
    /// The hub's address: `HF_ENDPOINT`, else that of Hugging Face.
    pub endpoint: String,
    /// Who asks: `HF_TOKEN`, else the file that `hf auth login` writes. Sent to the endpoint only.
    pub token: Option<String>,
    /// Whether the network must not be asked: `HF_HUB_OFFLINE`.
    pub offline: bool,
    /// How long a silent server is waited for, and over how long it is averaged what comes:
    /// `HF_HUB_DOWNLOAD_TIMEOUT` in whole seconds, else 30 s.
    pub patience: Duration,
    /// Where downloads go.
    pub cache: CacheEnvironment,
}

impl Hub {
    /// Returns what the environment of this process says.
    pub fn from_process() -> Hub {
        Hub::from_variables(|name| std::env::var_os(name))
    }

    /// Returns whether a download may help where a model could not be opened for this reason: its id, or
    /// some of its files, are not in the cache.
    pub fn may_have(&self, model: &str, error: &CheckpointError) -> bool {
        match error {
            CheckpointError::NotInCache { .. } | CheckpointError::RevisionNotInCache { .. } => true,
            // Other tools fetch single files, and an interrupted download leaves some out.
            CheckpointError::DownloadNotEnded { .. }
            | CheckpointError::MissingShard { .. }
            | CheckpointError::IncompleteSet { .. }
            | CheckpointError::NotACheckpoint { .. }
            | CheckpointError::OnlyPickles { .. }
            | CheckpointError::EmptyDirectory { .. }
            | CheckpointError::BadCacheEntry { .. } => !self.offline && !Path::new(model).exists(),
            _ => false,
        }
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Hub {
        let text = |name: &str| {
            let value = variable(name)?.to_string_lossy().trim().to_owned();
            (!value.is_empty()).then_some(value)
        };
        let cache = CacheEnvironment::from_variables(&variable);
        let is_on = |name: &str| {
            let value = text(name).unwrap_or_default().to_ascii_lowercase();
            ["1", "true", "yes", "on"].contains(&value.as_str())
        };
        let token = text("HF_TOKEN")
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| {
                let path = match text("HF_TOKEN_PATH") {
                    Some(path) => cache.expanded(&PathBuf::from(path)),
                    None => cache.hugging_face_home()?.join("token"),
                };
                let mut token = String::new();
                let file = File::open(path).ok()?;
                file.take(4096).read_to_string(&mut token).ok()?;
                let token = token.trim();
                (!token.is_empty()).then(|| token.to_owned())
            });
        Hub {
            endpoint: text("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".to_owned())
                .trim_end_matches('/')
                .to_owned(),
            token,
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            patience: text("HF_HUB_DOWNLOAD_TIMEOUT")
                .and_then(|seconds| seconds.parse().ok())
                .filter(|seconds| (1..=MOST_PATIENCE).contains(seconds))
                .map_or(PATIENCE, Duration::from_secs),
            cache,
        }
    }

    /// Refuses what cannot be sent, before it is.
    /// Gives the server that the token is for.
    pub(super) fn check(&self) -> Result<Origin, HubError> {
        let address = Some(&self.endpoint)
            .filter(|endpoint| !endpoint.contains(['?', '#']))
            .and_then(|endpoint| endpoint.parse().ok());
        let Some(Ok(origin)) = address.map(|address| Origin::of(&address)) else {
            return Err(HubError::BadEndpoint {
                endpoint: without_user(&self.endpoint),
            });
        };
        match &self.token {
            Some(token) if !token.bytes().all(|b| b.is_ascii_graphic()) => Err(HubError::BadToken),
            _ => Ok(origin),
        }
    }
}

/// An address as it may be shown: what stands before its host can be a password.
fn without_user(address: &str) -> String {
    match address.rsplit_once('@') {
        Some((_, rest)) => format!("...@{rest}"),
        None => address.to_owned(),
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &without_user(&self.endpoint))
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .field("patience", &self.patience)
            .field("cache", &self.cache)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        Hub::from_variables(|name| {
            let found = variables.iter().find(|(n, _)| *n == name)?;
            Some(found.1.into())
        })
    }

    #[test]
    fn variables_are_those_of_huggingface_hub() {
        let default = hub(&[]);
        assert_eq!(default.endpoint, "https://huggingface.co");
        assert_eq!((default.token, default.offline), (None, false));
        let set = hub(&[
            ("HF_ENDPOINT", "http://127.0.0.1:1/"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "YES"),
        ]);
        assert_eq!(set.endpoint, "http://127.0.0.1:1");
        assert_eq!(set.token.as_deref(), Some("secret"));
        assert!(set.offline);
        assert!(!format!("{set:?}").contains("secret"));
        assert!(!hub(&[("HF_HUB_OFFLINE", "0")]).offline);
        let patience = |seconds| hub(&[("HF_HUB_DOWNLOAD_TIMEOUT", seconds)]).patience;
        assert_eq!(patience("5"), Duration::from_secs(5));
        for none in ["", "0", "-1", "x", "1e9", "99999999999999999999"] {
            assert_eq!(patience(none), PATIENCE, "{none}");
        }
    }

    #[test]
    fn the_token_of_a_login_is_found() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        std::fs::write(home.path().join("token"), "of-login\n").unwrap();
        let login = hub(&[("HF_HOME", path)]);
        assert_eq!(login.token.as_deref(), Some("of-login"));
        let both = hub(&[("HF_HOME", path), ("HF_TOKEN", "mine")]);
        assert_eq!(both.token.as_deref(), Some("mine"));
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        for endpoint in [
            "huggingface.co",
            "file:///x",
            "http://",
            "http://a b",
            "http://a?b",
            "http://a#b",
            "http://a:b",
            "http://me:hidden@a",
        ] {
            let bad = hub(&[("HF_ENDPOINT", endpoint)]);
            let error = bad.check().unwrap_err();
            assert!(matches!(error, HubError::BadEndpoint { .. }), "{endpoint}");
            assert!(!format!("{error} {error:?} {bad:?}").contains("hidden"));
        }
        let bad = hub(&[("HF_TOKEN", "a\nHost: b")]);
        assert!(matches!(bad.check(), Err(HubError::BadToken)));
        assert!(hub(&[]).check().is_ok());
    }
}
