//! From a checkpoint and a policy to a plan.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::products;
use super::{
    BadPlan, FormatRuleError, FormatRules, Plan, PlanError, PlanOptions, SizeError, round_up,
    tensor_part_sizes,
};
use crate::cancel::{Cancelled, Watch};
use crate::checkpoint::{Checkpoint, QuantizationMethod, TensorInfo};
use crate::device::DeviceInfo;
use crate::policy::{Policy, PolicyError, PreviousFailure, Request, check_settings};
use crate::status::Status;
use crate::types::Format;

/// A plan, and which policy made it and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposed {
    /// The plan.
    pub plan: Plan,
    /// The policy's name.
    pub policy: String,
    /// The policy's version.
    pub version: String,
    /// Every setting with the value that was used, and the format rules.
    pub settings: Vec<(String, String)>,
    /// Fuel that a wasm policy burnt.
    pub fuel: Option<u64>,
    /// Time of the policy and the layout.
    pub elapsed: Duration,
}

/// Why a policy gave no plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProposeError {
    /// It refused or failed.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// It answered with something that contradicts the request.
    #[error("policy '{policy}' gave a bad plan: {bad}")]
    BadPlan {
        /// The policy, as it was asked for.
        policy: String,
        /// What is wrong.
        bad: BadPlan,
    },
    /// The user fixed a format that cannot be.
    #[error(transparent)]
    FormatRule(#[from] FormatRuleError),
    /// [`PlanOptions::formats`] names a tensor that is not there.
    #[error("a format is given for tensor number {index}, there are {tensors} (from 0)")]
    NoSuchTensor {
        /// The index given.
        index: usize,
        /// How many tensors there are.
        tensors: usize,
    },
    /// [`PlanOptions::formats`] has a format that cannot hold the tensor.
    #[error("tensor '{tensor}': {source}")]
    IllegalFormat {
        /// The tensor.
        tensor: String,
        /// Why not.
        source: SizeError,
    },
    /// The setting `rows` has no number of rows.
    #[error("setting '{ROWS_SETTING}': '{value}' is not a number of rows")]
    NotRows {
        /// What was given.
        value: String,
    },
    /// It proposed more than a device has.
    #[error("what policy '{policy}' proposes does not fit: {source}")]
    DoesNotFit {
        /// The policy, as it was asked for.
        policy: String,
        /// Always [`PlanError::DoesNotFit`].
        source: PlanError,
    },
    /// It was asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<&ProposeError> for Status {
    fn from(error: &ProposeError) -> Status {
        match error {
            ProposeError::Policy(error) => error.into(),
            ProposeError::FormatRule(_)
            | ProposeError::NotRows { .. }
            | ProposeError::NoSuchTensor { .. }
            | ProposeError::IllegalFormat { .. } => Status::Usage,
            ProposeError::BadPlan { .. } => Status::Policy,
            ProposeError::DoesNotFit { .. } => Status::DoesNotFit,
            ProposeError::Cancelled => Status::Interrupted,
        }
    }
}

impl From<Cancelled> for ProposeError {
    fn from(_: Cancelled) -> ProposeError {
        ProposeError::Cancelled
    }
}

/// The setting that is [`PlanOptions::rows`], whatever the policy.
pub const ROWS_SETTING: &str = "rows";

/// Returns whether a setting of this name is understood here, and no policy is told of it:
/// [`FormatRules`], and [`ROWS_SETTING`].
pub fn is_setting(name: &str) -> bool {
    FormatRules::is_rule(name) || name == ROWS_SETTING
}

/// A policy's settings.
type Settings = Vec<(String, String)>;

/// Takes the number of rows out of settings, the last one of several, and gives what is left.
fn take_rows(settings: Settings) -> Result<(Option<u64>, Settings), ProposeError> {
    let (rows, others): (Settings, Settings) = settings
        .into_iter()
        .partition(|(name, _)| name == ROWS_SETTING);
    let parse = |(_, value): &(String, String)| {
        let value = value.trim();
        value.parse().map_err(|_| ProposeError::NotRows {
            value: value.to_owned(),
        })
    };
    Ok((rows.last().map(parse).transpose()?, others))
}

/// Experts of a token, as the configuration says.
fn experts_per_token(checkpoint: &Checkpoint) -> Option<u64> {
    const KEYS: [&str; 2] = ["num_experts_per_tok", "experts_per_token"];
    let json = &checkpoint.config()?.json;
    let models = [json.get("text_config"), Some(json)];
    let values = models
        .into_iter()
        .flatten()
        .flat_map(|model| KEYS.map(|key| model.get(key)));
    // Nonsense is as if it were absent, as everywhere in the configuration.
    let mut numbers = values.flatten().filter_map(serde_json::Value::as_u64);
    numbers.find(|number| (1..=4096).contains(number))
}

/// Asks `policy` where the checkpoint's tensors go, and lays them out.
///
/// Settings named `format:PATTERN` are [`FormatRules`] and hold whatever the policy says, `rows` is
/// [`PlanOptions::rows`]; all others are the policy's. A checkpoint that another method than bitsandbytes' 4 bits has quantized
/// ([`Checkpoint::quantization`]) stays as it is stored but for such rules, and for what is decoded as it
/// is read ([`TensorInfo::encoded`]), which is the policy's.
///
/// # Errors
/// [`ProposeError`].
pub fn propose(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[DeviceInfo],
    settings: &[(String, String)],
) -> Result<Proposed, ProposeError> {
    propose_with(
        checkpoint,
        policy,
        devices,
        settings,
        &PlanOptions::default(),
    )
}

/// [`propose`] with options. A policy in wasm has a deadline of its own, and is not ended before.
///
/// With [`PlanOptions::reserve_headroom`] the headroom that the policy leaves is reserved too: what it
/// counted for the KV cache, and what the user has it reserve.
///
/// # Errors
/// [`ProposeError`].
pub fn propose_with(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[DeviceInfo],
    settings: &[(String, String)],
    options: &PlanOptions,
) -> Result<Proposed, ProposeError> {
    propose_again(checkpoint, policy, devices, settings, None, options)
}

/// The formats of tensors, those that no rule is for as stored, but what is decoded as it is read: what
/// the method that has quantized a checkpoint left in floating point stays so unless the user asks.
fn with_the_rest_stored(
    required: Vec<(usize, Format)>,
    tensors: &[TensorInfo],
) -> Vec<(usize, Format)> {
    let as_stored = |tensor: &TensorInfo| tensor.encoded.is_none().then_some(Format::Stored);
    let mut formats: Vec<Option<Format>> = tensors.iter().map(as_stored).collect();
    for (tensor, format) in required {
        formats[tensor] = Some(format);
    }
    let formats = formats.into_iter().enumerate();
    formats
        .filter_map(|(tensor, format)| Some((tensor, format?)))
        .collect()
}

/// Formats that are required, those of the second list first; ascending indices, each once.
fn with_formats(
    required: Vec<(usize, Format)>,
    given: &[(usize, Format)],
    tensors: &[TensorInfo],
) -> Result<Vec<(usize, Format)>, ProposeError> {
    if given.is_empty() {
        return Ok(required);
    }
    let mut formats: BTreeMap<usize, Format> = required.into_iter().collect();
    for &(index, format) in given {
        let Some(tensor) = tensors.get(index) else {
            return Err(ProposeError::NoSuchTensor {
                index,
                tensors: tensors.len(),
            });
        };
        if let Err(source) = tensor_part_sizes(tensor, format) {
            return Err(ProposeError::IllegalFormat {
                tensor: tensor.name.clone(),
                source,
            });
        }
        formats.insert(index, format);
    }
    Ok(formats.into_iter().collect())
}

/// The devices as a policy is told of them: without what is reserved beside what it places.
fn offered(
    devices: &[DeviceInfo],
    tensors: &[TensorInfo],
    options: &PlanOptions,
) -> Result<Vec<DeviceInfo>, Cancelled> {
    let mut offered = devices.to_vec();
    if !options.reserve_headroom && options.rows == 0 {
        return Ok(offered);
    }
    let products = match options.rows {
        0 => 0,
        _ => {
            let watch = &mut Watch::new(&options.cancel);
            products::most_bytes(tensors, &options.wanted(), watch)?
        }
    };
    for device in &mut offered {
        // Weights and headroom are rounded up together. Where only whole units are offered, that
        // always fits.
        let granularity = device.granularity.max(1);
        device.available -= device.available % granularity;
        if products::are_computed_on(device) {
            // Headroom that is left free is behind what is rounded up.
            let taken = match options.reserve_headroom {
                true => products,
                false => round_up(products, granularity),
            };
            device.available = device.available.saturating_sub(taken);
        }
    }
    Ok(offered)
}

/// [`propose_with`], telling the policy why its previous plan failed.
pub(crate) fn propose_again(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[DeviceInfo],
    settings: &[(String, String)],
    failure: Option<PreviousFailure>,
    options: &PlanOptions,
) -> Result<Proposed, ProposeError> {
    let start = Instant::now();
    let cancel = &options.cancel;
    let (rules, settings) = FormatRules::take(settings)?;
    let (rows, settings) = take_rows(settings)?;
    let options = &PlanOptions {
        rows: rows.unwrap_or(options.rows),
        experts_per_token: match options.experts_per_token {
            0 => experts_per_token(checkpoint).unwrap_or(0),
            given => given,
        },
        ..options.clone()
    };
    let description = policy.describe()?;
    let label = policy.label().unwrap_or(&description.name);
    check_settings(label, &description, &settings)?;
    cancel.check()?;
    let mut required_formats = rules.formats(checkpoint.tensors(), checkpoint.ties())?;
    // Beside bitsandbytes' 4 bits more may be quantized: policies know which modules it skipped.
    let is_finished = |method: &QuantizationMethod| !method.is_bitsandbytes_4bit();
    if checkpoint.quantization().is_some_and(is_finished) {
        required_formats = with_the_rest_stored(required_formats, checkpoint.tensors());
    }
    let required_formats = with_formats(required_formats, &options.formats, checkpoint.tensors())?;
    let offered = offered(devices, checkpoint.tensors(), options)?;
    let request = Request {
        settings: &settings,
        required_formats: &required_formats,
        failure,
        ..Request::new(checkpoint, &offered)
    };
    cancel.check()?;
    let mut answer = policy.plan(&request)?;
    cancel.check()?;
    let mut formats = BTreeMap::new();
    for (tensor, format) in required_formats {
        // Too few placements are found below.
        if let Some(placement) = answer.proposal.placements.get_mut(tensor) {
            placement.format = format;
        }
        formats.insert(tensor, format);
    }
    for slice in &mut answer.proposal.slices {
        if let Some(&format) = formats.get(&(slice.tensor as usize)) {
            slice.placement.format = format;
        }
    }
    let plan =
        Plan::of_with(checkpoint, devices, &answer.proposal, options).map_err(
            |error| match error {
                PlanError::Bad(bad) => ProposeError::BadPlan {
                    policy: label.to_owned(),
                    bad,
                },
                source @ PlanError::DoesNotFit { .. } => ProposeError::DoesNotFit {
                    policy: label.to_owned(),
                    source,
                },
                PlanError::Cancelled => ProposeError::Cancelled,
            },
        )?;
    let value = |name: &str, default: &str| {
        settings
            .iter()
            .find(|(given, _)| given == name)
            .map_or(default, |(_, value)| value)
            .to_owned()
    };
    Ok(Proposed {
        plan,
        settings: description
            .settings
            .iter()
            .map(|setting| (setting.name.clone(), value(&setting.name, &setting.default)))
            .chain(rules.settings())
            .chain(rows.map(|rows| (ROWS_SETTING.to_owned(), rows.to_string())))
            .collect(),
        policy: description.name,
        version: description.version,
        fuel: answer.fuel,
        elapsed: start.elapsed(),
    })
}
