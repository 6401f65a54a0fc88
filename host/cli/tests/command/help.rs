//! Help, versions, and what is said of arguments that cannot be understood.

use std::os::unix::process::CommandExt;
use std::process::Command;

use tightfit::synth::Preset;
use tightfit::text::is_hidden;
use tightfit_tests::command::{Scratchpad, tightfit};

const USAGE: i32 = 2;

#[test]
fn every_command_lists_its_options_and_exit_statuses() {
    let scratchpad = Scratchpad::new();
    for command in [
        &[][..],
        &["demo"],
        &["synth"],
        &["inspect"],
        &["plan"],
        &["load"],
        &["save"],
        &["run"],
        &["check"],
        &["policy"],
        &["policy", "show"],
        &["policy", "list"],
        &["devices"],
        &["completions"],
        &["man"],
    ] {
        let help = [&["help"], command].concat();
        let text = scratchpad.run(&help).succeeds().stdout;
        let statuses = text.split_once("Exit status:").expect("statuses").1;
        for status in ["\n  0  ", "\n  1  ", "\n  2  ", "\n  130  "] {
            assert!(statuses.contains(status), "{command:?}: {text}");
        }
        assert!(
            statuses.contains("SIGTERM") && statuses.contains("cannot be written"),
            "{text}"
        );
        let same = scratchpad
            .run(&[command, &["--help"]].concat())
            .succeeds()
            .stdout;
        assert_eq!(same, text);
        assert!(text.is_ascii(), "{text}");
    }
    let text = scratchpad.run(&["help", "check"]).succeeds().stdout;
    assert!(text.contains("every expectation holds"), "{text}");
}

#[test]
fn presets_are_listed() {
    let text = Scratchpad::new()
        .run(&["synth", "--help"])
        .succeeds()
        .stdout;
    for preset in Preset::all() {
        assert!(text.contains(preset.name()), "{text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn help_that_cannot_be_written_is_a_failure() {
    let scratchpad = Scratchpad::new();
    for arguments in ["--version", "--help", "help plan", "plan --help"] {
        scratchpad
            .run_shell(&format!("\"$TIGHTFIT\" {arguments} > /dev/full"))
            .fails(1, &["cannot write the result"]);
    }
    scratchpad.run_unheard(&["--help"]).succeeds();
}

#[test]
fn what_was_typed_is_not_repeated_raw() {
    let evil = "--x\x1b[2J\u{9b}31m\u{202e}\u{200b}\r";
    let scratchpad = Scratchpad::new();
    for arguments in [
        &[evil][..],
        &[&evil[2..]],
        &["plan", evil],
        &["plan", "m", "--device", evil],
        &["load", "m", "--threads", evil],
        &["synth", evil, "d"],
        &["load", "m", "--threads", &evil[2..]],
        &["policy", "show", &evil[2..]],
        &["plan", &evil[2..]],
        &["check", &evil[2..]],
    ] {
        let outcome = scratchpad.run(arguments);
        assert_ne!(outcome.status, Some(0), "{outcome:?}");
        assert_eq!(outcome.stdout, "");
        let hidden = outcome.stderr.chars().find(|&c| c != '\n' && is_hidden(c));
        assert_eq!(hidden, None, "{outcome:?}");
        assert!(
            outcome.stderr.contains("\\u{9b}31m\\u{202e}"),
            "{outcome:?}"
        );
        let json = scratchpad.run(&[arguments, &["--json"]].concat());
        let hidden = json.stdout.chars().find(|&c| c != '\n' && is_hidden(c));
        assert_eq!(hidden, None, "{json:?}");
        assert_eq!(json.json()["error"]["status"], json.status.unwrap());
    }
    // The name that the program itself is called by.
    let output = Command::new(tightfit())
        .arg0("/tmp/x\x1b[2J")
        .arg("--help")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("Usage: tightfit ") && !text.contains('\x1b'),
        "{text}"
    );
}

#[test]
fn an_amount_without_a_unit_is_asked_for_one() {
    let scratchpad = Scratchpad::new();
    for arguments in [
        &["plan", "m", "--device", "sim:24"][..],
        &["plan", "m", "--device", "cuda:0:24"],
        &["devices", "--device", "cpu:16"],
        &["plan", "m", "--staging", "64"],
        &["load", "m", "--staging=64"],
        &["save", "m", "d", "--max-shard-size", "5"],
        &["run", "x.wasm", "--quota", "8"],
    ] {
        scratchpad
            .run(arguments)
            .fails(USAGE, &["has no unit", "GiB"]);
    }
    scratchpad
        .run(&["devices", "--device", "sim:24B"])
        .succeeds();
}

#[test]
fn shells_complete_what_there_is() {
    let scratchpad = Scratchpad::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = scratchpad.run(&["completions", shell]).succeeds().stdout;
        for word in ["tightfit", "inspect", "device"] {
            assert!(text.contains(word), "{shell} does not know {word}");
        }
        assert!(!text.contains("compile-policy"), "{shell}");
    }
    // What bash makes of it.
    let script = scratchpad.path("completions.bash");
    let text = scratchpad.run(&["completions", "bash"]).succeeds().stdout;
    std::fs::write(&script, text).unwrap();
    let asked = r#". "$0"; COMP_WORDS=(tightfit pl); COMP_CWORD=1; _tightfit tightfit pl tightfit; echo "${COMPREPLY[*]}""#;
    let bash = Command::new("bash")
        .arg("-c")
        .arg(asked)
        .arg(&script)
        .output();
    match bash {
        Ok(output) => assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "plan"),
        Err(error) => eprintln!("there is no bash: {error}"),
    }
    scratchpad
        .run(&["completions", "dash"])
        .fails(USAGE, &["dash", "bash"]);
}

#[test]
fn every_command_has_a_manual_page() {
    let scratchpad = Scratchpad::new();
    let directory = scratchpad.path("man");
    let path = directory.to_str().unwrap();
    scratchpad.run(&["man", path]).succeeds();
    let mut names: Vec<String> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    for name in ["tightfit.1", "tightfit-load.1", "tightfit-policy-show.1"] {
        assert!(names.iter().any(|known| known == name), "{names:?}");
    }
    assert!(
        !names.iter().any(|name| name.contains("compile")),
        "{names:?}"
    );
    let page = std::fs::read_to_string(directory.join("tightfit-load.1")).unwrap();
    for word in [".TH tightfit-load 1", "\\-\\-device", "Exit status"] {
        assert!(page.contains(word), "{word}: {page}");
    }
}
