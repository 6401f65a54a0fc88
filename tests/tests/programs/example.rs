//! The SDK's example does what it says.

use tightfit::checkpoint::Checkpoint;
use tightfit_tests::golden::GoldenModel;
use tightfit_tests::programs::{Bench, LOAD_AND_CHECK, compile, run};
use tightfit_wasm::program::default_limits;

#[test]
fn it_loads_a_checkpoint_and_says_how_far_it_is_off() {
    let golden = GoldenModel::unpack("llama");
    let path = golden.path("bf16");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let program = compile(LOAD_AND_CHECK, default_limits());
    let bench = Bench::new(16 << 20);
    let context = bench.context().grant("llama", &path);
    let outcome = run(&program, context, &["llama"]).unwrap();
    bench.is_unharmed();
    let matrices = checkpoint
        .tensors()
        .iter()
        .filter(|tensor| tensor.shape.len() == 2);
    let expected = format!(
        "{} of {} tensors quantized, ",
        matrices.count(),
        checkpoint.tensors().len()
    );
    assert!(outcome.answer.starts_with(&expected), "{}", outcome.answer);
    let mut compared = 0;
    for line in outcome.answer.lines().skip(1) {
        let (name, error) = line.split_once(": off by at most ").unwrap();
        let error: f32 = error.parse().unwrap();
        let index = checkpoint.find(name).unwrap();
        let mut bytes = vec![0; checkpoint.tensors()[index].bytes as usize];
        checkpoint.read_tensor(index, 0, &mut bytes).unwrap();
        let largest = bytes
            .chunks_exact(2)
            .map(|bytes| {
                f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16).abs()
            })
            .fold(0.0, f32::max);
        // Half of the widest step between two values of NF4, which are from -1 to 1.
        assert!(
            error > 0.0 && error < 0.16 * largest,
            "{line}, largest {largest}"
        );
        compared += 1;
    }
    assert_eq!(compared, 3);

    let small = Bench::new(1 << 12);
    let context = small.context().grant("llama", &path);
    let error = run(&program, context, &["llama"]).unwrap_err().to_string();
    assert!(error.contains("gave up: the quota is exceeded"), "{error}");
}
