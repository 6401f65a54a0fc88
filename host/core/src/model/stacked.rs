//! Tensors that lie one behind the other, as one.

use super::{SharedPart, Tensor};
use crate::plan::PartKind;

/// Tensors of one shape, type, format and device whose parts of each kind lie one behind the other, in their
/// order: the experts of a layer where the plan laid them out as a stack. Together they are one tensor
/// [tensors, ..], in place.
///
/// Plans lay out so what a checkpoint has as `experts.0.gate_proj.weight`, `experts.0.up_proj.weight`,
/// `experts.1.gate_proj.weight` and so on (Mixtral's `w1` and `w3` too), and apart from these the
/// `down_proj` or `w2`: on one device, in one format, and where the bytes of each part are a multiple of
/// [`PART_ALIGNMENT`](crate::plan::PART_ALIGNMENT). Double-quantized ones lie so too, but are no tensor together: each
/// has a mean. [`Model::experts`](super::Model::experts) computes with them.
#[derive(Debug, Clone)]
pub struct Stacked<'m> {
    tensors: Vec<Tensor<'m>>,
}

impl<'m> Stacked<'m> {
    /// These tensors as one; `None` where they do not lie so, or there are none.
    pub fn of(tensors: Vec<Tensor<'m>>) -> Option<Stacked<'m>> {
        let first = *tensors.first()?;
        // A mean would be that of one of them only.
        first.absmax_mean().is_none().then_some(())?;
        for (number, tensor) in tensors.iter().enumerate() {
            let is_alike = std::ptr::eq(tensor.model(), first.model())
                && (
                    tensor.dtype(),
                    tensor.shape(),
                    tensor.format(),
                    tensor.device(),
                ) == (first.dtype(), first.shape(), first.format(), first.device())
                && tensor.quantization() == first.quantization();
            let follows = || {
                let parts = tensor.parts().iter().zip(first.parts());
                parts.into_iter().all(|(part, first)| {
                    let before = (number as u64).checked_mul(first.bytes);
                    let offset = before.and_then(|before| first.offset.checked_add(before));
                    part.kind == first.kind && Some(part.offset) == offset
                })
            };
            (is_alike && follows()).then_some(())?;
        }
        Some(Stacked { tensors })
    }

    /// Returns the first of them, which has what all have in common.
    pub fn first(&self) -> Tensor<'m> {
        self.tensors[0]
    }

    /// Returns them, in their order: at least one.
    pub fn tensors(&self) -> &[Tensor<'m>] {
        &self.tensors
    }

    /// Returns the shape of all of them: how many there are, and their own.
    pub fn shape(&self) -> Vec<u64> {
        let count = self.tensors.len() as u64;
        let mut shape = vec![count];
        shape.extend(self.first().shape());
        shape
    }

    /// Returns the parts of this kind of all of them as one, which stays in place when the model is gone.
    pub fn shared_part(&self, kind: PartKind) -> Option<SharedPart> {
        let first = self.first();
        let part = first.planned().part(kind)?;
        let bytes = part.bytes.checked_mul(self.tensors.len() as u64)?;
        let memory = first.reservation().cloned();
        Some(SharedPart::new(memory, part.offset, bytes))
    }
}
