//! Downloads from a hub on 127.0.0.1.
#![forbid(unsafe_code)]

use std::fs;

use serde_json::json;
use tempfile::TempDir;
use tightfit_tests::command::Scratchpad;
use tightfit_tests::hub_server::{Behavior, COMMIT, HubServer, Request, files_of};
use tightfit_tests::models::{write_awkward, write_decoder};

const LOAD: [&str; 5] = ["load", "org/name", "--device", "sim:1GiB", "--json"];

/// A model in one file, with much that is not needed.
fn single() -> Behavior {
    let directory = TempDir::new().unwrap();
    write_awkward(directory.path());
    let mut files = files_of(directory.path());
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "pytorch_model.bin",
        "model.gguf",
        "onnx/model.onnx",
        ".gitattributes",
    ] {
        files.insert(name.into(), format!("\"{name}\"").into_bytes());
    }
    Behavior {
        files,
        ..Behavior::default()
    }
}

/// The same model in two files with an index.
fn sharded() -> Behavior {
    let directory = TempDir::new().unwrap();
    write_decoder(directory.path(), 2, 64);
    let other = TempDir::new().unwrap();
    write_awkward(other.path());
    let mut files = files_of(directory.path());
    let whole = files.remove("model.safetensors").unwrap();
    let extra = fs::read(other.path().join("model.safetensors")).unwrap();
    let names = |bytes: &[u8]| {
        let (_, metadata) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
        metadata.tensors().into_keys().collect::<Vec<_>>()
    };
    // Only what the first file lacks is taken from the second.
    let first = names(&whole);
    let mut map = serde_json::Map::new();
    for name in &first {
        map.insert(name.clone(), json!("model-00001-of-00002.safetensors"));
    }
    let second = safetensors::SafeTensors::deserialize(&extra).unwrap();
    let rest: Vec<_> = second
        .tensors()
        .into_iter()
        .filter(|(name, _)| !first.contains(name))
        .collect();
    for (name, _) in &rest {
        map.insert(name.clone(), json!("model-00002-of-00002.safetensors"));
    }
    let rest = safetensors::serialize(rest, None).unwrap();
    files.insert("model-00001-of-00002.safetensors".into(), whole);
    files.insert("model-00002-of-00002.safetensors".into(), rest);
    let index = json!({ "metadata": {}, "weight_map": map }).to_string();
    files.insert("model.safetensors.index.json".into(), index.into_bytes());
    Behavior {
        files,
        ..Behavior::default()
    }
}

/// A place whose command knows the server and nothing else.
fn scratchpad(server: &HubServer) -> Scratchpad {
    let mut scratchpad = Scratchpad::new();
    scratchpad.set("HF_HUB_OFFLINE", "0");
    scratchpad.set("HF_ENDPOINT", server.endpoint());
    scratchpad
}

fn start(behavior: Behavior) -> (HubServer, Scratchpad) {
    let server = HubServer::start(behavior);
    let scratchpad = scratchpad(&server);
    (server, scratchpad)
}

/// Names of the files whose bytes were asked for, in order.
fn fetched(requests: &[Request]) -> Vec<&str> {
    requests
        .iter()
        .filter(|request| request.method == "GET")
        .filter_map(|request| request.path.split_once("/resolve/")?.1.split_once('/'))
        .map(|(_, name)| name)
        .collect()
}

const ENTRY: &str = "../home/.cache/huggingface/hub/models--org--name";

#[test]
fn a_sharded_model_is_downloaded_once_and_loaded_from_the_cache_then() {
    let (server, scratchpad) = start(sharded());
    let report = scratchpad.run(&LOAD).succeeds().json();
    let requests = server.take_requests();
    assert_eq!(
        fetched(&requests),
        [
            "model.safetensors.index.json",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors"
        ]
    );
    assert!(
        requests
            .iter()
            .all(|request| request.authorization.is_none())
    );
    let again = scratchpad.run(&LOAD).succeeds().json();
    assert_eq!(server.take_requests(), []);
    assert_eq!(report["model"], again["model"]);
    // As other tools lay it out.
    let entry = scratchpad.path(ENTRY);
    assert_eq!(fs::read_to_string(entry.join("refs/main")).unwrap(), COMMIT);
    let snapshot = entry.join("snapshots").join(COMMIT);
    let config = snapshot.join("config.json");
    match fs::read_link(&config) {
        Ok(target) => assert!(target.starts_with("../../blobs")),
        // Where the system has no links, the file is there itself, and only there.
        Err(_) if cfg!(windows) => {
            assert!(config.is_file());
            assert_eq!(fs::read_dir(entry.join("blobs")).unwrap().count(), 0);
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn plans_take_headers_and_no_weights() {
    for ignore_ranges in [false, true] {
        let mut behavior = sharded();
        behavior.ignore_ranges = ignore_ranges;
        let whole: usize = behavior.files.values().map(Vec::len).sum();
        let (server, scratchpad) = start(behavior);
        for command in [
            &["inspect", "org/name"][..],
            &["plan", "org/name", "--device", "sim:1GiB"],
        ] {
            let report = scratchpad
                .run(&[command, &["--json"]].concat())
                .succeeds()
                .json();
            let model = report.get("model").unwrap_or(&report);
            assert_eq!(model["path"], "org/name");
            assert!(model["source_bytes"].as_u64().unwrap() as usize * 10 > whole * 8);
            let requests = server.take_requests();
            let weights = requests
                .iter()
                .filter(|r| r.method == "GET" && r.path.ends_with(".safetensors"));
            // First the length of the header, then the header.
            let ranges: Vec<_> = weights.map(|r| r.range.as_deref().unwrap()).collect();
            assert_eq!(ranges.len(), 4, "{ranges:?}");
            let last = |range: &str| {
                range
                    .strip_prefix("bytes=0-")
                    .unwrap()
                    .parse::<usize>()
                    .unwrap()
            };
            assert_eq!((last(ranges[0]), last(ranges[2])), (7, 7));
            assert!(!scratchpad.path(ENTRY).exists());
        }
        // What was planned is what is loaded then.
        let planned = scratchpad.run(&["plan", "org/name", "--device", "sim:1GiB", "--json"]);
        let planned = planned.succeeds().json();
        let loaded = scratchpad.run(&LOAD).succeeds().json();
        let reserved = |report: &serde_json::Value| report["devices"][0]["reserved"].clone();
        assert_eq!(reserved(&planned), reserved(&loaded));
        server.take_requests();
        scratchpad
            .run(&["plan", "org/name", "--device", "sim:1GiB"])
            .succeeds();
        assert_eq!(server.take_requests(), []);
    }
}

#[test]
fn a_plan_of_a_large_model_takes_less_than_a_hundredth_of_it() {
    let directory = TempDir::new().unwrap();
    write_decoder(directory.path(), 2, 512);
    let whole = files_of(directory.path());
    let name = "model-00001-of-00001.safetensors";
    let mut files = whole.clone();
    let weights = files.remove("model.safetensors").unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&weights).unwrap();
    let names = metadata.tensors().into_keys();
    let map: serde_json::Map<_, _> = names.map(|tensor| (tensor, json!(name))).collect();
    let index = json!({ "weight_map": map }).to_string();
    files.insert(name.into(), weights);
    files.insert("model.safetensors.index.json".into(), index.into_bytes());
    let total: usize = files.values().map(Vec::len).sum();
    let (server, scratchpad) = start(Behavior {
        files,
        ..Behavior::default()
    });
    scratchpad
        .run(&["plan", "org/name", "--device", "sim:1GiB"])
        .succeeds();
    let sent = server.bytes_sent();
    assert!(sent > 0 && sent * 100 < total, "{sent} of {total}");
}

#[test]
fn what_bitsandbytes_has_quantized_is_downloaded_for_a_plan() {
    let directory = TempDir::new().unwrap();
    let scratchpad = Scratchpad::new();
    write_decoder(directory.path(), 1, 64);
    let model = directory.path().to_str().unwrap();
    scratchpad.run(&["save", model, "quantized"]).succeeds();
    let (server, scratchpad) = start(Behavior {
        files: files_of(&scratchpad.path("quantized")),
        ..Behavior::default()
    });
    let text = scratchpad.run(&["inspect", "org/name"]).succeeds().stdout;
    assert!(
        text.contains("quantized by bitsandbytes already (4 bits)"),
        "{text}"
    );
    assert!(fetched(&server.take_requests()).contains(&"model.safetensors"));
}

#[test]
fn only_what_is_needed_is_downloaded() {
    let (server, scratchpad) = start(single());
    for command in ["load", "plan"] {
        let arguments = [command, "org/name", "--device", "sim:1GiB", "--quiet"];
        scratchpad.run(&arguments).succeeds();
        let requests = server.take_requests();
        let expected: &[&str] = match command {
            "load" => &[
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "model.safetensors",
            ],
            _ => &[],
        };
        assert_eq!(fetched(&requests), expected);
    }
}

#[test]
fn what_another_tool_left_out_is_downloaded() {
    let (server, scratchpad) = start(single());
    // As after loading only the tokenizer with another tool.
    let entry = scratchpad.path(ENTRY);
    let snapshot = entry.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(entry.join("refs")).unwrap();
    fs::write(entry.join("refs/main"), COMMIT).unwrap();
    fs::write(snapshot.join("tokenizer.json"), "{}").unwrap();
    scratchpad.run(&LOAD).succeeds();
    assert!(!fetched(&server.take_requests()).contains(&"tokenizer.json"));
}

#[test]
fn the_token_is_sent_where_it_is_set() {
    let mut behavior = single();
    behavior.token = Some("hf_secret".into());
    let (server, mut scratchpad) = start(behavior);
    let refused = scratchpad
        .run(&LOAD)
        .fails(3, &["org/name", "401", "set HF_TOKEN"]);
    // The server's port may have such digits, too.
    let said = refused.stderr.replace(&server.endpoint(), "");
    assert!(!said.contains("404"), "{said}");
    scratchpad.set("HF_TOKEN", "hf_wrong");
    let refused = scratchpad
        .run(&LOAD)
        .fails(3, &["401", "does not give access"]);
    assert!(!refused.stderr.contains("hf_wrong"), "{refused:?}");
    scratchpad.set("HF_TOKEN", "hf_secret");
    server.take_requests();
    scratchpad.run(&LOAD).succeeds();
    let sent = Some("Bearer hf_secret".to_owned());
    assert!(
        server
            .take_requests()
            .iter()
            .all(|request| request.authorization == sent)
    );
}

#[test]
fn what_the_hub_does_not_know_is_said() {
    let (server, scratchpad) = start(single());
    let endpoint = server.endpoint();
    scratchpad
        .run(&["load", "org/other", "--device", "cpu"])
        .fails(3, &["org/other", "main", &endpoint, "404"]);
    scratchpad
        .run(&["load", "org/name", "--device", "cpu", "--revision", "v9"])
        .fails(3, &["org/name", "v9", "404"]);
    // Not ids: the hub is not asked.
    server.take_requests();
    for model in ["./nowhere", "a/b/c", "/nowhere"] {
        scratchpad.run(&["inspect", model]).fails(3, &[model]);
    }
    scratchpad
        .run(&["inspect", "org/name", "--revision", "../x"])
        .fails(3, &["../x"]);
    assert_eq!(server.take_requests(), []);
}

#[test]
fn offline_says_what_was_looked_for_and_where() {
    let (server, mut scratchpad) = start(single());
    let words = [
        "org/name",
        "main",
        "models--org--name",
        "--offline",
        "HF_HUB_OFFLINE",
    ];
    scratchpad
        .run(&["inspect", "org/name", "--offline"])
        .fails(3, &words);
    scratchpad.set("HF_HUB_OFFLINE", "yes");
    scratchpad.run(&["inspect", "org/name"]).fails(3, &words);
    assert_eq!(server.take_requests(), []);
}

#[test]
fn an_unreachable_hub_is_named() {
    let mut scratchpad = Scratchpad::new();
    scratchpad.set("HF_HUB_OFFLINE", "");
    // The port is free: nothing listens on it any more.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    scratchpad.set("HF_ENDPOINT", format!("http://{port}"));
    scratchpad
        .run(&["inspect", "org/name"])
        .fails(3, &["cannot download", &port.to_string()]);
    scratchpad.set("HF_ENDPOINT", "hub.example");
    scratchpad
        .run(&["inspect", "org/name"])
        .fails(3, &["HF_ENDPOINT", "hub.example"]);
}

#[test]
fn a_dropped_connection_is_taken_up_again() {
    let mut behavior = single();
    behavior.drop_after = Some((5000, 1));
    let (server, scratchpad) = start(behavior);
    scratchpad.run(&LOAD).succeeds();
    let requests = server.take_requests();
    let ranges: Vec<_> = requests.iter().filter_map(|r| r.range.as_deref()).collect();
    assert_eq!(ranges, ["bytes=5000-"]);
}

#[test]
fn bytes_that_cannot_be_placed_are_asked_for_from_the_start() {
    for range in ["", "bytes 0-9/10", "bytes 5000-5001/9", "items 5000-"] {
        let mut behavior = single();
        behavior.drop_after = Some((5000, 1));
        behavior.content_range = Some(range.to_owned());
        let (server, scratchpad) = start(behavior);
        scratchpad.run(&LOAD).succeeds();
        let requests = server.take_requests();
        let weights = requests
            .iter()
            .filter(|r| r.method == "GET" && r.path.ends_with(".safetensors"));
        let ranges: Vec<_> = weights.map(|r| r.range.as_deref()).collect();
        assert_eq!(ranges, [None, Some("bytes=5000-"), None], "{range}");
    }
}

#[test]
fn what_the_hub_says_of_an_error_is_shown() {
    let long = "x".repeat(20_000);
    for (status, headers, body, word) in [
        (
            429,
            vec!["X-Error-Message: slow down, please".to_owned()],
            "",
            "slow down, please",
        ),
        (
            403,
            vec![],
            r#"{"error":"Access to org/name is restricted\u001b[2J"}"#,
            "is restricted\\u{1b}[2J",
        ),
        (
            404,
            vec!["Content-Type: application/json".to_owned()],
            r#"{"error":"Entry not found"}"#,
            "Entry not found",
        ),
        (401, vec![], r#"{"error":{"code":1}}"#, "answered 401"),
        (
            403,
            vec!["Content-Type: text/html".to_owned()],
            r#"{"error":"not shown"}"#,
            "answered 403",
        ),
        (
            403,
            vec![],
            &format!("{{\"error\":\"{long}\"}}"),
            "answered 403",
        ),
    ] {
        let mut behavior = single();
        behavior.refusal = Some((status, headers, body.to_owned()));
        let (_server, scratchpad) = start(behavior);
        let outcome = scratchpad.run(&["load", "org/name", "--device", "cpu"]);
        let outcome = outcome.fails(3, &[word]);
        assert!(!outcome.stderr.contains("not shown"), "{outcome:?}");
        assert!(!outcome.stderr.contains(&long[..500]), "{outcome:?}");
    }
}

#[test]
fn an_interrupted_download_is_resumed_by_the_next_run() {
    for ignore_ranges in [false, true] {
        let mut behavior = single();
        // More often than it is tried again.
        behavior.drop_after = Some((1000, 4));
        behavior.ignore_ranges = ignore_ranges;
        let (server, scratchpad) = start(behavior);
        scratchpad
            .run(&LOAD)
            .fails(3, &["cannot download", "model.safetensors"]);
        // What is incomplete is never taken for the model.
        assert!(!scratchpad.path(ENTRY).join("refs").exists());
        scratchpad
            .run(&["inspect", "org/name", "--offline"])
            .fails(3, &["models--org--name"]);
        server.take_requests();
        scratchpad.run(&LOAD).succeeds();
        let requests = server.take_requests();
        assert_eq!(fetched(&requests), ["model.safetensors"]);
        let ranges: Vec<_> = requests.iter().filter_map(|r| r.range.as_deref()).collect();
        assert_eq!(
            ranges,
            [if ignore_ranges {
                "bytes=1000-"
            } else {
                "bytes=4000-"
            }]
        );
        let loaded = scratchpad
            .path(ENTRY)
            .join("snapshots")
            .join(COMMIT)
            .join("model.safetensors");
        assert_eq!(
            fs::read(loaded).unwrap(),
            single().files["model.safetensors"]
        );
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_a_download_that_can_be_resumed() {
    let mut behavior = single();
    behavior.slow = true;
    let (server, scratchpad) = start(behavior);
    let blobs = scratchpad.path(ENTRY).join("blobs");
    let mut running = scratchpad.start(&LOAD);
    let begun = |_| {
        let Ok(list) = fs::read_dir(&blobs) else {
            return false;
        };
        // Config and tokenizer are shorter.
        list.flatten().any(|entry| {
            entry.file_name().to_str().unwrap().ends_with(".part")
                && entry
                    .metadata()
                    .is_ok_and(|metadata| metadata.len() >= 2000)
        })
    };
    assert!(running.interrupt_when(begun));
    running.finish().fails(130, &["interrupted", "resumed"]);
    server.change(|behavior| behavior.slow = false);
    server.take_requests();
    scratchpad.run(&LOAD).succeeds();
    let requests = server.take_requests();
    assert_eq!(fetched(&requests), ["model.safetensors"]);
    assert!(requests.iter().any(|request| request.range.is_some()));
}

#[test]
fn a_shard_outside_of_the_model_is_refused_before_it_is_asked_for() {
    let mut behavior = single();
    behavior.files.remove("model.safetensors");
    let index = json!({ "weight_map": { "a": "../../etc/passwd" } }).to_string();
    behavior
        .files
        .insert("model.safetensors.index.json".into(), index.into_bytes());
    behavior
        .files
        .insert("../../etc/passwd".into(), b"root".to_vec());
    let (server, scratchpad) = start(behavior);
    scratchpad.run(&LOAD).fails(3, &["../../etc/passwd"]);
    assert_eq!(
        fetched(&server.take_requests()),
        ["model.safetensors.index.json"]
    );
}

#[test]
fn a_shard_that_the_model_lacks_is_named() {
    let mut behavior = sharded();
    behavior.files.remove("model-00002-of-00002.safetensors");
    let (server, scratchpad) = start(behavior);
    scratchpad
        .run(&LOAD)
        .fails(3, &["model-00002-of-00002.safetensors", "does not have"]);
    assert_eq!(
        fetched(&server.take_requests()),
        ["model.safetensors.index.json"]
    );
}

#[test]
fn what_is_not_as_announced_is_refused() {
    type Change = fn(&mut Behavior);
    let cases: [(Change, &str); 6] = [
        (|b| b.longer = 1, "came"),
        (|b| b.longer = -1, "came"),
        (|b| b.etag = Some("0".repeat(64)), "SHA-256"),
        (|b| b.etag = Some("../../../escaped".into()), "etag"),
        (|b| b.etag = Some("..".into()), "etag"),
        (|b| b.commit = Some("../../escaped".into()), "commit"),
    ];
    for (change, word) in cases {
        let mut behavior = single();
        change(&mut behavior);
        let (_server, scratchpad) = start(behavior);
        scratchpad.run(&LOAD).fails(3, &[word]);
        let snapshot = scratchpad.path(ENTRY).join("snapshots").join(COMMIT);
        assert!(!snapshot.join("config.json").exists(), "{word}");
    }
}

#[test]
fn pickles_are_not_downloaded() {
    let mut behavior = single();
    behavior.files.remove("model.safetensors");
    let (server, scratchpad) = start(behavior);
    scratchpad
        .run(&LOAD)
        .fails(3, &["org/name", "no weights as safetensors"]);
    assert_eq!(fetched(&server.take_requests()), [] as [&str; 0]);
}

#[test]
fn a_revision_is_downloaded_and_remembered_under_its_name() {
    let mut behavior = single();
    behavior.revisions = vec!["v1.0".into(), "refs/pr/1".into()];
    let (server, scratchpad) = start(behavior);
    for revision in ["v1.0", "refs/pr/1", COMMIT] {
        let load = ["load", "org/name", "--device", "sim:1GiB", "--quiet"];
        let arguments = [&load[..], &["--revision", revision]].concat();
        scratchpad.run(&arguments).succeeds();
        let offline = [&arguments[..], &["--offline"]].concat();
        scratchpad.run(&offline).succeeds();
    }
    let asked: Vec<_> = server.take_requests().into_iter().map(|r| r.path).collect();
    assert!(asked[0].ends_with("/revision/v1.0"), "{asked:?}");
    assert!(
        asked
            .iter()
            .any(|path| path.ends_with("/revision/refs%2Fpr%2F1")),
        "{asked:?}"
    );
    // The files are those of one commit, which are there already.
    assert!(
        asked
            .iter()
            .all(|path| !path.contains("/resolve/") || path.contains(COMMIT))
    );
    scratchpad
        .run(&["inspect", "org/name", "--offline", "--revision", "v2"])
        .fails(3, &["v2", "models--org--name"]);
}

/// Where the token of this place's command has been sent.
fn tokens(server: &HubServer) -> Vec<(String, bool)> {
    let requests = server.take_requests().into_iter();
    let sent = requests.map(|request| {
        let is_sent = request.authorization.is_some();
        (format!("{} {}", request.method, request.path), is_sent)
    });
    sent.collect()
}

#[test]
fn the_token_does_not_follow_a_redirect_to_another_port() {
    // What is redirected: the list, files, everything.
    for prefix in ["/api/", "/org/name/resolve/", "/"] {
        let other = HubServer::start(single());
        let mut behavior = single();
        behavior.redirect = Some((prefix.into(), other.endpoint()));
        let (server, mut scratchpad) = start(behavior);
        scratchpad.set("HF_TOKEN", "hf_secret");
        scratchpad.run(&LOAD).succeeds();
        let at_home = tokens(&server);
        assert!(
            !at_home.is_empty() && at_home.iter().all(|(_, sent)| *sent),
            "{at_home:?}"
        );
        let away = tokens(&other);
        assert!(
            !away.is_empty() && away.iter().all(|(_, sent)| !sent),
            "{away:?}"
        );
    }
}

#[test]
fn a_mirror_that_only_redirects_is_followed_without_the_token() {
    let other = HubServer::start(single());
    let mut behavior = single();
    behavior.bare_redirect = true;
    behavior.redirect = Some(("/org/name/resolve/".to_owned(), other.endpoint()));
    let (server, mut scratchpad) = start(behavior);
    scratchpad.set("HF_TOKEN", "hf_secret");
    scratchpad.run(&LOAD).succeeds();
    assert!(
        server
            .take_requests()
            .iter()
            .all(|r| r.authorization.is_some())
    );
    let there = other.take_requests();
    assert!(there.iter().any(|r| r.method == "HEAD") && there.iter().any(|r| r.method == "GET"));
    assert!(there.iter().all(|r| r.authorization.is_none()));
}

#[test]
fn the_token_follows_a_redirect_within_the_hub() {
    let server = HubServer::start(single());
    // Named with its port and in the other case, which is the same server.
    let base = format!("{}/again", server.endpoint().replace("http", "HTTP"));
    server.change(|behavior| behavior.redirect = Some(("/org/".into(), base)));
    let mut scratchpad = scratchpad(&server);
    scratchpad.set("HF_TOKEN", "hf_secret");
    scratchpad.run(&LOAD).succeeds();
    let sent = tokens(&server);
    let again = sent.iter().filter(|(path, _)| path.contains("/again/"));
    assert!(again.count() > 0, "{sent:?}");
    assert!(sent.iter().all(|(_, sent)| *sent), "{sent:?}");
}

#[test]
fn the_token_does_not_come_back_from_elsewhere() {
    let (home, away) = (HubServer::start(single()), HubServer::start(single()));
    home.change(|behavior| behavior.redirect = Some(("/org/".into(), away.endpoint())));
    let back = format!("{}/again", home.endpoint());
    away.change(|behavior| behavior.redirect = Some(("/".into(), back)));
    let mut scratchpad = scratchpad(&home);
    scratchpad.set("HF_TOKEN", "hf_secret");
    scratchpad.run(&LOAD).succeeds();
    assert!(tokens(&away).iter().all(|(_, sent)| !sent));
    for (path, sent) in tokens(&home) {
        assert_eq!(sent, !path.contains("/again/"), "{path}");
    }
}

#[test]
fn a_resumed_download_is_redirected_without_the_token() {
    let away = HubServer::start(single());
    away.change(|behavior| behavior.drop_after = Some((5000, 1)));
    let mut behavior = single();
    behavior.redirect = Some(("/org/".into(), away.endpoint()));
    let (_server, mut scratchpad) = start(behavior);
    scratchpad.set("HF_TOKEN", "hf_secret");
    scratchpad.run(&LOAD).succeeds();
    let requests = away.take_requests();
    assert!(
        requests
            .iter()
            .all(|request| request.authorization.is_none())
    );
    let ranges: Vec<_> = requests.iter().filter_map(|r| r.range.as_deref()).collect();
    assert_eq!(ranges, ["bytes=5000-"]);
}

#[test]
fn redirects_that_cannot_be_followed_are_named() {
    let cases = [
        ("ftp://127.0.0.1", "neither http nor https"),
        ("http://me@127.0.0.1", "user name"),
        ("http://127.0.0.1:99999", "port"),
    ];
    for (base, word) in cases {
        let mut behavior = single();
        behavior.redirect = Some(("/api/".into(), base.into()));
        let (_server, scratchpad) = start(behavior);
        scratchpad.run(&LOAD).fails(3, &[word]);
    }
    let server = HubServer::start(single());
    let itself = server.endpoint();
    server.change(|behavior| behavior.redirect = Some(("/".into(), itself)));
    scratchpad(&server)
        .run(&LOAD)
        .fails(3, &["redirects more than"]);
}

#[test]
fn a_server_that_drips_is_given_up_and_what_came_is_kept() {
    let mut behavior = single();
    // More often than it is tried again.
    behavior.drip = Some((1000, 4));
    let (server, mut scratchpad) = start(behavior);
    scratchpad.set("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    scratchpad
        .run(&LOAD)
        .fails(3, &["model.safetensors", "bytes came in 1 s", "4096"]);
    server.take_requests();
    scratchpad.run(&LOAD).succeeds();
    let requests = server.take_requests();
    assert_eq!(fetched(&requests), ["model.safetensors"]);
    let range = requests.iter().find_map(|r| r.range.as_deref()).unwrap();
    let from: u64 = range
        .strip_prefix("bytes=")
        .and_then(|range| range.strip_suffix('-')?.parse().ok())
        .unwrap();
    // All that four attempts brought.
    assert!(from >= 4000, "{range}");
}

#[test]
fn a_dripping_server_that_recovers_is_only_tried_again() {
    let mut behavior = single();
    behavior.drip = Some((1000, 1));
    let (server, mut scratchpad) = start(behavior);
    scratchpad.set("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    scratchpad.run(&LOAD).succeeds();
    let requests = server.take_requests();
    assert_eq!(requests.iter().filter(|r| r.range.is_some()).count(), 1);
}

#[test]
fn a_list_that_drips_is_given_up() {
    let mut behavior = single();
    behavior.drip_list = true;
    let (_server, mut scratchpad) = start(behavior);
    scratchpad.set("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    scratchpad
        .run(&LOAD)
        .fails(3, &["/revision/main", "bytes came in 1 s"]);
}

#[cfg(unix)]
#[test]
fn a_silent_server_is_given_up_and_an_interrupt_does_not_wait_for_it() {
    let mut behavior = single();
    behavior.silent = true;
    let (server, mut scratchpad) = start(behavior);
    let mut running = scratchpad.start(&LOAD);
    assert!(
        running.interrupt_when(|_| {
            fetched(&server.take_requests()).contains(&"model.safetensors")
        })
    );
    let start = std::time::Instant::now();
    running.finish().fails(130, &["interrupted"]);
    // Patience is 30 s.
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    scratchpad.set("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    scratchpad
        .run(&LOAD)
        .fails(3, &["cannot download", "model.safetensors"]);
}

#[test]
fn small_files_and_lists_that_are_large_are_refused_before_they_are_written() {
    const MIB: u64 = 1 << 20;
    for (name, bytes) in [
        ("config.json", 5 * MIB),
        ("tokenizer.json", 300 * MIB),
        ("tokenizer_config.json", u64::MAX >> 1),
    ] {
        let mut behavior = single();
        behavior.announce = Some((name.into(), bytes));
        let (server, scratchpad) = start(behavior);
        scratchpad
            .run(&LOAD)
            .fails(3, &[name, &bytes.to_string(), "at most"]);
        assert!(!fetched(&server.take_requests()).contains(&name));
    }
    // Longer than it said: not a byte more than that is written.
    let mut behavior = single();
    behavior.announce = Some(("config.json".into(), 10));
    let (_server, scratchpad) = start(behavior);
    scratchpad
        .run(&LOAD)
        .fails(3, &["config.json", "has 10 bytes"]);
    let mut behavior = single();
    behavior.padded_list = Some(33 << 20);
    let (_server, scratchpad) = start(behavior);
    scratchpad
        .run(&LOAD)
        .fails(3, &["a list of files", "at most 33554432"]);
    // A list without a length that is none too long is fine.
    let mut behavior = single();
    behavior.padded_list = Some(1000);
    let (_server, scratchpad) = start(behavior);
    scratchpad.run(&LOAD).succeeds();
}
