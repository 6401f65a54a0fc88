//! Double quantization.

use std::arch::x86_64::*;

use super::memory::*;
use crate::{buckets::DynamicBuckets, double};

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(crate) fn absmax_mean(absmax: &[f32]) -> f32 {
    double::mean(absmax, double::group_sum)
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(crate) fn quantize_absmax(
    absmax: &[f32],
    offset: f32,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
) {
    double::quantize(
        absmax,
        offset,
        codes,
        nested_absmax,
        |absmax, offset, reciprocal, codes| plain_absmax_codes(absmax, offset, reciprocal, codes),
    );
}

/// [`double::plain_codes`] with gathered entries.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
fn plain_absmax_codes(absmax: &[f32], offset: f32, reciprocal: f32, codes: &mut [u8]) {
    const PLACE_BITS: u32 = DynamicBuckets::PLACE_BITS;
    let (chunks, rest) = absmax.as_chunks::<16>();
    let (outs, outs_rest) = codes.as_chunks_mut::<16>();
    let place_bits = _mm512_set1_epi32(DynamicBuckets::PLACE as i32);
    for (chunk, out) in chunks.iter().zip(outs) {
        let centred = _mm512_sub_ps(load512_f32(chunk), _mm512_set1_ps(offset));
        let x = _mm512_castps_si512(_mm512_mul_ps(centred, _mm512_set1_ps(reciprocal)));
        let negative = _mm512_movepi32_mask(x);
        let magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7fff_ffff));
        let bucket = _mm512_srli_epi32::<PLACE_BITS>(magnitude);
        let bucket = _mm512_max_epi32(bucket, _mm512_set1_epi32(DynamicBuckets::FIRST as i32));
        let bucket = _mm512_min_epi32(bucket, _mm512_set1_epi32(DynamicBuckets::LAST as i32));
        let bucket = _mm512_sub_epi32(bucket, _mm512_set1_epi32(DynamicBuckets::FIRST as i32));
        let side = _mm512_set1_epi32(DynamicBuckets::SIDE as i32);
        let bucket = _mm512_mask_add_epi32(bucket, negative, bucket, side);
        let place = _mm512_and_si512(magnitude, place_bits);
        let place = _mm512_mask_xor_epi32(place, negative, place, place_bits);
        let entries = DynamicBuckets::TABLE.entries();
        // SAFETY: `bucket` is clamped to one side of the table, and one side is added at most.
        let entry = unsafe { _mm512_i32gather_epi32::<4>(bucket, entries.as_ptr().cast()) };
        let codes = _mm512_srli_epi32::<PLACE_BITS>(_mm512_add_epi32(entry, place));
        store128(out, _mm512_cvtepi32_epi8(codes));
    }
    double::plain_codes(rest, offset, reciprocal, outs_rest);
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(crate) fn dequantize_absmax(codes: &[u8], nested_absmax: &[f32], offset: f32, out: &mut [f32]) {
    double::dequantize(codes, nested_absmax, offset, out);
}
