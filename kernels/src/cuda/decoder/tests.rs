//! Launches: that they are possible, and stay within their bounds.

use std::num::NonZeroUsize;

use super::*;
use crate::decoder::Heads;

const H100: Gpu = Gpu {
    compute_capability: (9, 0),
    multiprocessors: 132,
};

/// Qwen2.5-7B.
fn attention(rows: usize, visible: Visible) -> Attention {
    Attention {
        heads: Heads {
            float: FloatType::Bf16,
            rows,
            query_heads: 28,
            kv_heads: 4,
            head_size: 128,
        },
        capacity: 1 << 15,
        visible,
        scale: 0.088,
    }
}

const ALL: Visible = Visible::Causal { window: None };

#[test]
fn every_kernel_is_in_every_module() {
    for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 1)] {
        let module = module(capability).expect("supported");
        for name in KERNELS {
            let found = module.windows(name.len() + 1).any(|window| {
                window.starts_with(name.as_bytes()) && !window[name.len()].is_ascii_alphanumeric()
            });
            assert!(found, "{capability:?}: {name}");
        }
    }
    assert!(module((7, 0)).is_err());
}

#[test]
fn a_long_cache_is_shared_by_all_multiprocessors() {
    let shares = |rows, visible, most| {
        let launch = attend(&attention(rows, visible), most, H100).expect("possible");
        (launch.grid, launch.shares)
    };
    assert_eq!(shares(1, ALL, 1 << 15), (132, 33));
    // A share has no fewer keys than a thread block looks at together.
    assert_eq!(shares(1, ALL, 100), (8, 2));
    assert_eq!(shares(1, ALL, 0), (4, 1));
    let window = NonZeroUsize::new(512);
    assert_eq!(shares(1, Visible::Causal { window }, 1 << 15), (32, 8));
    let first = Visible::First(NonZeroUsize::new(64).expect("not 0"));
    assert_eq!(shares(1, first, 1 << 15), (4, 1));
    // Many rows are enough by themselves.
    assert_eq!(shares(40, ALL, 1 << 15), (160, 1));
}

#[test]
fn counters_are_enough_whatever_the_gpu() {
    for multiprocessors in [0, 1, 132, 5000, u32::MAX] {
        let gpu = Gpu {
            multiprocessors,
            ..H100
        };
        for rows in [1, 7, 511, 512, 5000] {
            let launch = attend(&attention(rows, ALL), 1 << 15, gpu).expect("possible");
            let units = launch.grid / launch.shares;
            assert!(
                launch.shares == 1 || units as usize * 4 <= COUNTERS,
                "{launch:?}"
            );
            let launch = top(FloatType::F32, [rows, 150_000, 50], gpu).expect("possible");
            assert!(launch.shares == 1 || rows * 4 <= COUNTERS, "{launch:?}");
        }
    }
}

#[test]
fn what_is_too_long_is_an_error() {
    let long = u32::MAX as usize + 1;
    let float = FloatType::F16;
    let norm = RmsNorm {
        float,
        rows: 1,
        columns: long,
        eps: 0.0,
        weight_offset: 0.0,
    };
    assert!(rms_norm(&norm).is_err());
    assert!(
        rms_norm(&RmsNorm {
            rows: 1 << 31,
            columns: 1,
            ..norm
        })
        .is_err()
    );
    assert!(gate(float, usize::MAX).is_err());
    assert!(add(float, usize::MAX).is_err());
    assert!(gather(float, 1, long, 1).is_err());
    assert!(gather(float, 1 << 31, 1, 1).is_err());
    assert!(dense(float, [1, 1, long]).is_err());
    assert!(dense(float, [1 << 20, 1 << 20, 1]).is_err());
    assert!(top(float, [1, long, 1], H100).is_err());
    assert!(route(float, [long, 8, 2]).is_err());
    assert!(attend(&attention(1 << 31, ALL), 1, H100).is_err());
    let old = Gpu {
        compute_capability: (7, 0),
        ..H100
    };
    assert!(attend(&attention(1, ALL), 1, old).is_err());
}
