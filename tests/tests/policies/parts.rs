//! Components that are made of more parts than anyone needs.

use tightfit_tests::guests::{self, Handwritten, compile, with_module};
use tightfit_wasm::sandbox::{Failure, Limits};

use super::{Bench, rejection};

fn too_many(what: &'static str, limit: usize) -> Failure {
    Failure::TooMany { what, limit }
}

/// How the hostile policy fails with one more module, instantiated so many times.
#[track_caller]
fn with(module: &str, times: u32, limits: Limits) -> Failure {
    let component = with_module(&guests::component(guests::HOSTILE), module, times);
    Bench::new().failure(&compile(&component, limits), "")
}

#[test]
fn more_modules_alone_do_no_harm() {
    // Without this the tests below could fail for a reason of their own.
    let component = guests::component(guests::HOSTILE);
    let policy = compile(&with_module(&component, "(module)", 20), Limits::default());
    Bench::new().propose(&policy, "honest").unwrap();
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
    let many = Limits {
        memories: 100,
        ..Limits::default()
    };
    let failure = with(MEMORY, 20, many);
    let limit = 256 << 20;
    assert!(
        matches!(failure, Failure::Memory { need, limit: at } if at == limit && need <= limit + (56 << 20)),
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
        matches!(failure, Failure::Tables { need, limit: 100_000 } if need > 100_000),
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
    assert!(matches!(failure, Failure::WrongWorld(_)), "{failure:?}");
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
        matches!(&failure, Failure::NotAComponent { reason } if reason.contains("components that it is given")),
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
            matches!(failure, Failure::NotAComponent { .. }),
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
            matches!(failure, Failure::NotAComponent { .. }),
            "{failure:?}"
        );
    }
}
