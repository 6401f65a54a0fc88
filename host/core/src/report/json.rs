//! The report as data. Its JSON form is a promise to other programs: fields are added, not
//! changed, while `schema` is 1. Sizes are in bytes.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::{Fill, fills};
use crate::checkpoint::{Checkpoint, Piece};
use crate::load::Revision;
use crate::memory::{Usage, peak_rss_bytes};
use crate::model::Model;
use crate::plan::{Plan, Proposed};
use crate::ranks::PlanDigest;
use crate::text::printable;

/// What `plan` and `load` report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Version of this form.
    pub schema: u32,
    /// The checkpoint.
    pub model: ModelReport,
    /// The policy that placed its tensors.
    pub policy: PolicyReport,
    /// The digest of the plan and of what it was made for: see [`PlanDigest`]. Among several ranks it is
    /// that of the plan of all.
    pub digest: String,
    /// Which of several processes this is; absent where there is only one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RanksReport>,
    /// Every device, in the user's order; where this is a rank, only its own.
    pub devices: Vec<DeviceReport>,
    /// This process.
    pub host: HostReport,
    /// What loading took; absent from a mere plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadReport>,
    /// Every tensor, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placements: Option<Vec<PlacementReport>>,
}

/// The checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelReport {
    /// Where it is.
    pub path: String,
    /// As config.json names it.
    pub architecture: Option<String>,
    /// Tensors in the checkpoint.
    pub tensors: usize,
    /// Bytes of them.
    pub source_bytes: u64,
    /// The method by which it has been quantized already, if it has.
    pub quantization: Option<MethodReport>,
}

/// The method by which a checkpoint has been quantized.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MethodReport {
    /// Its name, for example `fp8`, `gptq` or `bitsandbytes`.
    pub method: String,
    /// Bits of an element, where config.json says so.
    pub bits: Option<u64>,
    /// Where it is known from: `config` or `tensors`.
    pub source: &'static str,
    /// Weights that are decoded as they are read; their formats are those of the plan.
    pub decoded: u64,
    /// Weights that could be, and are left as the file has them.
    pub left: u64,
    /// Bits that an element of these takes in the file with its scales, on average.
    pub left_bits: Option<f64>,
    /// Weights in codes that are not understood: they are left as the file has them.
    pub unknown: u64,
}

impl MethodReport {
    /// Returns what is to be said of a checkpoint that has been quantized.
    pub fn of(checkpoint: &Checkpoint) -> Option<MethodReport> {
        let method = checkpoint.quantization()?;
        let counts = checkpoint.encoded();
        Some(MethodReport {
            method: method.name.clone(),
            bits: method.bits,
            source: method.source.name(),
            decoded: counts.decoded,
            left: counts.left,
            left_bits: (counts.left > 0).then(|| counts.left_millibits as f64 / 1000.0),
            unknown: counts.unknown,
        })
    }
}

/// Bits of an element in NF4, in blocks of 64 with scales in f32.
const NF4_BITS: f64 = 4.5;

impl fmt::Display for MethodReport {
    /// One sentence: what it is and what that means.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "quantized by {} already", printable(&self.method))?;
        if let Some(bits) = self.bits {
            write!(f, " ({bits} bits)")?;
        }
        match self.source {
            "config" => f.write_str(", as config.json says")?,
            _ => f.write_str(", as its tensors show")?,
        }
        f.write_str(": ")?;
        match (self.decoded, self.left, self.left_bits) {
            (0, 0, _) => {}
            (0, left, Some(bits)) if bits <= NF4_BITS => write!(
                f,
                "{left} weights of {bits:.2} bits an element stay as they are, for which NF4 with its \
                 {NF4_BITS} bits would gain nothing (--dequantize all decodes them); "
            )?,
            (0, left, bits) => write!(
                f,
                "{left} weights of {:.2} bits an element stay as they are, unless --dequantize asks; ",
                bits.unwrap_or_default()
            )?,
            (decoded, 0, _) => write!(f, "{decoded} weights are decoded as they are read; ")?,
            (decoded, left, bits) => write!(
                f,
                "{decoded} weights are decoded as they are read, {left} of {:.2} bits an element stay as \
                 they are (--dequantize all decodes them); ",
                bits.unwrap_or_default()
            )?,
        }
        if self.unknown > 0 {
            write!(f, "{} are in codes that are not understood; ", self.unknown)?;
        }
        f.write_str(
            "what that left in float stays as it is, unless --set format:PATTERN=FORMAT asks",
        )
    }
}

/// The policy that placed the tensors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicyReport {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Every setting with the value that was used.
    pub settings: BTreeMap<String, String>,
    /// Fuel that it burnt, if it is a wasm policy.
    pub fuel: Option<u64>,
    /// Why earlier plans of it were given up: devices that had less memory than they had said.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub revisions: Vec<RevisionReport>,
    /// Seconds that planning took.
    pub seconds: f64,
}

/// One of several processes that load a model together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RanksReport {
    /// Which it is, from 0; `null` where this is about all of them.
    pub rank: Option<u32>,
    /// How many there are.
    pub world: u32,
    /// Whether the others have said that they have the same plan.
    pub agreed: bool,
    /// Connections to rank 0 that were of none of them.
    pub turned_away: u64,
}

/// A plan that was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RevisionReport {
    /// The device's name.
    pub device: String,
    /// Bytes that the plan needed there, headroom included.
    pub needed: u64,
    /// Bytes that there were.
    pub available: u64,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Bytes that may be used in all.
    pub capacity: u64,
    /// Bytes of everything stored there.
    pub allocated: u64,
    /// The same after alignment.
    pub padded: u64,
    /// Bytes taken from the device.
    pub reserved: u64,
    /// The most that was taken from the device at any time; in a plan, what will be.
    pub peak_reserved: u64,
    /// Bytes that the policy leaves free.
    pub headroom: u64,
    /// Bytes that are reserved behind the weights, for the application.
    pub tail: u64,
    /// Tensors stored there.
    pub tensors: u64,
    /// What fills it, as planned.
    pub fill: Fill,
}

/// This process.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostReport {
    /// Bytes of the staging ring; in a plan, the most it may take.
    pub staging_bytes: u64,
    /// Bytes allowed for the scales of double-quantized tensors in flight.
    pub scratch_bytes: u64,
    /// The most resident memory that the process has had.
    pub peak_rss_bytes: Option<u64>,
}

/// What loading took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoadReport {
    /// From the first reservation to the last byte.
    pub seconds: f64,
    /// Bytes read from the checkpoint.
    pub bytes_read: u64,
    /// Tensors that were quantized.
    pub quantized: u64,
    /// Tensors that were stored otherwise.
    pub stored: u64,
    /// Who quantized, by the name of the device; devices for which nothing was are left out.
    pub quantized_on: BTreeMap<String, QuantizedReport>,
    /// Blocks with infinities or NaN among what was quantized.
    pub nonfinite_blocks: u64,
    /// The tensors that have such blocks, with their number.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub nonfinite: BTreeMap<String, u64>,
}

/// Bytes of the checkpoint that were quantized for one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct QuantizedReport {
    /// By the processor.
    pub by_host: u64,
    /// By the device itself.
    pub by_device: u64,
}

/// What became of one tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlacementReport {
    /// Its name.
    pub tensor: String,
    /// The name of its device; `null` when it is not loaded.
    pub device: Option<String>,
    /// For example `nf4`, `nf4+double`, `stored`, `cast:bf16`.
    pub format: String,
    /// Bytes it takes.
    pub bytes: u64,
    /// What part of which tensor it is, where the plan cuts that into slices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice: Option<SliceReport>,
}

/// What part of a tensor a slice is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SliceReport {
    /// The name of the whole tensor.
    pub of: String,
    /// The shape of the whole tensor.
    pub shape: Vec<u64>,
    /// The dimension along which it is cut.
    pub dimension: usize,
    /// What it has along that: beginning and end of each range.
    pub ranges: Vec<[u64; 2]>,
}

impl From<&Piece> for SliceReport {
    fn from(piece: &Piece) -> SliceReport {
        SliceReport {
            of: piece.of.clone(),
            shape: piece.shape.clone(),
            dimension: piece.dimension,
            ranges: piece
                .ranges
                .iter()
                .map(|range| [range.start, range.end])
                .collect(),
        }
    }
}

impl From<&Proposed> for PolicyReport {
    fn from(proposed: &Proposed) -> PolicyReport {
        PolicyReport {
            name: proposed.policy.clone(),
            version: proposed.version.clone(),
            settings: proposed.settings.iter().cloned().collect(),
            fuel: proposed.fuel,
            revisions: Vec::new(),
            seconds: proposed.elapsed.as_secs_f64(),
        }
    }
}

/// The checkpoint whose tensors are those of the plan, unless it is the same. A plan that is not for it has
/// been refused before.
fn cut(plan: &Plan, checkpoint: &Checkpoint) -> Option<Checkpoint> {
    plan.cut(checkpoint).unwrap_or(None)
}

impl Report {
    /// Returns the report of a plan. `staging_bytes` is what a load may take.
    pub fn of_plan(checkpoint: &Checkpoint, proposed: &Proposed, staging_bytes: u64) -> Report {
        let cut = cut(&proposed.plan, checkpoint);
        let tensors = cut.as_ref().unwrap_or(checkpoint).tensors();
        Report {
            schema: 1,
            model: ModelReport {
                path: checkpoint.path().display().to_string(),
                architecture: checkpoint
                    .config()
                    .and_then(|config| config.architecture.clone()),
                tensors: checkpoint.tensors().len(),
                source_bytes: checkpoint.source_bytes(),
                quantization: MethodReport::of(checkpoint),
            },
            policy: PolicyReport::from(proposed),
            digest: PlanDigest::of(checkpoint, &proposed.plan).whole.to_string(),
            ranks: None,
            devices: proposed
                .plan
                .devices
                .iter()
                .zip(fills(tensors, &proposed.plan))
                .map(|(device, fill)| DeviceReport {
                    name: device.device.name.clone(),
                    capacity: device.device.capacity,
                    allocated: device.size.requested,
                    padded: device.size.padded,
                    reserved: device.size.reserved,
                    peak_reserved: device.size.reserved,
                    headroom: device.headroom,
                    tail: device.tail,
                    tensors: device.tensors,
                    fill,
                })
                .collect(),
            host: HostReport {
                staging_bytes,
                scratch_bytes: proposed.plan.scratch_budget(),
                peak_rss_bytes: peak_rss_bytes(),
            },
            load: None,
            placements: None,
        }
    }

    /// Adds why earlier plans were given up.
    pub fn with_revisions(mut self, revisions: &[Revision]) -> Report {
        let report = |revision: &Revision| RevisionReport {
            device: revision.device.clone(),
            needed: revision.needed,
            available: revision.available,
        };
        self.policy.revisions = revisions.iter().map(report).collect();
        self
    }

    /// Says that it is about what is of one of several processes, or about all of them, and whose plan that
    /// is: `digest` is that of all.
    pub fn with_ranks(mut self, ranks: RanksReport, digest: &PlanDigest) -> Report {
        self.ranks = Some(ranks);
        self.digest = digest.whole.to_string();
        self
    }

    /// Adds what loading the model did. `usage` is that of each device, measured while it is loaded.
    pub fn with_load(mut self, model: &Model, usage: &[Usage]) -> Report {
        let stats = model.stats();
        for (device, usage) in self.devices.iter_mut().zip(usage) {
            device.allocated = usage.requested.now;
            device.padded = usage.padded.now;
            device.reserved = usage.reserved.now;
            device.peak_reserved = usage.reserved.peak;
        }
        self.host = HostReport {
            staging_bytes: stats.staging_bytes,
            scratch_bytes: stats.scratch_bytes,
            peak_rss_bytes: peak_rss_bytes(),
        };
        self.load = Some(LoadReport {
            seconds: stats.elapsed.as_secs_f64(),
            bytes_read: stats.bytes_read,
            quantized: stats.quantized,
            stored: stats.stored,
            quantized_on: self
                .devices
                .iter()
                .zip(&stats.quantized_on)
                .filter(|(_, bytes)| bytes.by_host + bytes.by_device > 0)
                .map(|(device, bytes)| {
                    let bytes = QuantizedReport {
                        by_host: bytes.by_host,
                        by_device: bytes.by_device,
                    };
                    (device.name.clone(), bytes)
                })
                .collect(),
            nonfinite_blocks: stats.nonfinite_blocks(),
            nonfinite: stats
                .nonfinite
                .iter()
                .filter_map(|&(index, blocks)| {
                    let tensor = model.tensor_at(index)?;
                    Some((tensor.name().to_owned(), blocks))
                })
                .collect(),
        });
        self
    }

    /// Adds every tensor's placement.
    pub fn with_placements(mut self, checkpoint: &Checkpoint, plan: &Plan) -> Report {
        let cut = cut(plan, checkpoint);
        let tensors = cut.as_ref().unwrap_or(checkpoint).tensors();
        self.placements = Some(
            tensors
                .iter()
                .zip(&plan.tensors)
                .map(|(tensor, planned)| PlacementReport {
                    tensor: tensor.name.clone(),
                    device: planned
                        .placement
                        .device
                        .map(|device| plan.devices[device as usize].device.name.clone()),
                    format: planned.placement.format.to_string(),
                    bytes: planned.requested(),
                    slice: tensor.piece.as_deref().map(SliceReport::from),
                })
                .collect(),
        );
        self
    }
}
