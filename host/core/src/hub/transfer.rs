//! The bytes of one file, into the cache.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::error::io_error;
use super::http::{About, Client, header, network};
use super::pace::Pace;
use super::store::{Entry, Part};
use super::{FileProgress, HubError, choice};

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;
/// How often to look whether another process has finished the same file.
const POLL: Duration = Duration::from_millis(200);

/// The download of one file.
pub(super) struct Transfer<'a> {
    pub(super) client: &'a Client<'a>,
    pub(super) entry: &'a Entry,
    pub(super) name: &'a str,
    pub(super) url: &'a str,
    pub(super) progress: &'a (dyn Fn(FileProgress<'_>) + Sync),
}

impl Transfer<'_> {
    /// Downloads what is missing and puts the file in its place.
    pub(super) fn run(&mut self) -> Result<(), HubError> {
        let about = self.client.about(self.url)?;
        if let Some((limit, what)) = choice::limit(self.name)
            && about.bytes > limit
        {
            return Err(HubError::TooLarge {
                url: self.url.into(),
                what,
                have: about.bytes,
                limit,
            });
        }
        let is_new = loop {
            match self.entry.open_part(&about.etag, self.name)? {
                Part::Complete => break false,
                Part::Busy => self.client.pause(POLL)?,
                Part::Ours(mut file) => {
                    self.fill(&mut file, &about)?;
                    self.check_digest(&mut file, &about)?;
                    let (part, blob) = (self.entry.part(&about.etag), self.entry.blob(&about.etag));
                    file.sync_all().map_err(io_error("write", &part))?;
                    // Renamed before the lock goes with the file.
                    fs::rename(&part, &blob).map_err(io_error("rename", &part))?;
                    break true;
                }
            }
        };
        self.entry.link(&about.etag, self.name, is_new)
    }

    /// Brings the partial file to its full length.
    fn fill(&mut self, file: &mut File, about: &About) -> Result<(), HubError> {
        let part = self.entry.part(&about.etag);
        let written = || io_error("write", &part);
        let mut done = file.metadata().map_err(written())?.len();
        if done == about.bytes {
            return Ok(());
        }
        if done > about.bytes {
            done = 0;
        }
        let mut response = self.client.get(self.url, done)?;
        // Bytes that cannot be placed are no more use than none: mirrors leave the range out.
        let is_of_no_use = match response.status().as_u16() {
            416 => true,
            206 => !is_rest(header(&response, "content-range"), done, about.bytes),
            _ => false,
        };
        if is_of_no_use && done > 0 {
            done = 0;
            response = self.client.get(self.url, 0)?;
        }
        match response.status().as_u16() {
            // A server may send everything whatever was asked for.
            200 => done = 0,
            206 if is_rest(header(&response, "content-range"), done, about.bytes) => {}
            status => {
                return Err(HubError::BadAnswer {
                    url: self.url.into(),
                    problem: format!("it has status {status} and not the bytes from {done} on"),
                });
            }
        }
        let announced = header(&response, "content-length").and_then(|length| length.parse().ok());
        if let Some(announced) = announced.map(|length: u64| done.saturating_add(length))
            && announced != about.bytes
        {
            return self.wrong_length(file, about, announced);
        }
        file.set_len(done).map_err(written())?;
        file.seek(SeekFrom::Start(done)).map_err(written())?;
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER];
        let mut pace = Pace::new(self.client.hub.patience);
        loop {
            (self.progress)(FileProgress {
                file: self.name,
                bytes_done: done,
                bytes_total: about.bytes,
            });
            self.client.check_cancelled()?;
            let read = self
                .client
                .read(self.url, &mut body, &mut buffer, &mut pace)?;
            if read == 0 {
                break;
            }
            let end = done.saturating_add(read as u64);
            if end > about.bytes {
                return self.wrong_length(file, about, end);
            }
            file.write_all(&buffer[..read]).map_err(written())?;
            done = end;
        }
        match announced {
            _ if done == about.bytes => Ok(()),
            // Cut off on the way: what is there is kept for the next attempt.
            Some(_) => Err(network(self.url)("the connection was closed early")),
            None => self.wrong_length(file, about, done),
        }
    }

    /// The file is not what was announced: nothing of it is kept.
    fn wrong_length(&self, file: &File, about: &About, have: u64) -> Result<(), HubError> {
        self.forget(file, about)?;
        Err(HubError::WrongLength {
            url: self.url.into(),
            need: about.bytes,
            have,
        })
    }

    fn forget(&self, file: &File, about: &About) -> Result<(), HubError> {
        let part = self.entry.part(&about.etag);
        file.set_len(0).map_err(io_error("empty", &part))
    }

    /// Large files have the SHA-256 of their content as etag.
    fn check_digest(&self, file: &mut File, about: &About) -> Result<(), HubError> {
        if about.etag.len() != 64 || !about.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(());
        }
        let part = self.entry.part(&about.etag);
        let read = || io_error("read", &part);
        file.seek(SeekFrom::Start(0)).map_err(read())?;
        let mut digest = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            self.client.check_cancelled()?;
            let count = file.read(&mut buffer).map_err(read())?;
            if count == 0 {
                break;
            }
            digest.update(&buffer[..count]);
        }
        let have: String = digest
            .finalize()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        if have.eq_ignore_ascii_case(&about.etag) {
            return Ok(());
        }
        self.forget(file, about)?;
        Err(HubError::WrongDigest {
            url: self.url.into(),
            need: about.etag.clone(),
            have,
        })
    }
}

/// Whether a `Content-Range` is that of all bytes from the offset on, of so many in all.
fn is_rest(range: Option<&str>, offset: u64, bytes: u64) -> bool {
    let Some(range) = range.and_then(|range| range.trim().strip_prefix("bytes ")) else {
        return false;
    };
    let range = range.split('/').next().unwrap_or_default();
    let Some((first, last)) = range.split_once('-') else {
        return false;
    };
    let number = |text: &str| text.trim().parse::<u64>().ok();
    number(first) == Some(offset)
        && number(last).and_then(|last| last.checked_add(1)) == Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_taken_only_where_it_is_the_rest_of_the_file() {
        assert!(is_rest(Some("bytes 5-9/10"), 5, 10));
        assert!(is_rest(Some("bytes 5-9/*"), 5, 10));
        for range in [
            None,
            Some("bytes 4-9/10"),
            Some("bytes 5-8/10"),
            Some("bytes 5-18446744073709551615/10"),
            Some("bytes 5/10"),
            Some("bytes */10"),
            Some("5-9/10"),
            Some(""),
        ] {
            assert!(!is_rest(range, 5, 10), "{range:?}");
        }
    }
}
