//! Double quantization in a dozen lines, from its definition and not from our kernels; and how
//! far that of bitsandbytes may be from it.

use tightfit::model::Tensor;
use tightfit::plan::PartKind;

use crate::loading::part;
use crate::tensors::{FileTensors, floats, ulp, ulps};

/// What two ways of summing some thousand numbers of one sign differ by.
const OFFSET_ULPS: u32 = 2;

/// bitsandbytes' CPU path does not search for the nearest of the 256 values but looks it up in
/// 65,536 bins over -1..1, and so misses it now and then: by one step, or, around zero, where the
/// values are denser than the bins, by as much as a bin is wide. Its CUDA path and ours do not.
const CPU_BIN: f32 = 2.0 / 65_535.0;

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

/// A double-quantized weight, loaded or in a file.
#[derive(Debug)]
pub struct DoubleWeight<'a> {
    name: &'a str,
    codes: &'a [u8],
    absmax: &'a [u8],
    nested: Vec<f32>,
    offset: f32,
}

impl<'m> From<Tensor<'m>> for DoubleWeight<'m> {
    fn from(tensor: Tensor<'m>) -> DoubleWeight<'m> {
        DoubleWeight {
            name: tensor.name(),
            codes: part(tensor, PartKind::Codes),
            absmax: part(tensor, PartKind::Absmax),
            nested: floats(part(tensor, PartKind::NestedAbsmax)),
            offset: tensor.absmax_mean().expect("it is double-quantized"),
        }
    }
}

impl FileTensors {
    /// The double-quantized weight of this name.
    pub fn double<'a>(&'a self, name: &'a str) -> DoubleWeight<'a> {
        DoubleWeight {
            name,
            codes: self.data(name),
            absmax: self.data(&format!("{name}.absmax")),
            nested: floats(self.data(&format!("{name}.nested_absmax"))),
            offset: self.nested_offset(name),
        }
    }
}

/// Counts in how many of the double-quantized scales of many weights bitsandbytes differs.
#[derive(Debug)]
pub struct Differences {
    map: Vec<f32>,
    blocks: usize,
    differ: usize,
}

impl Differences {
    /// None yet. `any` is a file with a double-quantized weight, for the map of 8-bit values.
    pub fn new(any: &FileTensors) -> Differences {
        let map = any
            .0
            .iter()
            .find(|(name, _)| name.ends_with(".nested_quant_map"));
        let (_, map) = map.expect("there is a double-quantized weight");
        Differences {
            map: floats(&map.data),
            blocks: 0,
            differ: 0,
        }
    }

    /// Adds a weight: `theirs` is that of bitsandbytes.
    pub fn add(&mut self, ours: DoubleWeight<'_>, theirs: DoubleWeight<'_>, context: &str) {
        let name = ours.name;
        assert!(ours.codes == theirs.codes, "codes of {name}, {context}");
        let (offset, expected) = (ours.offset, theirs.offset);
        assert!(
            ulps(offset, expected) <= OFFSET_ULPS,
            "offset of {name}: {offset}, bitsandbytes {expected}, {context}"
        );

        // The largest distance of a scale from the offset: it moves as far as the offset does.
        let moved = (offset - expected).abs();
        assert_eq!(ours.nested.len(), theirs.nested.len(), "{name}, {context}");
        for (ours, theirs) in ours.nested.into_iter().zip(theirs.nested) {
            assert!(
                (ours - theirs).abs() <= moved + ulp(theirs),
                "nested scale of {name}: {ours}, bitsandbytes {theirs}, {context}"
            );
        }

        assert_eq!(ours.absmax.len(), theirs.absmax.len(), "{name}, {context}");
        self.blocks += ours.absmax.len();
        for (&ours, &theirs) in ours.absmax.iter().zip(theirs.absmax) {
            let apart = (self.map[usize::from(ours)] - self.map[usize::from(theirs)]).abs();
            assert!(
                ours.abs_diff(theirs) <= 1 || apart <= CPU_BIN,
                "scale of {name}: {ours}, bitsandbytes {theirs}, {context}"
            );
            self.differ += usize::from(ours != theirs);
        }
    }

    /// Asserts that they are few.
    pub fn check(self, context: &str) {
        assert!(self.blocks > 0, "{context}: nothing was compared");
        assert!(
            self.differ * 100 < self.blocks,
            "{context}: {} of {} scales differ",
            self.differ,
            self.blocks
        );
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
