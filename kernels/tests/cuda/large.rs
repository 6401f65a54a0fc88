//! What only a GPU does in reasonable time: tensors of real size, and a mean of three levels.

use tightfit_kernels::{BlockSize, FloatType, Kernels, QuantType, blocks, packed_bytes};

use crate::calls::{self, Misaligned};
use crate::gpu::Gpu;
use crate::values::{Random, elements, floats};

#[test]
fn tensors_of_real_size() {
    let Some(mut gpu) = Gpu::open() else { return };
    let kernels = Kernels::detect();
    let mut random = Random(9);
    let length = 4096 * 11_008 + 77;
    let mut weights: Vec<f32> = (0..length).map(|_| random.weight(0.02)).collect();
    for _ in 0..1000 {
        weights[random.below(length)] = random.pick(&crate::values::SPECIAL);
    }
    for float in FloatType::ALL {
        let source = elements(&weights, float);
        for block_size in [64, 4096].map(|size| BlockSize::new(size).expect("valid")) {
            let mut packed = vec![0; packed_bytes(length)];
            let mut absmax = vec![0.0; blocks(length, block_size)];
            let stats = kernels
                .quantize_nf4(&source, float, block_size, &mut packed, &mut absmax)
                .expect("lengths");
            let misaligned = Misaligned::default();
            let have = calls::quantize(&mut gpu, &source, float, block_size, misaligned);
            assert!(have.packed == packed, "{float} {block_size}");
            assert!(have.absmax == crate::values::to_bytes(&absmax));
            assert_eq!(have.nonfinite_blocks, stats.nonfinite_blocks);

            let mut out = vec![0; source.len()];
            kernels
                .dequantize(
                    QuantType::Nf4,
                    &packed,
                    &absmax,
                    block_size,
                    length,
                    float,
                    &mut out,
                )
                .expect("lengths");
            let have = calls::dequantize(
                &mut gpu,
                QuantType::Nf4,
                &packed,
                &floats(&have.absmax),
                block_size,
                length,
                float,
                misaligned,
            );
            crate::values::assert_elements(&have, &out, float, "dequantized");
        }
    }
}

#[test]
fn a_mean_of_three_levels() {
    let Some(mut gpu) = Gpu::open() else { return };
    let mut random = Random(10);
    let values: Vec<f32> = (0..65_536 * 256 + 1000)
        .map(|_| f32::from_bits(random.next() as u32 >> 1 & 0x5fff_ffff))
        .collect();
    let need = Kernels::detect().absmax_mean(&values);
    assert_eq!(
        calls::absmax_mean(&mut gpu, &values).to_bits(),
        need.to_bits()
    );
}
