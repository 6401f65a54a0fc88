//! The text that says how a 4-bit weight is to be read, as bitsandbytes writes it: Python's
//! `json.dumps` of `QuantState.as_dict`, spaces and order of keys included.

use crate::model::Quantization;
use crate::types::DType;

/// The longest offset that is written, such as `-1.1754943508222875e-38`.
const LONGEST_OFFSET: usize = 24;

/// The text for a weight that had this type and shape.
pub(super) fn text(dtype: DType, shape: &[u64], quantization: &Quantization) -> String {
    let offset = quantization
        .absmax_mean
        .map(|offset| python_repr(f64::from(offset)));
    with_offset(dtype, shape, quantization, offset.as_deref())
}

/// A length that the text will not exceed, whatever the offset will be.
pub(super) fn longest(dtype: DType, shape: &[u64], quantization: &Quantization) -> usize {
    let offset = quantization.absmax_mean.map(|_| "");
    with_offset(dtype, shape, quantization, offset).len() + LONGEST_OFFSET
}

fn with_offset(
    dtype: DType,
    shape: &[u64],
    quantization: &Quantization,
    offset: Option<&str>,
) -> String {
    let dtype = match dtype {
        DType::F16 => "float16",
        DType::F32 => "float32",
        // Nothing else is quantized.
        _ => "bfloat16",
    };
    let shape: Vec<String> = shape.iter().map(u64::to_string).collect();
    let mut text = format!(
        r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{dtype}", "shape": [{}]"#,
        quantization.quant_type.name(),
        quantization.block_size,
        shape.join(", "),
    );
    if let Some(offset) = offset {
        text += &format!(
            r#", "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset}"#
        );
    }
    text + "}"
}

/// A number as Python prints it: the shortest digits that give it back, in exponent form below
/// 1e-4 and from 1e16 on.
fn python_repr(value: f64) -> String {
    let shortest = format!("{value:e}");
    let Some((digits, _)) = shortest.split_once('e') else {
        // Python's json writes these words; bitsandbytes never has such an offset for finite weights.
        return match value {
            v if v.is_nan() => "NaN".to_owned(),
            v if v > 0.0 => "Infinity".to_owned(),
            _ => "-Infinity".to_owned(),
        };
    };
    // Where two are shortest and equally near, Python takes the even one and Rust the larger one.
    // Asked for as many digits, Rust takes the even one too.
    let count = digits.bytes().filter(u8::is_ascii_digit).count();
    let even = format!("{value:.*e}", count - 1);
    let scientific = match even.parse::<f64>() {
        Ok(back) if back == value => even,
        _ => shortest,
    };
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let (sign, digits) = match digits.strip_prefix('-') {
        Some(digits) => ("-", digits.replace('.', "")),
        None => ("", digits.replace('.', "")),
    };
    let Ok(before) = usize::try_from(exponent + 1) else {
        let zeros = "0".repeat(exponent.unsigned_abs() as usize - 1);
        return format!("{sign}0.{zeros}{digits}");
    };
    if before == 0 {
        return format!("{sign}0.{digits}");
    }
    let digits = format!("{digits:0<before$}");
    let (whole, fraction) = digits.split_at(before);
    let fraction = if fraction.is_empty() { "0" } else { fraction };
    format!("{sign}{whole}.{fraction}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{BlockSize, QuantType};

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, expected) in [
            (f64::from(0.051_832_2_f32), "0.05183219909667969"),
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (f64::from(1.5e-7_f32), "1.500000053056283e-07"),
            (f64::from(f32::MAX), "3.4028234663852886e+38"),
            (f64::from(f32::MIN_POSITIVE), "1.1754943508222875e-38"),
            (1e15, "1000000000000000.0"),
            (-2.5e16, "-2.5e+16"),
            (-0.0, "-0.0"),
            (-12.75, "-12.75"),
            (-0.5, "-0.5"),
            (0.001_953_125, "0.001953125"),
            // Its digits end in ..125: with one less, two numbers are equally near.
            (f64::from(0.104_724_884_f32), "0.10472488403320312"),
        ] {
            assert_eq!(python_repr(value), expected);
        }
    }

    #[test]
    fn the_text_is_what_bitsandbytes_writes() {
        let mut quantization = Quantization {
            quant_type: QuantType::Nf4,
            block_size: BlockSize::DEFAULT,
            absmax_mean: None,
        };
        assert_eq!(
            text(DType::Bf16, &[128, 256], &quantization),
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 256]}"#
        );
        quantization.absmax_mean = Some(0.051_832_2);
        assert_eq!(
            text(DType::F16, &[3], &quantization),
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [3], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05183219909667969}"#
        );
        for offset in [
            f32::MIN,
            f32::MAX,
            1.0e-45,
            -f32::MIN_POSITIVE,
            f32::NEG_INFINITY,
            f32::NAN,
        ] {
            quantization.absmax_mean = Some(offset);
            let length = text(DType::F32, &[1, 2], &quantization).len();
            assert!(
                length <= longest(DType::F32, &[1, 2], &quantization),
                "{offset}"
            );
        }
    }
}
