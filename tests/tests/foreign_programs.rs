//! The example program in other languages, built as its recipes say: each multiplies, and is told what the host
//! says. Recipes whose tools cannot be installed are skipped as in `foreign_policies.rs`.
#![cfg(unix)]

use std::fs;
use std::time::Duration;

use tightfit_tests::foreign::{build, repository};
use tightfit_tests::programs::{Bench, run};
use tightfit_wasm::program::{WasmProgram, default_limits};

/// What the program multiplies: 1 and -1 with small whole numbers.
fn expected(rows: usize) -> String {
    let row = |row: usize| {
        let output = |output: usize| {
            let of_input = |input: usize| {
                let weight = if input.is_multiple_of(output + 2) {
                    1
                } else {
                    -1
                };
                weight * (row + input % 3) as i64
            };
            (0..64).map(of_input).sum::<i64>().to_string()
        };
        (0..4).map(output).collect::<Vec<_>>().join(" ")
    };
    (0..rows).map(row).collect::<Vec<_>>().join("\n")
}

fn multiplies(language: &str) {
    let Some(component) = build(&repository(), language, "multiply.wasm") else {
        return;
    };
    let bytes = fs::read(component).unwrap();
    // A busy machine is not the program's fault.
    let limits = default_limits()
        .with_fuel(100_000_000_000)
        .with_deadline(Duration::from_secs(120));
    let program = WasmProgram::new("multiply.wasm", &bytes, limits);
    let program = program.unwrap_or_else(|error| panic!("{language}: {error}"));
    let bench = Bench::default();
    for (arguments, rows) in [(&[][..], 1), (&["3"], 3), (&["17"], 17)] {
        let outcome = run(&program, bench.context(), arguments);
        let outcome = outcome.unwrap_or_else(|error| panic!("{language} {arguments:?}: {error}"));
        assert_eq!(outcome.answer, expected(rows), "{language}");
        println!("{language}: {rows} rows, {} units of fuel", outcome.fuel);
    }
    bench.is_unharmed();
    let small = Bench::new(1 << 12);
    let error = run(&program, small.context(), &["100"])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the quota is exceeded"),
        "{language}: {error}"
    );
    small.is_unharmed();
}

#[test]
fn c_multiplies() {
    multiplies("c");
}

#[test]
fn javascript_multiplies() {
    multiplies("javascript");
}

#[test]
fn python_multiplies() {
    multiplies("python");
}
