use tightfit_kernels::FloatType;

use super::*;
use types::{Format, Nf4Format, Placement};
use wit_models::{HostModel as _, PartKind};

fn nf4(double_quantized: bool) -> Format {
    Format::Nf4(Nf4Format {
        block_size: 64,
        double_quantized,
    })
}

/// The matrices in 4 bits, in turn on both devices.
fn placements() -> Vec<Placement> {
    let format = [nf4(false), nf4(true), Format::Stored, nf4(true)];
    let placement = |(index, format)| Placement {
        device: Some(index as u32 % 2),
        format,
    };
    format.into_iter().enumerate().map(placement).collect()
}

fn load(
    program: &mut Program,
    placements: Vec<Placement>,
) -> Result<Resource<LoadedModel>, CallError> {
    let open = program.open("model");
    program.call().load(open, placements, vec![0, 0])
}

#[test]
fn a_model_is_loaded_looked_up_and_unloaded() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 16 * MIB);
    let model = done(load(&mut program, placements()));
    let statistics = program.call().get_statistics(again(&model)).unwrap();
    assert_eq!((statistics.quantized, statistics.stored), (3, 1));
    let source: usize = sources().iter().map(|source| source.bytes.len()).sum();
    assert_eq!(statistics.bytes_read, source as u64);
    for (index, share) in statistics.shares.iter().enumerate() {
        let usage = program.context.usage(index).unwrap();
        assert_eq!(share.tensors, 2);
        assert_eq!(usage.requested.now, share.requested);
        assert_eq!(usage.padded.now, share.padded);
        assert_eq!(usage.reserved.now, share.reserved);
        assert_eq!(
            program.context.devices[index].usage().reserved.now,
            share.reserved
        );
    }
    let find = |program: &mut Program, name: &str| {
        wit_models::HostModel::find(&mut program.call(), again(&model), name.to_owned())
    };
    assert_eq!(find(&mut program, "large").unwrap(), Some(3));
    assert_eq!(find(&mut program, "small").unwrap(), None);
    let tensor = done(program.call().get_tensor(again(&model), 3));
    assert_eq!((tensor.name.as_str(), tensor.device), ("large", 1));
    let quantization = tensor.quantization.unwrap();
    assert_eq!(quantization.block_size, 64);
    assert!(quantization.mean.is_some_and(|mean| mean > 0.0));
    let kinds: Vec<_> = tensor.parts.iter().map(|part| part.kind).collect();
    assert_eq!(
        kinds,
        [PartKind::Codes, PartKind::Absmax, PartKind::NestedAbsmax]
    );

    program.unload(model);
    assert_eq!(program.context.reserved().now, 0);
    assert_eq!(program.context.devices[0].usage().reserved.now, 0);
}

#[test]
fn ranges_of_tensors_are_ranges_of_the_whole() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 32 * MIB);
    let handle = done(load(&mut program, placements()));
    let mut check = |number: u32, dtype, to: FloatType| {
        let model = program.table.get(&handle).unwrap().model();
        let whole = model
            .tensor_at(number as usize)
            .unwrap()
            .to_float(to)
            .unwrap();
        let count = (whole.len() / to.bytes()) as u64;
        let ranges = [
            (0, 1),
            (1, 1),
            (63, 2),
            (64, 64),
            (65, 1000),
            (16_383, 20_000),
            (count - 1, 1),
            (count - 70, 70),
            (count, 0),
            (1 << 20, 9),
            ((1 << 20) - 5, 70_000),
        ];
        for (first, n) in ranges.into_iter().filter(|(first, n)| first + n <= count) {
            let expected = &whole[first as usize * to.bytes()..][..n as usize * to.bytes()];
            let given = program
                .call()
                .read_elements(again(&handle), number, first, n, dtype);
            assert_eq!(done(given), expected, "{number}: {first}, {n}");
            let buffer = program.allocate(1, expected.len() as u64 + 1);
            let call = &mut program.call();
            done(call.read_elements_into(
                again(&handle),
                number,
                first,
                n,
                dtype,
                again(&buffer),
                1,
            ));
            assert_eq!(program.bytes(&buffer)[1..], *expected);
        }
        let buffer = program.allocate(0, whole.len() as u64);
        let call = &mut program.call();
        done(call.read_elements_into(again(&handle), number, 0, count, dtype, again(&buffer), 0));
        assert_eq!(program.bytes(&buffer), whole);
        for (first, n) in [
            (0, count + 1),
            (count + 1, 0),
            (count, 1),
            (u64::MAX, 1),
            (1, u64::MAX),
        ] {
            invalid(
                program
                    .call()
                    .read_elements(again(&handle), number, first, n, dtype),
            );
            let buffer = again(&buffer);
            let call = &mut program.call();
            invalid(call.read_elements_into(again(&handle), number, first, n, dtype, buffer, 0));
        }
    };
    for number in [0, 1, 3] {
        check(number, types::Dtype::F32, FloatType::F32);
        check(number, types::Dtype::Bf16, FloatType::Bf16);
    }
}

#[test]
fn parts_are_read_as_they_are_stored() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 32 * MIB);
    let handle = done(load(&mut program, placements()));
    for number in 0..4 {
        for part in done(program.call().get_tensor(again(&handle), number)).parts {
            let kind = super::super::models::part_kind(part.kind);
            let model = program.table.get(&handle).unwrap().model();
            let tensor = model.tensor_at(number as usize).unwrap();
            let whole = tensor.part(kind).unwrap().to_vec();
            let buffer = program.allocate(0, part.bytes);
            let into = |program: &mut Program, start, bytes, offset| {
                let (model, buffer) = (again(&handle), again(&buffer));
                let call = &mut program.call();
                call.read_part_into(model, number, part.kind, start, bytes, buffer, offset)
            };
            done(into(&mut program, 0, part.bytes, 0));
            assert_eq!(program.bytes(&buffer), whole);
            let read = |program: &mut Program, start, bytes| {
                program
                    .call()
                    .read_part(again(&handle), number, part.kind, start, bytes)
            };
            let end = whole.len() as u64;
            assert_eq!(
                done(read(&mut program, end - 2, 2)),
                whole[whole.len() - 2..]
            );
            for (start, bytes) in [(end, 1), (0, end + 1), (u64::MAX, 1), (1, u64::MAX)] {
                invalid(read(&mut program, start, bytes));
                invalid(into(&mut program, start, bytes, 0));
            }
            invalid(into(&mut program, 0, part.bytes, 1));
        }
    }
    let missing = program
        .call()
        .read_part(again(&handle), 2, PartKind::Codes, 0, 0);
    assert!(invalid(missing).contains("no Codes"));
    let ids = program
        .call()
        .read_elements(again(&handle), 2, 0, 1, types::Dtype::F32);
    assert!(matches!(told(ids), errors::Error::Unsupported(_)));
    for number in [4, u32::MAX] {
        invalid(program.call().get_tensor(again(&handle), number));
    }
}

#[test]
fn a_bad_plan_is_told_and_nothing_is_taken() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 64 * MIB);
    let edited = |edit: &dyn Fn(&mut Vec<Placement>)| {
        let mut placements = placements();
        edit(&mut placements);
        placements
    };
    let with = |index: usize, device, format| {
        edited(&move |placements| placements[index] = Placement { device, format })
    };
    let nf4_of = |block_size| {
        Format::Nf4(Nf4Format {
            block_size,
            double_quantized: true,
        })
    };
    for (placements, says) in [
        (edited(&|placements| placements.clear()), "placed 0 tensors"),
        (
            edited(&|placements| placements.push(placements[0])),
            "placed 5 tensors",
        ),
        (with(0, Some(2), Format::Stored), "device number 2"),
        (
            with(0, Some(u32::MAX), Format::Stored),
            "device number 4294967295",
        ),
        (with(0, Some(0), nf4_of(48)), "power of two"),
        (
            with(0, Some(0), Format::Cast(types::Dtype::I8)),
            "casts are between",
        ),
        (with(2, Some(0), nf4_of(64)), "NF4 is made from"),
    ] {
        let message = invalid(load(&mut program, placements));
        assert!(message.contains(says), "{message}");
    }
    let open = program.open("model");
    for headroom in [vec![], vec![0; 3]] {
        invalid(program.call().load(again(&open), placements(), headroom));
    }
    let headroom = vec![u64::MAX, 0];
    let result = program.call().load(again(&open), placements(), headroom);
    assert!(matches!(told(result), errors::Error::NoSpace(_)));
    assert_eq!(program.context.reserved(), Gauge::default());
    assert_eq!(program.context.devices[0].usage(), Usage::default());
}

#[test]
fn a_model_counts_towards_the_quota_before_anything_is_taken() {
    let directory = checkpoint();
    let mut program = with_model(directory.path(), 64 * MIB);
    done(load(&mut program, placements()));
    let need = program.context.reserved().now;

    let mut program = with_model(directory.path(), need - 4096);
    assert_eq!(
        over_quota(load(&mut program, placements())),
        (need, need - 4096)
    );
    assert_eq!(program.context.reserved(), Gauge::default());
    assert_eq!(program.context.devices[0].usage(), Usage::default());

    let mut program = with_model(directory.path(), need);
    let buffer = program.allocate(0, 1);
    let (wanted, left) = over_quota(load(&mut program, placements()));
    assert_eq!((wanted, left), (need, need - MIB));
    // What is freed and kept for the next buffer is in nobody's way.
    program.free(buffer);
    let model = done(load(&mut program, placements()));
    over_quota(program.call().allocate(0, 1));
    program.unload(model);
    program.allocate(0, 1);
}

#[test]
fn what_the_host_keeps_of_models_is_bounded() {
    let directory = checkpoint();
    let checkpoint = tightfit::checkpoint::Checkpoint::open(directory.path()).unwrap();
    let loader = super::super::models::Loader::new();
    let mut kept = Vec::new();
    let error = loop {
        match loader.keep(&checkpoint, &[], &Stop::default()) {
            Ok(entry) => kept.push(entry),
            Err(error) => break error,
        }
        assert!(kept.len() < 1 << 20);
    };
    assert!(matches!(
        told::<()>(Err(error)),
        errors::Error::Unsupported(_)
    ));
    // A slice is kept as a tensor is, and each of its ranges.
    kept.clear();
    let slice = |ranges: usize| tightfit::types::Slice {
        tensor: 0,
        dimension: 0,
        ranges: vec![0..1; ranges],
        placement: tightfit::types::Placement {
            device: None,
            format: tightfit::types::Format::Stored,
        },
    };
    let told = |slices: &[tightfit::types::Slice]| {
        told(loader.keep(&checkpoint, slices, &Stop::default()))
    };
    let many = told(&vec![slice(1); 2_000_000]);
    assert!(matches!(many, errors::Error::Unsupported(_)));
    let long = told(&vec![slice(1000); 4000]);
    assert!(matches!(long, errors::Error::Unsupported(_)));
    let few = loader.keep(&checkpoint, &vec![slice(2); 1000], &Stop::default());
    kept.push(done(few));
    kept.clear();
    kept.push(done(loader.keep(&checkpoint, &[], &Stop::default())));
}
