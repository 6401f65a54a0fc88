//! What was planned and done, for people and for programs.

mod bar;
mod diff;
mod fill;
mod inspect;
mod json;
mod places;
#[cfg(test)]
mod samples;
mod svg;
mod table;

pub use bar::{BarStyle, bar};
pub use diff::{Comparison, DeviceChange, FormatChange, Move, Side, Totals};
pub use fill::{Content, Fill, fills};
pub use inspect::Inspection;
pub use json::{
    DeviceReport, HostReport, LoadReport, ModelReport, PlacementReport, PolicyReport,
    QuantizedReport, Report, RevisionReport,
};
pub use places::map;
pub use svg::{Heading, svg};
pub use table::{Table, printable};

use tightfit_names::{TensorKind, kind_of};

use crate::checkpoint::TensorInfo;

/// What a tensor is for. Packed elements count as what they stand for: this is about a model's
/// parts, not about what could be quantized.
fn purpose(tensor: &TensorInfo) -> TensorKind {
    kind_of(&tensor.name, tensor.shape.len(), true)
}
