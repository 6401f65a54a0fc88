//! Downloads of models by their Hugging Face id, into the cache that other Hugging Face tools share.
//!
//! ```no_run
//! use tightfit::Checkpoint;
//! use tightfit::hub::{self, FetchOptions, Hub};
//!
//! let hub = Hub::from_process();
//! let path = hub::fetch(&hub, "Qwen/Qwen2.5-0.5B", &FetchOptions::default())?;
//! let checkpoint = Checkpoint::open(&path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The crate `hf-hub` asks what a model consists of and knows the URLs and the layout of the cache.
//! The transfers are done here, with its HTTP client: its own can neither be stopped nor limited in
//! time, append to a partial file whatever the server sends, and make paths of what the server calls
//! a file's etag and commit. Here a server is trusted as little as a checkpoint is: names are
//! checked before they become paths, lengths and (where the hub knows them) SHA-256 digests before
//! a file gets its name.
#![forbid(unsafe_code)]

mod address;
mod choice;
mod environment;
mod error;
mod http;
mod pace;
mod store;
mod transfer;
mod watchdog;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::cancel::CancelToken;
use crate::checkpoint::{
    self, Beginning, Checkpoint, CheckpointError, Config, Dequantize, Directory,
    MAX_ALL_HEADERS_BYTES, MAX_INDEX_BYTES, OpenOptions, header_length, parse_index,
};

pub use environment::Hub;
pub use error::HubError;

use http::Client;
use store::Entry;
use transfer::Transfer;

const CONFIG: &str = "config.json";
/// Most bytes of the answer that lists a model's files.
const MAX_INFO_BYTES: u64 = 32 << 20;
/// How often a request is repeated that failed for a reason that may pass.
const RETRIES: u32 = 3;
/// Wait before the first repetition; it doubles with every further one.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// How far the download of one file has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileProgress<'a> {
    /// Its name.
    pub file: &'a str,
    /// Bytes that are on the disk, with those of an earlier, interrupted download.
    pub bytes_done: u64,
    /// Bytes of the file.
    pub bytes_total: u64,
}

/// How to download.
#[non_exhaustive]
pub struct FetchOptions<'a> {
    /// A branch, a tag or a commit; `main` without one.
    pub revision: Option<&'a str>,
    /// Called after every few hundred KiB.
    pub progress: &'a (dyn Fn(FileProgress<'_>) + Sync),
    /// Which weights that another method has quantized are decoded as they are read; where only headers
    /// are asked for.
    pub dequantize: Dequantize,
    /// Looked at between them, and while nothing comes.
    pub cancel: CancelToken,
}

impl Default for FetchOptions<'_> {
    fn default() -> Self {
        FetchOptions {
            revision: None,
            progress: &|_| {},
            dequantize: Dequantize::default(),
            cancel: CancelToken::new(),
        }
    }
}

tightfit_common::setters!([<'a>] FetchOptions<'a>:
    with_revision: revision, Option<&'a str>;
    with_progress: progress, &'a (dyn Fn(FileProgress<'_>) + Sync);
    with_dequantize: dequantize, Dequantize;
    with_cancel: cancel, CancelToken;
);

/// Downloads a model into the cache, unless it is complete there, and gives its directory.
///
/// Only the files that are needed are asked for: configuration, tokenizer, and weights in
/// safetensors. A download that was interrupted is resumed where it ended.
///
/// # Errors
/// A [`HubError`] that says what was asked for and where. Complete files stay in the cache.
pub fn fetch(hub: &Hub, model: &str, options: &FetchOptions<'_>) -> Result<PathBuf, HubError> {
    with_model(hub, model, options, |mut download, revision, info| {
        download.all(model, revision, info)?;
        download.entry.refer(revision, &info.sha)?;
        Ok(download.entry.snapshot())
    })
}

/// Asks for a model's configuration, its index and the headers of its weights, and for nothing else:
/// enough to plan for it. Nothing is written into the cache.
///
/// # Errors
/// As [`fetch`]; and [`CheckpointError::HeadersOnly`] where some of the weights have to be read, as for
/// what bitsandbytes has quantized.
pub fn headers(hub: &Hub, model: &str, options: &FetchOptions<'_>) -> Result<Checkpoint, HubError> {
    with_model(hub, model, options, |download, revision, info| {
        download.headers(model, revision, info, options.dequantize)
    })
}

fn with_model<T>(
    hub: &Hub,
    model: &str,
    options: &FetchOptions<'_>,
    work: impl FnOnce(Download<'_>, &str, &RepoInfo) -> Result<T, HubError>,
) -> Result<T, HubError> {
    let (progress, cancel) = (options.progress, &options.cancel);
    let revision = options.revision.unwrap_or("main");
    let Some(name) = checkpoint::entry_name(model) else {
        return Err(CheckpointError::NotAModelName {
            model: model.into(),
        }
        .into());
    };
    if !checkpoint::is_revision(revision) {
        return Err(CheckpointError::NotARevision {
            revision: revision.into(),
        }
        .into());
    }
    let Some(cache) = hub.cache.cache() else {
        return Err(CheckpointError::NoCache {
            model: model.into(),
        }
        .into());
    };
    if hub.offline {
        return Err(HubError::Offline {
            model: model.into(),
            revision: revision.into(),
            looked_for: cache.join(name),
        });
    }
    let home = hub.check()?;
    let client = Client::new(hub, home, model, revision, cancel);
    let api = ApiBuilder::from_cache(Cache::new(cache.clone()))
        .with_endpoint(hub.endpoint.clone())
        // It only knows addresses; whatever is sent, and to whom, is our client's.
        .with_token(None)
        .with_progress(false)
        .build()
        .map_err(|error| HubError::Network {
            url: hub.endpoint.clone(),
            problem: error.to_string(),
        })?;
    let repository = |revision: &str| {
        let repository =
            Repo::with_revision(model.to_owned(), RepoType::Model, revision.to_owned());
        api.repo(repository)
    };
    let info = info(&client, &repository(revision))?;
    let download = Download {
        client: &client,
        entry: Entry::new(cache.join(name), &info.sha),
        // Of the commit, so that all files belong together even if the branch moves meanwhile.
        repository: repository(&info.sha),
        progress,
    };
    work(download, revision, &info)
}

/// What the model consists of at the revision.
fn info(client: &Client<'_>, repository: &ApiRepo) -> Result<RepoInfo, HubError> {
    let request = repository.info_request();
    let url = request.uri_ref().map(ToString::to_string);
    let url = url.unwrap_or_else(|| client.hub.endpoint.clone());
    let text = client.patiently(|| client.text(&url, "a list of files", MAX_INFO_BYTES))?;
    let bad = |problem: String| HubError::BadAnswer {
        url: url.clone(),
        problem,
    };
    let info: RepoInfo =
        serde_json::from_str(&text).map_err(|error| bad(format!("no list of files: {error}")))?;
    if info.sha.len() == 40 && info.sha.bytes().all(|b| b.is_ascii_hexdigit()) {
        Ok(info)
    } else {
        Err(bad(format!(
            "'{}' is not a commit",
            checkpoint::shown(&info.sha)
        )))
    }
}

/// The file to begin the weights with.
fn chosen<'n>(names: &[&'n str], model: &str, revision: &str) -> Result<&'n str, HubError> {
    choice::weights(names).ok_or_else(|| HubError::NoSafetensors {
        model: model.into(),
        revision: revision.into(),
        have: choice::other_weights(names).map(str::to_owned),
    })
}

/// All shards of an index are there.
fn check_shards(
    shards: &[String],
    names: &[&str],
    model: &str,
    revision: &str,
) -> Result<(), HubError> {
    match shards.iter().find(|shard| !names.contains(&shard.as_str())) {
        Some(shard) => Err(HubError::MissingShard {
            model: model.into(),
            revision: revision.into(),
            shard: shard.clone(),
        }),
        None => Ok(()),
    }
}

/// A download under way.
struct Download<'a> {
    client: &'a Client<'a>,
    entry: Entry,
    repository: ApiRepo,
    progress: &'a (dyn Fn(FileProgress<'_>) + Sync),
}

impl Download<'_> {
    /// The text of a small file; `None` where the model has none.
    fn small(&self, names: &[&str], name: &str) -> Result<Option<String>, HubError> {
        let Some((limit, what)) = choice::limit(name).filter(|_| names.contains(&name)) else {
            return Ok(None);
        };
        let url = self.repository.url(name);
        let text = self
            .client
            .patiently(|| self.client.text(&url, what, limit))?;
        Ok(Some(text))
    }

    fn headers(
        &self,
        model: &str,
        revision: &str,
        info: &RepoInfo,
        dequantize: Dequantize,
    ) -> Result<Checkpoint, HubError> {
        let cancel = self.client.cancel;
        let names: Vec<&str> = info
            .siblings
            .iter()
            .map(|file| file.rfilename.as_str())
            .collect();
        let weights = chosen(&names, model, revision)?;
        let config = match self.small(&names, CONFIG)? {
            Some(text) => Some(Config::parse(Path::new(CONFIG), text)?),
            None => None,
        };
        let (mut index, mut shards) = (None, vec![weights.to_owned()]);
        if weights == choice::INDEX {
            let text = self.small(&names, weights)?.unwrap_or_default();
            let parsed = parse_index(Path::new(weights), &text, cancel)?;
            check_shards(&parsed.shards, &names, model, revision)?;
            shards.clone_from(&parsed.shards);
            index = Some(parsed);
        }
        let (mut files, mut total) = (Vec::with_capacity(shards.len()), 0);
        for name in shards {
            let file = self.beginning(&name, &mut total)?;
            (self.progress)(FileProgress {
                file: &name,
                bytes_done: file.bytes.len() as u64,
                bytes_total: file.bytes.len() as u64,
            });
            files.push(file);
        }
        let options = OpenOptions::default()
            .with_dequantize(dequantize)
            .with_cancel(cancel.clone());
        Ok(Checkpoint::of_beginnings(
            model, config, index, files, &options,
        )?)
    }

    /// A file as far as its header goes. `total` are the bytes of all headers.
    fn beginning(&self, name: &str, total: &mut u64) -> Result<Beginning, HubError> {
        let url = self.repository.url(name);
        let client = self.client;
        let length = client.patiently(|| client.about(&url))?.bytes;
        let first = client.patiently(|| client.beginning(&url, length.min(8) as usize))?;
        let mut bytes = first.clone();
        // What is too short, or something else, is told when it is opened.
        if let Ok(first) = <[u8; 8]>::try_from(first)
            && let Ok(header) = header_length(Path::new(name), first, length)
        {
            *total += header as u64;
            if *total > MAX_ALL_HEADERS_BYTES {
                return Err(HubError::TooLarge {
                    url,
                    what: "all headers",
                    have: *total,
                    limit: MAX_ALL_HEADERS_BYTES,
                });
            }
            bytes = client.patiently(|| client.beginning(&url, 8 + header))?;
        }
        Ok(Beginning {
            name: name.to_owned(),
            bytes: bytes.into(),
            length,
        })
    }

    fn all(&mut self, model: &str, revision: &str, info: &RepoInfo) -> Result<(), HubError> {
        let names: Vec<&str> = info
            .siblings
            .iter()
            .map(|file| file.rfilename.as_str())
            .collect();
        let weights = chosen(&names, model, revision)?;
        // The index first: what is wrong with it is known before anything large is fetched, and
        // with it an interrupted download is known to be incomplete.
        let mut shards = vec![weights.to_owned()];
        if weights == choice::INDEX {
            let path = self.file(weights)?;
            let directory = Directory::open(&self.entry.snapshot())?;
            let cancel = self.client.cancel;
            let text = directory.read_text(weights, "an index (bytes)", MAX_INDEX_BYTES, cancel)?;
            shards = parse_index(&path, &text.unwrap_or_default(), cancel)?.shards;
            check_shards(&shards, &names, model, revision)?;
        }
        for name in choice::SMALL
            .into_iter()
            .filter(|name| names.contains(name))
        {
            self.file(name)?;
        }
        for shard in &shards {
            self.file(shard)?;
        }
        Ok(())
    }

    /// Downloads one file, unless it is there.
    fn file(&mut self, name: &str) -> Result<PathBuf, HubError> {
        let path = self.entry.snapshot().join(name);
        if path.is_file() {
            return Ok(path);
        }
        let url = self.repository.url(name);
        let mut transfer = Transfer {
            client: self.client,
            entry: &self.entry,
            name,
            url: &url,
            progress: self.progress,
        };
        self.client.patiently(|| transfer.run())?;
        Ok(path)
    }
}
