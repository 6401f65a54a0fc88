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
    /// Scales of 4-bit weights are rounded to 16 bits: bitsandbytes computed with the model on a processor before
    /// it was saved. See [`AbsmaxForm`](super::AbsmaxForm).
    RoundedScales {
        /// How many weights have such scales.
        weights: u64,
        /// Of how many of them they are transposed, too.
        transposed: u64,
        /// Of how many of them they are double-quantized.
        double: u64,
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
                double,
            } => write!(
                f,
                "{weights} 4-bit weights have scales of 16 bits, as bitsandbytes rounds them when it computes \
                 on a processor before a model is saved. Of {transposed} they are transposed, which bitsandbytes \
                 reads in another order than it has written them. Of {double} they are double-quantized: these \
                 are loaded with scales in f32"
            ),
        }
    }
}
