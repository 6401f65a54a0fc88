//! Checkpoints that were not granted, or change; plans that make no sense; models that are too large.

use std::fs::{self, File};

use tightfit_tests::programs::{Bench, hostile, run};

#[track_caller]
fn told(arguments: &[&str], expected: &str) {
    assert_eq!(Bench::default().told(hostile(), arguments), expected);
}

#[track_caller]
fn answers(arguments: &[&str], expected: &str) {
    assert_eq!(Bench::default().answer(hostile(), arguments), expected);
}

#[test]
fn only_granted_names_open() {
    answers(&["open", "model"], "4");
    answers(&["names"], "[\"model\"]");
    let bench = Bench::default();
    let path = bench.directory.path().to_str().unwrap();
    let file = format!("{path}/model.safetensors");
    for name in [
        "", "other", "..", "../model", "./model", "model/", "MODEL", "/", path, &file,
    ] {
        let told = bench.told(hostile(), &["open", name]);
        let expected = format!("Error::NotFound(\"no checkpoint has been granted as '{name}'\")");
        assert_eq!(told, expected);
    }
}

#[test]
fn what_is_wrong_with_a_checkpoint_does_not_say_where_it_is() {
    let bench = Bench::default();
    let file = bench.directory.path().join("model.safetensors");
    fs::write(&file, [0xff; 64]).unwrap();
    let expected = "Error::BadCheckpoint(\"it is not a valid checkpoint\")";
    assert_eq!(bench.told(hostile(), &["open", "model"]), expected);
    fs::remove_file(&file).unwrap();
    assert_eq!(bench.told(hostile(), &["open", "model"]), expected);
}

#[cfg(unix)]
#[test]
fn a_checkpoint_cannot_show_a_program_what_lies_outside_of_it() {
    let secret = tempfile::TempDir::new().unwrap();
    let path = |name: &str| secret.path().join(name);
    fs::write(path("config.json"), "{}").unwrap();
    let expected =
        "Error::BadCheckpoint(\"a file of the checkpoint is a link that leads out of it\")";
    for (name, target) in [
        ("config.json", "config.json"),
        // Whether there is anything is not told either.
        ("config.json", "nothing"),
        ("model.safetensors", "config.json"),
        ("model.safetensors.index.json", "config.json"),
    ] {
        let bench = Bench::default();
        let file = bench.directory.path().join(name);
        let _ = fs::remove_file(&file);
        std::os::unix::fs::symlink(path(target), &file).unwrap();
        assert_eq!(bench.told(hostile(), &["open", "model"]), expected);
    }
}

#[test]
fn names_that_others_were_granted_mean_nothing() {
    let bench = Bench::default();
    let context = bench.context().grant("secret", bench.directory.path());
    let names = run(hostile(), context, &["names"]).unwrap().answer;
    assert_eq!(names, "[\"model\", \"secret\"]");
    answers(&["names"], "[\"model\"]");
    told(
        &["open", "secret"],
        "Error::NotFound(\"no checkpoint has been granted as 'secret'\")",
    );
}

#[test]
fn a_plan_that_makes_no_sense_is_refused() {
    answers(&["plan", "none"], "3 tensors");
    let invalid = |message: &str| format!("Error::InvalidArgument({message:?})");
    for (fault, message) in [
        ("too-few", "it placed 1 tensors, the checkpoint has 4"),
        ("too-many", "it placed 5 tensors, the checkpoint has 4"),
        (
            "a-million",
            "it placed 1000000 tensors, the checkpoint has 4",
        ),
        (
            "no-such-device",
            "it placed tensor 'model.layers.0.mlp.up_proj.weight' on device number 2, there are 2 (from 0)",
        ),
        (
            "block-48",
            "tensor 'model.layers.0.mlp.up_proj.weight': block size 48 is not a power of two from \
             32 to 4096",
        ),
        (
            "integers",
            "tensor 'model.position_ids': format nf4+double cannot hold i64 elements: NF4 is made \
             from bf16, f16 or f32",
        ),
        (
            "cast-i8",
            "tensor 'model.layers.0.mlp.up_proj.weight': format cast:i8 cannot hold bf16 elements: \
             casts are between bf16, f16 and f32",
        ),
        (
            "torn-tie",
            "it tore apart 'model.embed_tokens.weight' and 'lm_head.weight', which are one \
             parameter: same device and format, or leave 'lm_head.weight' out",
        ),
        (
            "few-headrooms",
            "it gave headroom for 0 devices, there are 2",
        ),
    ] {
        told(&["plan", fault], &invalid(message));
    }
    let told = Bench::default().told(hostile(), &["plan", "endless-headroom"]);
    assert!(
        told.starts_with("Error::NoSpace(Shortage { message: \"sim:0 is too small"),
        "{told}"
    );
    assert!(
        told.contains("need: 18446744073709551615, have: 67108864"),
        "{told}"
    );
}

/// Three matrices of 2048 elements, and 128 bytes.
const RESERVED: u64 = 4096;

#[test]
fn a_model_counts_towards_the_quota() {
    let reserved = RESERVED.to_string();
    answers(&["load-after-buffer", &reserved], "loaded");
    told(
        &["load-after-buffer", "0"],
        "Error::QuotaExceeded(Shortage { message: \"the quota is exceeded: need 4.000 KiB, have \
         0 B\", need: 4096, have: 0 })",
    );
    let bench = Bench::new(RESERVED - 1);
    let told = bench.told(hostile(), &["load"]);
    assert!(told.contains("need: 4096, have: 4095"), "{told}");
    // Refused before anything was taken.
    assert_eq!(bench.devices[0].usage().reserved.peak, 0);
}

#[test]
fn models_that_are_never_unloaded_are_unloaded() {
    answers(&["load-and-forget"], &(10 * RESERVED).to_string());
}

#[test]
fn a_model_needs_its_checkpoint_no_longer() {
    answers(&["drop-checkpoint-in-use"], "256 bytes");
}

#[test]
fn ranges_outside_of_a_tensor_are_refused() {
    const MAX: &str = "18446744073709551615";
    for (start, bytes) in [("0", "129"), ("128", "1"), (MAX, "1"), ("1", MAX)] {
        let expected = format!(
            "Error::InvalidArgument(\"{bytes} bytes from {start} on lie outside of tensor \
             'model.position_ids', which has 128\")"
        );
        told(&["read-outside-tensor", start, bytes], &expected);
    }
    answers(&["elements-outside", "2047", "1"], "4 bytes");
    answers(&["part-outside", "1023", "1"], "1 bytes");
    for (first, count) in [("2047", "2"), ("2049", "0"), (MAX, "1")] {
        for (behavior, unit) in [("elements-outside", "elements"), ("part-outside", "bytes")] {
            let told = Bench::default().told(hostile(), &[behavior, first, count]);
            assert!(told.starts_with("Error::InvalidArgument(\""), "{told}");
            assert!(told.contains(unit), "{told}");
        }
    }
    let told_of = |count| Bench::default().told(hostile(), &["elements-outside", "0", count]);
    assert!(told_of(MAX).contains("have no size"), "{}", told_of(MAX));
    assert!(told_of("1048577").contains("too many for one call"));
    told(
        &["elements-of-integers"],
        "Error::Unsupported(\"tensor 'model.position_ids' holds i64 elements, which are not converted\")",
    );
}

#[test]
fn metadata_comes_in_batches() {
    answers(&["batches"], "4 2 0 1");
}

#[test]
fn a_file_that_is_cut_short_under_a_program_is_told() {
    let bench = super::stopped::with_hook(|path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 64).unwrap();
    });
    let told = bench.told(hostile(), &["read-tensor"]);
    let expected = "Error::BadCheckpoint(\"the checkpoint has been cut short: a file ends before \
                    tensor 'model.position_ids'\")";
    assert_eq!(told, expected);
}

#[test]
fn a_file_that_changes_under_a_load_is_told() {
    let bench = super::stopped::with_hook(|path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
    });
    let told = bench.told(hostile(), &["load"]);
    assert!(
        told.starts_with("Error::BadCheckpoint(\"the checkpoint has been c"),
        "{told}"
    );
}
