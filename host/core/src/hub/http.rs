//! Requests: limited in time, stoppable, and with the token for the endpoint only.

use std::cell::RefCell;
use std::io::{ErrorKind, Read};
use std::thread;
use std::time::{Duration, Instant};

use ureq::http::{Method, Response, Uri};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

use super::address::{Origin, redirected};
use super::pace::{Pace, TooSlow};
use super::watchdog::Watchdog;
use super::{FIRST_WAIT, Hub, HubError, RETRIES};
use crate::cancel::CancelToken;
use crate::checkpoint::{is_plain_file_name, shown};

const CONNECT: Duration = Duration::from_secs(10);
/// Redirects that are followed for one request.
const MAX_REDIRECTS: usize = 10;
/// What is read at once of a text.
const TEXT_PIECE: usize = 64 << 10;
/// Longest answer in which a server's message is looked for.
const MAX_MESSAGE_BYTES: usize = 16 << 10;

/// What asks the hub about one model.
pub(super) struct Client<'a> {
    /// Of no use any more, and replaced, once its connections have been shut down.
    agent: RefCell<Agent>,
    watchdog: Watchdog,
    pub(super) hub: &'a Hub,
    /// Whom the token is for.
    home: Origin,
    model: &'a str,
    revision: &'a str,
    pub(super) cancel: &'a CancelToken,
}

/// Which bytes of a file are asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    from: u64,
    last: Option<u64>,
}

impl Range {
    const ALL: Range = Range {
        from: 0,
        last: None,
    };
}

/// What the hub says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct About {
    /// Names its content; checked to be a plain word.
    pub(super) etag: String,
    pub(super) bytes: u64,
}

/// Connections that keep within the user's patience, and go nowhere by themselves.
fn agent(hub: &Hub) -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        // Followed by us: it compares hosts only when it decides who is sent the token.
        .max_redirects(0)
        .timeout_resolve(Some(CONNECT))
        .timeout_connect(Some(CONNECT))
        .timeout_send_request(Some(hub.patience))
        .timeout_recv_response(Some(hub.patience))
        .timeout_per_read(Some(hub.patience))
        .user_agent(concat!("tightfit/", env!("CARGO_PKG_VERSION")))
        // Lengths and ranges are those of the files only if nothing is compressed on the way.
        .accept_encoding("identity")
        .build()
        .into()
}

impl<'a> Client<'a> {
    pub(super) fn new(
        hub: &'a Hub,
        home: Origin,
        model: &'a str,
        revision: &'a str,
        cancel: &'a CancelToken,
    ) -> Client<'a> {
        Client {
            agent: RefCell::new(agent(hub)),
            watchdog: Watchdog::new(cancel.clone()),
            hub,
            home,
            model,
            revision,
            cancel,
        }
    }

    /// Repeats what fails for a reason that may pass.
    pub(super) fn patiently<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, HubError>,
    ) -> Result<T, HubError> {
        let mut wait = FIRST_WAIT;
        for _ in 0..RETRIES {
            match attempt() {
                Err(error) if error.may_pass() => {
                    tracing::info!("{error}; trying again");
                    self.pause(wait)?;
                    wait *= 2;
                }
                other => return other,
            }
        }
        attempt()
    }

    /// Waits, unless it is asked to stop.
    pub(super) fn pause(&self, time: Duration) -> Result<(), HubError> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.check_cancelled()?;
            thread::sleep(Duration::from_millis(20));
        }
        self.check_cancelled()
    }

    pub(super) fn check_cancelled(&self) -> Result<(), HubError> {
        if self.cancel.is_cancelled() {
            Err(HubError::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Does what may block in a connection, for no longer than this. What has taken longer, or was
    /// given up because the user asked for it, has failed.
    fn limited<T>(
        &self,
        url: &str,
        most: Duration,
        block: impl FnOnce() -> Result<T, HubError>,
    ) -> Result<T, HubError> {
        self.check_cancelled()?;
        let current = self.agent.borrow().clone();
        let (result, was_late) = self.watchdog.limited(&current, most, block);
        if !was_late && !self.cancel.is_cancelled() {
            return result;
        }
        *self.agent.borrow_mut() = agent(self.hub);
        self.check_cancelled()?;
        Err(network(url)(format_args!(
            "there was no answer within {} s",
            most.as_secs()
        )))
    }

    /// Sends a request and follows where it is redirected to.
    ///
    /// The token is sent to the hub's own scheme, host and port only, and never again once a redirect
    /// has led away from there. A `HEAD` is not redirected away by a hub that has said what is to be
    /// known of the bytes elsewhere. Gives the address that answered.
    fn send(
        &self,
        method: &Method,
        url: &str,
        range: Range,
    ) -> Result<(String, Response<Body>), HubError> {
        let bad = |at: &str, problem: &str| HubError::BadAnswer {
            url: at.to_owned(),
            problem: problem.to_owned(),
        };
        let mut at: Uri = url.parse().map_err(network(url))?;
        let mut is_home = true;
        for _ in 0..=MAX_REDIRECTS {
            let origin = Origin::of(&at).map_err(|problem| bad(url, problem))?;
            is_home &= origin == self.home;
            let request = self.request(method, &at, range, is_home);
            let shown = match is_home {
                true => at.to_string(),
                // Elsewhere the rest is often a key to the file.
                false => shown(at.to_string().split('?').next().unwrap_or_default()).to_string(),
            };
            // Each of its phases has a limit of its own; together they cannot take longer.
            let most = 2 * CONNECT + 2 * self.hub.patience;
            let response =
                self.limited(&shown, most, || request.call().map_err(network(&shown)))?;
            let status = response.status().as_u16();
            // Nothing behind the offset: the caller starts again.
            if status >= 400 && !(status == 416 && range.from > 0) {
                return Err(self.refused(&shown, response, is_home));
            }
            let location = response.headers().get("location");
            let Some(location) = location.filter(|_| response.status().is_redirection()) else {
                return Ok((shown, response));
            };
            let location = location.to_str();
            let next = location.map_or(Err("it redirects to what is no text"), |location| {
                redirected(&at, location)
            });
            let next = next.map_err(|problem| bad(&shown, problem))?;
            // A mirror that only leads to another says nothing of the file itself.
            if method == Method::HEAD
                && Origin::of(&next).as_ref() != Ok(&self.home)
                && about(&shown, &response)
                    .is_ok_and(|_| header(&response, "x-linked-size").is_some())
            {
                return Ok((shown, response));
            }
            at = next;
        }
        Err(HubError::BadAnswer {
            url: url.to_owned(),
            problem: format!("it redirects more than {MAX_REDIRECTS} times"),
        })
    }

    fn request(
        &self,
        method: &Method,
        at: &Uri,
        range: Range,
        with_token: bool,
    ) -> RequestBuilder<WithoutBody> {
        let agent = self.agent.borrow();
        let mut request = match *method {
            Method::HEAD => agent.head(at),
            _ => agent.get(at),
        };
        if let Some(token) = self.hub.token.as_ref().filter(|_| with_token) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        match (range.from, range.last) {
            (0, None) => request,
            (from, None) => request.header("range", format!("bytes={from}-")),
            (from, Some(last)) => request.header("range", format!("bytes={from}-{last}")),
        }
    }

    /// The text at an address, of at most this many bytes.
    pub(super) fn text(
        &self,
        url: &str,
        what: &'static str,
        limit: u64,
    ) -> Result<String, HubError> {
        let (url, response) = self.send(&Method::GET, url, Range::ALL)?;
        let too_large = |have| HubError::TooLarge {
            url: url.clone(),
            what,
            have,
            limit,
        };
        let announced = header(&response, "content-length").and_then(|text| text.parse().ok());
        if let Some(announced) = announced.filter(|&announced| announced > limit) {
            return Err(too_large(announced));
        }
        let mut body = response.into_body().into_reader();
        let (mut bytes, mut piece) = (Vec::new(), vec![0; TEXT_PIECE]);
        let mut pace = Pace::new(self.hub.patience);
        loop {
            let read = self.read(&url, &mut body, &mut piece, &mut pace)?;
            if read == 0 {
                break;
            }
            bytes.extend_from_slice(&piece[..read]);
            if bytes.len() as u64 > limit {
                return Err(too_large(bytes.len() as u64));
            }
        }
        String::from_utf8(bytes).map_err(|_| HubError::BadAnswer {
            url,
            problem: "it is not text".to_owned(),
        })
    }

    /// Reads some of a body; nothing at its end.
    pub(super) fn read(
        &self,
        url: &str,
        body: &mut impl Read,
        buffer: &mut [u8],
        pace: &mut Pace,
    ) -> Result<usize, HubError> {
        let start = Instant::now();
        let read = self.limited(url, self.hub.patience, || {
            loop {
                match body.read(buffer) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    other => return other.map_err(network(url)),
                }
            }
        })?;
        if read > 0 {
            pace.came(read as u64, start.elapsed())
                .map_err(|slow| too_slow(url, slow))?;
        }
        Ok(read)
    }

    /// Asks about a file.
    pub(super) fn about(&self, url: &str) -> Result<About, HubError> {
        match self.send(&Method::HEAD, url, Range::ALL) {
            Ok((at, response)) => about(&at, &response),
            // What is said of it in a body is not there in the answer to a `HEAD`.
            Err(error) if error.is_unexplained() => {
                match self.send(&Method::GET, url, Range::ALL) {
                    Err(explained) => Err(explained),
                    Ok(_) => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// The bytes of a file from an offset on; all of them if the server does not know better.
    pub(super) fn get(&self, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        let range = Range { from, last: None };
        Ok(self.send(&Method::GET, url, range)?.1)
    }

    /// Returns this many bytes of a file from its beginning on, at most a few hundred MB. A server that
    /// sends more of it is not listened to any longer.
    pub(super) fn beginning(&self, url: &str, bytes: usize) -> Result<Vec<u8>, HubError> {
        let last = Some((bytes as u64).saturating_sub(1));
        let (url, response) = self.send(&Method::GET, url, Range { from: 0, last })?;
        let is_placed = match response.status().as_u16() {
            206 => header(&response, "content-range")
                .is_none_or(|range| range.trim().starts_with("bytes 0-")),
            status => status == 200,
        };
        if !is_placed {
            return Err(HubError::BadAnswer {
                problem: format!(
                    "it has status {} and not the first {bytes} bytes",
                    response.status().as_u16()
                ),
                url,
            });
        }
        let mut body = response.into_body().into_reader();
        let (mut have, mut piece) = (Vec::new(), vec![0; TEXT_PIECE]);
        let mut pace = Pace::new(self.hub.patience);
        while have.len() < bytes {
            let most = piece.len().min(bytes - have.len());
            match self.read(&url, &mut body, &mut piece[..most], &mut pace)? {
                0 => {
                    return Err(network(&url)("the connection was closed early"));
                }
                read => have.extend_from_slice(&piece[..read]),
            }
        }
        Ok(have)
    }

    /// The error for an answer with a status that does not help, with what the server says of it.
    fn refused(&self, url: &str, response: Response<Body>, is_home: bool) -> HubError {
        let status = response.status().as_u16();
        let said = match self.said(url, response) {
            Ok(said) => said,
            Err(HubError::Cancelled) => return HubError::Cancelled,
            Err(_) => None,
        };
        match status {
            401 | 403 if is_home => HubError::Unauthorized {
                model: self.model.into(),
                url: url.into(),
                status,
                token: self.hub.token.is_some(),
                said,
            },
            404 if is_home => HubError::NotFound {
                model: self.model.into(),
                revision: self.revision.into(),
                url: url.into(),
                said,
            },
            _ => HubError::Status {
                url: url.into(),
                status,
                said,
            },
        }
    }

    /// What a server says of an error: in the header that the hub has for it, or as `error` in JSON.
    fn said(&self, url: &str, response: Response<Body>) -> Result<Option<String>, HubError> {
        if let Some(message) = header(&response, "x-error-message").filter(|text| !text.is_empty())
        {
            return Ok(Some(message.to_owned()));
        }
        let is_json = header(&response, "content-type")
            .is_none_or(|kind| kind.to_ascii_lowercase().contains("json"));
        if !is_json {
            return Ok(None);
        }
        let mut body = response.into_body().into_reader();
        let (mut bytes, mut piece) = (Vec::new(), vec![0; MAX_MESSAGE_BYTES]);
        let mut pace = Pace::new(self.hub.patience);
        // A longer one is no message.
        while bytes.len() <= MAX_MESSAGE_BYTES {
            match self.read(url, &mut body, &mut piece, &mut pace)? {
                0 => break,
                read => bytes.extend_from_slice(&piece[..read]),
            }
        }
        let said = serde_json::from_slice(&bytes).ok();
        Ok(said
            .and_then(|Said { error }| error)
            .filter(|error| !error.is_empty()))
    }
}

/// What a server says in place of a file.
#[derive(serde::Deserialize)]
struct Said {
    error: Option<String>,
}

fn too_slow(url: &str, slow: TooSlow) -> HubError {
    HubError::TooSlow {
        url: url.into(),
        seconds: slow.seconds,
        need: slow.need,
        have: slow.have,
    }
}

/// A header's value, if it is text.
pub(super) fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

fn about(url: &str, response: &Response<Body>) -> Result<About, HubError> {
    let bad = |problem: String| HubError::BadAnswer {
        url: url.into(),
        problem,
    };
    // The linked ones are those of the content, where the answer itself is a redirect to it.
    let first = |names: [&str; 2]| names.iter().find_map(|name| header(response, name));
    let Some(etag) = first(["x-linked-etag", "etag"]) else {
        return Err(bad("it has no etag".to_owned()));
    };
    let etag = etag.trim_start_matches("W/").trim_matches('"');
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if etag.len() > 128 || !etag.bytes().all(is_word) || !is_plain_file_name(etag) {
        return Err(bad(format!("its etag is '{}'", shown(etag))));
    }
    match first(["x-linked-size", "content-length"]).map(str::parse) {
        Some(Ok(bytes)) => Ok(About {
            etag: etag.to_owned(),
            bytes,
        }),
        _ => Err(bad("it does not say how long the file is".to_owned())),
    }
}

/// For `map_err` of a request.
pub(super) fn network<E: ToString>(url: &str) -> impl FnOnce(E) -> HubError {
    let url = url.to_owned();
    move |error| HubError::Network {
        url,
        problem: shown(&error.to_string()).to_string(),
    }
}
