//! Between the generated types and our own.

pub(crate) use policy::*;

use super::bindings::slicing::tightfit::host::slices as wit_slices;
use super::bindings::tightfit::host::types;
use tightfit::checkpoint::TensorInfo;
use tightfit::types::{BlockSize, DType, Format, IllegalBlockSize, Placement, QuantType, Slice};

/// A placement that no plan can have: its format has a block size that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tensor '{tensor}': {source}")]
pub struct BadPlacement {
    /// The tensor that is placed.
    pub tensor: String,
    /// Which block size that is.
    pub source: IllegalBlockSize,
}

/// Both directions of an enumeration whose cases have corresponding names; `more` of ours are told
/// as one of theirs.
macro_rules! same_cases {
    ($(#[$meta:meta])* $to_ours:ident, $to_theirs:ident, $ours:ident, $theirs:path:
     $($case:ident = $wit:ident),* $(; $($more:ident => $told:ident),*)? $(,)?) => {
        $(#[$meta])*
        pub(crate) fn $to_ours(given: $theirs) -> $ours {
            use $theirs as Theirs;
            match given { $(Theirs::$wit => $ours::$case),* }
        }

        pub(crate) fn $to_theirs(given: $ours) -> $theirs {
            use $theirs as Theirs;
            match given {
                $($ours::$case => Theirs::$wit,)*
                $($($ours::$more => Theirs::$told,)*)?
            }
        }
    };
}

pub(super) use same_cases;

same_cases!(dtype, wit_dtype, DType, types::Dtype:
    Bool = Bool, U8 = U8, I8 = I8, U16 = U16, I16 = I16, U32 = U32, I32 = I32, U64 = U64,
    I64 = I64, F4 = F4, F6E2M3 = F6E2m3, F6E3M2 = F6E3m2, F8E4M3 = F8E4m3, F8E5M2 = F8E5m2,
    F8E8M0 = F8E8m0, F16 = F16, Bf16 = Bf16, F32 = F32, F64 = F64, C64 = C64;
    // A new case would turn away every guest that was built before.
    F8E4M3Fnuz => F8E4m3, F8E5M2Fnuz => F8E5m2,
);

same_cases!(quant_type, wit_quant_type, QuantType, types::QuantType: Nf4 = Nf4, Fp4 = Fp4);

/// Placements as a guest gives them. The formats of those tensors that are `ignored` do not count.
pub(crate) fn placements(
    given: Vec<types::Placement>,
    tensors: &[TensorInfo],
    is_ignored: impl Fn(usize) -> bool,
) -> Result<Vec<Placement>, BadPlacement> {
    let given = given.into_iter().enumerate();
    given
        .map(|(index, given)| placement(given, index, tensors, &is_ignored))
        .collect()
}

/// Slices as a guest gives them. The formats of slices of tensors that are `ignored` do not count.
pub(crate) fn slices(
    given: Vec<wit_slices::Slice>,
    tensors: &[TensorInfo],
    is_ignored: impl Fn(usize) -> bool,
) -> Result<Vec<Slice>, BadSlices> {
    // One for each slice is counted with the slice.
    let ranges: usize = given
        .iter()
        .map(|slice| slice.ranges.len().max(1) - 1)
        .sum();
    if ranges > MOST_RANGES {
        return Err(BadSlices::Ranges(TooManyRanges { have: ranges }));
    }
    let slice = |given: wit_slices::Slice| {
        let index = given.tensor as usize;
        Ok(Slice {
            tensor: given.tensor,
            dimension: given.dimension,
            ranges: given
                .ranges
                .iter()
                .map(|range| range.start..range.end)
                .collect(),
            placement: placement(given.placement, index, tensors, &is_ignored)?,
        })
    };
    given.into_iter().map(slice).collect()
}

/// Ranges that a guest's slices have in all, beyond one for each: for each of them the host keeps some hundred
/// bytes, ten times what it is in the guest.
pub(crate) const MOST_RANGES: usize = 1 << 18;

/// Slices with more ranges than the host takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its slices have {have} ranges beyond one for each, there can be {MOST_RANGES}")]
pub struct TooManyRanges {
    /// How many there are.
    pub have: usize,
}

/// Why a guest's slices are none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadSlices {
    #[error(transparent)]
    Placement(#[from] BadPlacement),
    #[error(transparent)]
    Ranges(TooManyRanges),
}

fn placement(
    given: types::Placement,
    index: usize,
    tensors: &[TensorInfo],
    is_ignored: &impl Fn(usize) -> bool,
) -> Result<Placement, BadPlacement> {
    let format = match format(given.format) {
        Ok(format) => format,
        Err(_) if given.device.is_none() || is_ignored(index) => Format::Stored,
        Err(source) => {
            return Err(BadPlacement {
                // There may be more placements than tensors.
                tensor: tensors
                    .get(index)
                    .map_or_else(|| format!("number {index}"), |tensor| tensor.name.clone()),
                source,
            });
        }
    };
    Ok(Placement {
        device: given.device,
        format,
    })
}

pub(crate) fn format(format: types::Format) -> Result<Format, IllegalBlockSize> {
    Ok(match format {
        types::Format::Stored => Format::Stored,
        types::Format::Cast(target) => Format::Cast(dtype(target)),
        types::Format::Nf4(nf4) => Format::Nf4 {
            block_size: BlockSize::try_from(nf4.block_size)?,
            double_quantized: nf4.double_quantized,
        },
    })
}

pub(crate) fn wit_format(format: Format) -> types::Format {
    match format {
        Format::Stored => types::Format::Stored,
        Format::Cast(target) => types::Format::Cast(wit_dtype(target)),
        Format::Nf4 {
            block_size,
            double_quantized,
        } => types::Format::Nf4(types::Nf4Format {
            block_size: block_size.into(),
            double_quantized,
        }),
    }
}

mod policy {
    use super::super::bindings::exports::tightfit::host::planner;
    use super::super::bindings::slicing::exports::tightfit::host::slicer;
    use super::super::bindings::tightfit::host::types;
    use super::{
        BadPlacement, BadSlices, placements, slices, wit_dtype, wit_format, wit_quant_type,
    };
    use tightfit::checkpoint::{TensorInfo, Tie};
    use tightfit::device::{DeviceInfo, DeviceKind};
    use tightfit::policy::{Description, Proposal, Refusal, RefusalReason, Request, Setting};
    // To be shown to people, who are not to be flooded by them.
    use tightfit::text::truncated as text;

    /// Tensor counts are bounded by the checkpoint reader, far below 2^32.
    pub(crate) fn index(index: usize) -> u32 {
        u32::try_from(index).expect("a tensor index fits in 32 bits")
    }

    pub(crate) fn tensor(tensor: &TensorInfo) -> types::Tensor {
        types::Tensor {
            name: tensor.name.clone(),
            dtype: wit_dtype(tensor.dtype),
            shape: tensor.shape.clone(),
            bytes: tensor.source_bytes(),
            quantized: tensor.quantized.as_ref().map(|given| types::Quantization {
                quant_type: wit_quant_type(given.quant_type),
                block_size: given.block_size.into(),
                double_quantized: given.nested.is_some(),
            }),
        }
    }

    fn tie(tie: &Tie) -> planner::Tie {
        planner::Tie {
            tensor: index(tie.tensor),
            alias: tie.alias.clone(),
            alias_tensor: tie.alias_tensor.map(index),
        }
    }

    pub(crate) fn device(device: &DeviceInfo) -> types::Device {
        types::Device {
            name: device.name.clone(),
            kind: match device.kind {
                DeviceKind::Cuda => types::DeviceKind::Cuda,
                DeviceKind::Sim => types::DeviceKind::Sim,
                DeviceKind::Cpu => types::DeviceKind::Cpu,
            },
            capacity: device.capacity,
            available: device.available,
            granularity: device.granularity,
        }
    }

    pub(crate) fn request(request: &Request<'_>) -> planner::Request {
        planner::Request {
            config_json: request.config_json.to_owned(),
            tensors: request.tensors.iter().map(tensor).collect(),
            ties: request.ties.iter().map(tie).collect(),
            devices: request.devices.iter().map(device).collect(),
            settings: request.settings.to_vec(),
            required_formats: request
                .required_formats
                .iter()
                .map(|&(tensor, format)| planner::RequiredFormat {
                    tensor: index(tensor),
                    format: wit_format(format),
                })
                .collect(),
            failure: request.failure.map(|failure| planner::Failure {
                device: failure.device,
                needed: failure.needed,
                available: failure.available,
            }),
        }
    }

    /// Of each text at most `limit` bytes are kept.
    pub(crate) fn description(given: planner::Description, limit: usize) -> Description {
        Description {
            name: text(given.name, limit),
            version: text(given.version, limit),
            settings: given
                .settings
                .into_iter()
                .map(|setting| Setting {
                    name: text(setting.name, limit),
                    default: text(setting.default, limit),
                    help: text(setting.help, limit),
                })
                .collect(),
        }
    }

    /// The answer to this request.
    pub(crate) fn proposal(
        given: planner::Proposal,
        request: &Request<'_>,
    ) -> Result<Proposal, BadPlacement> {
        Ok(Proposal {
            placements: placements(given.placements, request.tensors, is_required(request))?,
            headroom: given.headroom,
            slices: Vec::new(),
        })
    }

    /// The answer to this request of a policy that cuts tensors.
    pub(crate) fn sliced_proposal(
        given: slicer::SlicedProposal,
        request: &Request<'_>,
    ) -> Result<Proposal, BadSlices> {
        Ok(Proposal {
            placements: placements(given.placements, request.tensors, is_required(request))?,
            headroom: given.headroom,
            slices: slices(given.slices, request.tensors, is_required(request))?,
        })
    }

    /// Whatever format is answered for these is replaced.
    fn is_required(request: &Request<'_>) -> impl Fn(usize) -> bool {
        let required = request.required_formats;
        move |tensor| {
            required
                .binary_search_by_key(&tensor, |&(index, _)| index)
                .is_ok()
        }
    }

    /// Of the message at most `limit` bytes are kept.
    pub(crate) fn refusal(given: planner::Refusal, limit: usize) -> Refusal {
        Refusal {
            reason: match given.reason {
                planner::RefusalReason::DoesNotFit => RefusalReason::DoesNotFit,
                planner::RefusalReason::BadSetting => RefusalReason::BadSetting,
                planner::RefusalReason::Unsupported => RefusalReason::Unsupported,
            },
            message: text(given.message, limit),
            missing_bytes: given.missing_bytes,
        }
    }
}
