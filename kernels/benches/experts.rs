//! Layers of experts on the processor.
//!
//! ```text
//! cargo bench -p tightfit-kernels --bench experts
//! ```
//!
//! `experts.py` beside this file measures those on a GPU, and asks this program, given `launches` and what
//! they depend on, how to launch them.
//!
//! Prints one line for each instruction set and number of tokens: the median time, and the rate at which
//! codes and scales of the experts that are used are read. `THREADS` says how many threads to use, 2 if
//! it is not set.

use std::{collections::BTreeSet, env, num::NonZeroUsize, time::Instant};

use tightfit_kernels::cuda::{
    experts::{ExpertsLaunch, ExpertsLayer, Routing},
    linear::Gpu,
};
use tightfit_kernels::half::bf16;
use tightfit_kernels::{
    Activation, BlockSize, Choices, ExpertsWeights, FloatType, GateLayout, Isa, Kernels,
    LinearWeights, QuantType, Scales, blocks, packed_bytes,
};

/// A layer of Qwen3.5-35B-A3B with a quarter of its 256 experts.
const EXPERTS: usize = 64;
const CHOICES: usize = 8;
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 512;

/// Prints a layer's launches: of the compute capability, multiprocessors, tokens, choices, experts, hidden
/// and intermediate lengths, and whether gates are interleaved and clamped, as those of gpt-oss.
fn print_launches(numbers: &[usize]) {
    let [
        major,
        minor,
        multiprocessors,
        tokens,
        choices,
        experts,
        hidden,
        intermediate,
        gpt_oss,
    ] = *numbers
    else {
        panic!("launches takes nine numbers");
    };
    let routing = Routing {
        tokens,
        choices,
        experts,
    };
    let (layout, activation) = match gpt_oss {
        0 => (GateLayout::Halves, Activation::Silu),
        _ => (GateLayout::Interleaved, Activation::Clamped { limit: 7.0 }),
    };
    let layer = ExpertsLayer {
        routing,
        float: FloatType::Bf16,
        hidden,
        intermediate,
        block_size: BlockSize::DEFAULT,
        layout,
        activation,
        apart: false,
        aligned: true,
    };
    let launches = layer.launches(Gpu {
        compute_capability: (major as u32, minor as u32),
        multiprocessors: multiprocessors as u32,
    });
    let launches = launches.expect("possible");
    let json = |launch: ExpertsLaunch| {
        format!(
            r#"{{"kernel": "{}", "grid": {}, "threads": {}, "shared": {}, "form": {}, "limit": {}}}"#,
            launch.kernel,
            launch.grid,
            launch.threads,
            launch.shared_bytes,
            launch.form,
            launch.limit.to_bits()
        )
    };
    println!(
        r#"{{"route": {}, "gate_up": {}, "down": {}, "combine": {}, "rows": {}, "routing": {}, "workspace": {}}}"#,
        launches.route.map_or("null".to_owned(), json),
        json(launches.gate_up),
        json(launches.down),
        json(launches.combine),
        routing.tile_rows(),
        launches.routing_bytes,
        launches.workspace_bytes
    );
}

struct Stack {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Stack {
    fn random(elements: usize, random: &mut impl FnMut() -> u32) -> Stack {
        Stack {
            codes: (0..packed_bytes(elements))
                .map(|_| random() as u8)
                .collect(),
            absmax: (0..blocks(elements, BlockSize::DEFAULT))
                .map(|_| random() as f32 / 1e12)
                .collect(),
        }
    }

    fn view(&self, outputs: usize, inputs: usize) -> LinearWeights<'_> {
        LinearWeights {
            quant_type: QuantType::Nf4,
            outputs: EXPERTS * outputs,
            inputs,
            block_size: BlockSize::DEFAULT,
            codes: &self.codes,
            scales: Scales::Absmax(&self.absmax),
        }
    }

    fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.absmax.len()
    }
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some(("launches", numbers)) = arguments
        .split_first()
        .map(|(first, rest)| (first.as_str(), rest))
    {
        let numbers: Result<Vec<usize>, _> = numbers.iter().map(|text| text.parse()).collect();
        return print_launches(&numbers.expect("numbers"));
    }
    let threads = env::var("THREADS").ok().and_then(|text| text.parse().ok());
    let threads = threads.unwrap_or(NonZeroUsize::MIN.saturating_add(1));
    let mut state = 1u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u32
    };
    let gate_up = Stack::random(EXPERTS * 2 * INTERMEDIATE * HIDDEN, &mut random);
    let down = Stack::random(EXPERTS * HIDDEN * INTERMEDIATE, &mut random);
    let layer = ExpertsWeights {
        experts: EXPERTS,
        gate_up: gate_up.view(2 * INTERMEDIATE, HIDDEN),
        down: down.view(HIDDEN, INTERMEDIATE),
        layout: GateLayout::Halves,
        activation: Activation::Silu,
    };
    let of_expert = (gate_up.bytes() + down.bytes()) / EXPERTS;
    println!("{CHOICES} of {EXPERTS} experts, {HIDDEN} x {INTERMEDIATE}, {threads} threads");
    for isa in Isa::available() {
        let kernels = Kernels::new(isa).expect("available");
        for tokens in [1, 16, 256] {
            if isa == Isa::Portable && tokens > 1 {
                continue;
            }
            let x: Vec<bf16> = (0..tokens * HIDDEN)
                .map(|_| bf16::from_f32(random() as f32 / 1e9))
                .collect();
            let mut y = vec![bf16::ZERO; x.len()];
            let weights = vec![0.125; tokens * CHOICES];
            let mut used = 0;
            let mut times: Vec<f64> = (0..if tokens > 16 { 3 } else { 15 })
                .map(|_| {
                    let ids: Vec<i32> = (0..tokens * CHOICES)
                        .map(|_| random() as i32 % EXPERTS as i32)
                        .collect();
                    used = ids.iter().collect::<BTreeSet<_>>().len();
                    let choices = Choices {
                        of_token: CHOICES,
                        ids: &ids,
                        weights: &weights,
                    };
                    let start = Instant::now();
                    kernels
                        .experts(&layer, &choices, &x, None, None, &mut y, threads)
                        .expect("lengths");
                    start.elapsed().as_secs_f64()
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let seconds = times[times.len() / 2];
            println!(
                "{isa:<9} {tokens:>4} tokens, {used:>3} experts {:>8.2} ms, best {:>8.2} {:>7.1} GB/s",
                seconds * 1e3,
                times[0] * 1e3,
                (used * of_expert) as f64 / seconds / 1e9
            );
        }
    }
}
