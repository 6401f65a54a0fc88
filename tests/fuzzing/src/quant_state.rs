//! The JSON text beside a weight that bitsandbytes has quantized.

use safetensors::{Dtype, tensor::TensorView};
use tightfit::checkpoint::Checkpoint;
use tightfit::device::{Device, HostDevice};
use tightfit::load::{LoadOptions, load};
use tightfit::plan::Plan;
use tightfit::types::{Format, Placement, elements};
use tightfit_kernels::{DYNAMIC_MAP, FP4, FloatType, NF4};

use crate::checkpoint::{assert_printable, assert_sound};
use crate::file;

/// Opens a weight with this quant state, and loads and dequantizes what is accepted. The first
/// three bytes say what lies beside it: whether the scales are nested (bit 0) and the table is FP4's
/// (bit 1), how many bytes of codes there are, and how many scales. The rest is the JSON text.
pub fn quant_state(data: &[u8]) -> bool {
    let Some((&[kinds, codes, scales], text)) = data.split_first_chunk::<3>() else {
        return false;
    };
    let path = file(
        "quantized.safetensors",
        &weight(
            kinds & 1 != 0,
            kinds & 2 != 0,
            codes.into(),
            scales.into(),
            text,
        ),
    );
    let checkpoint = match Checkpoint::open(&path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            assert_printable(&error.to_string());
            return false;
        }
    };
    assert_sound(&checkpoint);
    load_and_dequantize(&checkpoint);
    true
}

/// A checkpoint of one weight, `w`, complete but for what the text says of it.
fn weight(nested: bool, fp4: bool, codes: usize, scales: usize, text: &[u8]) -> Vec<u8> {
    let bytes = |values: &[f32]| -> Vec<u8> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        bytes.collect()
    };
    let codes: Vec<u8> = (0..codes).map(|index| index as u8).collect();
    let table = bytes(if fp4 { &FP4 } else { &NF4 });
    let absmax = match nested {
        true => vec![128; scales],
        false => bytes(&vec![0.5; scales]),
    };
    let nested_absmax = bytes(&vec![0.25; scales.div_ceil(256)]);
    let nested_table = bytes(&DYNAMIC_MAP);
    let state = match fp4 {
        true => "w.quant_state.bitsandbytes__fp4",
        false => "w.quant_state.bitsandbytes__nf4",
    };
    let scale_type = match nested {
        true => Dtype::U8,
        false => Dtype::F32,
    };
    let mut tensors = vec![
        ("w", Dtype::U8, &codes),
        ("w.absmax", scale_type, &absmax),
        ("w.quant_map", Dtype::F32, &table),
    ];
    if nested {
        tensors.push(("w.nested_absmax", Dtype::F32, &nested_absmax));
        tensors.push(("w.nested_quant_map", Dtype::F32, &nested_table));
    }
    let text = text.to_vec();
    tensors.push((state, Dtype::U8, &text));
    let views = tensors.into_iter().map(|(name, dtype, bytes)| {
        let shape = vec![bytes.len() * 8 / dtype.bitsize()];
        let view = TensorView::new(dtype, shape, bytes);
        (name, view.expect("as long as its shape says"))
    });
    safetensors::serialize(views, None).expect("it is well-formed")
}

/// What a checkpoint was accepted with is enough to use it.
fn load_and_dequantize(checkpoint: &Checkpoint) {
    let devices: Vec<Box<dyn Device>> = vec![Box::new(HostDevice::sim(0, 1 << 24))];
    let placement = Placement {
        device: Some(0),
        format: Format::Stored,
    };
    let placements = vec![placement; checkpoint.tensors().len()];
    let info = [devices[0].info()];
    let plan = Plan::new(checkpoint.tensors(), &[], &info, &placements, &[0]);
    let plan = plan.unwrap_or_else(|error| panic!("{error}"));
    let options = LoadOptions::default().with_threads(1);
    let model = load(checkpoint, &plan, &devices, &options);
    let model = model.unwrap_or_else(|error| panic!("{error}"));
    for tensor in model.tensors() {
        if tensor.quantization().is_some() {
            let values = tensor.to_float(FloatType::F32);
            let values = values.unwrap_or_else(|error| panic!("{error}"));
            let elements = elements(tensor.shape()).expect("it was loaded");
            assert_eq!(values.len() as u64, 4 * elements);
        }
    }
}
