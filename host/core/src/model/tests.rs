//! What outlives a model, and what is handed out beside it.

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::*;
use crate::device::{Device, HostDevice};
use crate::load::{LoadOptions, load};
use crate::plan::PlanOptions;
use crate::types::Placement;

/// A model of a few tensors on one device.
pub(crate) struct Loaded {
    pub(crate) devices: Vec<Box<dyn Device>>,
    pub(crate) model: Model,
}

impl Loaded {
    /// Bytes that are taken from the device now.
    pub(crate) fn reserved(&self) -> u64 {
        self.devices[0].usage().reserved.now
    }
}

/// Loads tensors of this type, shape and format, with `tail` bytes behind them.
pub(crate) fn loaded(tensors: &[(&str, Dtype, &[usize], Format)], tail: u64) -> Loaded {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, dtype, shape, _)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            // Without the bits that would make a number huge or none.
            (0..bytes).map(|index| (index % 61) as u8).collect()
        })
        .collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, dtype, shape, _), data)| {
            (
                *name,
                TensorView::new(*dtype, shape.to_vec(), data).unwrap(),
            )
        });
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let placements: Vec<Placement> = checkpoint
        .tensors()
        .iter()
        .map(|tensor| Placement {
            device: Some(0),
            format: tensors
                .iter()
                .find(|(name, ..)| *name == tensor.name)
                .map(|&(.., format)| format)
                .unwrap(),
        })
        .collect();
    let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::sim(0, 1 << 26))];
    let infos = [devices[0].info()];
    let with_tail = PlanOptions::default().with_reserved_headroom(true);
    let plan = Plan::new_with(
        checkpoint.tensors(),
        &[],
        &infos,
        &placements,
        &[tail],
        &with_tail,
    )
    .unwrap();
    let model = load(&checkpoint, &plan, &devices, &LoadOptions::default()).unwrap();
    Loaded { devices, model }
}

#[test]
fn parts_outlive_the_model() {
    let loaded = loaded(
        &[
            ("plain", Dtype::BF16, &[30, 7], Format::Stored),
            ("double", Dtype::BF16, &[257, 64], Format::NF4_DOUBLE),
            ("empty", Dtype::BF16, &[0, 7], Format::Stored),
        ],
        0,
    );
    let mut parts = Vec::new();
    for tensor in loaded.model.tensors() {
        for part in tensor.parts() {
            let bytes = tensor.part(part.kind).unwrap().to_vec();
            let shared = tensor.shared_part(part.kind).unwrap();
            assert_eq!((shared.bytes(), shared.address()), (part.bytes, None));
            parts.push((shared, bytes));
        }
        assert!(
            tensor.shared_part(PartKind::NestedAbsmax).is_some() == (tensor.name() == "double")
        );
    }
    assert_eq!(parts.len(), 5);
    let reserved = loaded.reserved();
    let Loaded { devices, model } = loaded;
    drop(model);
    let last = parts.pop().unwrap();
    for (shared, bytes) in &parts {
        let mut copy = vec![0; bytes.len()];
        shared.read(&mut copy).unwrap();
        assert_eq!(shared.host(), Some(&bytes[..]));
        assert_eq!(&copy, bytes);
    }
    drop(parts);
    assert_eq!(devices[0].usage().reserved.now, reserved);
    drop(last);
    assert_eq!(devices[0].usage().reserved.now, 0);
}

#[test]
fn a_part_alone_on_its_device_may_have_no_bytes() {
    let loaded = loaded(&[("empty", Dtype::BF16, &[0, 7], Format::Stored)], 4096);
    assert_eq!(loaded.reserved(), 0);
    let part = loaded.model.tensor("empty").unwrap();
    assert_eq!(
        part.shared_part(PartKind::Data).unwrap().host(),
        Some(&[][..])
    );
    // What a policy leaves free on a device without weights is not taken from it.
    assert!(loaded.model.tail(0).is_none());
}

#[test]
fn the_tail_is_reserved_with_the_weights_and_handed_out_to_the_last_byte() {
    let tail = 5 * 4096 + 1;
    let loaded = loaded(&[("plain", Dtype::BF16, &[300, 70], Format::Stored)], tail);
    let plan = loaded.model.plan().devices[0].clone();
    assert_eq!((plan.tail, plan.headroom), (tail + 255, 0));
    assert_eq!(plan.size.padded, 42_240);
    assert_eq!(
        plan.size.reserved,
        (42_240 + tail + 255).next_multiple_of(4096)
    );
    // One reservation, and never more.
    let usage = loaded.devices[0].usage();
    assert_eq!(usage.reserved.now, plan.size.reserved);

    let weights = loaded.model.tensor("plain").unwrap().part(PartKind::Data);
    let weights = weights.unwrap().to_vec();
    let allocator = loaded.model.tail(0).unwrap().clone();
    assert!(loaded.model.tail(1).is_none());
    assert_eq!(allocator.capacity(), plan.tail);
    let mut first = allocator.allocate(tail - 4096).unwrap();
    let mut second = allocator.allocate(4096).unwrap();
    assert_eq!(allocator.largest_free(), 0);
    let error = allocator.allocate(1).unwrap_err();
    assert!(
        matches!(&error, DeviceError::OutOfMemory { device, need: 1, have: 0 } if device == "sim:0"),
        "{error}"
    );
    assert_eq!(allocator.allocate(0).unwrap().host(), Some(&[][..]));
    first.host_mut().unwrap().fill(1);
    second.host_mut().unwrap().fill(2);
    assert_eq!(first.host().unwrap(), vec![1; tail as usize - 4096]);
    assert_eq!((first.bytes(), first.address()), (tail - 4096, None));
    let after = loaded.model.tensor("plain").unwrap().part(PartKind::Data);
    assert_eq!(after.unwrap(), weights);

    drop(second);
    let again = allocator.allocate(4096).unwrap();
    assert_eq!(
        again.host().unwrap(),
        [0; 4096],
        "what others wrote is gone"
    );
    drop((first, again));
    assert_eq!(allocator.largest_free(), plan.tail);
    assert_eq!(
        (allocator.used().now, allocator.used().peak),
        (0, plan.tail)
    );
    assert_eq!(loaded.devices[0].usage(), usage);
}

#[test]
fn an_allocation_outlives_the_model() {
    let loaded = loaded(&[("plain", Dtype::BF16, &[64], Format::Stored)], 4096);
    let reserved = loaded.reserved();
    let mut piece = loaded.model.tail(0).unwrap().allocate(100).unwrap();
    let Loaded { devices, model } = loaded;
    drop(model);
    assert_eq!(devices[0].usage().reserved.now, reserved);
    std::thread::spawn(move || {
        piece.host_mut().unwrap()[99] = 7;
        drop(piece);
    })
    .join()
    .unwrap();
    assert_eq!(devices[0].usage().reserved.now, 0);
}
