//! The code tables, bit for bit those of bitsandbytes (`functional.py`, `csrc/kernels.cu`, version
//! 0.50).

/// The 16 values of NF4, ascending; code 7 is zero.
pub const NF4: [f32; 16] = floats([
    0xbf80_0000,
    0xbf32_39b1,
    0xbf06_6b30,
    0xbeca_32a0,
    0xbe91_a24d,
    0xbe3d_353f,
    0xbdba_7871,
    0x0000_0000,
    0x3da2_faff,
    0x3e24_cae3,
    0x3e7c_04dd,
    0x3ead_033a,
    0x3ee1_a4b8,
    0x3f10_07ab,
    0x3f39_13b3,
    0x3f80_0000,
]);

/// The 15 thresholds of NF4, ascending. The code of `v` is the number of thresholds strictly below
/// `v`.
///
/// These are the constants of the CUDA kernel. The CPU path of bitsandbytes uses the `f32`
/// midpoints of [`NF4`], of which the last is one ulp lower.
pub const NF4_THRESHOLDS: [f32; 15] = floats([
    0xbf59_1cd8,
    0xbf1c_5270,
    0xbeeb_8480,
    0xbead_ea76,
    0xbe70_3cec,
    0xbe0d_38bc,
    0xbd3a_7871,
    0x3d22_faff,
    0x3df6_4862,
    0x3e50_67e0,
    0x3e95_82d4,
    0x3ec7_53f9,
    0x3f00_6d04,
    0x3f24_8daf,
    0x3f5c_89db,
]);

/// The 16 values of FP4 in the order of their bit patterns; bit 3 is the sign. Code 8 is +0.0, as
/// in the `quant_map` that bitsandbytes writes to files.
pub const FP4: [f32; 16] = floats([
    0x0000_0000,
    0x3baa_aaab,
    0x3f2a_aaab,
    0x3f80_0000,
    0x3eaa_aaab,
    0x3f00_0000,
    0x3e2a_aaab,
    0x3e80_0000,
    0x0000_0000,
    0xbbaa_aaab,
    0xbf2a_aaab,
    0xbf80_0000,
    0xbeaa_aaab,
    0xbf00_0000,
    0xbe2a_aaab,
    0xbe80_0000,
]);

/// The 256 values of the dynamic 8-bit map for double quantization, ascending: 127 negative values,
/// 0.0 at index 127, their 127 positive counterparts, and 1.0.
pub const DYNAMIC_MAP: [f32; 256] = {
    let mut map = [0.0; 256];
    let mut i = 0;
    while i < 127 {
        map[128 + i] = f32::from_bits(DYNAMIC_MAGNITUDES[i]);
        map[126 - i] = -map[128 + i];
        i += 1;
    }
    map[255] = 1.0;
    map
};

/// The positive values of the dynamic map below 1.0, as `f32` bits. Listed because the rounding of
/// the `linspace` they were made with matters.
const DYNAMIC_MAGNITUDES: [u32; 127] = [
    0x3513_a3b7,
    0x365a_1a94,
    0x3702_05ff,
    0x37b2_4206,
    0x3837_8034,
    0x388a_efb3,
    0x38ba_1f4b,
    0x3923_d70b,
    0x398c_e705,
    0x39c7_e283,
    0x3a01_6f01,
    0x3a1e_ecc1,
    0x3a3c_6a80,
    0x3a59_e83e,
    0x3a77_65ff,
    0x3aa7_ef9d,
    0x3af1_a9fc,
    0x3b1d_b22d,
    0x3b42_8f5c,
    0x3b67_6c8a,
    0x3b86_24dd,
    0x3b98_9374,
    0x3bab_020d,
    0x3bbd_70a4,
    0x3bcf_df3b,
    0x3be2_4dd3,
    0x3bf4_bc6a,
    0x3c03_9581,
    0x3c0c_cccd,
    0x3c16_0418,
    0x3c1f_3b64,
    0x3c3a_e148,
    0x3c68_f5c3,
    0x3c8b_851f,
    0x3ca2_8f5d,
    0x3cb9_999a,
    0x3cd0_a3d7,
    0x3ce7_ae15,
    0x3cfe_b852,
    0x3d0a_e148,
    0x3d16_6667,
    0x3d21_eb85,
    0x3d2d_70a3,
    0x3d38_f5c3,
    0x3d44_7ae1,
    0x3d50_0000,
    0x3d5b_851f,
    0x3d67_0a3d,
    0x3d72_8f5d,
    0x3d7e_147b,
    0x3d84_cccd,
    0x3d8a_8f5d,
    0x3d90_51eb,
    0x3d96_147b,
    0x3d9b_d70a,
    0x3da1_999a,
    0x3da7_5c2a,
    0x3dad_1eb8,
    0x3db2_e148,
    0x3db8_a3d7,
    0x3dbe_6667,
    0x3dc4_28f7,
    0x3dc9_eb85,
    0x3ddb_3334,
    0x3df8_0000,
    0x3e0a_6666,
    0x3e18_cccd,
    0x3e27_3333,
    0x3e35_999a,
    0x3e44_0000,
    0x3e52_6666,
    0x3e60_cccd,
    0x3e6f_3333,
    0x3e7d_9999,
    0x3e86_0000,
    0x3e8d_3334,
    0x3e94_6666,
    0x3e9b_999a,
    0x3ea2_cccc,
    0x3eaa_0000,
    0x3eb1_3333,
    0x3eb8_6666,
    0x3ebf_999a,
    0x3ec6_cccc,
    0x3ece_0000,
    0x3ed5_3333,
    0x3edc_6666,
    0x3ee3_999a,
    0x3eea_cccc,
    0x3ef2_0000,
    0x3ef9_3332,
    0x3f00_3333,
    0x3f03_cccc,
    0x3f07_6666,
    0x3f0b_0000,
    0x3f0e_999a,
    0x3f12_3334,
    0x3f15_cccd,
    0x3f19_6666,
    0x3f1d_0000,
    0x3f20_999a,
    0x3f24_3334,
    0x3f27_cccd,
    0x3f2b_6666,
    0x3f2f_0000,
    0x3f32_999a,
    0x3f36_3334,
    0x3f39_cccd,
    0x3f3d_6666,
    0x3f41_0000,
    0x3f44_999a,
    0x3f48_3333,
    0x3f4b_cccd,
    0x3f4f_6666,
    0x3f53_0000,
    0x3f56_999a,
    0x3f5a_3333,
    0x3f5d_cccd,
    0x3f61_6666,
    0x3f65_0000,
    0x3f68_999a,
    0x3f6c_3333,
    0x3f6f_cccd,
    0x3f73_6666,
    0x3f77_0000,
    0x3f7a_999a,
    0x3f7e_3333,
];

const fn floats<const N: usize>(bits: [u32; N]) -> [f32; N] {
    let mut floats = [0.0; N];
    let mut i = 0;
    while i < N {
        floats[i] = f32::from_bits(bits[i]);
        i += 1;
    }
    floats
}
