//! What a file is that should hold weights or a configuration and does not: told by its first bytes,
//! and only once it could not be read as what it should be.

use std::fmt;

use super::text::PIECE;

/// Bytes that are enough to tell.
pub(super) const FIRST_BYTES: usize = 512;

/// What a file is instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A pointer that Git leaves in place of a large file.
    LfsPointer {
        /// Bytes of the file that it stands for, where it says so.
        bytes: Option<u64>,
    },
    /// HTML or XML: what a server says in place of a file.
    WebPage,
    /// A pickle of PyTorch's, in a zip archive or not.
    Pickle,
    /// A model of llama.cpp's.
    Gguf,
    /// Weights of TensorFlow, Keras, Flax or ONNX.
    OtherFramework,
    /// A zip, tar, gzip, xz, zstd, bzip2 or 7z file.
    Archive,
}

impl FileKind {
    /// Tells by the first bytes of a file; `None` for what it does not know.
    pub(super) fn of(first: &[u8]) -> Option<FileKind> {
        let begins = |magic: &[u8]| first.starts_with(magic);
        if begins(b"version https://git-lfs.github.com/spec/") || begins(b"version https://hawser")
        {
            return Some(FileKind::LfsPointer {
                bytes: pointed_size(first),
            });
        }
        if begins(b"PK\x03\x04") {
            let is_pickle = first.windows(8).any(|name| name == b"data.pkl");
            return Some(match is_pickle {
                true => FileKind::Pickle,
                false => FileKind::Archive,
            });
        }
        // Protocols 2 to 5, and what follows there in a file of PyTorch's or of pickle's own.
        if let [0x80, 2..=5, next, ..] = first
            && matches!(next, 0x8a | 0x95 | b'}' | b']' | b'c' | b'(' | b'X')
        {
            return Some(FileKind::Pickle);
        }
        if begins(b"GGUF") || begins(b"lmgg") || begins(b"tjgg") {
            return Some(FileKind::Gguf);
        }
        if begins(b"\x89HDF\r\n\x1a\n") {
            return Some(FileKind::OtherFramework);
        }
        let archives: [&[u8]; 6] = [
            b"\x1f\x8b",
            b"\xfd7zXZ\0",
            b"\x28\xb5\x2f\xfd",
            b"BZh",
            b"7z\xbc\xaf\x27\x1c",
            b"PK\x05\x06",
        ];
        if archives.iter().any(|magic| begins(magic)) || first.get(257..262) == Some(b"ustar") {
            return Some(FileKind::Archive);
        }
        let text = first.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first);
        let text = text.trim_ascii_start();
        let pages: [&[u8]; 5] = [b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error>"];
        let is_page = |page: &&[u8]| {
            let begin = text.get(..page.len());
            begin.is_some_and(|begin| begin.eq_ignore_ascii_case(page))
        };
        pages
            .iter()
            .any(is_page)
            .then_some(FileKind::WebPage)
    }

    /// Tells by the name of a file that is not looked into.
    pub(super) fn of_name(name: &str) -> Option<FileKind> {
        let name = name.to_ascii_lowercase();
        let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
        if is_pickle(&name) {
            Some(FileKind::Pickle)
        } else if ends(&[".gguf", ".ggml"]) {
            Some(FileKind::Gguf)
        } else if ends(&[".onnx", ".h5", ".msgpack", ".keras", ".tflite", ".mlmodel"]) {
            Some(FileKind::OtherFramework)
        } else if ends(&[".zip", ".tar", ".tgz", ".gz", ".xz", ".zst", ".bz2", ".7z"]) {
            Some(FileKind::Archive)
        } else {
            None
        }
    }

    /// Returns a word for programs.
    pub fn name(self) -> &'static str {
        match self {
            FileKind::LfsPointer { .. } => "git-lfs-pointer",
            FileKind::WebPage => "web-page",
            FileKind::Pickle => "pickle",
            FileKind::Gguf => "gguf",
            FileKind::OtherFramework => "other-framework",
            FileKind::Archive => "archive",
        }
    }
}

impl fmt::Display for FileKind {
    /// What it is, and what to do about it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileKind::LfsPointer { bytes } => {
                f.write_str("a Git LFS pointer")?;
                if let Some(bytes) = bytes {
                    write!(f, " of a file of {bytes} bytes")?;
                }
                f.write_str(", and not the file itself: fetch it with `git lfs pull`")
            }
            FileKind::WebPage => f.write_str(
                "a web page or another answer of a server (HTML or XML), and not the file itself: \
                 download it again",
            ),
            FileKind::Pickle => f.write_str(
                "a PyTorch pickle: these can run code when loaded and are not read; convert it to \
                 safetensors first",
            ),
            FileKind::Gguf => f.write_str(
                "a GGUF model, of llama.cpp: take the model's safetensors, which it was made of",
            ),
            FileKind::OtherFramework => f.write_str(
                "a model of another framework (TensorFlow, Keras, Flax, ONNX): take the model's \
                 safetensors",
            ),
            FileKind::Archive => f.write_str("an archive: unpack it first"),
        }
    }
}

/// Bytes of the file that a pointer of Git LFS stands for.
fn pointed_size(pointer: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(pointer).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("size ")?.trim().parse().ok())
}

/// The names that PyTorch weights have, in lower case. What trainers leave beside them is no weights.
fn is_pickle(name: &str) -> bool {
    let is_state = [
        "training_args",
        "optimizer",
        "scheduler",
        "rng_state",
        "scaler",
    ]
    .iter()
    .any(|state| name.starts_with(state));
    let ends = [".bin", ".pt", ".pth", ".ckpt", ".pkl"];
    !is_state && ends.iter().any(|end| name.ends_with(end))
}

const _: () = assert!(FIRST_BYTES <= PIECE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_first_bytes() {
        let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n";
        let mut tar = vec![b'a'; 512];
        tar[257..262].copy_from_slice(b"ustar");
        let zip = |name: &str| [b"PK\x03\x04".as_slice(), &[0; 26], name.as_bytes()].concat();
        for (first, kind) in [
            (lfs.as_bytes(), FileKind::LfsPointer { bytes: Some(12345) }),
            (&lfs.as_bytes()[..50], FileKind::LfsPointer { bytes: None }),
            (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", FileKind::WebPage),
            (b"<HTML>", FileKind::WebPage),
            (b"<?xml version='1.0'?><Error>", FileKind::WebPage),
            (
                b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
                FileKind::Pickle,
            ),
            (&zip("archive/data.pkl"), FileKind::Pickle),
            (&zip("model.safetensors"), FileKind::Archive),
            (b"GGUF\x03\0\0\0", FileKind::Gguf),
            (b"\x89HDF\r\n\x1a\n", FileKind::OtherFramework),
            (b"\x1f\x8b\x08", FileKind::Archive),
            (&tar, FileKind::Archive),
        ] {
            assert_eq!(FileKind::of(first), Some(kind), "{first:?}");
        }
        for other in [
            &b""[..],
            b"{}",
            b"hello",
            b"P",
            b"\x80\x02",
            b"\x10\0\0\0\0\0\0\0{}",
        ] {
            assert_eq!(FileKind::of(other), None, "{other:?}");
        }
    }
}
