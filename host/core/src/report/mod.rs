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
/// parts, not about what could be quantized.
pub fn purpose(tensor: &TensorInfo) -> TensorKind {
    kind_of(&tensor.name, tensor.shape.len(), true)
}
