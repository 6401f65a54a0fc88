//! A Hugging Face hub on 127.0.0.1: as much of HTTP/1.1 as a download needs, and misbehavior.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::json;

/// The commit of every revision that the server knows.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server has and how it behaves.
#[derive(Debug, Clone, Default)]
pub struct Behavior {
    /// Files of the model `org/name`.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Branches and tags other than `main`.
    pub revisions: Vec<String>,
    /// The token without which nothing is answered.
    pub token: Option<String>,
    /// Closes the connection after this many bytes of every `.safetensors` answer, so many times.
    pub drop_after: Option<(usize, u32)>,
    /// Takes its time between small pieces of an answer.
    pub slow: bool,
    /// Redirects requests whose path begins with the one text to the other with the path behind it.
    pub redirect: Option<(String, String)>,
    /// Of every `.safetensors` answer, sends so many bytes at once and then one every tenth of a
    /// second, so many times.
    pub drip: Option<(usize, u32)>,
    /// The same for the list of files, from its first byte on, always.
    pub drip_list: bool,
    /// Says nothing at all where bytes of `.safetensors` files are asked for.
    pub silent: bool,
    /// Sends the list of files without its length, and with so many spaces behind it.
    pub padded_list: Option<usize>,
    /// Says that files of this name have this length.
    pub announce: Option<(String, u64)>,
    /// Sends whole files whatever range is asked for.
    pub ignore_ranges: bool,
    /// The header `Content-Range` of answers to ranges instead of the right one; none where it is empty.
    pub content_range: Option<String>,
    /// Answers every request for a file so: status, headers, body.
    pub refusal: Option<(u16, Vec<String>, String)>,
    /// Redirects without a word on the file, as mirrors do.
    pub bare_redirect: bool,
    /// Adds this to the lengths in answers about files.
    pub longer: i64,
    /// The etag of every file instead of its own.
    pub etag: Option<String>,
    /// The commit instead of the usual.
    pub commit: Option<String>,
}

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `HEAD`.
    pub method: String,
    /// With the leading slash.
    pub path: String,
    /// Header `Range`.
    pub range: Option<String>,
    /// Header `Authorization`.
    pub authorization: Option<String>,
}

/// The server. It runs until the test's process ends.
#[derive(Debug)]
pub struct HubServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    behavior: Behavior,
    requests: Vec<Request>,
    bytes_sent: usize,
}

impl HubServer {
    /// Starts one.
    pub fn start(behavior: Behavior) -> HubServer {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State {
            behavior,
            requests: Vec::new(),
            bytes_sent: 0,
        }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                // The command going away is nothing to complain about.
                thread::spawn(move || serve(&stream, &shared));
            }
        });
        HubServer { address, state }
    }

    /// What `HF_ENDPOINT` is to be.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The requests so far, which are forgotten.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    /// Bytes of all answers so far, heads included.
    pub fn bytes_sent(&self) -> usize {
        self.state.lock().unwrap().bytes_sent
    }

    /// Changes how it behaves.
    pub fn change(&self, change: impl FnOnce(&mut Behavior)) {
        change(&mut self.state.lock().unwrap().behavior);
    }
}

/// The files of a directory, for [`Behavior::files`].
pub fn files_of(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

fn serve(stream: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let request = read_request(&mut reader)?;
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        let (bytes, keep) = answer(&request, &mut state.behavior);
        state.bytes_sent += bytes.len();
        let behavior = &mut state.behavior;
        let slow = behavior.slow;
        let body = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        let body = body.map_or(0, |end| end + 4);
        let is_weights = request.method == "GET" && request.path.ends_with(".safetensors");
        let is_silent = is_weights && behavior.silent;
        // How much is sent before it begins to drip.
        let drip = match &mut behavior.drip {
            Some((at_once, times @ 1..)) if is_weights => {
                *times -= 1;
                Some(body + *at_once)
            }
            _ if behavior.drip_list && request.path.contains("/revision/") => Some(body),
            _ => None,
        };
        drop(state);
        let mut stream = stream;
        if is_silent {
            thread::sleep(Duration::from_secs(600));
            return None;
        }
        if let Some(at_once) = drip.filter(|at_once| *at_once < bytes.len()) {
            stream.write_all(&bytes[..at_once]).ok()?;
            for byte in bytes[at_once..].chunks(1) {
                thread::sleep(Duration::from_millis(100));
                stream.write_all(byte).ok()?;
            }
            continue;
        }
        for piece in bytes.chunks(if slow { 1000 } else { bytes.len() }) {
            stream.write_all(piece).ok()?;
            if slow {
                thread::sleep(Duration::from_millis(100));
            }
        }
        if !keep {
            stream.shutdown(std::net::Shutdown::Both).ok();
            return None;
        }
    }
}

fn read_request(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    let mut words = line.split_whitespace();
    let mut request = Request {
        method: words.next()?.to_owned(),
        path: words.next()?.to_owned(),
        range: None,
        authorization: None,
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            return Some(request);
        };
        let value = Some(value.trim().to_owned());
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = value,
            "authorization" => request.authorization = value,
            _ => {}
        }
    }
}

/// The answer, and whether the connection stays.
fn answer(request: &Request, behavior: &mut Behavior) -> (Vec<u8>, bool) {
    if let Some((prefix, base)) = &behavior.redirect
        && let Some(file) = request.path.strip_prefix(prefix.as_str())
    {
        let name = file.rsplit('/').next().unwrap_or_default();
        let mut headers = vec![format!("Location: {base}{}", request.path)];
        if let Some(content) = behavior.files.get(name)
            && !behavior.bare_redirect
        {
            headers.push(format!("X-Linked-Size: {}", content.len()));
            headers.push(format!("X-Linked-Etag: \"{}\"", etag(content)));
        }
        return (head(302, 0, &headers), true);
    }
    if let Some((status, headers, body)) = &behavior.refusal
        && request.path.contains("/resolve/")
    {
        let mut bytes = head(*status, body.len() as i64, headers);
        if request.method != "HEAD" {
            bytes.extend(body.as_bytes());
        }
        return (bytes, true);
    }
    if let Some(token) = &behavior.token
        && request.authorization.as_deref() != Some(&format!("Bearer {token}"))
    {
        return (head(401, 0, &[]), true);
    }
    let commit = behavior.commit.clone().unwrap_or_else(|| COMMIT.to_owned());
    let known = |revision: &str| {
        revision == "main" || revision == commit || behavior.revisions.iter().any(|r| r == revision)
    };
    if let Some(revision) = request.path.strip_prefix("/api/models/org/name/revision/") {
        if !known(&revision.replace("%2F", "/")) {
            return (head(404, 0, &[]), true);
        }
        let siblings: Vec<_> = behavior
            .files
            .keys()
            .map(|name| json!({ "rfilename": name }))
            .collect();
        let body = json!({ "sha": commit, "siblings": siblings }).to_string();
        let Some(spaces) = behavior.padded_list else {
            let mut bytes = head(200, body.len() as i64, &[]);
            bytes.extend(body.as_bytes());
            return (bytes, true);
        };
        let mut bytes = b"HTTP/1.1 200 Status\r\nConnection: close\r\n\r\n".to_vec();
        bytes.extend(body.as_bytes());
        bytes.resize(bytes.len() + spaces, b' ');
        return (bytes, false);
    }
    // Where a redirect has led back to.
    let path = request.path.strip_prefix("/again").unwrap_or(&request.path);
    let file = path.strip_prefix("/org/name/resolve/");
    let file = file.and_then(|file| file.split_once('/'));
    let Some((name, content)) = file
        .filter(|(revision, _)| known(revision))
        .and_then(|(_, name)| Some((name, behavior.files.get(name)?)))
    else {
        return (head(404, 0, &[]), true);
    };
    let etag = behavior.etag.clone().unwrap_or_else(|| etag(content));
    let length = content.len();
    let announced = match &behavior.announce {
        Some((other, bytes)) if other == name => *bytes as i64,
        _ => length as i64,
    };
    if request.method == "HEAD" {
        let headers = [
            format!("ETag: \"{etag}\""),
            format!("X-Repo-Commit: {commit}"),
            format!("X-Linked-Size: {}", announced + behavior.longer),
            format!("X-Linked-Etag: \"{etag}\""),
        ];
        return (head(200, length as i64, &headers), true);
    }
    let from = request.range.as_deref().filter(|_| !behavior.ignore_ranges);
    let range = from.and_then(|range| {
        let (from, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        let last = match last {
            "" => usize::MAX,
            last => last.parse().ok()?,
        };
        Some((from.parse::<usize>().ok()?, last))
    });
    let mut bytes = match range {
        Some((from, _)) if from >= length => return (head(416, 0, &[]), true),
        Some((from, last)) => {
            let last = last.min(length - 1);
            let range = match behavior.content_range.as_deref() {
                None => vec![format!(
                    "Content-Range: bytes {from}-{}/{length}",
                    length - 1
                )],
                Some("") => Vec::new(),
                Some(range) => vec![format!("Content-Range: {range}")],
            };
            let mut bytes = head(206, (last + 1 - from) as i64, &range);
            bytes.extend(&content[from..=last]);
            bytes
        }
        None => {
            let mut bytes = head(200, length as i64, &[]);
            bytes.extend(content);
            bytes
        }
    };
    if name.ends_with(".safetensors")
        && let Some((after, times @ 1..)) = &mut behavior.drop_after
    {
        *times -= 1;
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        bytes.truncate(end + *after);
        return (bytes, false);
    }
    (bytes, true)
}

/// Not a digest, but one word for one content.
fn etag(content: &[u8]) -> String {
    let sum = content.iter().fold(7u64, |sum, b| {
        sum.wrapping_mul(31).wrapping_add(u64::from(*b))
    });
    format!("{sum:040x}")
}

fn head(status: u16, length: i64, headers: &[String]) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\n");
    for header in headers {
        text += &format!("{header}\r\n");
    }
    (text + "\r\n").into_bytes()
}
