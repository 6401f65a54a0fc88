//! Components that are made of more parts than anyone needs.

use tightfit_tests::guests::{self, Handwritten, compile, with_module};
use tightfit_wasm::sandbox::{GuestFailure, Limits};

use super::{Bench, rejection};

fn too_many(what: &'static str, limit: usize) -> GuestFailure {
    GuestFailure::TooMany { what, limit }
}

/// How the hostile policy fails with one more module, instantiated so many times.
#[track_caller]
fn with(module: &str, times: u32, limits: Limits) -> GuestFailure {
    let component = with_module(&guests::component(guests::HOSTILE), module, times);
    Bench::new().failure(&compile(&component, limits), "")
}

/// The hostile policy with so many more of a module, none of them instantiated.
fn with_unused(module: &str, count: usize) -> Vec<u8> {
    let component = guests::component(guests::HOSTILE);
    (0..count).fold(component, |component, _| with_module(&component, module, 0))
}

#[test]
fn a_few_empty_instances_do_no_harm() {
    // Without this the tests below could fail for a reason of their own.
    let component = guests::component(guests::HOSTILE);
    let policy = compile(&with_module(&component, "(module)", 20), Limits::default());
    Bench::new().propose(&policy, "honest").unwrap();
}

#[test]
fn modules_that_are_not_instantiated_take_what_their_bytes_take() {
    // A byte at each end: 16 MiB that need not be there, 3 GiB of all of them.
    let images =
        r#"(module (memory 257) (data (i32.const 0) "a") (data (i32.const 16777200) "b"))"#;
    let limits = Limits::default().with_compiled(4 << 20);
    let policy = compile(&with_unused(images, 200), limits.clone());
    Bench::new().propose(&policy, "honest").unwrap();
    // The end of a table of a million.
    let table = "(module (table 1048576 funcref) (elem (i32.const 49999) $f) (func $f))";
    let policy = compile(&with_unused(table, 1), limits);
    Bench::new().propose(&policy, "honest").unwrap();
    for (module, need) in [
        (table, 150_000),
        (
            "(module (table 1048576 funcref) (elem (i32.const 1048575) $f) (func $f))",
            3 << 20,
        ),
        (
            "(module (table 100000 funcref (ref.func $f)) (func $f))",
            300_000,
        ),
    ] {
        let failure = rejection(&with_unused(module, 3));
        assert!(
            matches!(failure, GuestFailure::Tables { need: found, limit: 100_000 } if found >= need),
            "{module}: {failure:?}"
        );
    }
}

#[test]
fn modules_are_counted_instantiated_or_not() {
    assert_eq!(
        rejection(&with_unused("(module)", 300)),
        too_many("modules", 256)
    );
    let nested = format!("(component (component {}))", "(core module)".repeat(300));
    let nested = wat::parse_str(nested).unwrap();
    assert_eq!(rejection(&nested), too_many("modules", 256));
}

#[test]
fn what_instances_take_besides_their_memories_is_counted() {
    const LIMIT: u64 = 256 << 20;
    let globals = format!("(module {})", "(global i64 (i64.const 0))".repeat(30_000));
    let elements = format!("(module (func $f) (elem func {}))", "$f ".repeat(80_000));
    for module in [globals, elements] {
        let component = with_module(&guests::component(guests::HOSTILE), &module, 230);
        let failure = rejection(&component);
        assert!(
            matches!(failure, GuestFailure::Memory { need, limit: LIMIT } if need > LIMIT),
            "{failure:?}"
        );
        // Once is no more than a module may have.
        let policy = compile(
            &with_module(&guests::component(guests::HOSTILE), &module, 1),
            Limits::default(),
        );
        Bench::new().propose(&policy, "honest").unwrap();
    }
}

#[test]
fn empty_components_are_instances_too() {
    // 2^20 of them, without a single module.
    let mut text = "(component $c0)".to_owned();
    for level in 1..=20 {
        let below = level - 1;
        text += &format!(
            "(component $c{level} (alias outer 1 $c{below} (component $b))
                (instance (instantiate $b)) (instance (instantiate $b)))"
        );
    }
    let bomb = wat::parse_str(format!("(component {text} (instance (instantiate $c20)))")).unwrap();
    assert_eq!(rejection(&bomb), too_many("instances", 256));
}

#[test]
fn a_type_of_a_million_parts_is_not_read_back() {
    // Each level has the one before twice.
    let mut text = "(type $t0 (instance))".to_owned();
    for level in 1..=17 {
        let below = level - 1;
        text += &format!(
            r#"(type $t{level} (instance (alias outer 1 $t{below} (type $b))
                (export "a" (instance (type $b))) (export "b" (instance (type $b)))))"#
        );
    }
    let component = |levels: u32| {
        let text = format!(
            r#"(component {text} (import "tightfit:host/log@0.1.0" (instance (type $t{levels})))
                (instance $nothing) (export "tightfit:host/planner@0.1.0" (instance $nothing)))"#
        );
        rejection(&wat::parse_str(text).unwrap())
    };
    for (levels, word) in [(15, "bytes to describe"), (17, "out of proportion")] {
        let failure = component(levels);
        assert!(
            matches!(&failure, GuestFailure::NotAComponent { reason } if reason.contains(word)),
            "{failure:?}"
        );
    }
    // What is small is refused for what it is.
    let failure = component(3);
    assert!(
        matches!(failure, GuestFailure::WrongWorld(_)),
        "{failure:?}"
    );
}

#[test]
fn interfaces_are_counted() {
    let imports: String = (0..300)
        .map(|patch| format!(r#"(import "tightfit:host/log@0.1.{patch}" (instance))"#))
        .collect();
    let component = wat::parse_str(format!("(component {imports})")).unwrap();
    assert_eq!(rejection(&component), too_many("imports", 256));
}

#[test]
fn many_memories_do_not_get_around_the_limit() {
    const MEMORY: &str = "(module (memory 896))";
    assert_eq!(with(MEMORY, 20, Limits::default()), too_many("memories", 1));
    let second = Handwritten {
        extra: "(memory 1)".to_owned(),
        ..Handwritten::default()
    };
    let policy = compile(&second.module(), Limits::default());
    assert_eq!(Bench::new().failure(&policy, ""), too_many("memories", 1));
    // Where there may be many, they are summed: 56 MiB each.
    let many = Limits::default().with_memories(100);
    let failure = with(MEMORY, 20, many);
    let limit = 256 << 20;
    assert!(
        matches!(failure, GuestFailure::Memory { need, limit: at } if at == limit && need <= limit + (56 << 20)),
        "{failure:?}"
    );
}

#[test]
fn many_tables_do_not_get_around_the_limit() {
    assert_eq!(
        with(
            "(module (table 10 funcref) (table 10 funcref))",
            150,
            Limits::default()
        ),
        too_many("tables", 256)
    );
    let failure = with("(module (table 20000 funcref))", 10, Limits::default());
    assert!(
        matches!(failure, GuestFailure::Tables { need, limit: 100_000 } if need > 100_000),
        "{failure:?}"
    );
}

#[test]
fn instances_are_counted_before_anything_is_compiled() {
    let component = with_module(&guests::component(guests::HOSTILE), "(module)", 300);
    assert_eq!(rejection(&component), too_many("instances", 256));
}

#[test]
fn components_that_double_themselves_are_counted_too() {
    // Each level instantiates the one before twice: 2^40 instances in two kilobytes.
    let mut text = "(component $c0 (core module $m) (core instance (instantiate $m)))".to_owned();
    for level in 1..=40 {
        let below = level - 1;
        text += &format!(
            "(component $c{level} (alias outer 1 $c{below} (component $b))
                (instance (instantiate $b)) (instance (instantiate $b)))"
        );
    }
    let bomb = wat::parse_str(format!("(component {text} (instance (instantiate $c40)))")).unwrap();
    assert!(bomb.len() < 4000, "{}", bomb.len());
    assert_eq!(rejection(&bomb), too_many("instances", 256));
    // Inside of each other, instead of side by side.
    let mut nested = "(core module $m) (core instance (instantiate $m))".to_owned();
    for level in 0..40 {
        nested = format!(
            "(component $c{level} {nested}) (instance (instantiate $c{level})) (instance (instantiate $c{level}))"
        );
    }
    let bomb = wat::parse_str(format!("(component {nested})")).unwrap();
    assert_eq!(rejection(&bomb), too_many("instances", 256));
    // By exporting itself under another name.
    let exported = r#"(component
        (component $a (core module $m) (core instance (instantiate $m)))
        (export $e "e" (component $a))
        (component $b (alias outer 1 $e (component $x))
            (instance (instantiate $x)))
        (instance (instantiate $b)))"#;
    let failure = rejection(&wat::parse_str(exported).unwrap());
    assert!(
        matches!(failure, GuestFailure::WrongWorld(_)),
        "{failure:?}"
    );
}

#[test]
fn components_that_are_handed_around_are_turned_down() {
    let text = "(component
        (component $twice
            (import \"c\" (component $c))
            (instance (instantiate $c)) (instance (instantiate $c)))
        (component $none)
        (instance (instantiate $twice (with \"c\" (component $none)))))";
    let failure = rejection(&wat::parse_str(text).unwrap());
    assert!(
        matches!(&failure, GuestFailure::NotAComponent { reason } if reason.contains("components that it is given")),
        "{failure:?}"
    );
}

#[test]
fn features_that_are_off_are_turned_down() {
    for extra in [
        "(memory $shared 1 1 shared)",
        "(type (struct (field i32)))",
        "(tag $t) (func (throw $t))",
        "(func (param v128) (result v128)
            (i32x4.relaxed_trunc_f32x4_s (local.get 0)))",
    ] {
        let policy = Handwritten {
            extra: extra.to_owned(),
            ..Handwritten::default()
        };
        let failure = rejection(&policy.module());
        assert!(
            matches!(failure, GuestFailure::NotAComponent { .. }),
            "{extra}: {failure:?}"
        );
    }
    let asynchronous = r#"(component
        (core module $m (func (export "f") (result i32) (i32.const 0)))
        (core instance $i (instantiate $m))
        (func $f async (canon lift (core func $i "f") async (callback (core func $i "f"))))
        (instance $p (export "plan" (func $f)))
        (export "tightfit:host/planner@0.1.0" (instance $p)))"#;
    if let Ok(bytes) = wat::parse_str(asynchronous) {
        let failure = rejection(&bytes);
        assert!(
            matches!(failure, GuestFailure::NotAComponent { .. }),
            "{failure:?}"
        );
    }
}
