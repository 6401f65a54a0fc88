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
    /// Scales of 4-bit weights are in bf16: bitsandbytes computed with the model on a processor before it
    /// was saved. See [`AbsmaxForm`](super::AbsmaxForm).
    RoundedScales {
        /// How many weights have such scales.
        weights: u64,
        /// Of how many of them they are transposed, too.
        transposed: u64,
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
            Remark::RoundedScales {
                weights,
                transposed,
            } => write!(
                f,
                "{weights} 4-bit weights have scales that are rounded to bf16, {transposed} of them \
                 transposed too, as bitsandbytes leaves them when it has computed on a processor before \
                 the model was saved: they are read in the right order, which bitsandbytes does not, and what was rounded is lost"
            ),
        }
    }
}
