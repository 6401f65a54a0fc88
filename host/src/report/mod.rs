//! What was planned and done, for people and for programs.

mod inspect;
mod json;
mod table;

pub use inspect::Inspection;
pub use json::{
    DeviceReport, HostReport, LoadReport, ModelReport, PlacementReport, PolicyReport, Report,
};
pub use table::{Table, printable};
