//! What can go wrong with a download: what, where, need and have.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::checkpoint::{CheckpointError, shown};
use crate::status::Status;

/// Why a model cannot be downloaded. What a server said is shortened and escaped in the message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The cache does not have the model, and the network must not be asked.
    #[error(
        "there is no file or directory '{model}', the local Hugging Face cache does not have \
         revision '{revision}' of such a model (looked for {looked_for:?}), and it is not \
         downloaded: offline was asked for (--offline or HF_HUB_OFFLINE)"
    )]
    #[allow(
        missing_docs,
        reason = "what was asked for, and the directory it would be in"
    )]
    Offline {
        model: String,
        revision: String,
        looked_for: PathBuf,
    },

    /// A file or directory of the cache is a link, or no file or directory: nothing is written
    /// through it.
    #[error(
        "{path:?} in the local Hugging Face cache is a link, or neither file nor directory; nothing \
         is written there: remove it, and the model is downloaded"
    )]
    #[allow(missing_docs, reason = "what is in the way")]
    LeadsOut { path: PathBuf },

    /// The hub has no such model, or no such revision of it.
    #[error(
        "there is no model '{model}' with revision '{revision}', neither as a path nor in the \
         local Hugging Face cache nor on the hub: {url} answered 404{}",
        Said(.said)
    )]
    #[allow(
        missing_docs,
        reason = "what was asked for, the address, and what the server said"
    )]
    NotFound {
        model: String,
        revision: String,
        url: String,
        said: Option<String>,
    },

    /// The hub does not tell whoever asks.
    #[error(
        "the hub does not give '{model}': {url} answered {status}: it does not exist, or it is \
         private or gated{}{}",
        if *.token {
            "; the token that was sent does not give access"
        } else {
            " and needs a token: set HF_TOKEN"
        },
        Said(.said)
    )]
    Unauthorized {
        /// What was asked for.
        model: String,
        /// The address.
        url: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token was sent.
        token: bool,
        /// What the server said.
        said: Option<String>,
    },

    /// The hub answered with a status that does not help.
    #[error("{url} answered {status}{}", Said(.said))]
    #[allow(missing_docs, reason = "the address and its answer")]
    Status {
        url: String,
        status: u16,
        said: Option<String>,
    },

    /// The hub cannot be reached, or the connection broke.
    #[error("cannot download {url}: {problem}")]
    #[allow(missing_docs, reason = "the address, and what the network said")]
    Network { url: String, problem: String },

    /// The answer makes no sense, or is not safe to act on.
    #[error("{url} gave an answer that cannot be used: {problem}")]
    #[allow(
        missing_docs,
        reason = "the address, and what is wrong with the answer"
    )]
    BadAnswer { url: String, problem: String },

    /// Fewer bytes came in a while than have to.
    #[error(
        "cannot download {url}: {have} bytes came in {seconds} s, and at least {need} have to; what \
         has come of a file is kept, and the next attempt goes on from there"
    )]
    TooSlow {
        /// The address.
        url: String,
        /// How long it was waited for, in seconds.
        seconds: u64,
        /// Bytes that have to come in that time.
        need: u64,
        /// Bytes that came.
        have: u64,
    },

    /// A file or an answer is larger than any real one of its kind.
    #[error("{url} has {have} bytes or more, and at most {limit} are downloaded of {what}")]
    TooLarge {
        /// The address.
        url: String,
        /// Its kind.
        what: &'static str,
        /// Bytes that were announced, or came before it was given up.
        have: u64,
        /// The most that are read.
        limit: u64,
    },

    /// More or fewer bytes came than the hub had said.
    #[error("{url} has {need} bytes, and {have} came")]
    #[allow(
        missing_docs,
        reason = "the address, the bytes announced and the bytes sent"
    )]
    WrongLength { url: String, need: u64, have: u64 },

    /// The bytes are not those that the hub knows.
    #[error("{url} came with other bytes than its SHA-256 {need} says (they have {have})")]
    #[allow(missing_docs, reason = "the address and both digests")]
    WrongDigest {
        url: String,
        need: String,
        have: String,
    },

    /// The model has no weights that can be read.
    #[error(
        "'{model}' (revision '{revision}') has no weights as safetensors{}",
        match .have {
            Some(have) => format!(" that could be chosen, only files such as '{}'", shown(have)),
            None => String::new(),
        }
    )]
    NoSafetensors {
        /// What was asked for.
        model: String,
        /// Its revision.
        revision: String,
        /// A file with other weights.
        have: Option<String>,
    },

    /// The index names a file that the model does not have.
    #[error(
        "the index of '{model}' (revision '{revision}') names the file '{}', which it does not have",
        shown(.shard)
    )]
    #[allow(missing_docs, reason = "what was asked for, and the file")]
    MissingShard {
        model: String,
        revision: String,
        shard: String,
    },

    /// `HF_ENDPOINT` is not an address.
    #[error(
        "HF_ENDPOINT is '{}', which is not an http or https address without a user name, a query and \
         a fragment",
        shown(.endpoint)
    )]
    #[allow(missing_docs, reason = "its value, without a user name and a password")]
    BadEndpoint { endpoint: String },

    /// The token cannot be sent.
    #[error("the Hugging Face token has characters that no token has; see HF_TOKEN")]
    BadToken,

    /// The name cannot be that of a model, there is no cache, or the index is not valid.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),

    /// The cache cannot be written.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// It was asked to stop.
    #[error("the download was interrupted; it will be resumed where it ended")]
    Cancelled,
}

/// What a server said of an error, in a message: shortened and escaped, as it comes from anybody.
struct Said<'a>(&'a Option<String>);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(said) => write!(f, "; it says '{}'", shown(said)),
            None => Ok(()),
        }
    }
}

impl HubError {
    /// Whether the same request may succeed a moment later.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            HubError::Network { .. } | HubError::TooSlow { .. } => true,
            HubError::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }

    /// Whether a server refuses for good and has not said why.
    pub(super) fn is_unexplained(&self) -> bool {
        match self {
            HubError::Unauthorized { said: None, .. } | HubError::NotFound { said: None, .. } => {
                true
            }
            HubError::Status { said: None, .. } => !self.may_pass(),
            _ => false,
        }
    }
}

/// For `map_err` of what was to be done to a file.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HubError {
    let path = path.to_path_buf();
    move |source| HubError::Io {
        action,
        path,
        source,
    }
}

impl From<&HubError> for Status {
    fn from(error: &HubError) -> Status {
        match error {
            HubError::Cancelled => Status::Interrupted,
            _ => Status::Checkpoint,
        }
    }
}
