//! Double quantization in a dozen lines, from its definition and not from our kernels.

/// The scales of one tensor, quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleQuantized {
    /// Mean of the scales.
    pub offset: f32,
    /// Largest distance from the mean in each 256 scales.
    pub nested: Vec<f32>,
    /// For each scale the index of the nearest value in the map.
    pub codes: Vec<u8>,
}

/// Quantizes `absmax` with the ascending values of `map`: the nearest one to
/// `(absmax - mean) / nested`, in f32 arithmetic as on the GPU.
pub fn double_quantize(absmax: &[f32], map: &[f32]) -> DoubleQuantized {
    let sum: f64 = absmax.iter().copied().map(f64::from).sum();
    let offset = (sum / absmax.len() as f64) as f32;
    let middles: Vec<f32> = map
        .windows(2)
        .map(|pair| (pair[0] + pair[1]) / 2.0)
        .collect();
    let mut nested = Vec::new();
    let mut codes = Vec::new();
    for chunk in absmax.chunks(256) {
        let distance = |scale: &f32| scale - offset;
        let largest = chunk.iter().map(distance).map(f32::abs).fold(0.0, f32::max);
        nested.push(largest);
        // The kernels multiply by the reciprocal.
        let reciprocal = if largest > 0.0 { 1.0 / largest } else { 0.0 };
        codes.extend(chunk.iter().map(|scale| {
            let value = distance(scale) * reciprocal;
            middles.partition_point(|&middle| middle < value) as u8
        }));
    }
    DoubleQuantized {
        offset,
        nested,
        codes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_go_to_the_nearest_value_around_their_mean() {
        let map = [-1.0, 0.0, 0.5, 1.0];
        let mut absmax = vec![3.0; 254];
        absmax.extend([1.0, 5.0, 4.2, 1.8]);
        let quantized = double_quantize(&absmax, &map);
        assert_eq!(quantized.offset, 3.0);
        assert_eq!(quantized.nested, [2.0, 1.2]);
        assert_eq!(quantized.codes[..254], [1; 254]);
        assert_eq!(quantized.codes[254..], [0, 3, 3, 0]);
    }
}
