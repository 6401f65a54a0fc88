//! `tightfit save` and `load --save`: what is printed, what is written where, and what goes wrong.

use std::fs;

use tightfit::checkpoint::Checkpoint;
use tightfit_tests::command::Scratchpad;
use tightfit_tests::models;
use tightfit_tests::saving::{files, names, written};

const OUTPUT: i32 = 1;
const USAGE: i32 = 2;
const CHECKPOINT: i32 = 3;
const DOES_NOT_FIT: i32 = 4;

fn scratchpad_with_model() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 2, 64);
    scratchpad
}

/// Asserts that there is nothing but what was there.
#[track_caller]
fn has_only(scratchpad: &Scratchpad, expected: &[&str]) {
    let expected = expected.iter().map(|&name| name.to_owned()).collect();
    assert_eq!(names(&scratchpad.path("")), expected);
}

/// Modules that a reader of the saved model must not take for 4-bit ones.
fn skipped_modules(scratchpad: &Scratchpad, model: &str) -> serde_json::Value {
    let text = fs::read_to_string(scratchpad.path(model).join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["quantization_config"]["llm_int8_skip_modules"].clone()
}

/// Adds entries to the configuration of a model, before all others.
fn configure(scratchpad: &Scratchpad, model: &str, entries: &str) {
    let path = scratchpad.path(model).join("config.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
    let (_, rest) = text.split_once('{').expect("an object");
    let comma = if rest.trim_start().starts_with('}') {
        ""
    } else {
        ","
    };
    fs::write(path, format!("{{{entries}{comma}{rest}")).unwrap();
}

#[test]
fn what_another_method_has_quantized_is_named_and_left_alone() {
    for (method, bits) in [
        ("fp8", ""),
        ("compressed-tensors", ""),
        ("gptq", r#","bits":4"#),
    ] {
        for nested in [false, true] {
            let scratchpad = scratchpad_with_model();
            let entry = format!(r#""quantization_config":{{"quant_method":"{method}"{bits}}}"#);
            let entry = if nested {
                format!(r#""text_config":{{{entry}}}"#)
            } else {
                entry
            };
            configure(&scratchpad, "m", &entry);
            let words = format!("quantized by {method} already");
            for arguments in [
                &["inspect", "m"][..],
                &["plan", "m", "--device", "cpu"],
                &["load", "m", "--device", "cpu"],
            ] {
                let text = scratchpad.run(arguments).succeeds().stdout;
                assert!(text.contains(&words), "{text}");
            }
            let plan = scratchpad.run(&["plan", "m", "--device", "cpu", "--placements", "--json"]);
            let plan = plan.succeeds().json();
            assert_eq!(plan["model"]["quantization"]["method"], method);
            assert_eq!(plan["model"]["quantization"]["source"], "config");
            let placements = plan["placements"].as_array().unwrap();
            assert!(
                placements
                    .iter()
                    .all(|placement| placement["format"] == "stored")
            );
            let inspected = scratchpad
                .run(&["inspect", "m", "--json"])
                .succeeds()
                .json();
            assert_eq!(inspected["quantization"], plan["model"]["quantization"]);
            // What is asked for is done in memory, and in no checkpoint.
            let rule = ["--set", "format:q_proj=nf4"];
            let load = ["load", "m", "--device", "cpu", "--json"];
            let loaded = scratchpad
                .run(&[&load[..], &rule].concat())
                .succeeds()
                .json();
            assert_eq!(loaded["load"]["quantized"], 2);
            let save = [&["save", "m", "out"][..], &rule].concat();
            let outcome = scratchpad
                .run(&save)
                .fails(CHECKPOINT, &[method, "q_proj.weight"]);
            assert!(!scratchpad.path("out").exists(), "{outcome:?}");
            let error = scratchpad.run(&[&save[..], &["--json"]].concat()).json();
            assert_eq!(error["error"]["kind"], "quantized-already");
            let outcome = scratchpad.run(&["save", "m", "out"]);
            let words = format!("no weight is in 4 bits: the checkpoint is quantized by {method}");
            assert!(outcome.stderr.contains(&words), "{outcome:?}");
            assert_eq!(outcome.status, Some(0));
            let config =
                |model: &str| fs::read(scratchpad.path(model).join("config.json")).unwrap();
            assert_eq!(config("m"), config("out"));
        }
    }
}

#[test]
fn modules_that_bitsandbytes_left_out_stay_as_they_are() {
    let scratchpad = scratchpad_with_model();
    configure(&scratchpad, "m", r#""time_step_limit": [0.0, Infinity]"#);
    scratchpad
        .run(&["save", "m", "some", "--set", "skip=q_proj"])
        .succeeds();
    let text = fs::read_to_string(scratchpad.path("some/config.json")).unwrap();
    assert!(
        text.contains("\"time_step_limit\": [0.0, Infinity]"),
        "{text}"
    );
    scratchpad.run(&["save", "some", "again"]).succeeds();
    assert_eq!(
        files(&scratchpad.path("some")),
        files(&scratchpad.path("again"))
    );
    // One of them is asked for.
    let rule = "format:layers.0.self_attn.q_proj=nf4";
    scratchpad
        .run(&["save", "some", "more", "--set", rule])
        .succeeds();
    let path = scratchpad.path("more/config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("Infinity", "null")).unwrap();
    let listed = skipped_modules(&scratchpad, "more");
    let is_listed = |module: &str| listed.as_array().unwrap().iter().any(|name| name == module);
    assert!(!is_listed("model.layers.0.self_attn.q_proj"));
    assert!(is_listed("model.layers.1.self_attn.q_proj") && is_listed("lm_head"));
}

#[test]
fn nothing_quantized_is_worth_a_warning() {
    let scratchpad = scratchpad_with_model();
    let outcome = scratchpad.run(&["save", "m", "out", "--set", "skip=*"]);
    assert!(
        outcome.stderr.contains("no weight is in 4 bits"),
        "{outcome:?}"
    );
    assert_eq!(outcome.status, Some(0));
    scratchpad.run(&["save", "m", "quantized"]).succeeds();
}

#[test]
fn modules_skipped_on_request_are_listed_for_readers() {
    let scratchpad = scratchpad_with_model();
    scratchpad.run(&["save", "m", "all"]).succeeds();
    assert_eq!(skipped_modules(&scratchpad, "all"), serde_json::Value::Null);
    scratchpad
        .run(&["save", "m", "some", "--set", "skip=q_proj"])
        .succeeds();
    let listed = skipped_modules(&scratchpad, "some");
    let listed = listed.as_array().expect("a list");
    // The list replaces the default one, so that the output head is in it too.
    for module in [
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ] {
        assert!(
            listed.iter().any(|name| name == module),
            "{module} is not in {listed:?}"
        );
    }
    assert!(
        !listed
            .iter()
            .any(|name| name == "model.layers.0.self_attn.k_proj")
    );
}

#[test]
fn a_save_says_what_it_wrote() {
    let scratchpad = scratchpad_with_model();
    let text = scratchpad.run(&["save", "m", "text"]).succeeds().stdout;
    for word in ["text: ", "in 1 file, from ", "14 weights in 4 bits"] {
        assert!(text.contains(word), "it lacks {word}: {text}");
    }
    let quiet = scratchpad
        .run(&["save", "m", "quiet", "--quiet"])
        .succeeds();
    assert_eq!(quiet.stdout, "");
    let save = ["save", "m", "json", "--json", "--max-shard-size", "20KB"];
    let report = scratchpad.run(&save).succeeds().json();
    let bytes: usize = written(&scratchpad.path("json"))
        .0
        .values()
        .map(|tensor| tensor.data.len())
        .sum();
    let shards = names(&scratchpad.path("json"))
        .into_iter()
        .filter(|name| name.ends_with(".safetensors"))
        .count();
    assert!(shards > 2);
    assert_eq!(report["schema"], 1);
    assert_eq!(report["path"], "json");
    assert_eq!(report["shards"], shards);
    assert_eq!(report["bytes"], bytes);
    assert_eq!(report["quantized"], 14);
    assert_eq!(report["nonfinite_blocks"], 0);
    assert!(report["seconds"].is_number());
    let source = Checkpoint::open(scratchpad.path("m"))
        .unwrap()
        .source_bytes();
    assert_eq!(report["source_bytes"], source);
    has_only(&scratchpad, &["json", "m", "quiet", "text"]);
}

#[test]
fn a_single_file_is_saved_from_beside_it() {
    let scratchpad = scratchpad_with_model();
    scratchpad
        .run(&["save", "m", "expected", "--quiet"])
        .succeeds();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(scratchpad.path("m").join(file), scratchpad.path(file)).unwrap();
    }
    scratchpad
        .run(&["save", "model.safetensors", "out", "--quiet"])
        .succeeds();
    assert!(files(&scratchpad.path("out")) == files(&scratchpad.path("expected")));
}

#[test]
fn what_is_too_large_to_be_copied_is_warned_of() {
    let scratchpad = scratchpad_with_model();
    let file = fs::File::create(scratchpad.path("m/vocab.txt")).unwrap();
    file.set_len(3 << 30).unwrap();
    let warning = "tightfit: warn: \"vocab.txt\" was not copied: it has 3221225472 bytes, and a \
                   file beside the weights at most 67108864\n";
    let outcome = scratchpad.run(&["save", "m", "out", "--json"]);
    assert_eq!((outcome.status, &*outcome.stderr), (Some(0), warning));
    assert_eq!(outcome.json()["left_out"], serde_json::json!(["vocab.txt"]));
    assert!(!scratchpad.path("out/vocab.txt").exists());
    let load = [
        "load",
        "m",
        "--device=sim:1GiB",
        "--save",
        "again",
        "--quiet",
    ];
    let outcome = scratchpad.run(&load);
    assert_eq!((outcome.status, &*outcome.stderr), (Some(0), warning));
}

#[cfg(unix)]
#[test]
fn no_command_follows_a_link_out_of_the_checkpoint() {
    let scratchpad = scratchpad_with_model();
    fs::create_dir(scratchpad.path("private")).unwrap();
    fs::write(
        scratchpad.path("private/auth.json"),
        r#"{"auth":"dXNlcjpodW50ZXIy"}"#,
    )
    .unwrap();
    for name in ["config.json", "tokenizer.json"] {
        let link = scratchpad.path("m").join(name);
        let kept = fs::read(&link).ok();
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink("../private/auth.json", &link).unwrap();
        let words = [
            name,
            "private/auth.json",
            "does not belong to the checkpoint",
        ];
        scratchpad
            .run(&["save", "m", "out"])
            .fails(CHECKPOINT, &words);
        if name == "config.json" {
            for command in ["inspect", "plan", "load"] {
                scratchpad.run(&[command, "m"]).fails(CHECKPOINT, &words);
            }
        }
        fs::remove_file(&link).unwrap();
        if let Some(bytes) = kept {
            fs::write(&link, bytes).unwrap();
        }
    }
    has_only(&scratchpad, &["m", "private"]);
}

#[test]
fn a_directory_that_is_there_is_replaced_only_by_force() {
    let scratchpad = scratchpad_with_model();
    fs::create_dir(scratchpad.path("empty")).unwrap();
    scratchpad
        .run(&["save", "m", "empty", "--quiet"])
        .succeeds();
    let expected = files(&scratchpad.path("empty"));

    fs::create_dir(scratchpad.path("full")).unwrap();
    fs::write(scratchpad.path("full/mine"), "text").unwrap();
    fs::write(scratchpad.path("file"), "text").unwrap();
    for target in ["full", "full/", "file", "m", "empty"] {
        let words = [target.trim_end_matches('/'), "exists", "--force"];
        scratchpad.run(&["save", "m", target]).fails(USAGE, &words);
        let load = ["load", "m", "--device=sim:1GiB", "--save", target];
        scratchpad.run(&load).fails(USAGE, &words);
    }
    assert_eq!(names(&scratchpad.path("full")), ["mine".to_owned()].into());
    assert_eq!(fs::read_to_string(scratchpad.path("file")).unwrap(), "text");
    // The last is the model itself, which Windows does not let go of while it is read.
    let targets = ["full", "file", "m"].into_iter();
    for target in targets.filter(|target| !cfg!(windows) || *target != "m") {
        let save = ["save", "m", target, "--force", "--quiet"];
        scratchpad.run(&save).succeeds();
        assert!(files(&scratchpad.path(target)) == expected, "{target}");
    }
    has_only(&scratchpad, &["empty", "file", "full", "m"]);
}

#[test]
fn directories_above_are_made_where_that_is_possible() {
    let scratchpad = scratchpad_with_model();
    let deep = ["save", "m", "a/b/out", "--quiet"];
    scratchpad.run(&deep).succeeds();
    assert_eq!(names(&scratchpad.path("a/b")), ["out".to_owned()].into());
    // What is no directory can have none, whoever asks.
    fs::write(scratchpad.path("file"), "text").unwrap();
    for target in ["file/out", "file/a/out"] {
        let words = ["cannot", "file"];
        scratchpad.run(&["save", "m", target]).fails(OUTPUT, &words);
    }
    for target in ["..", "/"] {
        let words = ["not the name of a directory"];
        scratchpad.run(&["save", "m", target]).fails(USAGE, &words);
    }
    has_only(&scratchpad, &["a", "file", "m"]);
}

#[test]
fn a_save_that_fails_leaves_nothing() {
    let scratchpad = scratchpad_with_model();
    fs::create_dir(scratchpad.path("nan")).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let data = [0xff; 2 * 64];
    let matrix = [(name, "BF16", &[1, 64][..], &data[..])];
    models::write_safetensors(&scratchpad.path("nan/model.safetensors"), &matrix);
    fs::create_dir(scratchpad.path("same")).unwrap();
    fs::write(scratchpad.path("same/model.safetensors"), "1234567").unwrap();
    for (arguments, status, words) in [
        (
            &["nan", "new/out", "--strict"][..],
            CHECKPOINT,
            &[name, "infinities or NaN"][..],
        ),
        (&["same", "new/out"], CHECKPOINT, &["7 bytes"]),
        (&["nowhere", "new/out"], CHECKPOINT, &["nowhere"]),
        (
            &["m", "new/out", "--set", "experts=some"],
            USAGE,
            &["experts", "some"],
        ),
        (&["m", "new/out", "--policy", "clever"], USAGE, &["clever"]),
        (
            &["m", "new/out", "--max-shard-size", "much"],
            USAGE,
            &["much"],
        ),
        (
            &["m", "new/out", "--staging", "1KiB"],
            USAGE,
            &["64.00 KiB"],
        ),
        (&["m"], USAGE, &["<DIRECTORY>"]),
    ] {
        let save = [&["save"], arguments].concat();
        scratchpad.run(&save).fails(status, words);
    }
    let small = ["load", "m", "--device=sim:64KiB", "--save", "new/out"];
    scratchpad.run(&small).fails(DOES_NOT_FIT, &["refuses"]);
    has_only(&scratchpad, &["m", "nan", "same"]);
    let report = scratchpad
        .run(&["save", "nan", "out", "--json"])
        .succeeds()
        .json();
    assert_eq!(report["nonfinite_blocks"], 1);
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_that_looks_complete() {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 2, 512);
    scratchpad
        .run(&["save", "m", "whole", "--quiet"])
        .succeeds();
    let whole = fs::metadata(scratchpad.path("whole/model.safetensors")).unwrap();
    // Blocks are of 512 or of 1024 bytes. Less than a megabyte would stop the policy: its memory
    // is a file to the system.
    let blocks = whole.len() / 1024;
    for blocks in [blocks * 3 / 4, blocks - 1] {
        let blocks = u32::try_from(blocks).unwrap();
        let words = ["cannot write", "model.safetensors"];
        for arguments in [
            &["save", "m", "new/out"][..],
            &["load", "m", "--device=sim:1GiB", "--save", "new/out"],
            &["save", "m", "whole", "--force"],
        ] {
            scratchpad
                .run_limited(blocks, true, arguments)
                .fails(OUTPUT, &words);
        }
        has_only(&scratchpad, &["m", "whole"]);
        let killed = scratchpad.run_limited(blocks, false, &["save", "m", "out"]);
        assert_eq!(killed.status, None, "{killed:#?}");
        assert!(!scratchpad.path("out").exists());
        for name in names(&scratchpad.path("")) {
            if name.starts_with(".out.partial-") {
                fs::remove_dir_all(scratchpad.path(&name)).unwrap();
            }
        }
        has_only(&scratchpad, &["m", "whole"]);
    }
}

#[test]
fn two_tensors_that_would_have_one_name_are_refused() {
    let scratchpad = Scratchpad::new();
    fs::create_dir(scratchpad.path("m")).unwrap();
    fs::write(scratchpad.path("m/config.json"), r#"{"hidden_size": 8}"#).unwrap();
    let zeros = [0; 2 * 2 * 16 * 8];
    let experts = "model.layers.0.mlp.experts";
    let stack = format!("{experts}.gate_up_proj");
    for (expert, shape) in [
        (format!("{experts}.0.gate_proj.weight"), &[8, 8][..]),
        // A part of a weight that is not there yet.
        (format!("{experts}.0.gate_proj.weight.absmax"), &[8, 8]),
    ] {
        let tensors = [
            (stack.as_str(), "BF16", &[2, 16, 8][..], &zeros[..]),
            (expert.as_str(), "BF16", shape, &zeros[..128]),
        ];
        // A gate of 16 rows is square to none: hidden size 8, intermediate size 8.
        models::write_safetensors(&scratchpad.path("m/model.safetensors"), &tensors);
        scratchpad
            .run(&["save", "m", "out"])
            .fails(CHECKPOINT, &[&expert]);
        has_only(&scratchpad, &["m"]);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn only_directories_and_files_are_replaced_and_links_stay() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    let scratchpad = scratchpad_with_model();
    scratchpad
        .run(&["save", "m", "expected", "--quiet"])
        .succeeds();
    let expected = files(&scratchpad.path("expected"));
    let fifo = scratchpad.path("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _listener = UnixListener::bind(scratchpad.path("socket")).unwrap();
    symlink("fifo", scratchpad.path("to-fifo")).unwrap();
    for target in ["fifo", "socket", "to-fifo", "/dev/null"] {
        let save = ["save", "m", target];
        scratchpad.run(&save).fails(USAGE, &["exists"]);
        let force = ["save", "m", target, "--force"];
        scratchpad
            .run(&force)
            .fails(USAGE, &["not the name of a directory"]);
        let load = [
            "load",
            "m",
            "--device=sim:1GiB",
            "--save",
            target,
            "--force",
        ];
        scratchpad
            .run(&load)
            .fails(USAGE, &["not the name of a directory"]);
    }
    assert!(fs::symlink_metadata(&fifo).unwrap().file_type().is_fifo());

    // A directory keeps its mode, behind a link too.
    fs::create_dir_all(scratchpad.path("elsewhere/real")).unwrap();
    symlink("elsewhere/real", scratchpad.path("link")).unwrap();
    symlink("nowhere", scratchpad.path("dangling")).unwrap();
    let mode = |path: &str| {
        fs::metadata(scratchpad.path(path))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    for (more, before) in [(&[][..], 0o700), (&["--force"], 0o750)] {
        let permissions = fs::Permissions::from_mode(before);
        fs::set_permissions(scratchpad.path("elsewhere/real"), permissions).unwrap();
        let save = [&["save", "m", "link", "--quiet"], more].concat();
        scratchpad.run(&save).succeeds();
        assert!(
            fs::symlink_metadata(scratchpad.path("link"))
                .unwrap()
                .is_symlink()
        );
        assert_eq!(mode("elsewhere/real"), before);
        assert!(files(&scratchpad.path("elsewhere/real")) == expected);
    }
    scratchpad
        .run(&["save", "m", "dangling", "--force"])
        .fails(OUTPUT, &["cannot follow the link", "dangling"]);
    assert_eq!(
        names(&scratchpad.path("elsewhere")),
        ["real".to_owned()].into()
    );
}
