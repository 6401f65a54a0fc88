//! Launches: that they are possible, and stay within their bounds.

use super::*;

const H100: Gpu = Gpu {
    compute_capability: (9, 0),
    multiprocessors: 132,
};

fn linear(rows: usize, outputs: usize, inputs: usize) -> Linear {
    Linear {
        float: FloatType::Bf16,
        rows,
        outputs,
        inputs,
        block_size: BlockSize::DEFAULT,
        aligned: true,
        by_row: false,
    }
}

#[test]
fn every_kernel_is_in_every_module() {
    let general = [FloatType::F32, FloatType::F16, FloatType::Bf16].map(|float| {
        let linear = Linear {
            float,
            aligned: false,
            ..linear(1, 1, 1)
        };
        [linear.launch(H100), linear.launch_transposed(H100)]
            .map(|launch| launch.expect("possible").kernel)
    });
    let has = |module: &[u8], name: &str| {
        module.windows(name.len() + 1).any(|window| {
            window.starts_with(name.as_bytes()) && !window[name.len()].is_ascii_alphanumeric()
        })
    };
    for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)] {
        let module = module(capability).expect("supported");
        for name in general.as_flattened() {
            assert!(has(&module, name), "{capability:?}: {name}");
        }
        for tier in &TIERS {
            let needed = capability >= (8, 0) && (!tier.by_warpgroup || capability == (9, 0));
            for name in [tier.f16, tier.bf16] {
                assert_eq!(has(&module, name), needed, "{capability:?}: {name}");
            }
        }
        for rows in [1, 100] {
            let transposed = linear(rows, 8, 32).launch_transposed(H100);
            let kernel = transposed.expect("possible").kernel;
            assert_eq!(has(&module, kernel), capability >= (8, 0));
        }
        for (kernel, _) in many::kernels() {
            assert_eq!(has(&module, kernel), capability == (9, 0), "{kernel}");
        }
        // What the driver is given as text ends in a zero.
        assert!(module.starts_with(b"\x7fELF") || module.ends_with(b"\0"));
    }
    assert_eq!(
        module((7, 0)),
        Err(KernelError::ComputeCapability {
            need: (7, 5),
            have: (7, 0)
        })
    );
}

#[test]
fn shares_are_even_where_that_costs_little() {
    let shares = |outputs, inputs| {
        linear(1, outputs, inputs)
            .launch(H100)
            .map(|launch| launch.shares)
    };
    assert_eq!(shares(512, 3584), Ok(28));
    assert_eq!(shares(3584, 3584), Ok(196));
    assert_eq!(shares(18944, 3584), Ok(264));
    assert_eq!(shares(8192, 28672), Ok(256));
    assert_eq!(shares(1, 64), Ok(1));
}

#[test]
fn launches_stay_within_their_bounds() {
    for rows in [1, 8, 9, 16, 17, 32, 33, 64, 65, 4096, 100_000] {
        for (outputs, inputs) in [(1, 64), (512, 3584), (28672, 8192), (1 << 20, 64)] {
            for by_row in [false, true] {
                let linear = Linear {
                    by_row,
                    ..linear(rows, outputs, inputs)
                };
                let launch = linear.launch(H100).expect("possible");
                let all = outputs.div_ceil(OUTPUTS) * inputs.div_ceil(SLICE);
                assert!((1..=all).contains(&(launch.shares as usize)));
                assert_eq!(launch.maps.is_some(), launch.kernel.contains("many"));
                // Whole clusters.
                assert!(launch.maps.is_none() || launch.grid.is_multiple_of(2));
                // There is a counter for every thread block that may need one.
                assert!(launch.workspace_bytes == 0 || launch.grid as usize * 4 <= COUNTERS);
                assert!(launch.workspace_bytes < 64 << 20, "{linear:?}: {launch:?}");
                let fixed = if launch.maps.is_some() {
                    0
                } else {
                    (256 * 32 + 256) * 4
                };
                assert!(launch.shared_bytes + fixed <= 227 << 10);
                assert!(!by_row || launch.rows <= 64);
                let launch = linear.launch_transposed(H100).expect("possible");
                assert!(launch.workspace_bytes <= 16 << 20);
                let needs_counters = launch.workspace_bytes > 0;
                assert!(!needs_counters || launch.grid / launch.shares <= COUNTERS as u32 / 4);
                assert!(!by_row || launch.shares == 1);
            }
        }
    }
}

#[test]
fn the_most_that_a_workspace_takes_is_enough_for_every_launch() {
    let gpus = [
        ((7, 5), 40),
        ((8, 0), 108),
        ((8, 9), 20),
        ((9, 0), 132),
        ((10, 0), 148),
        ((12, 0), 192),
    ];
    for (compute_capability, multiprocessors) in gpus {
        let gpu = Gpu {
            compute_capability,
            multiprocessors,
        };
        for outputs in [
            1, 128, 129, 300, 512, 3584, 18944, 100_000, 152_064, 200_000,
        ] {
            for inputs in [64, 320, 3584, 8192] {
                for by_row in [false, true] {
                    let of = |rows| Linear {
                        by_row,
                        ..linear(rows, outputs, inputs)
                    };
                    let (mut most, mut anywhere) = (0, 0);
                    for rows in (1..300).chain([2048, 4096, 4097, 300_000]) {
                        let linear = of(rows);
                        let launch = linear.launch(gpu).expect("possible");
                        let bound = linear.most_workspace_bytes(Some(gpu));
                        let bound_anywhere = linear.most_workspace_bytes(None);
                        assert!(launch.workspace_bytes <= bound, "{gpu:?}: {linear:?}");
                        assert!(most <= bound && anywhere <= bound_anywhere, "{linear:?}");
                        assert!(bound <= bound_anywhere, "{gpu:?}: {linear:?}");
                        (most, anywhere) = (bound, bound_anywhere);
                        // A counter for every block that may need one, however many rows there are.
                        let counters = launch.grid as usize * 4;
                        assert!(
                            launch.workspace_bytes == 0 || counters <= COUNTERS,
                            "{linear:?}"
                        );
                    }
                    assert!(anywhere < 32 << 20);
                }
            }
        }
    }
    let all = Linear {
        float: FloatType::F32,
        ..linear(64, 512, 3584)
    };
    assert_eq!(all.most_workspace_bytes(None), 0);
}

#[test]
fn every_launch_is_of_a_kernel_that_is_listed() {
    for compute_capability in [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)] {
        let gpu = Gpu {
            compute_capability,
            multiprocessors: 100,
        };
        let listed = kernels(compute_capability);
        for float in FloatType::ALL {
            for (rows, by_row, aligned) in (1..70).flat_map(|rows| {
                [(false, false), (false, true), (true, true)].map(|(by_row, a)| (rows, by_row, a))
            }) {
                let linear = Linear {
                    float,
                    by_row,
                    aligned,
                    ..linear(rows, 300, 640)
                };
                let launch = linear.launch(gpu).expect("possible");
                assert!(
                    listed.contains(&(launch.kernel, launch.shared_bytes)),
                    "{launch:?}"
                );
            }
        }
    }
}

#[test]
fn by_row_neither_rows_nor_multiprocessors_decide() {
    for (outputs, inputs) in [(512, 3584), (28672, 8192), (100, 128)] {
        let shares = |rows, multiprocessors| {
            let linear = Linear {
                by_row: true,
                ..linear(rows, outputs, inputs)
            };
            let gpu = Gpu {
                multiprocessors,
                ..H100
            };
            linear.launch(gpu).map(|launch| launch.shares)
        };
        for rows in [1, 16, 17, 40, 64, 1000] {
            assert_eq!(shares(rows, 30 + rows as u32), shares(1, 132));
        }
    }
}

#[test]
fn too_long_is_an_error() {
    for (rows, outputs, inputs) in [(1 << 32, 1, 1), (1, 1 << 32, 1), (1, 1, 1 << 32)] {
        assert!(matches!(
            linear(rows, outputs, inputs).launch(H100),
            Err(KernelError::Launch {
                have: 4_294_967_296,
                ..
            })
        ));
    }
    assert!(matches!(
        linear(1 << 31, 1 << 31, 1).launch(H100),
        Err(KernelError::Launch { .. })
    ));
}
