//! Double quantization: the portable code, compiled in this module. Its tables are too large for
//! instructions that look up in registers, and there is none that gathers.

use crate::double;

#[target_feature(enable = "neon")]
#[inline]
pub(crate) fn absmax_mean(absmax: &[f32]) -> f32 {
    double::mean(absmax, double::group_sum)
}

#[target_feature(enable = "neon")]
#[inline]
pub(crate) fn quantize_absmax(
    absmax: &[f32],
    offset: f32,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
) {
    double::quantize(absmax, offset, codes, nested_absmax, double::plain_codes);
}

#[target_feature(enable = "neon")]
#[inline]
pub(crate) fn dequantize_absmax(codes: &[u8], nested_absmax: &[f32], offset: f32, out: &mut [f32]) {
    double::dequantize(codes, nested_absmax, offset, out);
}
