//! What a decoder computes between products, on a device: in a queue as the processor does it, what a queue
//! refuses, and a whole model.

use std::num::NonZeroUsize;
use std::sync::Arc;

use tightfit::device::{
    CudaDevice, Device, DeviceBytes, DeviceError, Operation, Queue, QueuedDecode, Reservation,
};
use tightfit::memory::ReservationSize;
use tightfit_kernels::decoder::{
    self, Attention, Faults, Heads, Operand, RmsNorm, Rotation, Visible,
};
use tightfit_kernels::{Activation, FloatType, Kernels};
use tightfit_tests::generate::{generate, logits};
use tightfit_tests::golden::GoldenModel;
use tightfit_tests::tensors;

use super::{Driver, MIB};

struct Opened {
    queue: Arc<dyn Queue>,
    reservation: Box<dyn Reservation>,
    next: std::cell::Cell<u64>,
    _device: CudaDevice,
}

impl Opened {
    fn open() -> Opened {
        let device = CudaDevice::open(0, None).unwrap();
        let size = ReservationSize {
            requested: 16 * MIB,
            padded: 16 * MIB,
            reserved: 16 * MIB,
        };
        Opened {
            reservation: device.reserve(size).unwrap(),
            queue: device.queue().unwrap().expect("a GPU has one"),
            next: std::cell::Cell::new(0),
            _device: device,
        }
    }

    fn take(&self, bytes: usize) -> DeviceBytes {
        let start = self.next.get();
        self.next
            .set((start + bytes as u64 + 1).next_multiple_of(256));
        let range = self.reservation.range(start, bytes as u64).unwrap();
        range.expect("it is a GPU's")
    }

    fn put(&self, bytes: &[u8]) -> DeviceBytes {
        let place = self.take(bytes.len());
        self.queue.write(&place, bytes).unwrap();
        place
    }

    fn get(&self, place: &DeviceBytes) -> Vec<u8> {
        let mut out = vec![0; place.bytes() as usize];
        self.queue.read(place, &mut out).unwrap();
        out
    }

    fn zeros(&self, bytes: usize) -> DeviceBytes {
        let place = self.take(bytes);
        self.queue.give(&Operation::Clear(place.clone())).unwrap();
        place
    }

    /// Operands, faults and workspace for an operation, with what is in them.
    fn given(&self, operation: &decoder::Operation, operands: &[Vec<u8>]) -> QueuedDecode {
        QueuedDecode {
            operation: *operation,
            operands: operands.iter().map(|bytes| self.put(bytes)).collect(),
            faults: Some(self.zeros(4)),
            workspace: match self.queue.decode_workspace_bytes(operation) {
                0 => None,
                bytes => Some(self.zeros(bytes as usize)),
            },
        }
    }
}

const FLOAT: FloatType = FloatType::F32;

fn heads(rows: usize) -> Heads {
    Heads {
        float: FLOAT,
        rows,
        query_heads: 4,
        kv_heads: 2,
        head_size: 16,
    }
}

/// Every operation, of f32.
fn operations() -> Vec<decoder::Operation> {
    use decoder::Operation as O;
    let norm = RmsNorm {
        float: FLOAT,
        rows: 3,
        columns: 40,
        eps: 1e-3,
        weight_offset: 1.0,
    };
    let rotation = Rotation {
        heads: heads(3),
        rotary: 16,
        scaling: 1.0,
        capacity: 5,
        norm_eps: 1e-3,
        norm_weight_offset: 0.0,
    };
    // One head, whose keys all multiprocessors share.
    let attention = Attention {
        heads: Heads {
            query_heads: 1,
            kv_heads: 1,
            ..heads(1)
        },
        capacity: 300,
        visible: Visible::First(NonZeroUsize::new(300).unwrap()),
        scale: 0.25,
    };
    vec![
        O::RmsNorm { norm, add: false },
        O::RmsNorm { norm, add: true },
        O::Gate {
            float: FLOAT,
            activation: Activation::Silu,
            elements: 77,
        },
        O::Add {
            float: FLOAT,
            elements: 77,
        },
        O::Gather {
            float: FLOAT,
            rows: 3,
            table_rows: 4,
            columns: 10,
        },
        O::Dense {
            float: FLOAT,
            lengths: [1, 9, 70],
            bias: true,
        },
        O::Dense {
            float: FLOAT,
            lengths: [3, 9, 70],
            bias: false,
        },
        O::Rotate {
            rotation,
            norms: [true, false],
        },
        O::Attend {
            attention,
            most: 300,
        },
        O::Top {
            float: FLOAT,
            lengths: [1, 5000, 7],
        },
        O::Route {
            float: FLOAT,
            lengths: [3, 20, 4],
            normalize: true,
        },
        O::Combine {
            float: FLOAT,
            lengths: [3, 4, 20],
        },
    ]
}

/// Numbers that differ; for words small ones.
fn operands(operation: &decoder::Operation) -> Vec<Vec<u8>> {
    let shapes = operation.operands();
    let fill = shapes.iter().map(|shape| {
        let is_words = ["ids", "positions"].contains(&shape.name);
        let element = |i: usize| match is_words {
            true => (i as u32).to_le_bytes(),
            false => (((i * 7919) % 1009) as f32 / 500.0 - 1.0).to_le_bytes(),
        };
        (0..shape.elements).flat_map(element).collect()
    });
    fill.collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (floats, _) = bytes.as_chunks::<4>();
    floats.iter().copied().map(f32::from_le_bytes).collect()
}

#[test]
fn everything_is_done_as_the_processor_does_it() {
    let driver = Driver::start(1);
    {
        let on = Opened::open();
        for operation in operations() {
            let mut need = operands(&operation);
            let given = on.given(&operation, &need);
            on.queue.give(&Operation::Decode(given.clone())).unwrap();
            let shapes = operation.operands();
            let places = shapes.iter().zip(&mut need);
            let places = places.map(|(shape, bytes)| match shape.is_written {
                true => Operand::Written(bytes),
                false => Operand::Read(bytes),
            });
            let (kernels, one) = (Kernels::detect(), NonZeroUsize::MIN);
            let found = kernels.decode_step(&operation, places.collect(), one, &|| true);
            assert_eq!(found, Ok(Faults::NONE), "{operation:?}");
            for ((shape, place), need) in shapes.iter().zip(&given.operands).zip(&need) {
                let have = on.get(place);
                // Numbers of columns and experts are the same, and anything else is near.
                for (have, need) in floats(&have).iter().zip(floats(need)) {
                    let near = have.to_bits() == need.to_bits()
                        || (have - need).abs() <= 1e-5 * need.abs().max(1.0);
                    assert!(near, "{operation:?}, {}: {have} for {need}", shape.name);
                }
            }
            let faults = on.get(given.faults.as_ref().unwrap());
            assert_eq!(faults, [0; 4], "{operation:?}");
        }
    }
    driver.clean_report("a decoder");
}

#[test]
fn what_ids_and_positions_cannot_be_sets_bits() {
    let driver = Driver::start(1);
    {
        let on = Opened::open();
        for (operation, words, fault) in [
            (operations()[4], "ids", Faults::ID),
            (operations()[7], "positions", Faults::POSITION),
        ] {
            let mut operands = operands(&operation);
            let shapes = operation.operands();
            let at = shapes.iter().position(|shape| shape.name == words).unwrap();
            operands[at][4..8].copy_from_slice(&u32::MAX.to_le_bytes());
            let given = on.given(&operation, &operands);
            // Bits of others stay.
            let word = given.faults.clone().unwrap();
            on.queue
                .write(&word, &0x8000_0000u32.to_le_bytes())
                .unwrap();
            on.queue.give(&Operation::Decode(given)).unwrap();
            let (found, _) = on
                .get(&word)
                .as_chunks::<4>()
                .0
                .split_first()
                .map(|(a, b)| (*a, b.len()))
                .unwrap();
            assert_eq!(u32::from_le_bytes(found), 0x8000_0000 | fault.bits());
        }
    }
    driver.clean_report("faults");
}

#[test]
fn operands_that_do_not_belong_to_an_operation_are_refused() {
    let driver = Driver::start(1);
    {
        let on = Opened::open();
        let refused = |given: QueuedDecode, words: &str| {
            let result = on.queue.give(&Operation::Decode(given));
            let told = match result {
                Err(DeviceError::Operand { reason, .. }) => reason,
                other => panic!("{other:?}, not {words}"),
            };
            assert!(told.contains(words), "{told}, not {words}");
        };
        let gather = operations()[4];
        let attend = operations()[8];
        let of = |operation| on.given(operation, &operands(operation));
        let mut missing = of(&gather);
        missing.operands.pop();
        refused(missing, "2 operands, need 3");
        let mut without = of(&gather);
        without.faults = None;
        refused(without, "no place for faults");
        let mut short = of(&gather);
        short.operands[2] = on.take(100);
        refused(short, "y has 100 bytes, need 120");
        let mut overlapping = of(&gather);
        overlapping.operands[2] = overlapping.operands[0].slice(0, 120).unwrap();
        refused(overlapping, "overlap");
        let mut shifted = of(&attend);
        let queries = on.take(64 + 4);
        shifted.operands[0] = queries.slice(4, 64).unwrap();
        refused(shifted, "need a multiple of 16");
        let mut small = of(&attend);
        small.workspace = Some(on.zeros(256));
        refused(small, "the workspace has 256 bytes");
        let mut none = of(&attend);
        none.workspace = None;
        refused(none, "the workspace has 0 bytes");
        let decoder::Operation::Attend {
            mut attention,
            most,
        } = attend
        else {
            panic!("it is the ninth");
        };
        attention.heads.head_size = 12;
        let mut odd = of(&attend);
        odd.operation = decoder::Operation::Attend { attention, most };
        refused(odd, "a multiple of 8");
        // And nothing of it has been given.
        on.queue.finish().unwrap();
    }
    driver.clean_report("refused");
}

#[test]
fn golden_models_give_the_logits_of_transformers() {
    for (name, expected) in [
        ("llama", "logits_nf4_f32"),
        ("qwen3_moe", "logits_nf4_with_experts_f32"),
    ] {
        let driver = Driver::start(1);
        let model = GoldenModel::unpack(name);
        let file = model.tensors("expected.safetensors");
        let need = tensors::floats(file.data(expected));
        let ids = file.get("input_ids");
        let (ids, _) = ids.data.as_chunks::<8>();
        // The beginning of the first text: the stand-in is not fast.
        let tokens: Vec<u32> = ids[..4]
            .iter()
            .map(|id| i64::from_le_bytes(*id) as u32)
            .collect();
        let device = CudaDevice::open(0, None).unwrap();
        let devices: Arc<[Box<dyn Device>]> = Arc::from([Box::new(device) as Box<dyn Device>]);
        let have = logits(&model.path("bf16"), &devices, &tokens);
        for (i, (have, need)) in have.iter().zip(&need).enumerate() {
            assert!(
                (have - need).abs() <= 2e-4,
                "{name}: logit {i} is {have}, not {need}"
            );
        }
        let prompt = tokens
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(",");
        let arguments = ["--tokens", &prompt, "--max", "2", "--float", "f32"];
        let tokens = generate(&model.path("bf16"), &devices, &arguments).tokens;
        assert_eq!(tokens.len(), 2);
        assert_eq!(devices[0].usage().reserved.now, 0);
        drop(devices);
        driver.clean_report("generating");
    }
}
