//! The SDK's example that generates, run.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use tightfit::device::Device;
use tightfit_wasm::program::{Outcome, ProgramError, WasmProgram, default_limits};
use tightfit_wasm::wit::program::{ProgramCtx, output};

use crate::programs::compile;

/// The module built from the SDK's example.
pub const GENERATE: &[u8] = include_bytes!(env!("GENERATE"));

/// What came of it.
#[derive(Debug)]
pub struct Generated {
    /// The tokens, as it has handed them out.
    pub tokens: Vec<u32>,
    /// What it gave at the end.
    pub answer: String,
    /// From the first token to the last.
    pub seconds: f64,
}

fn program() -> &'static WasmProgram {
    static PROGRAM: OnceLock<WasmProgram> = OnceLock::new();
    PROGRAM.get_or_init(|| compile(GENERATE, default_limits().with_fuel(u64::MAX)))
}

fn run(
    model: &Path,
    devices: &Arc<[Box<dyn Device>]>,
    arguments: &[&str],
) -> (Result<Outcome, ProgramError>, String, f64) {
    let (to, texts) = output();
    let context = ProgramCtx::new(Arc::clone(devices), u64::MAX)
        .grant("model", model)
        .load_with(None, None)
        .with_output(to);
    let listener = std::thread::spawn(move || {
        let (mut said, mut times) = (String::new(), vec![]);
        for text in texts {
            times.push(Instant::now());
            said += &text;
        }
        let times = times.first().zip(times.last());
        let seconds = times.map_or(0.0, |(first, last)| (*last - *first).as_secs_f64());
        (said, seconds)
    });
    let arguments: Vec<String> = ["model"]
        .iter()
        .chain(arguments)
        .map(|&text| text.to_owned())
        .collect();
    let outcome = program().run(context, &arguments);
    let (said, seconds) = listener.join().expect("it only listens");
    (outcome, said, seconds)
}

/// Generates tokens with the checkpoint at a path.
///
/// # Panics
/// When the program gives up.
pub fn generate(model: &Path, devices: &Arc<[Box<dyn Device>]>, arguments: &[&str]) -> Generated {
    let (outcome, said, seconds) = run(model, devices, arguments);
    let outcome = outcome.unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    let tokens = said.split_whitespace();
    let tokens = tokens.map(|token| token.parse().expect("it says numbers"));
    Generated {
        tokens: tokens.collect(),
        answer: outcome.answer,
        seconds,
    }
}

/// What it says where it gives text.
///
/// # Panics
/// When the program gives up.
pub fn text(model: &Path, devices: &Arc<[Box<dyn Device>]>, arguments: &[&str]) -> String {
    let (outcome, said, _) = run(model, devices, arguments);
    outcome.unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    said
}

/// Why it gives up.
///
/// # Panics
/// When it does not.
pub fn failure(model: &Path, devices: &Arc<[Box<dyn Device>]>, arguments: &[&str]) -> String {
    match run(model, devices, arguments).0 {
        Ok(outcome) => panic!("{arguments:?} went well: {outcome:?}"),
        Err(error) => error.to_string(),
    }
}

/// The logits behind each of some tokens, computed in f32.
///
/// # Panics
/// When the program gives up.
pub fn logits(model: &Path, devices: &Arc<[Box<dyn Device>]>, tokens: &[u32]) -> Vec<f32> {
    let tokens: Vec<String> = tokens.iter().map(u32::to_string).collect();
    let arguments = ["--tokens", &tokens.join(","), "--float", "f32", "--logits"];
    let (outcome, said, _) = run(model, devices, &arguments);
    outcome.unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    let digits: Vec<u8> = said.bytes().filter(|digit| *digit != b'\n').collect();
    let (numbers, rest) = digits.as_chunks::<8>();
    assert!(rest.is_empty());
    let number = |digits: &[u8; 8]| {
        let text = std::str::from_utf8(digits).expect("digits");
        f32::from_bits(u32::from_str_radix(text, 16).expect("hexadecimal digits"))
    };
    numbers.iter().map(number).collect()
}
