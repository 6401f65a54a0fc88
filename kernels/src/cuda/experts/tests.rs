//! Launches: that they are possible, and stay within their bounds.

use super::*;

const H100: Gpu = Gpu {
    compute_capability: (9, 0),
    multiprocessors: 132,
};

/// Qwen3.5-35B-A3B.
fn layer(tokens: usize) -> ExpertsLayer {
    ExpertsLayer {
        routing: Routing {
            tokens,
            choices: 8,
            experts: 256,
        },
        float: FloatType::Bf16,
        hidden: 2048,
        intermediate: 512,
        block_size: BlockSize::DEFAULT,
        layout: GateLayout::Halves,
        activation: Activation::Silu,
        apart: false,
        aligned: true,
    }
}

fn launches(layer: &ExpertsLayer) -> Vec<ExpertsLaunch> {
    let launches = layer.launches(H100).expect("possible");
    let ExpertsLayerLaunches {
        route,
        gate_up,
        down,
        combine,
        ..
    } = launches;
    route.into_iter().chain([gate_up, down, combine]).collect()
}

#[test]
fn every_kernel_is_in_every_module() {
    let has = |module: &[u8], name: &str| {
        module.windows(name.len() + 1).any(|window| {
            window.starts_with(name.as_bytes()) && !window[name.len()].is_ascii_alphanumeric()
        })
    };
    for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)] {
        let module = module(capability).expect("supported");
        for float in FloatType::ALL {
            for tokens in [1, 2, 300, 3000] {
                for aligned in [false, true] {
                    let layer = ExpertsLayer {
                        float,
                        aligned,
                        ..layer(tokens)
                    };
                    for launch in launches(&layer) {
                        let needed = launch.shared_bytes == 0 || capability >= (8, 0);
                        let name = launch.kernel;
                        assert_eq!(has(&module, name), needed, "{capability:?}: {name}");
                    }
                }
            }
        }
        // What the driver is given as text ends in a zero.
        assert!(module.starts_with(b"\x7fELF") || module.ends_with(b"\0"));
    }
    let old = module((7, 0));
    assert!(matches!(old, Err(KernelError::ComputeCapability { .. })));
}

#[test]
fn tiles_of_rows_are_those_that_most_experts_fill() {
    let kernels = |tokens| launches(&layer(tokens)).iter().map(|l| l.kernel).collect();
    let names: Vec<&str> = kernels(1);
    assert_eq!(
        names,
        [
            "tightfit_experts_8_bf16",
            "tightfit_experts_8_bf16",
            "tightfit_experts_combine_bf16"
        ]
    );
    for (tokens, name) in [
        (16, "tightfit_experts_8_bf16"),
        (256, "tightfit_experts_16_bf16"),
        (2048, "tightfit_experts_64_bf16"),
    ] {
        let names: Vec<&str> = kernels(tokens);
        assert_eq!(names[0], "tightfit_experts_route");
        assert_eq!(names[1..3], [name; 2]);
    }
    // On an older GPU, and for f32, any rows are computed by the general kernel.
    let old = Gpu {
        compute_capability: (7, 5),
        ..H100
    };
    let general = layer(16).launches(old).expect("possible").down.kernel;
    assert_eq!(general, "tightfit_experts_general_bf16");
}

#[test]
fn one_token_keeps_all_multiprocessors_busy() {
    let launches = layer(1).launches(H100).expect("possible");
    assert_eq!((launches.route, launches.routing_bytes), (None, 0));
    assert_eq!(launches.gate_up.grid, 264);
    assert_eq!(launches.down.grid, 256);
}

#[test]
fn launches_stay_within_their_bounds() {
    for tokens in [0, 1, 2, 16, 256, 4096, 100_000] {
        for (hidden, intermediate) in [(2048, 512), (2880, 2880), (7168, 2048), (64, 64)] {
            for experts in [1, 8, 256, MOST_EXPERTS] {
                let mut layer = layer(tokens);
                (layer.hidden, layer.intermediate) = (hidden, intermediate);
                layer.routing.experts = experts;
                let routing = layer.routing;
                for launch in launches(&layer) {
                    assert!(launch.grid >= 1, "{launch:?}");
                    assert!(launch.shared_bytes + (256 * 32 + 256) * 4 <= 227 << 10);
                    // There is a counter for every thread block that may need one.
                    let counted = launch.workspace_bytes == 0 || launch.grid * 4 <= COUNTERS as u32;
                    assert!(counted, "{launch:?}");
                    assert!(launch.workspace_bytes <= 36 << 20, "{launch:?}");
                }
                assert!(routing.bytes() <= 16 + 24 * routing.pairs() + 16);
                // However pairs are dealt out to experts.
                let rows = routing.tile_rows();
                let most = routing.most_tiles();
                let pairs = routing.pairs();
                for used in [1, 2, experts / 2, experts] {
                    let used = used.clamp(1, experts).min(pairs.max(1));
                    let tiles = (used - 1) + (pairs.saturating_sub(used - 1)).div_ceil(rows);
                    assert!(tiles <= most, "{routing:?}: {used} used");
                }
            }
        }
    }
}

#[test]
fn forms_are_the_bits_that_kernels_read() {
    let product = ExpertsProduct {
        routing: layer(2).routing,
        float: FloatType::Bf16,
        x: RowsOfX::Tokens,
        results: 64,
        inputs: 64,
        block_size: BlockSize::DEFAULT,
        form: Form::Plain,
        quantized: Quantized::Whole,
        aligned: true,
        follows: false,
    };
    let form = |product: ExpertsProduct| {
        let launch = product.launch(H100).expect("possible");
        (launch.form, launch.limit)
    };
    assert_eq!(form(product), (0, 0.0));
    let parts = ExpertsProduct {
        form: Form::Parts,
        follows: true,
        ..product
    };
    assert_eq!(form(parts), (4 + 16, 0.0));
    let gated = ExpertsProduct {
        routing: layer(1).routing,
        form: Form::Gated {
            layout: GateLayout::Interleaved,
            activation: Activation::Clamped { limit: 7.0 },
        },
        ..product
    };
    assert_eq!(form(gated), (1 + 2 + 8 + (3 << 8), 7.0));
    assert_eq!((product.outputs(), gated.outputs()), (64, 128));
    for (quantized, bit, results) in [(Quantized::Experts, 32, 256), (Quantized::Halves, 64, 512)] {
        let apart = ExpertsProduct {
            quantized,
            results,
            ..product
        };
        assert_eq!(form(apart), (bit, 0.0));
        for results in [results / 2, results + 1] {
            let launch = ExpertsProduct { results, ..apart }.launch(H100);
            assert!(
                matches!(launch, Err(KernelError::Shape { .. })),
                "{launch:?}"
            );
        }
    }
}

#[test]
fn too_much_is_an_error() {
    let routing = |tokens, experts| Routing {
        tokens,
        choices: 8,
        experts,
    };
    let refused = |routing: Routing, most, have| {
        let kernel = "tightfit_experts_route";
        let error = KernelError::Launch { kernel, most, have };
        assert_eq!(routing.launch(), Err(error.clone()));
        assert_eq!(combine(routing, FloatType::F32, 1), Err(error.clone()));
        let layer = ExpertsLayer {
            routing,
            ..layer(1)
        };
        assert_eq!(layer.launches(H100), Err(error));
    };
    refused(routing(1, 4097), 4096, 4097);
    refused(routing(1 << 28, 8), i32::MAX as usize, 1 << 31);
    for (hidden, intermediate) in [(1 << 32, 64), (64, 1 << 32), (1 << 24, 64)] {
        let layer = ExpertsLayer {
            hidden,
            intermediate,
            ..layer(2)
        };
        assert!(matches!(
            layer.launches(H100),
            Err(KernelError::Launch { .. })
        ));
    }
    // The general kernels, which could do it, have other sums.
    let mut endless = layer(1 << 26);
    (endless.hidden, endless.intermediate) = (7168, 2048);
    assert_eq!(
        endless.launches(H100),
        Err(KernelError::Launch {
            kernel: "tightfit_experts_64_bf16",
            most: i32::MAX as usize,
            have: (256 + ((1 << 29) - 256) / 64) * 32 * 56,
        })
    );
    let old = Gpu {
        compute_capability: (7, 0),
        ..H100
    };
    assert!(matches!(
        layer(2).launches(old),
        Err(KernelError::ComputeCapability { .. })
    ));
}
