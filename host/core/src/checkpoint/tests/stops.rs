//! Opening is stopped wherever it looks whether to go on, and it looks all the time.

use super::*;

fn options(cancel: CancelToken) -> OpenOptions {
    OpenOptions::default().with_cancel(cancel)
}

/// Sees to it that opening stops at each of its looks with the error for that, and gives their number.
pub(super) fn stops_everywhere(path: &Path) -> usize {
    const MANY: usize = 1 << 40;
    let all = CancelToken::at_look(MANY);
    Checkpoint::open_with(path, &options(all.clone())).unwrap();
    let looks = MANY - all.looks_left();
    // All of them where there are few.
    for look in (0..looks).step_by(looks.div_ceil(200)) {
        let opened = Checkpoint::open_with(path, &options(CancelToken::at_look(look)));
        assert!(
            matches!(opened, Err(CheckpointError::Cancelled)),
            "{look} of {looks}: {opened:?}"
        );
    }
    looks
}

/// `count` empty tensors with names of this many bytes that begin alike, in the reverse order of names.
fn empty_tensors(first: usize, count: usize, length: usize) -> String {
    let entry = |i: usize| {
        let name = format!("{}{:08}", "x".repeat(length - 8), first + count - i);
        format!(r#""{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)
    };
    (0..count).map(entry).collect::<Vec<_>>().join(",")
}

#[test]
fn opening_stops_at_every_stage() {
    let dir = TempDir::new().unwrap();
    let config = r#"{"architectures":["LlamaForCausalLM"]}"#;
    fs::write(dir.path().join("config.json"), config).unwrap();
    let mut map = Vec::new();
    for shard in 0..3 {
        let header = format!(
            r#"{{"__metadata__":{{"a":"b"}},{}}}"#,
            empty_tensors(shard * 1000, 1000, 200)
        );
        let name = format!("{shard}.safetensors");
        write(&dir, &name, &file(&header, 0));
        map.extend((1..=1000).map(|i| {
            let tensor = format!("{}{:08}", "x".repeat(192), shard * 1000 + i);
            format!(r#""{tensor}":"{name}""#)
        }));
    }
    let index = format!(
        r#"{{"metadata":{{"x":[{}1]}},"weight_map":{{{}}}}}"#,
        "0,".repeat(5000),
        map.join(",")
    );
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let looks = stops_everywhere(dir.path());
    assert!(looks > 100, "{looks}");
}

#[test]
fn the_looks_grow_with_the_bytes_and_the_tensors() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    // 8 MB in few tensors, and few MB in many.
    for (count, length) in [(2000, 4096), (30_000, 16)] {
        let header = format!("{{{}}}", empty_tensors(0, count, length));
        fs::write(&path, file(&header, 0)).unwrap();
        let looks = stops_everywhere(&path);
        let least = (header.len() >> 18).max(count >> 10);
        // Read, parsed, sorted twice, compared, looked through for parts and ties.
        assert!(looks > 4 * least, "{looks} for {count} of {length}");
    }
}

#[test]
fn what_is_skipped_is_looked_at_too() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    let many = "0,".repeat(100_000);
    let objects = r#"{"a":null},"#.repeat(30_000);
    for header in [
        format!(r#"{{"a":{{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":[{many}0]}}}}"#),
        format!(r#"{{"a":{{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":[{objects}0]}}}}"#),
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"__metadata__":{{{}"x":""}}}}"#,
            (0..50_000)
                .map(|i| format!(r#""{i}":"","#))
                .collect::<String>()
        ),
    ] {
        fs::write(&path, file(&header, 0)).unwrap();
        let looks = stops_everywhere(&path);
        assert!(looks > 50, "{looks}");
    }
    // Refused at its end, and stopped before.
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{many}0],"data_offsets":[0,0]}}}}"#);
    fs::write(&path, file(&header, 0)).unwrap();
    assert_error!(
        Checkpoint::open(&path).unwrap_err(),
        CheckpointError::TooManyDimensions { .. }
    );
    let stopped = Checkpoint::open_with(&path, &options(CancelToken::at_look(20))).unwrap_err();
    assert_error!(stopped, CheckpointError::Cancelled);
}

#[test]
fn a_single_value_may_not_be_longer_than_a_parser_takes_at_once() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    let long = "x".repeat(text::MAX_VALUE_BYTES + 1);
    let header = format!(
        r#"{{"__metadata__":{{"a":"{long}","b":"{}"}}}}"#,
        "y".repeat(8 << 20)
    );
    fs::write(&path, file(&header, 0)).unwrap();
    assert_error!(
        Checkpoint::open(&path).unwrap_err(),
        CheckpointError::TooLarge {
            limit: 8_388_608,
            ..
        }
    );
    // In a shorter header it takes no time.
    let header = format!(r#"{{"__metadata__":{{"a":"{long}"}}}}"#);
    fs::write(&path, file(&header, 0)).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().metadata()["a"], long);
}
