//! Where models are downloaded from, into what, and as whom.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use super::HubError;
use crate::checkpoint::CacheEnvironment;

/// A hub and a cache. Its `Debug` output keeps the token to itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Hub {
    /// The hub's address: `HF_ENDPOINT`, else that of Hugging Face.
    pub endpoint: String,
    /// Who asks: `HF_TOKEN`, else the file that `hf auth login` writes. Sent to the endpoint only.
    pub token: Option<String>,
    /// Whether the network must not be asked: `HF_HUB_OFFLINE`.
    pub offline: bool,
    /// Where downloads go.
    pub cache: CacheEnvironment,
}

impl Hub {
    /// What the environment of this process says.
    pub fn from_process() -> Hub {
        Hub::from_variables(|name| std::env::var_os(name))
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
            cache,
        }
    }

    /// Refuses what cannot be sent, before it is.
    pub(super) fn check(&self) -> Result<(), HubError> {
        let is_address = ["https://", "http://"]
            .iter()
            .filter_map(|scheme| self.endpoint.strip_prefix(scheme))
            .any(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_graphic()));
        if !is_address {
            return Err(HubError::BadEndpoint {
                endpoint: self.endpoint.clone(),
            });
        }
        match &self.token {
            Some(token) if !token.bytes().all(|b| b.is_ascii_graphic()) => Err(HubError::BadToken),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
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
        for endpoint in ["huggingface.co", "file:///x", "http://", "http://a b"] {
            let bad = hub(&[("HF_ENDPOINT", endpoint)]);
            assert!(matches!(bad.check(), Err(HubError::BadEndpoint { .. })));
        }
        let bad = hub(&[("HF_TOKEN", "a\nHost: b")]);
        assert!(matches!(bad.check(), Err(HubError::BadToken)));
        assert!(hub(&[]).check().is_ok());
    }
}
