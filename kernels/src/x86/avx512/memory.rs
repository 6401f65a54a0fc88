//! Reading and writing vectors: the only code here that touches pointers.

use std::arch::x86_64::*;

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn load512(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: 64 bytes can be read, at any alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn load512_f32(values: &[f32; 16]) -> __m512 {
    // SAFETY: 16 values of 4 bytes can be read.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn load512_i32(values: &[i32; 16]) -> __m512i {
    // SAFETY: 16 values of 4 bytes can be read.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn load512_u16(values: &[u16]) -> __m512i {
    let values: &[u16; 32] = values.try_into().expect("half of the entries");
    // SAFETY: 32 values of 2 bytes can be read.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn load256(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes can be read, at any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn load128(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 bytes can be read, at any alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn store512(out: &mut [u8; 64], value: __m512i) {
    // SAFETY: 64 bytes can be written, at any alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn store256(out: &mut [u8; 32], value: __m256i) {
    // SAFETY: 32 bytes can be written, at any alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn store128(out: &mut [u8; 16], value: __m128i) {
    // SAFETY: 16 bytes can be written, at any alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn bytes512(x: __m512) -> [u8; 64] {
    let mut bytes = [0; 64];
    store512(&mut bytes, _mm512_castps_si512(x));
    bytes
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn bytes256(x: __m256i) -> [u8; 32] {
    let mut bytes = [0; 32];
    store256(&mut bytes, x);
    bytes
}

/// 16 bytes of each of 16 rows that begin `stride` apart: rows 0, 4, 8 and 12 in the first vector, the
/// rows after these in the next.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn load_rows(bytes: &[u8], stride: usize, at: usize) -> [__m512i; 4] {
    assert!(
        bytes.len() >= 16 && stride <= bytes.len() / 15 && at <= bytes.len() - 16 - 15 * stride
    );
    let mut vectors = [_mm512_setzero_si512(); 4];
    for (i, vector) in vectors.iter_mut().enumerate() {
        let mut quarters = [_mm_setzero_si128(); 4];
        for (j, quarter) in quarters.iter_mut().enumerate() {
            // SAFETY: the last row that is read is the 15th from `at`, 16 bytes of which are in
            // `bytes`.
            *quarter =
                unsafe { _mm_loadu_si128(bytes.as_ptr().add(at + (4 * j + i) * stride).cast()) };
        }
        let [a, b, c, d] = quarters;
        let rows = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
        let rows = _mm512_inserti32x4::<2>(rows, c);
        *vector = _mm512_inserti32x4::<3>(rows, d);
    }
    vectors
}

/// 32 bytes of each of 16 rows that begin `stride` apart: in the first vector those of rows 0 and 4, in
/// the fifth those of rows 8 and 12.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn load_wide_rows(bytes: &[u8], stride: usize, at: usize) -> [__m512i; 8] {
    assert!(
        bytes.len() >= 32 && stride <= bytes.len() / 15 && at <= bytes.len() - 32 - 15 * stride
    );
    let mut vectors = [_mm512_setzero_si512(); 8];
    for (i, vector) in vectors.iter_mut().enumerate() {
        let mut halves = [_mm256_setzero_si256(); 2];
        for (j, half) in halves.iter_mut().enumerate() {
            let row = i / 4 * 8 + i % 4 + 4 * j;
            // SAFETY: the last row that is read is the 15th from `at`, 32 bytes of which are in
            // `bytes`.
            *half = unsafe { _mm256_loadu_si256(bytes.as_ptr().add(at + row * stride).cast()) };
        }
        let low = _mm512_castsi256_si512(halves[0]);
        *vector = _mm512_inserti64x4::<1>(low, halves[1]);
    }
    vectors
}

/// Has the line of a byte read into the caches, where there is such a byte.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn prefetch(bytes: &[u8], at: usize) {
    _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast());
}

/// The values of indices, or the last one where an index is too large.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn gather(values: &[f32], index: __m512i) -> __m512 {
    assert!(!values.is_empty() && values.len() <= i32::MAX as usize);
    let last = _mm512_set1_epi32(values.len() as i32 - 1);
    let index = _mm512_min_epu32(index, last);
    // SAFETY: no index is larger than the last one.
    unsafe { _mm512_i32gather_ps::<4>(index, values.as_ptr()) }
}
