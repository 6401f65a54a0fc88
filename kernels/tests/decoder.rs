//! What a decoder computes between its products, on the processor, against f64: with every instruction set.

use std::num::NonZeroUsize;

use tightfit_kernels::decoder::{
    Attention, Faults, Heads, Operand, Operation, RmsNorm, Rotation, Visible,
};
use tightfit_kernels::{Activation, FloatType, Isa, KernelError, Kernels};

mod decoding;
mod layers;

use decoding::Decoder;

struct Processor {
    kernels: Kernels,
    threads: NonZeroUsize,
}

impl Decoder for Processor {
    fn run(&mut self, operation: &Operation, operands: &mut [Vec<u8>]) -> Faults {
        // Bytes that do not begin at a multiple of anything.
        let shapes = operation.operands();
        let mut moved: Vec<Vec<u8>> = operands
            .iter()
            .map(|bytes| [0].iter().chain(bytes).copied().collect())
            .collect();
        let given = shapes.iter().zip(&mut moved);
        let given = given.map(|(shape, bytes)| match shape.is_written {
            true => Operand::Written(&mut bytes[1..]),
            false => Operand::Read(&bytes[1..]),
        });
        let done = self
            .kernels
            .decode_step(operation, given.collect(), self.threads, &|| true);
        let faults = done.unwrap_or_else(|error| panic!("{operation:?}: {error}"));
        for (bytes, moved) in operands.iter_mut().zip(moved) {
            bytes.copy_from_slice(&moved[1..]);
        }
        faults
    }
}

fn with_every_instruction_set(check: fn(&mut dyn Decoder)) {
    for isa in Isa::available() {
        let kernels = Kernels::new(isa).expect("available");
        for threads in [1, 3] {
            let threads = NonZeroUsize::new(threads).expect("not 0");
            check(&mut Processor { kernels, threads });
        }
    }
}

#[test]
fn norms() {
    with_every_instruction_set(decoding::norms);
}

#[test]
fn elementwise() {
    with_every_instruction_set(decoding::elementwise);
}

#[test]
fn gathering() {
    with_every_instruction_set(decoding::gathering);
}

#[test]
fn dense_products() {
    with_every_instruction_set(decoding::dense_products);
}

#[test]
fn rotations() {
    with_every_instruction_set(decoding::rotations);
}

#[test]
fn attentions() {
    with_every_instruction_set(decoding::attentions);
}

#[test]
fn extreme_attentions() {
    with_every_instruction_set(decoding::extreme_attentions);
}

#[test]
fn choices() {
    with_every_instruction_set(decoding::choices);
}

#[test]
fn routes() {
    with_every_instruction_set(decoding::routes);
}

#[test]
fn combinations() {
    with_every_instruction_set(decoding::combinations);
}

const FLOAT: FloatType = FloatType::F32;

fn heads(query_heads: usize, kv_heads: usize, head_size: usize) -> Heads {
    Heads {
        float: FLOAT,
        rows: 1,
        query_heads,
        kv_heads,
        head_size,
    }
}

#[test]
fn shapes_that_cannot_be() {
    let kernels = Kernels::detect();
    let shape = |result: Result<(), KernelError>| {
        assert!(
            matches!(result, Err(KernelError::Shape { .. })),
            "{result:?}"
        );
    };
    for heads in [
        heads(1, 1, 0),
        heads(1, 1, 12),
        heads(1, 1, 264),
        heads(0, 1, 8),
        heads(1, 0, 8),
        heads(3, 2, 8),
    ] {
        shape(heads.check());
        let visible = Visible::Causal { window: None };
        let attention = Attention {
            heads,
            capacity: 1,
            visible,
            scale: 1.0,
        };
        shape(attention.check());
        let threads = NonZeroUsize::MIN;
        let result = kernels.attend(&attention, &[], &[], &[], &[], &mut [], threads);
        shape(result.map(drop));
    }
    let rotation = Rotation {
        heads: heads(1, 1, 8),
        rotary: 8,
        scaling: 1.0,
        capacity: 1,
        norm_eps: 0.0,
        norm_weight_offset: 0.0,
    };
    for wrong in [
        Rotation {
            rotary: 7,
            ..rotation
        },
        Rotation {
            rotary: 10,
            ..rotation
        },
        Rotation {
            capacity: 0,
            ..rotation
        },
        Rotation {
            capacity: 1 << 32,
            ..rotation
        },
    ] {
        shape(wrong.check());
    }
    let visible = Visible::First(NonZeroUsize::new(2).expect("not 0"));
    shape(
        Attention {
            heads: heads(1, 1, 8),
            capacity: 1,
            visible,
            scale: 1.0,
        }
        .check(),
    );
    for [columns, k] in [[5, 0], [5, 6], [300, 257], [0, 1]] {
        shape(kernels.top(FLOAT, [1, columns, k], &[], &mut [], &mut []));
    }
    for [experts, k] in [[5, 0], [5, 6], [100, 65], [4097, 1]] {
        shape(kernels.route(FLOAT, [1, experts, k], false, &[], &mut [], &mut []));
    }
}

#[test]
fn lengths_that_do_not_belong_together() {
    let kernels = Kernels::detect();
    let length = |result: Result<(), KernelError>, what: &str| {
        assert!(
            matches!(result, Err(KernelError::Length { what: is, .. }) if is == what),
            "{result:?}, not {what}"
        );
    };
    let norm = RmsNorm {
        float: FLOAT,
        rows: 1,
        columns: 2,
        eps: 0.0,
        weight_offset: 0.0,
    };
    length(kernels.rms_norm(&norm, &[0; 7], &[0; 8], &mut [0; 8]), "x");
    length(kernels.rms_norm(&norm, &[0; 8], &[0; 8], &mut [0; 4]), "y");
    length(
        kernels.rms_norm(&norm, &[0; 8], &[0; 4], &mut [0; 8]),
        "weight",
    );
    let add = kernels.add_rms_norm(&norm, &mut [0; 8], &[0; 4], &[0; 8], &mut [0; 8]);
    length(add, "add");
    let huge = RmsNorm {
        rows: usize::MAX,
        ..norm
    };
    length(kernels.rms_norm(&huge, &[0; 8], &[0; 8], &mut [0; 8]), "x");
    length(
        kernels.gate(FLOAT, Activation::Silu, &[0; 6], &[0; 6], &mut [0; 6]),
        "gate",
    );
    length(
        kernels.gate(FLOAT, Activation::Silu, &[0; 4], &[0; 8], &mut [0; 4]),
        "up",
    );
    length(kernels.add(FLOAT, &mut [0; 4], &[0; 8]), "add");
    length(
        kernels
            .gather(FLOAT, 2, &[0; 12], &[0], &mut [0; 8])
            .map(drop),
        "table",
    );
    length(
        kernels
            .gather(FLOAT, 2, &[0; 16], &[0], &mut [0; 4])
            .map(drop),
        "y",
    );
    let one = NonZeroUsize::MIN;
    let lengths = [1, 1, 2];
    length(
        kernels.dense(FLOAT, lengths, &[0; 4], &[0; 8], None, &mut [0; 4], one),
        "weights",
    );
    length(
        kernels.dense(FLOAT, lengths, &[0; 8], &[0; 4], None, &mut [0; 4], one),
        "x",
    );
    length(
        kernels.dense(
            FLOAT,
            lengths,
            &[0; 8],
            &[0; 8],
            Some(&[]),
            &mut [0; 4],
            one,
        ),
        "bias",
    );
    length(
        kernels.top(FLOAT, [1, 2, 1], &[0; 4], &mut [0], &mut [0.0]),
        "x",
    );
    length(
        kernels.top(FLOAT, [1, 2, 1], &[0; 8], &mut [], &mut [0.0]),
        "ids",
    );
    let visible = Visible::Causal { window: None };
    let attention = Attention {
        heads: heads(1, 1, 8),
        capacity: 2,
        visible,
        scale: 1.0,
    };
    let attend = |keys: usize, positions: &[u32]| {
        let (keys, values) = (vec![0; keys], [0; 64]);
        let mut y = [0; 32];
        kernels
            .attend(&attention, &[0; 32], &keys, &values, positions, &mut y, one)
            .map(drop)
    };
    length(attend(32, &[0]), "key_cache");
    length(attend(64, &[]), "positions");
    assert_eq!(attend(64, &[0]), Ok(()));
}

#[test]
fn operands_that_do_not_belong_to_an_operation() {
    let kernels = Kernels::detect();
    let add = Operation::Add {
        float: FLOAT,
        elements: 2,
    };
    let step = |operands: Vec<Operand<'_>>| {
        let done = kernels.decode_step(&add, operands, NonZeroUsize::MIN, &|| true);
        matches!(done, Err(KernelError::Length { .. }))
    };
    let (mut x, more) = ([0; 8], [0; 8]);
    assert!(step(vec![]));
    assert!(step(vec![Operand::Written(&mut x)]));
    assert!(step(vec![Operand::Read(&more), Operand::Read(&more)]));
    assert!(step(vec![
        Operand::Written(&mut x[..4]),
        Operand::Read(&more)
    ]));
    assert!(step(vec![
        Operand::Written(&mut x),
        Operand::Read(&more[1..])
    ]));
    assert!(!step(vec![Operand::Written(&mut x), Operand::Read(&more)]));
    let clamped = Operation::Gate {
        float: FLOAT,
        activation: Activation::Clamped { limit: 1.0 },
        elements: 0,
    };
    assert!(matches!(clamped.check(), Err(KernelError::Shape { .. })));
}

/// A row's bits do not depend on the rows beside it, and neither on threads.
#[test]
fn rows_by_themselves() {
    let mut dice = layers::Dice(5);
    let kernels = Kernels::detect();
    let heads = Heads {
        rows: 6,
        ..heads(4, 2, 64)
    };
    let visible = Visible::Causal { window: None };
    let attention = Attention {
        heads,
        capacity: 300,
        visible,
        scale: 0.125,
    };
    let mut bytes = |count| decoding::elements(&dice.weights(count, 1.0), FLOAT);
    let (queries, keys, values) = (
        bytes(heads.query_elements()),
        bytes(heads.kv_elements(300)),
        bytes(heads.kv_elements(300)),
    );
    let positions = [299, 3, 64, 180, 255, 256];
    let mut all = vec![0; queries.len()];
    let many = NonZeroUsize::new(4).expect("not 0");
    kernels
        .attend(
            &attention, &queries, &keys, &values, &positions, &mut all, many,
        )
        .expect("lengths");
    let row = queries.len() / 6;
    let attention = Attention {
        heads: Heads { rows: 1, ..heads },
        ..attention
    };
    for (i, position) in positions.into_iter().enumerate() {
        let mut y = vec![0; row];
        let queries = &queries[i * row..][..row];
        let one = NonZeroUsize::MIN;
        kernels
            .attend(
                &attention,
                queries,
                &keys,
                &values,
                &[position],
                &mut y,
                one,
            )
            .expect("lengths");
        assert_eq!(y, all[i * row..][..row], "row {i}");
    }
}
