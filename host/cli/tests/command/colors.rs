//! Colors: where they are shown, and that nobody else can put any there.

use tightfit_tests::command::{Outcome, Scratchpad};
use tightfit_tests::models;

const PLAN: &[&str] = &["plan", "m", "--device", "sim:1GiB"];
const LOAD: &[&str] = &["load", "m", "--device", "sim:1GiB"];

fn scratchpad() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 2, 64);
    scratchpad
}

fn run(scratchpad: &Scratchpad, command: &[&str], more: &[&str]) -> Outcome {
    scratchpad.run(&[command, more].concat())
}

/// A text without the sequences that set colors, of which the first characters tell them from all others.
fn without_colors(text: &str) -> String {
    let mut plain = String::new();
    let mut pieces = text.split("\x1b[");
    plain += pieces.next().unwrap();
    for piece in pieces {
        let (codes, rest) = piece.split_once('m').expect("a sequence ends with m");
        let is_code = |c: char| c.is_ascii_digit() || c == ';';
        assert!(codes.chars().all(is_code), "{codes}: {text}");
        plain += rest;
    }
    plain
}

#[test]
fn a_plan_in_color_is_the_plan() {
    let scratchpad = scratchpad();
    let plain = run(&scratchpad, PLAN, &[]).succeeds().stdout;
    let colored = run(&scratchpad, PLAN, &["--color", "always"])
        .succeeds()
        .stdout;
    // Before it stands how long the policy took.
    let shown = |text: &str| text.split_once("\ndigest").unwrap().1.to_owned();
    assert_eq!(shown(&without_colors(&colored)), shown(&plain));
    for part in [
        "\x1b[1mdevice  tensors",
        "\x1b[1msim:0\x1b[0m  1.000 GiB",
        "\x1b[38;5;25m#\x1b[0m linear layers",
        "\x1b[2m.\x1b[0m free",
    ] {
        assert!(colored.contains(part), "it lacks {part:?}: {colored:?}");
    }
    let loaded = run(&scratchpad, LOAD, &["--color=always"])
        .succeeds()
        .stdout;
    assert!(loaded.contains("\x1b[1mdevice  tensors"), "{loaded:?}");
}

#[test]
fn a_pipe_has_colors_only_where_they_are_asked_for() {
    let is_colored = |variables: &[(&'static str, &str)], more: &[&str]| {
        let mut scratchpad = scratchpad();
        for (name, value) in variables {
            scratchpad.set(name, *value);
        }
        let outcome = run(&scratchpad, PLAN, more).succeeds();
        outcome.stdout.contains('\x1b')
    };
    assert!(!is_colored(&[], &[]));
    assert!(!is_colored(&[("TERM", "xterm"), ("CLICOLOR", "1")], &[]));
    let forced = ("CLICOLOR_FORCE", "1");
    assert!(is_colored(&[forced], &[]));
    assert!(!is_colored(&[forced], &["--color=never"]));
    assert!(!is_colored(&[forced, ("NO_COLOR", "1")], &[]));
    assert!(is_colored(&[forced, ("NO_COLOR", "")], &[]));
    assert!(is_colored(&[("NO_COLOR", "1")], &["--color=always"]));
    // What programs read.
    assert!(!is_colored(&[forced], &["--json", "--color=always"]));
    assert!(!is_colored(&[forced], &["--svg", "-", "--color=always"]));
}

#[test]
fn errors_and_warnings_are_told_apart() {
    let scratchpad = scratchpad();
    let error = run(&scratchpad, &["plan", "none"], &["--color=always"]);
    let begin = "\x1b[1m\x1b[31mtightfit:\x1b[0m ";
    assert!(error.stderr.starts_with(begin), "{error:?}");
    let usage = run(&scratchpad, &["plan", "--color=always", "--nothing"], &[]);
    let begin = "\x1b[1m\x1b[31merror:\x1b[0m ";
    assert!(usage.stderr.starts_with(begin), "{usage:?}");
    let warned = run(&scratchpad, PLAN, &["--set=skip=none", "--color=always"]);
    let begin = "\x1b[1m\x1b[33mpolicy: warn:\x1b[0m ";
    assert!(warned.stderr.starts_with(begin), "{warned:?}");
    for outcome in [
        run(&scratchpad, &["plan", "none"], &[]),
        run(&scratchpad, &["plan", "--nothing"], &[]),
        run(&scratchpad, PLAN, &["--set=skip=none"]),
    ] {
        assert!(!outcome.stderr.contains('\x1b'), "{outcome:?}");
    }
    run(&scratchpad, &["plan", "m", "--color=red"], &[]).fails(2, &["red", "always"]);
}

/// On Windows no file has such a name.
#[cfg(unix)]
#[test]
fn names_cannot_color_anything() {
    let evil = "\x1b[31m\u{9b}32m";
    let scratchpad = scratchpad();
    let model = format!("m{evil}");
    std::fs::rename(scratchpad.path("m"), scratchpad.path(&model)).unwrap();
    let skip = format!("--set=skip=x{evil}");
    for arguments in [
        &["plan", &*model, "--device=sim:1GiB", &*skip][..],
        &["load", &*model, "--device=sim:1GiB"],
        &["plan", evil],
        &["plan", "m", &*format!("--{evil}")],
    ] {
        let outcome = run(&scratchpad, arguments, &["--color=always"]);
        let said = outcome.stdout.clone() + &outcome.stderr;
        assert!(said.contains("\\u{9b}32m"), "{outcome:?}");
        let left = without_colors(&said.replace("\x1b[1m\x1b[31m", ""));
        let hidden = left
            .chars()
            .find(|&c| c != '\n' && tightfit::text::is_hidden(c));
        assert_eq!(hidden, None, "{outcome:?}");
        assert!(!said.contains("\x1b[32m"), "{outcome:?}");
        // Ours are of errors, and stand before what they color.
        let red = said.matches("\x1b[31m").count();
        assert_eq!(red, said.matches("\x1b[1m\x1b[31m").count(), "{outcome:?}");
    }
}

/// `script` gives a command a terminal; it is part of Debian's and most systems' base.
#[cfg(target_os = "linux")]
#[test]
fn a_terminal_has_colors_unless_nobody_wants_them() {
    let has = std::process::Command::new("script")
        .arg("--version")
        .output();
    if has.is_err() {
        eprintln!("not run: there is no `script`");
        return;
    }
    let printed = |variables: &str| {
        let scratchpad = scratchpad();
        let line = format!(
            "TERM=xterm; export TERM; {variables} \
             script -qec '\"$TIGHTFIT\" plan m --device sim:1GiB' /dev/null"
        );
        scratchpad.run_shell(&line).succeeds().stdout
    };
    let colored = printed("");
    assert!(colored.contains("\x1b[38;5;25m"), "{colored:?}");
    for variables in ["NO_COLOR=1", "TERM=dumb", "CLICOLOR=0"] {
        let plain = printed(variables);
        assert!(
            plain.contains("linear layers") && !plain.contains('\x1b'),
            "{plain:?}"
        );
    }
}
