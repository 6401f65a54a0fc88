//! Slices of tensors against the tensors that they are of.
#![expect(
    clippy::single_range_in_vec_init,
    reason = "a range is what is meant, not its numbers"
)]

use std::ops::Range;

use proptest::prelude::*;
use tempfile::TempDir;
use tightfit_kernels::{FloatType, Kernels};

use super::tests::nf4;
use super::*;
use crate::device::HostDevice;
use crate::plan::PartKind;
use crate::policy::Proposal;
use crate::save::{SaveOptions, save};
use crate::testing::{Source, source, write_checkpoint};
use crate::types::{DType, Placement, Slice};

const NAMES: [&str; 3] = ["first", "second", "third"];

/// One way to give a tensor to devices: each has some ranges of a dimension.
#[derive(Debug, Clone)]
struct Cut {
    dimension: u32,
    of_device: Vec<Vec<Range<u64>>>,
}

fn sims(count: usize) -> Vec<Box<dyn Device>> {
    (0..count)
        .map(|number| Box::new(HostDevice::sim(number, 1 << 30)) as Box<dyn Device>)
        .collect()
}

/// The elements of all but one dimension in its order, of those `ranges` that there are along it.
fn select(bytes: &[u8], each: usize, shape: &[u64], cut: (u32, &[Range<u64>])) -> Vec<u8> {
    let (dimension, ranges) = (cut.0 as usize, cut.1);
    let length = shape[dimension] as usize;
    let inner = shape[dimension + 1..].iter().product::<u64>() as usize * each;
    let mut selected = Vec::new();
    for outer in bytes.chunks(length * inner) {
        for range in ranges {
            selected.extend(&outer[range.start as usize * inner..range.end as usize * inner]);
        }
    }
    selected
}

fn plan(
    checkpoint: &Checkpoint,
    devices: &[Box<dyn Device>],
    format: Format,
    cuts: &[Cut],
) -> Plan {
    let nowhere = Placement {
        device: None,
        format,
    };
    let slices = cuts.iter().enumerate().flat_map(|(tensor, cut)| {
        let of_device = cut.of_device.iter().enumerate();
        of_device
            .filter(|(_, ranges)| !ranges.is_empty())
            .map(move |(device, ranges)| Slice {
                tensor: tensor as u32,
                dimension: cut.dimension,
                ranges: ranges.clone(),
                placement: Placement {
                    device: Some(device as u32),
                    format,
                },
            })
    });
    let proposal = Proposal {
        placements: vec![nowhere; checkpoint.tensors().len()],
        headroom: vec![0; devices.len()],
        slices: slices.collect(),
    };
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    Plan::of(checkpoint, &infos, &proposal).unwrap()
}

fn options() -> LoadOptions<'static> {
    LoadOptions::default()
        .with_threads(2)
        .with_staging_bytes(128 << 10)
}

fn parts(tensor: &crate::Tensor<'_>) -> Vec<(PartKind, Vec<u8>)> {
    let parts = tensor.parts().iter();
    parts
        .map(|part| (part.kind, tensor.part(part.kind).unwrap().to_vec()))
        .collect()
}

/// Loads all of a checkpoint onto one device.
fn whole(checkpoint: &Checkpoint, format: Format) -> Model {
    let devices = sims(1);
    let placement = Placement {
        device: Some(0),
        format,
    };
    let placements = vec![placement; checkpoint.tensors().len()];
    let infos = [devices[0].info()];
    let ties = checkpoint.ties();
    let plan = Plan::new(checkpoint.tensors(), ties, &infos, &placements, &[0]).unwrap();
    load(checkpoint, &plan, &devices, &options()).unwrap()
}

fn ranges_of(
    length: u64,
    devices: usize,
    unit: u64,
    picks: &[prop::sample::Index],
) -> Vec<Vec<Range<u64>>> {
    let units = length.div_ceil(unit);
    let mut of_device: Vec<Vec<Range<u64>>> = vec![Vec::new(); devices];
    for number in 0..units {
        let device = picks[number as usize % picks.len()].index(devices);
        of_device[device].push(number * unit..((number + 1) * unit).min(length));
    }
    of_device
}

fn cuts() -> impl Strategy<Value = (Vec<Vec<u64>>, Vec<Cut>)> {
    let shape = prop_oneof![
        (1u64..200).prop_map(|a| vec![a]),
        (1u64..40, 1u64..5, 0u64..2).prop_map(|(a, b, odd)| vec![a, 64 * b + 3 * odd]),
        (1u64..5, 1u64..20, 1u64..3).prop_map(|(a, b, c)| vec![a, b, 64 * c]),
    ];
    let each = (
        shape,
        any::<prop::sample::Index>(),
        prop::sample::select(vec![1u64, 3, 32, 64]),
        prop::collection::vec(any::<prop::sample::Index>(), 1..6),
    );
    prop::collection::vec(each, 1..=3).prop_map(|each| {
        let cut =
            |(shape, dimension, unit, picks): (Vec<u64>, prop::sample::Index, u64, Vec<_>)| {
                let dimension = dimension.index(shape.len());
                let cut = Cut {
                    dimension: dimension as u32,
                    of_device: ranges_of(shape[dimension], 3, unit, &picks),
                };
                (shape, cut)
            };
        each.into_iter().map(cut).unzip()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    /// A slice is what a file of just its elements would be, and all of them are all of the tensor.
    #[test]
    fn a_slice_is_a_tensor_of_its_elements(
        (shapes, cuts) in cuts(),
        dtype in prop::sample::select(vec![DType::Bf16, DType::F32]),
        format in prop::sample::select(vec![
            Format::Stored, Format::Cast(DType::F16), nf4(64, false), nf4(32, false), nf4(64, true),
        ]),
    ) {
        let sources: Vec<Source> = shapes.iter().zip(NAMES).map(|(shape, name)| source(name, dtype, shape)).collect();
        let directory = TempDir::new().unwrap();
        write_checkpoint(directory.path(), &sources);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        // By offset, as they were written.
        let devices = sims(3);
        let plan = plan(&checkpoint, &devices, format, &cuts);
        let model = load(&checkpoint, &plan, &devices, &options()).unwrap();
        prop_assert!(model.stats().bytes_read >= checkpoint.source_bytes());
        let all = whole(&checkpoint, format);
        let mut elements = 0;
        for tensor in model.tensors() {
            let piece = tensor.piece().unwrap();
            let number = NAMES.iter().position(|name| *name == piece.of).unwrap();
            let (source, shape) = (&sources[number], &shapes[number]);
            prop_assert_eq!(&piece.shape, shape);
            let cut = (piece.dimension as u32, &piece.ranges[..]);
            let each = dtype.bits() as usize / 8;
            let bytes = select(&source.bytes, each, shape, cut);
            elements += bytes.len();
            let alone = TempDir::new().unwrap();
            write_checkpoint(alone.path(), &[Source { name: "alone", dtype, shape: tensor.shape().to_vec(), bytes }]);
            let alone = whole(&Checkpoint::open(alone.path()).unwrap(), format);
            let alone = alone.tensor("alone").unwrap();
            prop_assert_eq!(parts(&tensor), parts(&alone), "{}", tensor.name());
            prop_assert_eq!(tensor.quantization(), alone.quantization());
            // Where blocks are whole, it has the bytes of the whole.
            let columns = *shape.last().unwrap();
            let is_columns = cut.0 as usize == shape.len() - 1;
            let aligned = |unit: u64| !is_columns || cut.1.iter().all(|range| {
                range.start.is_multiple_of(unit) && range.end.is_multiple_of(unit)
            });
            let is_exact = match format {
                Format::Nf4 { double_quantized: true, .. } => false,
                Format::Nf4 { block_size, .. } => {
                    let block = block_size.elements() as u64;
                    columns.is_multiple_of(block) && aligned(block)
                }
                _ => true,
            };
            if is_exact {
                let whole = all.tensor(&piece.of).unwrap().to_float(FloatType::F32).unwrap();
                let want = select(&whole, 4, shape, cut);
                prop_assert!(tensor.to_float(FloatType::F32).unwrap() == want, "{}", tensor.name());
            }
        }
        let stored: usize = sources.iter().map(|source| source.bytes.len()).sum();
        prop_assert_eq!(elements, stored);
    }

    /// What is quantized in the checkpoint keeps its values, whichever way it is cut.
    #[test]
    fn a_slice_of_a_quantized_weight_has_its_values(
        rows in 1u64..80,
        blocks in 1u64..12,
        dimension in 0u32..2,
        unit in 1u64..24,
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..6),
        is_double in any::<bool>(),
    ) {
        let shape = [rows, 64 * blocks];
        let directory = TempDir::new().unwrap();
        write_checkpoint(directory.path(), &[source("weight", DType::Bf16, &shape)]);
        let plain = Checkpoint::open(directory.path()).unwrap();
        let format = nf4(64, is_double);
        let saved = directory.path().join("saved");
        let placements = [Placement { device: Some(0), format }];
        save(&plain, &placements, &saved, &SaveOptions::default()).unwrap();
        let checkpoint = Checkpoint::open(&saved).unwrap();
        prop_assert!(checkpoint.tensors()[0].quantized.is_some());
        let (length, unit) = match dimension {
            0 => (rows, unit),
            _ => (64 * blocks, 64 * unit),
        };
        let cut = Cut { dimension, of_device: ranges_of(length, 3, unit, &picks) };
        let devices = sims(3);
        let plan = plan(&checkpoint, &devices, Format::Stored, &[cut]);
        let model = load(&checkpoint, &plan, &devices, &options()).unwrap();
        let all = whole(&checkpoint, Format::Stored);
        let all = all.tensor("weight").unwrap();
        let values = all.to_float(FloatType::F32).unwrap();
        let codes = all.part(PartKind::Codes).unwrap();
        let mut elements = 0;
        for tensor in model.tensors() {
            let piece = tensor.piece().unwrap();
            let cut = (dimension, &piece.ranges[..]);
            let want = select(&values, 4, &shape, cut);
            prop_assert!(tensor.to_float(FloatType::F32).unwrap() == want, "{}", tensor.name());
            // Half a byte an element: in a matrix of as many columns.
            let half = |range: &Range<u64>| match dimension {
                0 => range.clone(),
                _ => range.start / 2..range.end / 2,
            };
            let ranges: Vec<Range<u64>> = cut.1.iter().map(half).collect();
            let want = select(codes, 1, &[rows, 32 * blocks], (dimension, &ranges));
            prop_assert_eq!(tensor.part(PartKind::Codes).unwrap(), &want[..]);
            elements += tensor.shape().iter().product::<u64>();
            // The stored bytes, where these can be cut.
            let quantization = tensor.quantization().unwrap();
            let is_kept = is_double && quantization.absmax_mean.is_some();
            prop_assert!(is_double || quantization.absmax_mean.is_none());
            if is_kept {
                prop_assert_eq!(quantization.absmax_mean, all.quantization().unwrap().absmax_mean);
            }
        }
        prop_assert_eq!(elements, rows * 64 * blocks);
        // Nothing is read that is not needed, but for what is between short runs.
        prop_assert!(model.stats().bytes_read <= 4 * checkpoint.source_bytes());
    }
}

#[test]
fn a_rank_loads_its_share_and_finds_it_by_the_names_of_tensors() {
    let directory = TempDir::new().unwrap();
    let sources = [
        source("rows", DType::Bf16, &[64, 128]),
        source("columns", DType::Bf16, &[32, 256]),
        source("copied", DType::F32, &[40]),
        source("alone", DType::Bf16, &[8, 64]),
    ];
    write_checkpoint(directory.path(), &sources);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let devices = sims(4);
    let index = |name: &str| checkpoint.find(name).unwrap() as u32;
    let mut slices = Vec::new();
    for device in 0..4u64 {
        let mut slice = |name, dimension, range, format| {
            slices.push(Slice {
                tensor: index(name),
                dimension,
                ranges: vec![range],
                placement: Placement {
                    device: Some(device as u32),
                    format,
                },
            });
        };
        slice("rows", 0, 16 * device..16 * (device + 1), Format::NF4);
        slice("columns", 1, 64 * device..64 * (device + 1), Format::NF4);
        slice("copied", 0, 0..40, Format::Stored);
    }
    let mut placements = vec![
        Placement {
            device: None,
            format: Format::Stored,
        };
        4
    ];
    placements[index("alone") as usize] = Placement {
        device: Some(2),
        format: Format::NF4,
    };
    let proposal = Proposal {
        placements,
        headroom: vec![0; 4],
        slices,
    };
    let infos: Vec<_> = devices.iter().map(|device| device.info()).collect();
    let plan = Plan::of(&checkpoint, &infos, &proposal).unwrap();
    let all = load(&checkpoint, &plan, &devices, &options()).unwrap();
    assert!(all.tensor("rows").is_none(), "there are four");
    assert!(all.tensor("rows[16:32]").is_some());
    assert!(all.tensor("columns[:, 64:128]").is_some());
    assert!(all.tensor("copied@3").is_some());
    assert_eq!(all.tensor("alone").unwrap().device(), 2);
    let mut read = 0;
    for rank in 0..4 {
        let mut keep = [false; 4];
        keep[rank] = true;
        let share = plan.share(&keep);
        assert_eq!(share.devices, [plan.devices[rank].clone()]);
        let devices = vec![sims(4).swap_remove(rank)];
        let model = load(&checkpoint, &share, &devices, &options()).unwrap();
        assert_eq!(
            devices[0].usage().reserved.peak,
            plan.devices[rank].size.reserved
        );
        assert_eq!(model.tensors().count(), 3 + usize::from(rank == 2));
        for tensor in model.tensors() {
            assert_eq!(parts(&tensor), parts(&all.tensor(tensor.name()).unwrap()));
        }
        for name in ["rows", "columns", "copied"] {
            assert_eq!(model.tensor(name).unwrap().piece().unwrap().of, name);
        }
        assert_eq!(model.tensor("rows").unwrap().shape(), [16, 128]);
        assert_eq!(model.tensor("columns").unwrap().shape(), [32, 64]);
        read += model.stats().bytes_read;
    }
    // Each part once, the copies four times, and what is between short runs of columns: all of it.
    let bytes = |name| {
        sources
            .iter()
            .find(|source| source.name == name)
            .unwrap()
            .bytes
            .len() as u64
    };
    let once: u64 = ["rows", "alone"].map(bytes).iter().sum();
    let most = once + 4 * bytes("columns") + 4 * bytes("copied");
    assert!(
        (once + bytes("columns") + 4 * bytes("copied")..=most).contains(&read),
        "{read}"
    );
}

#[test]
fn slices_that_there_cannot_be_are_refused() {
    use crate::checkpoint::SliceError;
    let directory = TempDir::new().unwrap();
    let sources = [
        source("a", DType::Bf16, &[4, 64]),
        source("a[0:2]", DType::Bf16, &[4, 64]),
        source("scalar", DType::F32, &[]),
    ];
    write_checkpoint(directory.path(), &sources);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let slice = |tensor, dimension, ranges: &[Range<u64>]| Slice {
        tensor,
        dimension,
        ranges: ranges.to_vec(),
        placement: Placement {
            device: Some(0),
            format: Format::Stored,
        },
    };
    let (a, scalar) = (
        checkpoint.find("a").unwrap() as u32,
        checkpoint.find("scalar").unwrap() as u32,
    );
    let refused = |slices: &[Slice]| checkpoint.cut(slices).unwrap_err();
    assert!(matches!(
        refused(&[slice(9, 0, &[0..1])]),
        SliceError::NoSuchTensor {
            tensor: 9,
            tensors: 3
        }
    ));
    assert!(matches!(
        refused(&[slice(a, 2, &[0..1])]),
        SliceError::NoSuchDimension { .. }
    ));
    assert!(matches!(
        refused(&[slice(scalar, 0, &[0..1])]),
        SliceError::NoSuchDimension { .. }
    ));
    assert!(matches!(
        refused(&[slice(a, 0, &[])]),
        SliceError::RangeCount { have: 0, .. }
    ));
    #[expect(clippy::reversed_empty_ranges, reason = "it is what is refused")]
    for bad in [
        &[0..5][..],
        &[1..1],
        &[2..1],
        &[0..2, 1..3],
        &[2..3, 0..1],
        &[0..u64::MAX],
    ] {
        let error = refused(&[slice(a, 0, bad)]);
        assert!(
            matches!(error, SliceError::BadRange { length: 4, .. }),
            "{error}"
        );
    }
    let taken = refused(&[slice(a, 0, &[0..2])]);
    assert!(matches!(taken, SliceError::NameTaken { .. }), "{taken}");
    let twice = [slice(a, 0, &[1..2]), slice(a, 0, &[1..2])];
    assert!(matches!(refused(&twice), SliceError::Twice { .. }));
    let cut = checkpoint.cut(&[slice(a, 0, &[1..2, 2..3])]).unwrap();
    assert_eq!(cut.tensors().len(), 3);
    assert!(cut.find("a[1:3]").is_some());
    // Placed as a whole, too.
    let placement = Placement {
        device: Some(0),
        format: Format::Stored,
    };
    let proposal = Proposal {
        placements: vec![placement; 3],
        headroom: vec![0],
        slices: vec![slice(a, 0, &[1..2])],
    };
    let error = Plan::of(&checkpoint, &[sims(1)[0].info()], &proposal).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("'a' is placed as a whole and in slices"),
        "{error}"
    );
    // Not within blocks of what is quantized already.
    let saved = directory.path().join("saved");
    let formats = [a, scalar, checkpoint.find("a[0:2]").unwrap() as u32].map(|index| index == a);
    let placements: Vec<Placement> = (0..3)
        .map(|index| Placement {
            device: Some(0),
            format: if index == a as usize {
                nf4(128, false)
            } else {
                Format::Stored
            },
        })
        .collect();
    assert!(formats[0]);
    save(&checkpoint, &placements, &saved, &SaveOptions::default()).unwrap();
    let saved = Checkpoint::open(&saved).unwrap();
    let a = saved.find("a").unwrap() as u32;
    for (dimension, range) in [(0, 1..2), (1, 0..32)] {
        let error = saved.cut(&[slice(a, dimension, &[range])]).unwrap_err();
        assert!(
            matches!(
                error,
                SliceError::WithinBlock {
                    block_size: 128,
                    ..
                }
            ),
            "{error}"
        );
    }
    assert!(saved.cut(&[slice(a, 0, &[2..4])]).is_ok());
}

/// What is read for the columns of a matrix: with what is between them where that is a page or less.
#[test]
fn gaps_of_a_page_are_read_and_longer_ones_are_not() {
    for (columns, runs, gaps) in [
        (128, 0..64, 64),
        (512, 0..256, 256),
        (4096, 1024..2048, 3072),
        (4096, 2048..4096, 2048),
        (4608, 0..2304, 2304),
    ] {
        let rows = 8;
        let directory = TempDir::new().unwrap();
        let whole = source("m", DType::Bf16, &[rows, columns]);
        write_checkpoint(directory.path(), std::slice::from_ref(&whole));
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let slice = Slice {
            tensor: 0,
            dimension: 1,
            ranges: vec![runs.clone()],
            placement: Placement {
                device: Some(0),
                format: Format::Stored,
            },
        };
        let cut = checkpoint.cut(&[slice]).unwrap();
        let part = cut
            .tensors()
            .iter()
            .find(|tensor| tensor.is_indirect())
            .unwrap();
        let need = select(
            &whole.bytes,
            2,
            &whole.shape,
            (1, std::slice::from_ref(&runs)),
        );
        let mut have = vec![0; need.len()];
        let mut scratch = vec![0; 256 << 10];
        let beside = cut.read_elements(part, 0, &mut have, &mut scratch, Kernels::detect());
        assert!(have == need, "{columns}, {runs:?}");
        // Not what is after the last of them.
        let between = 2 * gaps * (rows - 1);
        let need = if 2 * gaps <= 4096 { between } else { 0 };
        assert_eq!(beside.unwrap(), need, "{columns}, {runs:?}");
    }
}
