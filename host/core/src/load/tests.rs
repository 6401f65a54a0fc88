//! The loader against the kernels run over whole tensors, and what it leaves behind when it fails.

use std::sync::atomic::{AtomicU64, Ordering};

use std::fmt;
use tempfile::TempDir;

use tightfit_kernels::{BlockSize, Float, FloatType, Isa, half};

use super::*;
use crate::device::HostDevice;
use crate::model::{ModelError, Tensor};
use crate::plan::{PartKind, PlanOptions};
use crate::testing::{Source, source, write_checkpoint};
use crate::types::{DType, Placement};

pub(crate) fn nf4(block_size: usize, double_quantized: bool) -> Format {
    Format::Nf4 {
        block_size: BlockSize::new(block_size).unwrap(),
        double_quantized,
    }
}

/// One tensor of every kind, larger than a staging slot where that matters.
fn cases() -> Vec<(Source, Format)> {
    vec![
        (source("plain", DType::Bf16, &[300, 70]), Format::Stored),
        (source("ids", DType::I64, &[13]), Format::Stored),
        (
            source("cast", DType::F32, &[123, 457]),
            Format::Cast(DType::Bf16),
        ),
        (source("nf4", DType::Bf16, &[517, 331]), nf4(64, false)),
        (source("half", DType::F16, &[99, 801]), nf4(128, false)),
        (source("single", DType::F32, &[64, 1031]), nf4(32, false)),
        (
            source("wide blocks", DType::Bf16, &[257, 513]),
            nf4(4096, false),
        ),
        (source("double", DType::Bf16, &[1025, 257]), nf4(64, true)),
        (
            source("double single", DType::F32, &[3, 50_021]),
            nf4(256, true),
        ),
        (source("odd", DType::Bf16, &[65]), nf4(64, true)),
        (source("empty", DType::Bf16, &[0, 64]), nf4(64, true)),
        (source("scalar", DType::F32, &[]), nf4(64, false)),
    ]
}

struct Fixture {
    _directory: TempDir,
    path: std::path::PathBuf,
    checkpoint: Checkpoint,
    plan: Plan,
    devices: Vec<Box<dyn Device>>,
}

impl Fixture {
    fn new(cases: &[(Source, Format)]) -> Fixture {
        let directory = TempDir::new().unwrap();
        let mut all = Vec::new();
        for (source, _) in cases {
            all.push(Source {
                bytes: source.bytes.clone(),
                shape: source.shape.clone(),
                ..*source
            });
        }
        write_checkpoint(directory.path(), &all);
        let path = directory.path().join("model.safetensors");
        let checkpoint = Checkpoint::open(&path).unwrap();
        let devices: Vec<Box<dyn Device>> = vec![
            Box::new(HostDevice::sim(0, 1 << 30)),
            Box::new(HostDevice::sim(1, 1 << 30)),
        ];
        let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
        // The checkpoint's order is that of the offsets, where empty tensors sort first.
        let placements: Vec<Placement> = checkpoint
            .tensors()
            .iter()
            .enumerate()
            .map(|(index, tensor)| Placement {
                device: Some(index as u32 % 2),
                format: cases.iter().find(|(s, _)| s.name == tensor.name).unwrap().1,
            })
            .collect();
        let plan = Plan::new(checkpoint.tensors(), &[], &infos, &placements, &[0, 0]).unwrap();
        Fixture {
            _directory: directory,
            path,
            checkpoint,
            plan,
            devices,
        }
    }

    fn load(&self, options: &LoadOptions<'_>) -> Result<Model, LoadError> {
        load(&self.checkpoint, &self.plan, &self.devices, options)
    }

    fn reserved_now(&self) -> u64 {
        self.devices
            .iter()
            .map(|device| device.usage().reserved.now)
            .sum()
    }
}

/// What the tensor must hold, from the kernels run over the whole of it.
fn check(source: &Source, format: Format, tensor: Tensor<'_>) {
    let kernels = Kernels::new(Isa::Portable).unwrap();
    let part = |kind| {
        tensor
            .part(kind)
            .unwrap_or_else(|| panic!("{} has no {kind:?}", source.name))
    };
    match format {
        Format::Stored => assert_eq!(part(PartKind::Data), source.bytes, "{}", source.name),
        Format::Cast(target) => {
            let (from, to) = (
                source.dtype.float_type().unwrap(),
                target.float_type().unwrap(),
            );
            let mut expected = vec![0; source.bytes.len() / from.bytes() * to.bytes()];
            kernels
                .cast(&source.bytes, from, to, &mut expected)
                .unwrap();
            assert_eq!(part(PartKind::Data), expected, "{}", source.name);
        }
        Format::Nf4 {
            block_size,
            double_quantized,
        } => {
            let float = source.dtype.float_type().unwrap();
            let elements = source.bytes.len() / float.bytes();
            let mut codes = vec![0; tightfit_kernels::packed_bytes(elements)];
            let mut absmax = vec![0.0; tightfit_kernels::blocks(elements, block_size)];
            kernels
                .quantize_nf4(&source.bytes, float, block_size, &mut codes, &mut absmax)
                .unwrap();
            assert_eq!(part(PartKind::Codes), codes, "{}", source.name);
            if double_quantized {
                let offset = kernels.absmax_mean(&absmax);
                let mut codes = vec![0; absmax.len()];
                let mut nested = vec![0.0; absmax.len().div_ceil(256)];
                kernels
                    .quantize_absmax(&absmax, offset, &mut codes, &mut nested)
                    .unwrap();
                assert_eq!(part(PartKind::Absmax), codes, "{}", source.name);
                assert_eq!(
                    part(PartKind::NestedAbsmax),
                    bytemuck::cast_slice::<f32, u8>(&nested),
                    "{}",
                    source.name
                );
                assert_eq!(
                    tensor.quantization().unwrap().absmax_mean,
                    Some(offset),
                    "{}",
                    source.name
                );
            } else {
                assert_eq!(
                    part(PartKind::Absmax),
                    bytemuck::cast_slice::<f32, u8>(&absmax),
                    "{}",
                    source.name
                );
            }
        }
    }
}

#[test]
fn the_bytes_do_not_depend_on_threads_staging_or_instruction_set() {
    let cases = cases();
    let fixture = Fixture::new(&cases);
    for isa in Isa::available() {
        for (threads, staging_bytes) in [(1, 64 << 10), (2, 200_000), (3, 64 << 20), (16, 1 << 20)]
        {
            let model = fixture
                .load(
                    &LoadOptions::default()
                        .with_threads(threads)
                        .with_staging_bytes(staging_bytes)
                        .with_kernels(Kernels::new(isa).unwrap()),
                )
                .unwrap();
            for (source, format) in &cases {
                check(source, *format, model.tensor(source.name).unwrap());
            }
            let stats = model.stats();
            assert!(stats.staging_bytes <= staging_bytes);
            assert_eq!(stats.bytes_read, fixture.checkpoint.source_bytes());
            assert_eq!((stats.quantized, stats.stored), (9, 3));
            for (device, plan) in fixture.devices.iter().zip(&fixture.plan.devices) {
                assert_eq!(device.usage().reserved.now, plan.size.reserved);
                assert_eq!(
                    device.usage().reserved.peak,
                    plan.size.reserved,
                    "the plan is the ceiling"
                );
            }
            drop(model);
            assert_eq!(fixture.reserved_now(), 0);
        }
    }
}

/// The same numbers in every type and as bytes, all of them or some.
#[test]
fn numbers_are_read_in_every_type() {
    fn check<T: Float + PartialEq + fmt::Debug>(tensor: Tensor<'_>) {
        let all: Vec<T> = tensor.to_floats().unwrap();
        let bytes = tensor.to_float(T::TYPE).unwrap();
        assert_eq!(bytemuck::cast_slice::<T, u8>(&all), bytes);
        let first = all.len() / 3;
        let mut some = vec![T::zeroed(); (all.len() - first).min(100)];
        tensor.read_floats(first as u64, &mut some).unwrap();
        assert_eq!(some, all[first..][..some.len()]);
        let outside = tensor.read_floats(all.len() as u64 + 1, &mut some[..0]);
        assert!(matches!(outside, Err(ModelError::OutsideTensor { .. })));
    }
    let cases = cases();
    let fixture = Fixture::new(&cases);
    let model = fixture.load(&LoadOptions::default()).unwrap();
    for (source, _) in &cases {
        if source.dtype.is_quantizable() {
            let tensor = model.tensor(source.name).unwrap();
            check::<f32>(tensor);
            check::<half::f16>(tensor);
            check::<half::bf16>(tensor);
        }
    }
}

#[test]
fn dequantized_tensors_are_close_to_what_they_were() {
    let cases = cases();
    let fixture = Fixture::new(&cases);
    let model = fixture.load(&LoadOptions::default()).unwrap();
    for (source, format) in &cases {
        let tensor = model.tensor(source.name).unwrap();
        let Some(float) = source.dtype.float_type() else {
            assert!(tensor.to_float(FloatType::F32).is_err());
            continue;
        };
        let mut expected = vec![0; source.bytes.len() / float.bytes() * 4];
        Kernels::detect()
            .cast(&source.bytes, float, FloatType::F32, &mut expected)
            .unwrap();
        let found: Vec<f32> = tensor.to_floats().unwrap();
        let (chunks, _) = expected.as_chunks::<4>();
        let expected = chunks.iter().copied().map(f32::from_le_bytes);
        let pairs = found.into_iter().zip(expected);
        // Half the widest gap between two NF4 values, for weights within [-1, 1].
        let tolerance = if *format == Format::Stored { 0.0 } else { 0.16 };
        for (found, expected) in pairs {
            assert!(
                (found - expected).abs() <= tolerance,
                "{}: {found} {expected}",
                source.name
            );
        }
    }
}

#[test]
fn a_cancelled_load_stops_and_gives_everything_back() {
    // Of so many chunks that there is something left wherever it is cancelled.
    let names: Vec<String> = (0..40).map(|number| format!("{number}")).collect();
    let tensor = |name: &String| source(name.clone().leak(), DType::Bf16, &[9, 700]);
    let cases: Vec<_> = names
        .iter()
        .map(|name| (tensor(name), nf4(64, false)))
        .collect();
    let fixture = Fixture::new(&cases);
    for after in [0, 1, 5, 17] {
        let cancel = CancelToken::new();
        let seen = AtomicU64::new(0);
        let result = fixture.load(
            &LoadOptions::default()
                .with_threads(4)
                .with_staging_bytes(256 << 10)
                .with_progress(&|progress| {
                    assert!(progress.bytes_done <= progress.bytes_total);
                    if seen.fetch_add(1, Ordering::Relaxed) >= after {
                        cancel.cancel();
                    }
                })
                .with_cancel(cancel.clone()),
        );
        assert!(matches!(result, Err(LoadError::Cancelled)), "{result:?}");
        assert_eq!(fixture.reserved_now(), 0);
    }
}

#[test]
fn what_progress_says_was_written_is_what_the_plan_has() {
    let fixture = Fixture::new(&cases());
    for (threads, staging_bytes) in [(1, 64 << 10), (4, 1 << 20)] {
        let written = [AtomicU64::new(0), AtomicU64::new(0)];
        let report = |progress: crate::Progress| {
            let device = progress.device.unwrap() as usize;
            written[device].fetch_add(progress.bytes_written, Ordering::Relaxed);
        };
        let options = LoadOptions::default()
            .with_threads(threads)
            .with_staging_bytes(staging_bytes)
            .with_progress(&report);
        drop(fixture.load(&options).unwrap());
        let planned = fixture.plan.devices.iter().map(|plan| plan.size.requested);
        assert!(planned.eq(written.map(AtomicU64::into_inner)));
    }
}

#[test]
fn a_file_cut_short_while_loading_is_an_error_and_not_a_signal() {
    let cases = cases();
    let fixture = Fixture::new(&cases);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&fixture.path)
        .unwrap();
    let cut = std::sync::Once::new();
    let result = fixture.load(
        &LoadOptions::default()
            .with_threads(2)
            .with_progress(&|_| cut.call_once(|| file.set_len(4096).unwrap())),
    );
    match result {
        Err(LoadError::Checkpoint(error)) => {
            let text = error.to_string();
            assert!(text.contains("model.safetensors"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(fixture.reserved_now(), 0);
}

#[test]
fn infinities_and_nan_are_counted_or_refused() {
    let mut bad = source("bad", DType::F32, &[10_000]);
    for element in [3, 70, 71, 9_999] {
        bad.bytes[element * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    }
    let good = (source("good", DType::F32, &[640]), nf4(64, false));
    for double in [false, true] {
        let bad = Source {
            bytes: bad.bytes.clone(),
            shape: bad.shape.clone(),
            ..bad
        };
        let good = (
            Source {
                bytes: good.0.bytes.clone(),
                shape: good.0.shape.clone(),
                ..good.0
            },
            good.1,
        );
        let fixture = Fixture::new(&[good, (bad, nf4(64, double))]);
        let model = fixture.load(&LoadOptions::default()).unwrap();
        assert_eq!(model.stats().nonfinite_blocks(), 3);
        assert_eq!(model.stats().nonfinite.len(), 1);
        drop(model);
        let result = fixture.load(&LoadOptions::default().with_strict(true));
        assert!(
            matches!(result, Err(LoadError::NonFinite { ref tensor, .. }) if tensor == "bad"),
            "{result:?}"
        );
        assert_eq!(fixture.reserved_now(), 0);
    }
}

#[test]
fn a_device_that_shrank_since_the_plan_is_an_error_with_nothing_left_reserved() {
    let cases = cases();
    let mut fixture = Fixture::new(&cases);
    fixture.devices[1] = Box::new(HostDevice::sim(1, 4096));
    assert!(matches!(
        fixture.load(&LoadOptions::default()),
        Err(LoadError::Device(_))
    ));
    assert_eq!(fixture.reserved_now(), 0);
}

/// As many tensors, each of another shape or type than was planned: a vocabulary that has grown, norms
/// in f32, rows and columns that end elsewhere.
#[test]
fn a_plan_for_another_checkpoint_of_as_many_tensors_is_refused() {
    let cases = cases();
    for change in 0..3 {
        let mut fixture = Fixture::new(&cases);
        let others: Vec<Source> = cases
            .iter()
            .map(|(of, _)| {
                let (mut dtype, mut shape) = (of.dtype, of.shape.clone());
                let rows = shape.first_mut();
                match (change, rows) {
                    (0, Some(rows)) => *rows += 64,
                    (1, Some(rows)) => *rows = rows.saturating_sub(1),
                    (2, _) if dtype == DType::F32 => dtype = DType::Bf16,
                    (2, _) if dtype.is_quantizable() => dtype = DType::F32,
                    _ => {}
                }
                source(of.name, dtype, &shape)
            })
            .collect();
        write_checkpoint(fixture.path.parent().unwrap(), &others);
        fixture.checkpoint = Checkpoint::open(&fixture.path).unwrap();
        let result = fixture.load(&LoadOptions::default());
        assert!(
            matches!(result, Err(LoadError::OtherPlan)),
            "{change}: {result:?}"
        );
        assert_eq!(fixture.reserved_now(), 0);
    }
}

#[test]
fn a_plan_for_other_devices_is_refused() {
    let cases = cases();
    let mut fixture = Fixture::new(&cases);
    fixture.devices.pop();
    assert!(matches!(
        fixture.load(&LoadOptions::default()),
        Err(LoadError::OtherPlan)
    ));
}

#[test]
fn staging_too_small_for_one_worker_is_refused() {
    let cases = cases();
    let fixture = Fixture::new(&cases);
    let result = fixture.load(&LoadOptions::default().with_staging_bytes(1000));
    assert!(matches!(result, Err(LoadError::Staging(_))), "{result:?}");
    assert_eq!(fixture.reserved_now(), 0);
}

/// Sees to it that a load stops wherever it looks whether to go on, and gives everything back.
fn stops_everywhere(fixture: &Fixture, threads: usize) -> usize {
    const MANY: usize = 1 << 40;
    let load = |cancel: &CancelToken| {
        fixture.load(
            &LoadOptions::default()
                .with_threads(threads)
                .with_staging_bytes(256 << 10)
                .with_cancel(cancel.clone()),
        )
    };
    let all = CancelToken::at_look(MANY);
    drop(load(&all).unwrap());
    let looks = MANY - all.looks_left();
    for look in (0..looks).step_by(looks.div_ceil(100)) {
        let result = load(&CancelToken::at_look(look));
        assert!(
            matches!(result, Err(LoadError::Cancelled)),
            "{look} of {looks}: {result:?}"
        );
        assert_eq!(fixture.reserved_now(), 0);
    }
    looks
}

#[test]
fn a_load_stops_wherever_it_looks() {
    let fixture = Fixture::new(&cases());
    assert!(stops_everywhere(&fixture, 1) > cases().len());
}

#[test]
fn loads_and_plans_of_many_tensors_look_before_and_after_the_bytes() {
    // Without any bytes there is no chunk to look before.
    let names: Vec<String> = (0..20_000).map(|i| format!("t{}", 99_999 - i)).collect();
    let empty = |name: &String| source(name.clone().leak(), DType::U8, &[0]);
    let cases: Vec<_> = names
        .iter()
        .map(|name| (empty(name), Format::Stored))
        .collect();
    let directory = TempDir::new().unwrap();
    let sources: Vec<Source> = cases.into_iter().map(|(source, _)| source).collect();
    write_checkpoint(directory.path(), &sources);
    let path = directory.path().join("model.safetensors");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::sim(0, 1 << 30))];
    let placement = Placement {
        device: Some(0),
        format: Format::Stored,
    };
    let placements = vec![placement; checkpoint.tensors().len()];
    let plan = |cancel: &CancelToken| {
        let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
        let options = PlanOptions::default().with_cancel(cancel.clone());
        Plan::new_with(
            checkpoint.tensors(),
            &[],
            &infos,
            &placements,
            &[0],
            &options,
        )
    };
    const MANY: usize = 1 << 40;
    let all = CancelToken::at_look(MANY);
    let made = plan(&all).unwrap();
    let looks = MANY - all.looks_left();
    assert!(looks >= 4 * (placements.len() >> 10), "{looks}");
    for look in 0..looks {
        let stopped = plan(&CancelToken::at_look(look));
        assert_eq!(stopped, Err(crate::plan::PlanError::Cancelled), "{look}");
    }
    let fixture = Fixture {
        _directory: directory,
        path,
        checkpoint,
        plan: made,
        devices,
    };
    let looks = stops_everywhere(&fixture, 1);
    assert!(looks >= 4 * (placements.len() >> 10), "{looks}");
}
