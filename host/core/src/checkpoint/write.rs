//! The header of a safetensors file that is written: the safetensors crate's, which checks it.

use std::collections::{HashMap, HashSet};

use safetensors::tensor::{Metadata, SafeTensorError, TensorInfo};

use crate::types::DType;

/// Why a header cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeaderError {
    /// Two tensors have one name, of which the file could have only one.
    #[error("two tensors are called {0:?}")]
    Duplicate(String),
    /// A size that does not fit in a `usize`.
    #[error("its size does not fit in {} bits", usize::BITS)]
    TooLarge,
    /// What the safetensors crate says.
    #[error(transparent)]
    Format(#[from] SafeTensorError),
    /// JSON that cannot be made.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Returns the text of the header of a file with these tensors, in their order and without gaps: name,
/// type, shape and bytes of each. Its `__metadata__` says `"format": "pt"`, without which transformers
/// does not open a file.
pub(crate) fn header_text<'a>(
    tensors: impl IntoIterator<Item = (&'a str, DType, &'a [u64], u64)>,
) -> Result<String, HeaderError> {
    let mut names = HashSet::new();
    let mut described = Vec::new();
    let mut begin = 0usize;
    for (name, dtype, shape, bytes) in tensors {
        // The crate relies on it.
        if !names.insert(name) {
            return Err(HeaderError::Duplicate(name.to_owned()));
        }
        let size = |value: u64| usize::try_from(value).map_err(|_| HeaderError::TooLarge);
        let end = begin
            .checked_add(size(bytes)?)
            .ok_or(HeaderError::TooLarge)?;
        let info = TensorInfo {
            dtype: dtype.into(),
            shape: shape
                .iter()
                .map(|&length| size(length))
                .collect::<Result<_, _>>()?,
            data_offsets: (begin, end),
        };
        described.push((name.to_owned(), info));
        begin = end;
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(metadata), described)?;
    Ok(serde_json::to_string(&header)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_pytorch_writes() {
        let text = header_text([
            ("b\"", DType::F32, &[2, 3][..], 24),
            ("a", DType::U8, &[], 1),
        ]);
        assert_eq!(
            text.unwrap(),
            r#"{"__metadata__":{"format":"pt"},"b\"":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"a":{"dtype":"U8","shape":[],"data_offsets":[24,25]}}"#
        );
    }

    #[test]
    fn what_would_be_no_file_is_refused() {
        let twice = [("a", DType::U8, &[1][..], 1), ("a", DType::U8, &[1], 1)];
        assert!(matches!(header_text(twice), Err(HeaderError::Duplicate(name)) if name == "a"));
        let short = [("a", DType::U8, &[2][..], 1)];
        assert!(matches!(header_text(short), Err(HeaderError::Format(_))));
        let long = [
            ("a", DType::U8, &[u64::MAX][..], u64::MAX),
            ("b", DType::U8, &[1], 1),
        ];
        assert!(matches!(header_text(long), Err(HeaderError::TooLarge)));
    }
}
