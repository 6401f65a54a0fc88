//! What no compiler makes of Rust: modules written by hand that loop, trap or grow where a guest
//! has the word.

use std::time::Duration;

use tightfit_tests::guests::{Handwritten, compile};
use tightfit_wasm::sandbox::{GuestFailure, Limits};

use super::Bench;

const LOOP: &str = "(loop (br 0)) (unreachable)";
const FUEL: u64 = 2_000_000;

/// With little fuel, so that loops end soon.
fn meager() -> Limits {
    Limits::default().with_fuel(FUEL).with_fuel_per_tensor(0)
}

#[track_caller]
fn failure(edit: impl FnOnce(&mut Handwritten), limits: Limits) -> GuestFailure {
    let mut policy = Handwritten::default();
    edit(&mut policy);
    Bench::new().failure(&compile(&policy.module(), limits), "")
}

/// A function that runs as the module is instantiated.
fn start(body: &str) -> impl Fn(&mut Handwritten) {
    let text = format!("(func $start {body}) (start $start)");
    move |policy| policy.extra = text.clone()
}

/// A function that runs after an answer has been taken.
fn post_return(of: &str, body: &str) -> impl Fn(&mut Handwritten) {
    let text = format!(
        r#"(func (export "cabi_post_tightfit:host/planner@0.1.0#{of}") (param i32) {body})"#
    );
    move |policy| policy.extra = text.clone()
}

#[test]
fn a_loop_ends_with_the_fuel_wherever_it_is() {
    let out_of_fuel = GuestFailure::OutOfFuel { fuel: FUEL };
    for (what, edit) in [
        (
            "start",
            Box::new(start(LOOP)) as Box<dyn Fn(&mut Handwritten)>,
        ),
        (
            "describe",
            Box::new(|policy| policy.describe = LOOP.to_owned()),
        ),
        ("after describe", Box::new(post_return("describe", LOOP))),
        ("plan", Box::new(|policy| policy.plan = LOOP.to_owned())),
        ("after plan", Box::new(post_return("plan", LOOP))),
        (
            "allocator",
            Box::new(|policy| policy.realloc = LOOP.to_owned()),
        ),
    ] {
        assert_eq!(failure(edit, meager()), out_of_fuel, "{what}");
    }
}

#[test]
fn a_loop_ends_with_the_clock_wherever_it_is() {
    let impatient = || {
        Limits::default()
            .with_fuel(u64::MAX)
            .with_deadline(Duration::from_millis(200))
    };
    for (what, edit) in [
        (
            "start",
            Box::new(start(LOOP)) as Box<dyn Fn(&mut Handwritten)>,
        ),
        ("after describe", Box::new(post_return("describe", LOOP))),
        (
            "allocator",
            Box::new(|policy| policy.realloc = LOOP.to_owned()),
        ),
    ] {
        let failure = failure(edit, impatient());
        assert_eq!(failure, GuestFailure::Deadline { seconds: 0.2 }, "{what}");
    }
}

#[test]
fn recursion_ends_with_the_stack_wherever_it_is() {
    let recurse = "(func $dive (call $dive) (call $dive))";
    for (what, edit) in [
        (
            "start",
            Box::new(move |policy: &mut Handwritten| {
                policy.extra = format!("{recurse} (start $dive)");
            }) as Box<dyn Fn(&mut Handwritten)>,
        ),
        (
            "after plan",
            Box::new(move |policy| {
                post_return("plan", "(call $dive)")(policy);
                policy.extra += recurse;
            }),
        ),
        (
            "allocator",
            Box::new(move |policy| {
                policy.realloc = "(call $dive) (unreachable)".to_owned();
                policy.extra = recurse.to_owned();
            }),
        ),
    ] {
        let failure = failure(edit, Limits::default());
        assert_eq!(failure, GuestFailure::StackOverflow, "{what}");
    }
}

#[test]
fn memory_is_counted_wherever_it_is_asked_for() {
    const LIMIT: u64 = 256 << 20;
    let grow = "(drop (memory.grow (i32.const 5000)))";
    let memory = |pages: u64| GuestFailure::Memory {
        need: pages << 16,
        limit: LIMIT,
    };
    assert_eq!(failure(start(grow), Limits::default()), memory(5004));
    assert_eq!(
        failure(post_return("describe", grow), Limits::default()),
        memory(5004)
    );
    // At once, or a page at a time.
    let little_by_little = "(loop (drop (memory.grow (i32.const 1))) (br 0))";
    assert_eq!(
        failure(start(little_by_little), Limits::default()),
        memory(4097)
    );
}

#[test]
fn what_would_grow_past_its_own_maximum_does_not_and_is_not_counted() {
    // What is refused sixteen times is not summed: that would be more than the limit.
    let policy = Handwritten {
        extra: r#"(table $small 1 2 funcref)
            (func $start (local i32)
                (loop
                    (if (i32.ne (table.grow $small (ref.null func) (i32.const 50000)) (i32.const -1))
                        (then (unreachable)))
                    (local.set 0 (i32.add (local.get 0) (i32.const 1)))
                    (br_if 0 (i32.lt_u (local.get 0) (i32.const 16)))))
            (start $start)"#
            .to_owned(),
        ..Handwritten::default()
    };
    let policy = compile(&policy.module(), Limits::default());
    let error = Bench::new().error(&policy, "");
    assert!(error.to_string().contains("placed 0 tensors"), "{error}");
}

#[test]
fn tables_are_counted_at_birth_and_as_they_grow() {
    let tables = |need| GuestFailure::Tables {
        need,
        limit: 100_000,
    };
    let born = |policy: &mut Handwritten| policy.extra = "(table 200000 funcref)".to_owned();
    assert_eq!(failure(born, Limits::default()), tables(200_000));
    let grown = |policy: &mut Handwritten| {
        policy.extra = "(table $t 1 funcref)".to_owned();
        policy.plan =
            "(drop (table.grow $t (ref.null func) (i32.const 100000))) (i32.const 128)".to_owned();
    };
    assert_eq!(failure(grown, Limits::default()), tables(100_001));
    let several = |policy: &mut Handwritten| {
        policy.extra =
            "(table 40000 funcref) (table 40000 funcref) (table 40000 funcref)".to_owned();
    };
    assert_eq!(failure(several, Limits::default()), tables(120_000));
}

#[test]
fn a_guest_that_is_answering_cannot_call_the_host() {
    let imports = r#"(import "tightfit:host/log@0.1.0" "write" (func $log (param i32 i32 i32)))"#;
    let call = "(call $log (i32.const 0) (i32.const 64) (i32.const 3))";
    for (what, edit) in [
        (
            "allocator",
            Box::new(move |policy: &mut Handwritten| {
                policy.realloc = format!("{call} (i32.const 4096)");
            }) as Box<dyn Fn(&mut Handwritten)>,
        ),
        ("after describe", Box::new(post_return("describe", call))),
        // Not even linked by then.
        ("start", Box::new(start(call))),
    ] {
        let failure = failure(
            |policy| {
                policy.imports = imports.to_owned();
                edit(policy);
            },
            Limits::default(),
        );
        let GuestFailure::Trap { message } = &failure else {
            panic!("{what}: {failure:?}");
        };
        let word = match what {
            "start" => "uninitialized element",
            _ => "cannot leave component instance",
        };
        assert!(message.contains(word), "{what}: {message}");
    }
}

#[test]
fn one_instruction_on_much_memory_takes_fuel_for_each_byte() {
    let fill = |policy: &mut Handwritten| {
        policy.plan =
            "(memory.fill (i32.const 0) (i32.const 1) (i32.const -1)) (i32.const 128)".to_owned();
    };
    assert_eq!(
        failure(fill, meager()),
        GuestFailure::OutOfFuel { fuel: FUEL }
    );
}

#[test]
fn every_trap_is_named_by_its_kind() {
    for (body, word) in [
        ("(unreachable)", "unreachable"),
        ("(i32.div_u (i32.const 1) (i32.const 0))", "divide by zero"),
        (
            "(i32.div_s (i32.const 0x80000000) (i32.const -1))",
            "integer overflow",
        ),
        ("(i32.trunc_f32_s (f32.const nan))", "invalid conversion"),
        ("(i32.load (i32.const -4))", "out of bounds memory"),
        (
            "(call_indirect (result i32) (i32.const 7))",
            "out of bounds table",
        ),
        (
            "(call_indirect (result i32) (i32.const 1))",
            "uninitialized element",
        ),
        (
            "(call_indirect (result i32) (i32.const 0))",
            "type mismatch",
        ),
    ] {
        let edit = |policy: &mut Handwritten| {
            policy.plan = body.to_owned();
            policy.extra = "(table 2 funcref) (elem (i32.const 0) $other) (func $other)".to_owned();
        };
        let failure = failure(edit, Limits::default());
        assert!(
            matches!(&failure, GuestFailure::Trap { message } if message.contains(word)),
            "{body}: {failure:?}"
        );
    }
}

#[test]
fn segments_outside_of_memories_and_tables_are_traps() {
    for (extra, word) in [
        (
            r#"(data (i32.const 0x7fffffff) "x")"#,
            "out of bounds memory",
        ),
        (
            "(table 1 funcref) (elem (i32.const 9) $f) (func $f)",
            "out of bounds table",
        ),
    ] {
        let failure = failure(|policy| policy.extra = extra.to_owned(), Limits::default());
        assert!(
            matches!(&failure, GuestFailure::Trap { message } if message.contains(word)),
            "{extra}: {failure:?}"
        );
    }
}
