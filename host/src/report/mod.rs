//! What was planned and done, for people and for programs.

mod inspect;
mod json;
mod table;

pub use inspect::Inspection;
pub use json::{
    DeviceReport, HostReport, LoadReport, ModelReport, PlacementReport, PolicyReport, Report,
};
pub use table::{Table, printable};

use tightfit_names::{TensorKind, kind_of};

use crate::checkpoint::TensorInfo;

/// What a tensor is for. Packed elements count as what they stand for: this is about a model's
/// parts, not about what could be quantized.
fn purpose(tensor: &TensorInfo) -> TensorKind {
    kind_of(&tensor.name, tensor.shape.len(), true)
}
