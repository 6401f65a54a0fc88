//! What was planned and done, as data: for programs, and for whoever draws it.

mod fill;
mod inspect;
mod json;
#[cfg(test)]
mod samples;
mod to_json;

pub use fill::{Content, Fill, fills};
pub use inspect::Inspection;
pub use json::{
    DeviceReport, HostReport, LoadReport, MethodReport, ModelReport, PlacementReport, PolicyReport,
    QuantizedReport, RanksReport, Report, RevisionReport, SliceReport,
};

pub use to_json::to_json;

use tightfit_common::names::{TensorKind, kind_of};

use crate::checkpoint::TensorInfo;

/// Returns what a tensor is for. Packed elements count as what they stand for: this is about a model's
/// parts, not about what could be quantized. A part of a tensor is for what the whole is for.
pub fn purpose(tensor: &TensorInfo) -> TensorKind {
    let (name, shape) = match &tensor.piece {
        Some(piece) => (&piece.of, &piece.shape),
        None => (&tensor.name, &tensor.shape),
    };
    kind_of(name, shape.len(), true)
}
