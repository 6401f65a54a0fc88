//! What is no error, and worth saying.

use std::fmt;
use std::path::PathBuf;

use super::error::shown;

/// Something that whoever loads a checkpoint should hear.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remark {
    /// There is `model.safetensors`, which transformers takes first, and an index of other files.
    IndexIgnored {
        /// The index.
        index: PathBuf,
        /// A file that it names, and that is not there.
        missing: Option<String>,
    },
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remark::IndexIgnored { index, missing } => {
                write!(
                    f,
                    "model.safetensors is loaded, which transformers takes first, and not the files \
                     that the index {index:?} beside it names"
                )?;
                match missing {
                    Some(missing) => {
                        write!(f, ": it names shards that are gone ('{}')", shown(missing))
                    }
                    None => Ok(()),
                }
            }
        }
    }
}
