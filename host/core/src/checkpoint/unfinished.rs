//! Downloads that were begun and not ended, by us or by huggingface_hub: what they leave behind.

use std::fs;
use std::path::Path;

/// Files that are looked at; a model has some hundreds.
const MOST_LOOKED_AT: usize = 100_000;

/// Partial files, and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Unfinished {
    pub(super) files: u64,
    pub(super) bytes: u64,
}

/// What a download has left in one of these directories: in `blobs` of a cache entry, or in
/// `.cache/huggingface/download` of a directory that was downloaded into. Links are not followed.
pub(super) fn unfinished<'p>(
    directories: impl IntoIterator<Item = &'p Path>,
) -> Option<Unfinished> {
    let mut found = Unfinished::default();
    for directory in directories {
        let Ok(entries) = fs::read_dir(directory) else {
            continue;
        };
        for entry in entries.take(MOST_LOOKED_AT).flatten() {
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            // huggingface_hub's, hf-hub's and ours.
            let is_part = [&b".incomplete"[..], b".sync.part", b".part"]
                .iter()
                .any(|end| name.ends_with(end));
            if let Some(metadata) = entry.metadata().ok().filter(|m| is_part && m.is_file()) {
                found.files += 1;
                found.bytes = found.bytes.saturating_add(metadata.len());
            }
        }
    }
    (found.files > 0).then_some(found)
}
