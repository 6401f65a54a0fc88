//! Where files are written, whatever is named: `plan --svg FILE`, `load --timeline FILE` and `check --junit
//! FILE`.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::thread;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::process::geteuid;
use tightfit_tests::command::{Outcome, Scratchpad};
use tightfit_tests::models;
use tightfit_tests::saving::names;

const OUTPUT: i32 = 1;
const USAGE: i32 = 2;

/// What is written, and how it begins and ends.
const WRITERS: [(&str, &str, &str); 3] = [
    ("--svg", "<svg ", "</svg>\n"),
    ("--timeline", "<svg ", "</svg>\n"),
    ("--junit", "<?xml ", "</testsuites>\n"),
];

fn scratchpad() -> Scratchpad {
    let scratchpad = Scratchpad::new();
    models::write_decoder(&scratchpad.path("m"), 1, 64);
    fs::write(
        scratchpad.path("s.toml"),
        "[[scenario]]\nname = \"x\"\nmodel = { path = \"m\" }\ndevices = [\"sim:1GiB\"]\n\
         expect = { fits = true }\n",
    )
    .unwrap();
    scratchpad
}

fn arguments<'a>(option: &'a str, path: &'a str) -> Vec<&'a str> {
    match option {
        "--svg" => vec!["plan", "m", "--device=sim:1GiB", option, path],
        "--timeline" => vec!["load", "m", "--device=sim:1GiB", option, path],
        _ => vec!["check", "s.toml", option, path],
    }
}

fn write(scratchpad: &Scratchpad, option: &str, path: &str) -> Outcome {
    scratchpad.run(&arguments(option, path))
}

#[track_caller]
fn is_whole(text: &str, (option, begin, end): (&str, &str, &str)) {
    assert!(
        text.starts_with(begin) && text.ends_with(end),
        "{option}: {text}"
    );
    assert_eq!(text.matches(end.trim_end()).count(), 1, "{option}: {text}");
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_device_is_written_and_never_replaced() {
    let scratchpad = scratchpad();
    // A node of our own where that is possible: root could replace it.
    let node = scratchpad.path("node");
    let made = mknodat(
        CWD,
        &node,
        FileType::CharacterDevice,
        Mode::RUSR | Mode::WUSR,
        makedev(1, 3),
    );
    for (option, ..) in WRITERS {
        write(&scratchpad, option, "/dev/null").succeeds();
        write(&scratchpad, option, "/dev/full")
            .fails_midway(OUTPUT, &["cannot write /dev/full", "space"]);
        if made.is_ok() {
            // It may lie where devices cannot be opened.
            write(&scratchpad, option, "node");
            let kind = fs::symlink_metadata(&node).unwrap().file_type();
            assert!(kind.is_char_device(), "{option}: {kind:?}");
        }
        for path in ["/dev/null", "/dev/full"] {
            let kind = fs::symlink_metadata(path).unwrap().file_type();
            assert!(kind.is_char_device(), "{option}: {kind:?}");
        }
    }
}

#[test]
fn the_reader_of_a_fifo_gets_all_of_it() {
    let scratchpad = scratchpad();
    let fifo = scratchpad.path("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    symlink("fifo", scratchpad.path("link")).unwrap();
    for writer in WRITERS {
        for path in ["fifo", "link"] {
            let reader = thread::spawn({
                let fifo = fifo.clone();
                move || fs::read_to_string(fifo).unwrap()
            });
            write(&scratchpad, writer.0, path).succeeds();
            assert!(fs::symlink_metadata(&fifo).unwrap().file_type().is_fifo());
            is_whole(&reader.join().unwrap(), writer);
        }
    }
}

#[test]
fn links_are_followed_and_stay() {
    let scratchpad = scratchpad();
    fs::create_dir_all(scratchpad.path("a/b")).unwrap();
    fs::write(scratchpad.path("a/target"), "old").unwrap();
    symlink("../target", scratchpad.path("a/b/second")).unwrap();
    symlink("a/b/second", scratchpad.path("first")).unwrap();
    symlink("a/new", scratchpad.path("dangling")).unwrap();
    symlink("round", scratchpad.path("round")).unwrap();
    symlink("no/such/file", scratchpad.path("nowhere")).unwrap();
    for writer in WRITERS {
        for (link, target) in [("first", "a/target"), ("dangling", "a/new")] {
            write(&scratchpad, writer.0, link).succeeds();
            assert!(
                fs::symlink_metadata(scratchpad.path(link))
                    .unwrap()
                    .is_symlink()
            );
            is_whole(
                &fs::read_to_string(scratchpad.path(target)).unwrap(),
                writer,
            );
        }
        for link in ["round", "nowhere"] {
            let words = [format!("cannot write {link}")];
            write(&scratchpad, writer.0, link).fails(OUTPUT, &[words[0].as_str()]);
            assert!(
                fs::symlink_metadata(scratchpad.path(link))
                    .unwrap()
                    .is_symlink()
            );
        }
    }
    let left = names(&scratchpad.path("a"));
    assert_eq!(left, ["b", "new", "target"].map(str::to_owned).into());
}

#[test]
fn the_mode_and_other_names_of_a_file_stay() {
    let scratchpad = scratchpad();
    let old = scratchpad.path("old");
    for writer in WRITERS {
        for (before, after) in [
            (0o600, 0o600),
            (0o640, 0o640),
            (0o666, 0o666),
            (0o4755, 0o755),
        ] {
            fs::write(&old, "old").unwrap();
            fs::set_permissions(&old, fs::Permissions::from_mode(before)).unwrap();
            write(&scratchpad, writer.0, "old").succeeds();
            assert_eq!(mode(&old), after, "{before:o}");
            is_whole(&fs::read_to_string(&old).unwrap(), writer);
        }
        fs::write(
            &old,
            "old, and longer than what is written. ".repeat(10_000),
        )
        .unwrap();
        fs::hard_link(&old, scratchpad.path("other")).unwrap();
        write(&scratchpad, writer.0, "old").succeeds();
        is_whole(
            &fs::read_to_string(scratchpad.path("other")).unwrap(),
            writer,
        );
        fs::remove_file(scratchpad.path("other")).unwrap();
        // A new one is as other programs make them.
        fs::write(scratchpad.path("any"), "").unwrap();
        write(&scratchpad, writer.0, "new").succeeds();
        assert_eq!(mode(&scratchpad.path("new")), mode(&scratchpad.path("any")));
        fs::remove_file(scratchpad.path("new")).unwrap();
    }
    let left = names(&scratchpad.path(""));
    assert_eq!(
        left,
        ["any", "m", "old", "s.toml"].map(str::to_owned).into()
    );
}

#[test]
fn an_owner_stays_and_what_may_not_be_written_is_not() {
    let scratchpad = scratchpad();
    let old = scratchpad.path("old");
    let root = geteuid().is_root();
    for writer in WRITERS {
        fs::write(&old, "old").unwrap();
        if root {
            std::os::unix::fs::chown(&old, Some(1234), Some(4321)).unwrap();
            write(&scratchpad, writer.0, "old").succeeds();
            let now = fs::metadata(&old).unwrap();
            assert_eq!((now.uid(), now.gid()), (1234, 4321));
            is_whole(&fs::read_to_string(&old).unwrap(), writer);
            continue;
        }
        fs::set_permissions(&old, fs::Permissions::from_mode(0o444)).unwrap();
        write(&scratchpad, writer.0, "old").fails(OUTPUT, &["cannot write old", "denied"]);
        assert_eq!(fs::read_to_string(&old).unwrap(), "old");
        fs::remove_file(&old).unwrap();
        // A file that may be written, in a directory that may not.
        fs::create_dir(scratchpad.path("closed")).unwrap();
        fs::write(scratchpad.path("closed/old"), "old").unwrap();
        let closed = |mode| {
            fs::set_permissions(scratchpad.path("closed"), fs::Permissions::from_mode(mode))
                .unwrap();
        };
        closed(0o555);
        write(&scratchpad, writer.0, "closed/old").succeeds();
        write(&scratchpad, writer.0, "closed/new").fails(OUTPUT, &["cannot write closed/new"]);
        closed(0o755);
        is_whole(
            &fs::read_to_string(scratchpad.path("closed/old")).unwrap(),
            writer,
        );
        fs::remove_dir_all(scratchpad.path("closed")).unwrap();
    }
}

#[test]
fn standard_output_has_many_names_and_then_gets_nothing_else() {
    let scratchpad = scratchpad();
    symlink("/dev/stdout", scratchpad.path("link")).unwrap();
    let before = names(&scratchpad.path(""));
    for writer in WRITERS {
        for path in ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"] {
            let text = write(&scratchpad, writer.0, path).succeeds().stdout;
            is_whole(&text, writer);
            let json = [&arguments(writer.0, path)[..], &["--json"]].concat();
            let both = scratchpad
                .run(&json)
                .fails_midway(USAGE, &[writer.0, "--json"]);
            assert_eq!(both.json()["error"]["kind"], "usage");
        }
        assert_eq!(names(&scratchpad.path("")), before);
        assert!(fs::symlink_metadata("/dev/stdout").unwrap().is_symlink());
        let ordinary = write(&scratchpad, writer.0, "./-").succeeds().stdout;
        assert!(!ordinary.contains('<'), "{ordinary}");
        is_whole(&fs::read_to_string(scratchpad.path("-")).unwrap(), writer);
        fs::remove_file(scratchpad.path("-")).unwrap();
    }
}

#[test]
fn redirected_output_is_not_replaced_under_its_writer() {
    let scratchpad = scratchpad();
    for writer in WRITERS {
        for path in ["-", "/dev/stdout", "/proc/self/fd/1", "out"] {
            let line = format!(
                "\"$TIGHTFIT\" {} > out",
                arguments(writer.0, path).join(" ")
            );
            scratchpad.run_shell(&line).succeeds();
            is_whole(&fs::read_to_string(scratchpad.path("out")).unwrap(), writer);
            fs::remove_file(scratchpad.path("out")).unwrap();
        }
        // Another open file, which has no other name any more.
        let line = format!(
            "exec 3<> out 4< out; rm out; \"$TIGHTFIT\" {} > /dev/null; cat <&4",
            arguments(writer.0, "/proc/self/fd/3").join(" ")
        );
        is_whole(&scratchpad.run_shell(&line).succeeds().stdout, writer);
        let line = format!(
            "\"$TIGHTFIT\" {} > /dev/full",
            arguments(writer.0, "-").join(" ")
        );
        scratchpad
            .run_shell(&line)
            .fails(OUTPUT, &["cannot write -", "space"]);
        scratchpad.run_unheard(&arguments(writer.0, "-")).succeeds();
    }
}
