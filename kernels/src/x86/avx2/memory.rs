//! Reading and writing vectors: the only code here that touches pointers.

use std::arch::x86_64::*;

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn load256(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes can be read, at any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn load256_f32(values: &[f32; 8]) -> __m256 {
    // SAFETY: 8 values of 4 bytes can be read.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn load128(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 bytes can be read, at any alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn store256(out: &mut [u8; 32], value: __m256i) {
    // SAFETY: 32 bytes can be written, at any alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn store128(out: &mut [u8; 16], value: __m128i) {
    // SAFETY: 16 bytes can be written, at any alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), value) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn bytes256(x: __m256) -> [u8; 32] {
    let mut bytes = [0; 32];
    store256(&mut bytes, _mm256_castps_si256(x));
    bytes
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn bytes128(x: __m128i) -> [u8; 16] {
    let mut bytes = [0; 16];
    store128(&mut bytes, x);
    bytes
}
