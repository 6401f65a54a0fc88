//! Where files are written, whatever is named: `plan --svg FILE` and `check --junit FILE`.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::thread;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::process::geteuid;
use tightfit_tests::command::{Outcome, Place};
use tightfit_tests::models;
use tightfit_tests::saving::names;

const OUTPUT: i32 = 1;
const USAGE: i32 = 2;

/// What is written, and how it begins and ends.
const WRITERS: [(&str, &str, &str); 2] = [
    ("--svg", "<svg ", "</svg>\n"),
    ("--junit", "<?xml ", "</testsuites>\n"),
];

fn place() -> Place {
    let place = Place::new();
    models::write_decoder(&place.path("m"), 1, 64);
    fs::write(
        place.path("s.toml"),
        "[[scenario]]\nname = \"x\"\nmodel = { path = \"m\" }\ndevices = [\"sim:1GiB\"]\n\
         expect = { fits = true }\n",
    )
    .unwrap();
    place
}

fn arguments<'a>(option: &'a str, path: &'a str) -> Vec<&'a str> {
    match option {
        "--svg" => vec!["plan", "m", "--device=sim:1GiB", option, path],
        _ => vec!["check", "s.toml", option, path],
    }
}

fn write(place: &Place, option: &str, path: &str) -> Outcome {
    place.run(&arguments(option, path))
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
    let place = place();
    // A node of our own where that is possible: root could replace it.
    let node = place.path("node");
    let made = mknodat(
        CWD,
        &node,
        FileType::CharacterDevice,
        Mode::RUSR | Mode::WUSR,
        makedev(1, 3),
    );
    for (option, ..) in WRITERS {
        write(&place, option, "/dev/null").succeeds();
        write(&place, option, "/dev/full")
            .fails_midway(OUTPUT, &["cannot write /dev/full", "space"]);
        if made.is_ok() {
            // It may lie where devices cannot be opened.
            write(&place, option, "node");
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
    let place = place();
    let fifo = place.path("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    symlink("fifo", place.path("link")).unwrap();
    for writer in WRITERS {
        for path in ["fifo", "link"] {
            let reader = thread::spawn({
                let fifo = fifo.clone();
                move || fs::read_to_string(fifo).unwrap()
            });
            write(&place, writer.0, path).succeeds();
            assert!(fs::symlink_metadata(&fifo).unwrap().file_type().is_fifo());
            is_whole(&reader.join().unwrap(), writer);
        }
    }
}

#[test]
fn links_are_followed_and_stay() {
    let place = place();
    fs::create_dir_all(place.path("a/b")).unwrap();
    fs::write(place.path("a/target"), "old").unwrap();
    symlink("../target", place.path("a/b/second")).unwrap();
    symlink("a/b/second", place.path("first")).unwrap();
    symlink("a/new", place.path("dangling")).unwrap();
    symlink("round", place.path("round")).unwrap();
    symlink("no/such/file", place.path("nowhere")).unwrap();
    for writer in WRITERS {
        for (link, target) in [("first", "a/target"), ("dangling", "a/new")] {
            write(&place, writer.0, link).succeeds();
            assert!(fs::symlink_metadata(place.path(link)).unwrap().is_symlink());
            is_whole(&fs::read_to_string(place.path(target)).unwrap(), writer);
        }
        for link in ["round", "nowhere"] {
            let words = [format!("cannot write {link}")];
            write(&place, writer.0, link).fails(OUTPUT, &[words[0].as_str()]);
            assert!(fs::symlink_metadata(place.path(link)).unwrap().is_symlink());
        }
    }
    let left = names(&place.path("a"));
    assert_eq!(left, ["b", "new", "target"].map(str::to_owned).into());
}

#[test]
fn the_mode_and_other_names_of_a_file_stay() {
    let place = place();
    let old = place.path("old");
    for writer in WRITERS {
        for (before, after) in [
            (0o600, 0o600),
            (0o640, 0o640),
            (0o666, 0o666),
            (0o4755, 0o755),
        ] {
            fs::write(&old, "old").unwrap();
            fs::set_permissions(&old, fs::Permissions::from_mode(before)).unwrap();
            write(&place, writer.0, "old").succeeds();
            assert_eq!(mode(&old), after, "{before:o}");
            is_whole(&fs::read_to_string(&old).unwrap(), writer);
        }
        fs::write(
            &old,
            "old, and longer than what is written. ".repeat(10_000),
        )
        .unwrap();
        fs::hard_link(&old, place.path("other")).unwrap();
        write(&place, writer.0, "old").succeeds();
        is_whole(&fs::read_to_string(place.path("other")).unwrap(), writer);
        fs::remove_file(place.path("other")).unwrap();
        // A new one is as other programs make them.
        fs::write(place.path("any"), "").unwrap();
        write(&place, writer.0, "new").succeeds();
        assert_eq!(mode(&place.path("new")), mode(&place.path("any")));
        fs::remove_file(place.path("new")).unwrap();
    }
    let left = names(&place.path(""));
    assert_eq!(
        left,
        ["any", "m", "old", "s.toml"].map(str::to_owned).into()
    );
}

#[test]
fn an_owner_stays_and_what_may_not_be_written_is_not() {
    let place = place();
    let old = place.path("old");
    let root = geteuid().is_root();
    for writer in WRITERS {
        fs::write(&old, "old").unwrap();
        if root {
            std::os::unix::fs::chown(&old, Some(1234), Some(4321)).unwrap();
            write(&place, writer.0, "old").succeeds();
            let now = fs::metadata(&old).unwrap();
            assert_eq!((now.uid(), now.gid()), (1234, 4321));
            is_whole(&fs::read_to_string(&old).unwrap(), writer);
            continue;
        }
        fs::set_permissions(&old, fs::Permissions::from_mode(0o444)).unwrap();
        write(&place, writer.0, "old").fails(OUTPUT, &["cannot write old", "denied"]);
        assert_eq!(fs::read_to_string(&old).unwrap(), "old");
        fs::remove_file(&old).unwrap();
        // A file that may be written, in a directory that may not.
        fs::create_dir(place.path("closed")).unwrap();
        fs::write(place.path("closed/old"), "old").unwrap();
        let closed = |mode| {
            fs::set_permissions(place.path("closed"), fs::Permissions::from_mode(mode)).unwrap();
        };
        closed(0o555);
        write(&place, writer.0, "closed/old").succeeds();
        write(&place, writer.0, "closed/new").fails(OUTPUT, &["cannot write closed/new"]);
        closed(0o755);
        is_whole(
            &fs::read_to_string(place.path("closed/old")).unwrap(),
            writer,
        );
        fs::remove_dir_all(place.path("closed")).unwrap();
    }
}

#[test]
fn standard_output_has_many_names_and_then_gets_nothing_else() {
    let place = place();
    symlink("/dev/stdout", place.path("link")).unwrap();
    let before = names(&place.path(""));
    for writer in WRITERS {
        for path in ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"] {
            let text = write(&place, writer.0, path).succeeds().stdout;
            is_whole(&text, writer);
            let json = [&arguments(writer.0, path)[..], &["--json"]].concat();
            let both = place.run(&json).fails_midway(USAGE, &[writer.0, "--json"]);
            assert_eq!(both.json()["error"]["kind"], "usage");
        }
        assert_eq!(names(&place.path("")), before);
        assert!(fs::symlink_metadata("/dev/stdout").unwrap().is_symlink());
        let ordinary = write(&place, writer.0, "./-").succeeds().stdout;
        assert!(!ordinary.contains('<'), "{ordinary}");
        is_whole(&fs::read_to_string(place.path("-")).unwrap(), writer);
        fs::remove_file(place.path("-")).unwrap();
    }
}

#[test]
fn redirected_output_is_not_replaced_under_its_writer() {
    let place = place();
    for writer in WRITERS {
        for path in ["-", "/dev/stdout", "/proc/self/fd/1", "out"] {
            let line = format!(
                "\"$TIGHTFIT\" {} > out",
                arguments(writer.0, path).join(" ")
            );
            place.run_shell(&line).succeeds();
            is_whole(&fs::read_to_string(place.path("out")).unwrap(), writer);
            fs::remove_file(place.path("out")).unwrap();
        }
        // Another open file, which has no other name any more.
        let line = format!(
            "exec 3<> out 4< out; rm out; \"$TIGHTFIT\" {} > /dev/null; cat <&4",
            arguments(writer.0, "/proc/self/fd/3").join(" ")
        );
        is_whole(&place.run_shell(&line).succeeds().stdout, writer);
        let line = format!(
            "\"$TIGHTFIT\" {} > /dev/full",
            arguments(writer.0, "-").join(" ")
        );
        place
            .run_shell(&line)
            .fails(OUTPUT, &["cannot write -", "space"]);
        place.run_unheard(&arguments(writer.0, "-")).succeeds();
    }
}
