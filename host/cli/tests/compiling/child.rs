use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{WaitOptions, wait};
use tightfit::cancel::CancelToken;
use tightfit::policy::Policy;
use tightfit_tests::guests::{HOSTILE, Handwritten, component};
use tightfit_wasm::sandbox::GuestFailure;
use tightfit_wasm::sandbox::{Limits, SandboxOptions};

use super::{alone, compiler, open, program, unwary, works};

fn in_child(limits: Limits) -> SandboxOptions {
    SandboxOptions::default()
        .with_limits(limits)
        .with_compiler(compiler())
}

/// One function whose branches the compiler's time grows with faster than linearly.
fn bomb(branches: usize) -> Vec<u8> {
    let mut body = String::new();
    for n in 0..branches {
        write!(
            body,
            "(if (i32.and (local.get {}) (i32.const {n})) (then (local.set {} (i32.add (local.get {}) (i32.const {n})))))",
            n % 8,
            (n * 5 + 1) % 8,
            (n * 3 + 2) % 8,
        )
        .unwrap();
    }
    let policy = Handwritten {
        extra: format!("(func (param i32 i32 i32 i32 i32 i32 i32 i32) {body})"),
        ..Handwritten::default()
    };
    policy.module()
}

/// Open files and children that have ended and nobody waited for.
fn left_behind() -> (usize, bool) {
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    // An error where there are no children at all.
    let children = wait(WaitOptions::NOHANG).is_ok();
    (files, children)
}

#[test]
fn a_policy_that_was_compiled_elsewhere_works_here() {
    let _alone = alone();
    works(in_child(Limits::default()));
    // A component as well as a core module.
    let policy = open(&component(HOSTILE), in_child(Limits::default())).unwrap();
    assert_eq!(policy.describe().unwrap().name, "hostile");
}

#[test]
fn a_bomb_is_stopped_by_the_clock() {
    let _alone = alone();
    let limits = unwary().with_compile_time(Duration::from_millis(300));
    // The size limits alone would have turned it down.
    let bomb = bomb(120_000);
    let limit = Limits::default().function;
    assert!(matches!(
        open(&bomb, Limits::default()),
        Err(GuestFailure::TooLarge { what: "largest function", have, .. }) if have > limit
    ));
    let failure = open(&bomb, in_child(limits)).unwrap_err();
    assert_eq!(failure, GuestFailure::CompileTime { seconds: 0.3 });
    assert_eq!(failure.limit(), Some("compile-time"));
    works(in_child(Limits::default()));
}

#[test]
fn a_bomb_is_stopped_by_the_memory() {
    let _alone = alone();
    let limits = unwary().with_compile_memory(96 << 20);
    let limit = limits.compile_memory;
    let failure = open(&bomb(120_000), in_child(limits)).unwrap_err();
    assert_eq!(failure, GuestFailure::CompileMemory { limit });
    assert_eq!(failure.limit(), Some("compile-memory"));
    works(in_child(Limits::default()));
}

#[test]
fn a_compiler_without_any_memory_says_so() {
    let _alone = alone();
    let limits = Limits::default().with_compile_memory(0);
    let failure = open(HOSTILE, in_child(limits)).unwrap_err();
    assert_eq!(failure, GuestFailure::CompileMemory { limit: 0 });
}

#[test]
fn nothing_is_left_of_the_compiler_however_it_ends() {
    let _alone = alone();
    let endless = || {
        SandboxOptions::default()
            .with_limits(Limits::default().with_compile_time(Duration::from_millis(100)))
            .with_compiler(program("/bin/sh", &["-c", "exec sleep 600"]))
    };
    // What the first time opens and keeps.
    works(in_child(Limits::default()));
    let (before, _) = left_behind();
    for _ in 0..3 {
        works(in_child(Limits::default()));
        open(b"\0asm\x01\0\0\0", in_child(Limits::default())).unwrap_err();
        let failure = open(HOSTILE, endless()).unwrap_err();
        assert_eq!(failure, GuestFailure::CompileTime { seconds: 0.1 });
    }
    assert_eq!(left_behind(), (before, false));
}

#[test]
fn what_the_child_refuses_is_refused_as_here() {
    let _alone = alone();
    // Well-formed sections, a body that is not valid.
    let invalid = Handwritten {
        plan: "(i32.const 128)".to_owned(),
        extra: String::new(),
        ..Handwritten::default()
    };
    let mut invalid = component(&invalid.module());
    let at = invalid
        .windows(3)
        .position(|w| w == [0x41, 0x80, 0x01])
        .unwrap();
    // `i64.const` where an `i32` is due.
    invalid[at] = 0x42;
    let here = open(&invalid, Limits::default()).unwrap_err();
    assert!(
        matches!(here, GuestFailure::NotAComponent { .. }),
        "{here:?}"
    );
    assert_eq!(
        open(&invalid, in_child(Limits::default())).unwrap_err(),
        here
    );
}

#[test]
fn programs_that_are_no_compilers_are_told_apart() {
    let _alone = alone();
    let with = |compiler| {
        let options = SandboxOptions::default().with_compiler(compiler);
        open(HOSTILE, options).unwrap_err()
    };
    let missing = with(program("/nowhere/tightfit", &[]));
    assert!(
        matches!(&missing, GuestFailure::Host { message } if message.contains("/nowhere/tightfit")),
        "{missing:?}"
    );
    let talkative = with(program(
        "/bin/sh",
        &["-c", "echo no compiler here >&2; exit 3"],
    ));
    assert!(
        matches!(&talkative, GuestFailure::Compiler { message }
            if message.contains("exit status: 3") && message.contains("no compiler here")),
        "{talkative:?}"
    );
    let silent = with(program("/bin/sh", &["-c", "kill -SEGV $$"]));
    assert!(
        matches!(&silent, GuestFailure::Compiler { message } if message.contains("signal: 11")),
        "{silent:?}"
    );
    // An answer that is cut short, and one that says it is code and is none.
    let cut = with(program(
        "/bin/sh",
        &["-c", r"printf '+\377\0\0\0\0\0\0\0half'"],
    ));
    assert!(matches!(cut, GuestFailure::Compiler { .. }), "{cut:?}");
    let other = with(program(
        "/bin/sh",
        &["-c", r"printf '+\4\0\0\0\0\0\0\0none'"],
    ));
    assert!(matches!(other, GuestFailure::Host { .. }), "{other:?}");
}

#[test]
fn the_child_is_told_no_secrets() {
    let _alone = alone();
    // All names but those that the shell itself makes.
    let script = r"env | cut -d= -f1 | grep -vx 'PWD\|_\|SHLVL\|OLDPWD\|LD_LIBRARY_PATH' | tr '\n' ' ' >&2; exit 1";
    let options = SandboxOptions::default().with_compiler(program("/bin/sh", &["-c", script]));
    assert!(
        std::env::var_os("PATH").is_some(),
        "there is something to hide"
    );
    let failure = open(HOSTILE, options).unwrap_err();
    let message = "exit status: 1".to_owned();
    assert_eq!(failure, GuestFailure::Compiler { message });
}

#[test]
fn an_answer_is_bounded_before_it_is_read() {
    let _alone = alone();
    let limit = |compiled| Limits::default().with_compiled(compiled);
    let failure = open(HOSTILE, in_child(limit(100_000))).unwrap_err();
    assert_eq!(failure, GuestFailure::Compiled { limit: 100_000 });
    assert_eq!(failure.limit(), Some("compiled"));
    assert_eq!(open(HOSTILE, limit(100_000)).unwrap_err(), failure);
    works(in_child(limit(4 << 20)));
    // A terabyte, and more than there is: not a byte of it is waited for.
    for (script, limit) in [
        (r"printf '+\0\0\0\0\0\001\0\0'; exec sleep 600", 64 << 20),
        (
            r"printf '+\377\377\377\377\377\377\377\377'; exec sleep 600",
            64 << 20,
        ),
        (r"printf '+\001\0\0\0\0\0\0\0'; exec sleep 600", 0),
    ] {
        let options = SandboxOptions::default()
            .with_limits(Limits::default().with_compiled(limit))
            .with_compiler(program("/bin/sh", &["-c", script]));
        assert_eq!(
            open(HOSTILE, options).unwrap_err(),
            GuestFailure::Compiled { limit }
        );
    }
    // Nor of what is within the limit, and out of proportion to the policy.
    let length = 60 << 20;
    let script = format!(
        r"printf '+\0\0\{:o}\{:o}\0\0\0\0'; exec sleep 600",
        (length >> 16) & 0xff,
        length >> 24
    );
    let options = SandboxOptions::default().with_compiler(program("/bin/sh", &["-c", &script]));
    let failure = open(&Handwritten::default().module(), options).unwrap_err();
    assert!(
        matches!(&failure, GuestFailure::NotAComponent { reason } if reason.contains("out of proportion")),
        "{failure:?}"
    );
    // Of a reason as much is read as may be shown.
    let script = r"printf -- '-\0\0\0\0\1\0\0\0'; yes | tr -d '\n'";
    let options = SandboxOptions::default().with_compiler(program("/bin/sh", &["-c", script]));
    let failure = open(HOSTILE, options).unwrap_err();
    let GuestFailure::NotAComponent { reason } = &failure else {
        panic!("{failure:?}");
    };
    assert!(
        reason.starts_with("yyy") && reason.len() < 5000,
        "{}",
        reason.len()
    );
}

#[test]
fn compiling_is_cancelled() {
    let _alone = alone();
    let cancel = CancelToken::new();
    let options = SandboxOptions::default()
        .with_compiler(program("/bin/sh", &["-c", "exec sleep 600"]))
        .with_cancel(cancel.clone());
    let start = Instant::now();
    let failure = thread::scope(|scope| {
        let opened = scope.spawn(|| open(HOSTILE, options).unwrap_err());
        thread::sleep(Duration::from_millis(100));
        cancel.cancel();
        opened.join().unwrap()
    });
    assert_eq!(failure, GuestFailure::Cancelled);
    assert!(start.elapsed() < Limits::default().compile_time);
}
