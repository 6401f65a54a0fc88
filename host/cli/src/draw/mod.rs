//! Plans and reports for people: tables, bars, maps of what is where, comparisons, drawings.

mod bar;
mod diff;
pub(crate) mod paint;
mod places;
mod report;
#[cfg(test)]
mod samples;
mod svg;
mod table;
mod timeline;

pub use bar::{BarStyle, bar};
pub use diff::{Comparison, DeviceChange, FormatChange, Move, Side, Totals};
pub use paint::Text;
pub use places::map;
pub use report::{placements, plan, report};
pub use svg::{Heading, svg};
pub use table::Table;
pub use timeline::{Lane, Timeline, timeline};
