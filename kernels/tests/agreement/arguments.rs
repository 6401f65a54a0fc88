//! What is not accepted, and that the error says why.

use tightfit_kernels::{
    BlockSize, FloatType, IllegalBlockSize, Isa, KernelError, Kernels, QuantType,
};

use crate::all;

#[test]
fn wrong_lengths_are_errors_and_name_them() {
    let length = |what, need, have| Err(KernelError::Length { what, need, have });
    for kernels in all() {
        let quantize = |bytes: usize, packed: usize, absmax: usize| {
            let (mut packed, mut absmax) = (vec![0; packed], vec![0.0; absmax]);
            kernels
                .quantize_nf4(
                    &vec![0; bytes],
                    FloatType::Bf16,
                    BlockSize::DEFAULT,
                    &mut packed,
                    &mut absmax,
                )
                .map(|stats| stats.nonfinite_blocks)
        };
        assert_eq!(quantize(130, 33, 2), Ok(0));
        assert_eq!(quantize(0, 0, 0), Ok(0));
        assert_eq!(
            quantize(131, 33, 2),
            Err(KernelError::PartialElement {
                float: FloatType::Bf16,
                need: 2,
                have: 131
            })
        );
        assert_eq!(quantize(130, 32, 2), length("packed", 33, 32).map(|()| 0));
        assert_eq!(quantize(130, 33, 3), length("absmax", 2, 3).map(|()| 0));

        let dequantize = |packed: usize, absmax: usize, elements: usize, out: usize| {
            let (packed, absmax, mut out) = (vec![0; packed], vec![0.0; absmax], vec![0; out]);
            let (size, float) = (BlockSize::DEFAULT, FloatType::F32);
            kernels.dequantize(
                QuantType::Fp4,
                &packed,
                &absmax,
                size,
                elements,
                float,
                &mut out,
            )
        };
        assert_eq!(dequantize(33, 2, 65, 260), Ok(()));
        assert_eq!(dequantize(32, 2, 65, 260), length("packed", 33, 32));
        assert_eq!(dequantize(33, 1, 65, 260), length("absmax", 2, 1));
        assert_eq!(dequantize(33, 2, 65, 259), length("out", 260, 259));
        assert!(dequantize(0, 0, usize::MAX, 0).is_err());

        let mut floats = [0.0; 300];
        assert_eq!(
            kernels.quantize_absmax(&[0.0; 257], 0.0, &mut [0; 257], &mut floats[..2]),
            Ok(())
        );
        let error = kernels.quantize_absmax(&[0.0; 257], 0.0, &mut [0; 256], &mut floats[..2]);
        assert_eq!(error, length("codes", 257, 256));
        let error = kernels.quantize_absmax(&[0.0; 257], 0.0, &mut [0; 257], &mut floats[..1]);
        assert_eq!(error, length("nested_absmax", 2, 1));
        let error = kernels.dequantize_absmax(&[0; 257], &[0.0; 2], 0.0, &mut floats);
        assert_eq!(error, length("out", 257, 300));
        let error = kernels.dequantize_absmax(&[0; 257], &[0.0; 1], 0.0, &mut floats[..257]);
        assert_eq!(error, length("nested_absmax", 2, 1));

        let error = kernels.cast(&[0; 6], FloatType::Bf16, FloatType::F32, &mut [0; 11]);
        assert_eq!(error, length("out", 12, 11));
        assert!(
            kernels
                .cast(&[0; 6], FloatType::F32, FloatType::F32, &mut [0; 6])
                .is_err()
        );
    }
    let text = KernelError::Length {
        what: "packed",
        need: 33,
        have: 32,
    }
    .to_string();
    assert_eq!(text, "`packed` holds 32 elements, 33 are needed");
}

#[test]
fn block_sizes_and_instruction_sets() {
    for elements in 0..10_000 {
        let valid = BlockSize::ALL
            .iter()
            .any(|size| size.elements() == elements);
        assert_eq!(BlockSize::new(elements).is_ok(), valid, "{elements}");
    }
    assert_eq!(
        BlockSize::new(1 << 22),
        Err(IllegalBlockSize { have: 1 << 22 })
    );
    assert_eq!(BlockSize::default().elements(), 64);

    assert_eq!(Isa::available().next(), Some(Isa::Portable));
    assert_eq!(Kernels::detect().isa(), Isa::detect());
    for isa in Isa::ALL {
        match Kernels::new(isa) {
            Ok(kernels) => assert!(isa.is_available() && kernels.isa() == isa),
            Err(error) => {
                assert!(!isa.is_available() && error == KernelError::IsaUnavailable { isa })
            }
        }
    }
}
