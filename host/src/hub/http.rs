//! Requests: limited in time, stoppable, and with the token for the endpoint only.

use std::thread;
use std::time::{Duration, Instant};

use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

use super::{FIRST_WAIT, Hub, HubError, RETRIES};
use crate::checkpoint::shown;
use crate::load::CancelToken;

/// A server that says nothing for this long is given up.
const SILENCE: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(10);
/// Redirects within the hub that are followed when asking about a file.
const MAX_REDIRECTS: usize = 5;

/// What asks the hub about one model.
pub(super) struct Client<'a> {
    agent: Agent,
    hub: &'a Hub,
    model: &'a str,
    revision: &'a str,
    pub(super) cancel: &'a CancelToken,
}

/// What the hub says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct About {
    /// Names its content; checked to be a plain word.
    pub(super) etag: String,
    pub(super) bytes: u64,
}

impl<'a> Client<'a> {
    pub(super) fn new(
        hub: &'a Hub,
        model: &'a str,
        revision: &'a str,
        cancel: &'a CancelToken,
    ) -> Client<'a> {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("tightfit/", env!("CARGO_PKG_VERSION")))
            // Lengths and ranges are those of the files only if nothing is compressed on the way.
            .accept_encoding("identity")
            .build()
            .into();
        Client {
            agent,
            hub,
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

    /// The address and the text that a request is answered with.
    pub(super) fn text(
        &self,
        request: RequestBuilder<WithoutBody>,
        limit: u64,
    ) -> Result<(String, String), HubError> {
        self.check_cancelled()?;
        let url = request
            .uri_ref()
            .map_or_else(|| self.hub.endpoint.clone(), ToString::to_string);
        let request = request
            .config()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build();
        let mut response = request.call().map_err(network(&url))?;
        self.check_status(&url, response.status().as_u16())?;
        let text = response
            .body_mut()
            .with_config()
            .limit(limit)
            .read_to_string()
            .map_err(network(&url))?;
        Ok((url, text))
    }

    /// Asks about a file.
    pub(super) fn about(&self, url: &str) -> Result<About, HubError> {
        let mut at = url.to_owned();
        for _ in 0..MAX_REDIRECTS {
            self.check_cancelled()?;
            let response = self
                .authorized(self.agent.head(&at))
                .config()
                .max_redirects(0)
                .build()
                .call()
                .map_err(network(&at))?;
            self.check_status(&at, response.status().as_u16())?;
            // Elsewhere are only the bytes: the hub has said of them what is to be known.
            match self.on_the_hub(header(&response, "location")) {
                Some(next) if response.status().is_redirection() => at = next,
                _ => return about(&at, &response),
            }
        }
        Err(HubError::BadAnswer {
            url: url.to_owned(),
            problem: "it redirects without end".to_owned(),
        })
    }

    /// The bytes of a file from an offset on; all of them if the server does not know better.
    pub(super) fn get(&self, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        self.check_cancelled()?;
        let mut request = self.authorized(self.agent.get(url));
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let response = request.call().map_err(network(url))?;
        let status = response.status().as_u16();
        // Nothing behind the offset: the caller starts again.
        if status != 416 {
            self.check_status(url, status)?;
        }
        Ok(response)
    }

    fn authorized(&self, request: RequestBuilder<WithoutBody>) -> RequestBuilder<WithoutBody> {
        match &self.hub.token {
            Some(token) => request.header("authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    /// The address that a redirect leads to, if it is the hub's own.
    fn on_the_hub(&self, location: Option<&str>) -> Option<String> {
        let location = location?;
        let (scheme, rest) = self.hub.endpoint.split_once("://")?;
        let host = rest.split('/').next()?;
        let origin = format!("{scheme}://{host}");
        if location.starts_with('/') && !location.starts_with("//") {
            return Some(format!("{origin}{location}"));
        }
        let rest = location.strip_prefix(&origin)?;
        rest.starts_with('/').then(|| location.to_owned())
    }

    fn check_status(&self, url: &str, status: u16) -> Result<(), HubError> {
        match status {
            200..=399 => Ok(()),
            401 | 403 => Err(HubError::Unauthorized {
                model: self.model.into(),
                url: url.into(),
                status,
                token: self.hub.token.is_some(),
            }),
            404 => Err(HubError::NotFound {
                model: self.model.into(),
                revision: self.revision.into(),
                url: url.into(),
            }),
            _ => Err(HubError::Status {
                url: url.into(),
                status,
            }),
        }
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
    if etag.is_empty() || etag.len() > 128 || !etag.bytes().all(is_word) {
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
