//! What a consumer written against DLPack's header sees.
#![allow(unsafe_code)]

use std::mem::offset_of;

use safetensors::Dtype;

use super::*;
use crate::model::tests::{Loaded, loaded};

#[test]
fn structures_are_laid_out_as_in_dlpacks_header() {
    assert_eq!(offset_of!(DLTensor, data), 0);
    assert_eq!(offset_of!(DLTensor, device), 8);
    assert_eq!(offset_of!(DLTensor, ndim), 16);
    assert_eq!(offset_of!(DLTensor, dtype), 20);
    assert_eq!(offset_of!(DLTensor, shape), 24);
    assert_eq!(offset_of!(DLTensor, strides), 32);
    assert_eq!(offset_of!(DLTensor, byte_offset), 40);
    assert_eq!(size_of::<DLTensor>(), 48);
    assert_eq!(offset_of!(DLDataType, bits), 1);
    assert_eq!(offset_of!(DLDataType, lanes), 2);
    assert_eq!(size_of::<DLDataType>(), 4);
    assert_eq!(offset_of!(DLManagedTensor, manager_ctx), 48);
    assert_eq!(offset_of!(DLManagedTensor, deleter), 56);
    assert_eq!(size_of::<DLManagedTensor>(), 64);
    assert_eq!(offset_of!(DLManagedTensorVersioned, manager_ctx), 8);
    assert_eq!(offset_of!(DLManagedTensorVersioned, deleter), 16);
    assert_eq!(offset_of!(DLManagedTensorVersioned, flags), 24);
    assert_eq!(offset_of!(DLManagedTensorVersioned, dl_tensor), 32);
    assert_eq!(size_of::<DLManagedTensorVersioned>(), 80);
}

/// What a consumer reads of a tensor.
#[derive(Debug, PartialEq)]
struct Seen {
    device: (i32, i32),
    dtype: (u8, u8, u16),
    shape: Vec<i64>,
    strides: Vec<i64>,
    bytes: Vec<u8>,
}

/// Reads a tensor in host memory.
///
/// # Safety
/// It is well-formed and has not been freed.
unsafe fn see(tensor: &DLTensor) -> Seen {
    let ndim = tensor.ndim as usize;
    // SAFETY: `ndim` numbers each, as the interface says.
    let (shape, strides) = unsafe {
        (
            std::slice::from_raw_parts(tensor.shape, ndim).to_vec(),
            std::slice::from_raw_parts(tensor.strides, ndim).to_vec(),
        )
    };
    let bits = i64::from(tensor.dtype.bits) * i64::from(tensor.dtype.lanes);
    let length = (shape.iter().product::<i64>() * bits / 8) as usize;
    assert_eq!(tensor.data.is_null(), length == 0);
    assert_eq!(tensor.byte_offset, 0);
    let bytes = match length {
        0 => Vec::new(),
        // SAFETY: as many bytes as type and shape say.
        _ => unsafe { std::slice::from_raw_parts(tensor.data.cast::<u8>(), length).to_vec() },
    };
    Seen {
        device: (tensor.device.device_type, tensor.device.device_id),
        dtype: (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes),
        shape,
        strides,
        bytes,
    }
}

/// Hands a tensor over in both forms to a thread that reads it and frees it.
fn consume(one: Exported, other: Exported) -> Seen {
    // As C has them: numbers.
    let versioned = one.into_versioned().expose_provenance();
    let unversioned = other.into_unversioned().expose_provenance();
    std::thread::spawn(move || {
        let versioned: *mut DLManagedTensorVersioned =
            std::ptr::with_exposed_provenance_mut(versioned);
        let unversioned: *mut DLManagedTensor = std::ptr::with_exposed_provenance_mut(unversioned);
        // SAFETY: given away above and not yet freed.
        let (new, old) = unsafe { (&*versioned, &*unversioned) };
        assert_eq!(new.version, DLPackVersion { major: 1, minor: 1 });
        // SAFETY: they are well-formed.
        let (seen, same) = unsafe { (see(&new.dl_tensor), see(&old.dl_tensor)) };
        assert_eq!(seen, same);
        let (delete_new, delete_old) = (new.deleter.unwrap(), old.deleter.unwrap());
        // SAFETY: each of its own, once.
        unsafe {
            delete_new(versioned);
            delete_old(unversioned);
        }
        seen
    })
    .join()
    .unwrap()
}

#[test]
fn every_type_is_exported_with_its_code_and_stays_when_the_model_is_gone() {
    let kinds = [
        ("bool", Dtype::BOOL, (6, 8, 1)),
        ("u8", Dtype::U8, (1, 8, 1)),
        ("i8", Dtype::I8, (0, 8, 1)),
        ("u16", Dtype::U16, (1, 16, 1)),
        ("i16", Dtype::I16, (0, 16, 1)),
        ("u32", Dtype::U32, (1, 32, 1)),
        ("i32", Dtype::I32, (0, 32, 1)),
        ("u64", Dtype::U64, (1, 64, 1)),
        ("i64", Dtype::I64, (0, 64, 1)),
        ("e4m3", Dtype::F8_E4M3, (10, 8, 1)),
        ("e4m3fnuz", Dtype::F8_E4M3FNUZ, (11, 8, 1)),
        ("e5m2", Dtype::F8_E5M2, (12, 8, 1)),
        ("e5m2fnuz", Dtype::F8_E5M2FNUZ, (13, 8, 1)),
        ("e8m0", Dtype::F8_E8M0, (14, 8, 1)),
        ("f16", Dtype::F16, (2, 16, 1)),
        ("bf16", Dtype::BF16, (4, 16, 1)),
        ("f32", Dtype::F32, (2, 32, 1)),
        ("f64", Dtype::F64, (2, 64, 1)),
        ("c64", Dtype::C64, (5, 64, 1)),
    ];
    let shape: &[usize] = &[3, 1, 5];
    let tensors: Vec<_> = kinds
        .iter()
        .map(|&(name, dtype, _)| (name, dtype, shape, Format::Stored))
        .collect();
    let Loaded { devices, model } = loaded(&tensors, 0);
    let exported: Vec<_> = kinds
        .iter()
        .map(|&(name, _, dtype)| {
            let tensor = model.tensor(name).unwrap();
            let export = || tensor.to_dlpack(PartKind::Data).unwrap();
            let bytes = tensor.part(PartKind::Data).unwrap().to_vec();
            (export(), export(), dtype, bytes)
        })
        .collect();
    let reserved = devices[0].usage().reserved.now;
    drop(model);
    for (one, other, dtype, bytes) in exported {
        assert_eq!(devices[0].usage().reserved.now, reserved);
        let expected = Seen {
            device: (1, 0),
            dtype,
            shape: vec![3, 1, 5],
            strides: vec![5, 5, 1],
            bytes,
        };
        assert_eq!(consume(one, other), expected);
    }
    assert_eq!(devices[0].usage().reserved.now, 0);
}

#[test]
fn a_4_bit_weight_is_exported_part_by_part() {
    let Loaded { devices, model } = loaded(
        &[
            ("double", Dtype::BF16, &[257, 192], Format::NF4_DOUBLE),
            ("single", Dtype::F32, &[65], Format::NF4),
            ("cast", Dtype::F32, &[], Format::Cast(DType::Bf16)),
            ("empty", Dtype::BF16, &[0, 7], Format::Stored),
        ],
        0,
    );
    let u8_type = (1, 8, 1);
    let f32_type = (2, 32, 1);
    for (name, kind, dtype, shape, strides) in [
        (
            "double",
            PartKind::Codes,
            u8_type,
            vec![257 * 96, 1],
            vec![1, 1],
        ),
        ("double", PartKind::Absmax, u8_type, vec![771], vec![1]),
        ("double", PartKind::NestedAbsmax, f32_type, vec![4], vec![1]),
        ("single", PartKind::Codes, u8_type, vec![33, 1], vec![1, 1]),
        ("single", PartKind::Absmax, f32_type, vec![2], vec![1]),
        ("cast", PartKind::Data, (4, 16, 1), vec![], vec![]),
        ("empty", PartKind::Data, (4, 16, 1), vec![0, 7], vec![7, 1]),
    ] {
        let tensor = model.tensor(name).unwrap();
        let export = || tensor.to_dlpack(kind).unwrap();
        let expected = Seen {
            device: (1, 0),
            dtype,
            shape,
            strides,
            bytes: tensor.part(kind).unwrap().to_vec(),
        };
        assert_eq!(consume(export(), export()), expected, "{name} {kind:?}");
    }
    let missing = model
        .tensor("single")
        .unwrap()
        .to_dlpack(PartKind::NestedAbsmax);
    assert!(
        matches!(missing, Err(DlpackError::NoSuchPart { ref tensor, .. }) if tensor == "single")
    );
    drop(model);
    assert_eq!(devices[0].usage().reserved.now, 0);
}

#[test]
fn weights_are_read_only_and_memory_from_the_tail_is_not() {
    let Loaded { devices, model } = loaded(&[("w", Dtype::BF16, &[64], Format::Stored)], 4096);
    let weight = model
        .tensor("w")
        .unwrap()
        .to_dlpack(PartKind::Data)
        .unwrap();
    let allocate = || model.tail(0).unwrap().allocate(1000).unwrap();
    let cache = allocate().into_dlpack(DType::Bf16, &[2, 250]).unwrap();
    for (exported, flags) in [(weight, DLPACK_FLAG_BITMASK_READ_ONLY), (cache, 0)] {
        let tensor = exported.into_versioned();
        // SAFETY: given away just now.
        unsafe {
            assert_eq!((*tensor).flags, flags);
            if flags == 0 {
                // A consumer fills its cache.
                (*tensor).dl_tensor.data.cast::<u8>().write_bytes(9, 1000);
            }
            (*tensor).deleter.unwrap()(tensor);
        }
    }
    let small = allocate().into_dlpack(DType::Bf16, &[501]).unwrap_err();
    assert!(
        matches!(&small, DlpackError::TooSmall { what, have: 1000, .. } if what.contains("sim:0")),
        "{small}"
    );
    // Freed by the deleter, and by the failure.
    assert_eq!(model.tail(0).unwrap().used().now, 0);
    drop(model);
    assert_eq!(devices[0].usage().reserved.now, 0);
}

#[test]
fn what_dlpack_cannot_say_is_an_error() {
    let Loaded { model, .. } = loaded(
        &[
            ("f4", Dtype::F4, &[2], Format::Stored),
            ("wide", Dtype::U8, &[0, 1 << 63], Format::Stored),
        ],
        0,
    );
    let export = |name| {
        model
            .tensor(name)
            .unwrap()
            .to_dlpack(PartKind::Data)
            .unwrap_err()
    };
    assert!(matches!(
        export("f4"),
        DlpackError::NoType {
            dtype: DType::F4,
            ..
        }
    ));
    assert!(
        matches!(export("wide"), DlpackError::Dimension { dimension, .. } if dimension == 1 << 63)
    );
}
