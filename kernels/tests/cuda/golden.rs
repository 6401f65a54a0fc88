//! Every golden case, on a device.

use tightfit_kernels::{FloatType, QuantType};

use crate::calls::{self, Misaligned};
use crate::cases::count_cases;
use crate::device::Device;
use crate::values::{assert_elements, assert_floats, floats};

pub(crate) fn quantizing(device: &mut dyn Device) {
    let cases = count_cases(|case| {
        if case.quant_type != QuantType::Nf4 {
            return false;
        }
        let input = case.bytes("input").expect("input");
        let misaligned = Misaligned::default();
        let have = calls::quantize(device, input, case.float, case.block_size, misaligned);
        assert!(have.packed == case.truth("packed"), "{}", case.name);
        assert_floats(&floats(&have.absmax), &case.absmax(), case.name);
        true
    });
    assert_eq!(cases, 83);
}

pub(crate) fn double_quantizing(device: &mut dyn Device) {
    let cases = count_cases(|case| {
        let Some(absmax) = case.floats("absmax_before_double_quant") else {
            return false;
        };
        let offset = case.floats("nested_offset").expect("nested_offset")[0];
        let mean = calls::absmax_mean(device, &absmax);
        let ulps = mean.to_bits().abs_diff(offset.to_bits());
        assert!(ulps <= 2, "{}: mean {mean}, offset {offset}", case.name);

        let (codes, nested) = calls::quantize_absmax(device, &absmax, offset);
        assert!(codes == case.truth("absmax"), "{}", case.name);
        assert_floats(&nested, &floats(case.truth("nested_absmax")), case.name);
        let out = calls::dequantize_absmax(device, &codes, &nested, offset);
        let need = floats(case.truth("absmax_dequantized"));
        assert_floats(&out, &need, case.name);
        true
    });
    assert_eq!(cases, 9);
}

pub(crate) fn dequantizing_all(device: &mut dyn Device) {
    let mut tensors = 0;
    let cases = count_cases(|case| {
        for (prefix, packed, absmax) in case.to_dequantize() {
            for float in FloatType::ALL {
                let Some(truth) = case.bytes(&format!("{prefix}dequant_{float}")) else {
                    continue;
                };
                let out = calls::dequantize(
                    device,
                    case.quant_type,
                    packed,
                    &absmax,
                    case.block_size,
                    case.elements,
                    float,
                    Misaligned::default(),
                );
                assert_elements(&out, truth, float, case.name);
                tensors += 1;
            }
        }
        true
    });
    assert_eq!(cases, 88);
    assert!(tensors > 88, "{tensors} tensors");
}
