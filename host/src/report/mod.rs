//! What was planned and done, for people and for programs.

mod bar;
mod diff;
mod error;
mod fill;
mod inspect;
mod json;
mod places;
#[cfg(test)]
mod samples;
mod svg;
mod table;
mod to_json;

pub use bar::{BarStyle, bar};
pub use diff::{Comparison, DeviceChange, FormatChange, Move, Side, Totals};
pub use error::ErrorReport;
#[cfg(feature = "check")]
pub(crate) use error::failure_kind;
pub use fill::{Content, Fill, fills};
pub use inspect::Inspection;
pub use json::{
    DeviceReport, HostReport, LoadReport, ModelReport, PlacementReport, PolicyReport,
    QuantizedReport, Report, RevisionReport,
};
pub use places::map;
pub use svg::{Heading, svg};
pub use table::Table;
pub use to_json::to_json;

pub use crate::text::{is_hidden, printable, printable_lines};

use tightfit_names::{TensorKind, kind_of};

use crate::checkpoint::TensorInfo;

/// What a tensor is for. Packed elements count as what they stand for: this is about a model's
/// parts, not about what could be quantized.
fn purpose(tensor: &TensorInfo) -> TensorKind {
    kind_of(&tensor.name, tensor.shape.len(), true)
}
