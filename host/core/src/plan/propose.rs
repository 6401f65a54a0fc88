//! From a checkpoint and a policy to a plan.

use std::time::{Duration, Instant};

use super::{BadPlan, FormatRuleError, FormatRules, Plan, PlanError};
use crate::cancel::{CancelToken, Cancelled};
use crate::checkpoint::Checkpoint;
use crate::device::DeviceInfo;
use crate::policy::{Policy, PolicyError, PreviousFailure, Request, check_settings};
use crate::status::Status;

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
            ProposeError::FormatRule(_) => Status::Usage,
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

/// Asks `policy` where the checkpoint's tensors go, and lays them out.
///
/// Settings named `format:PATTERN` are [`FormatRules`] and hold whatever the policy says; all others
/// are the policy's.
///
/// # Errors
/// [`ProposeError`].
pub fn propose(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[DeviceInfo],
    settings: &[(String, String)],
) -> Result<Proposed, ProposeError> {
    let never = CancelToken::new();
    propose_again(checkpoint, policy, devices, settings, false, None, &never)
}

/// [`propose`] until it is asked to stop. The policy itself has a deadline of its own, and is not
/// ended before.
///
/// # Errors
/// [`ProposeError`].
pub fn propose_with(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[DeviceInfo],
    settings: &[(String, String)],
    cancel: &CancelToken,
) -> Result<Proposed, ProposeError> {
    propose_again(checkpoint, policy, devices, settings, false, None, cancel)
}

/// [`propose`], but the headroom that the policy leaves is reserved too ([`Plan::with_tail`]): what
/// it counted for the KV cache, and what the user has it reserve.
///
/// # Errors
/// [`ProposeError`].
pub fn propose_with_tail(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[DeviceInfo],
    settings: &[(String, String)],
) -> Result<Proposed, ProposeError> {
    let never = CancelToken::new();
    propose_again(checkpoint, policy, devices, settings, true, None, &never)
}

/// [`propose`] or, with `tail`, [`propose_with_tail`], telling the policy why its previous plan
/// failed.
pub(crate) fn propose_again(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[DeviceInfo],
    settings: &[(String, String)],
    tail: bool,
    failure: Option<PreviousFailure>,
    cancel: &CancelToken,
) -> Result<Proposed, ProposeError> {
    let start = Instant::now();
    let (rules, settings) = FormatRules::take(settings)?;
    let description = policy.describe()?;
    let label = policy.label().unwrap_or(&description.name);
    check_settings(label, &description, &settings)?;
    cancel.check()?;
    let required_formats = rules.formats(checkpoint.tensors(), checkpoint.ties())?;
    let mut offered = devices.to_vec();
    if tail {
        // Weights and headroom are rounded up together. Where only whole units are offered, that
        // always fits.
        for device in &mut offered {
            device.available -= device.available % device.granularity.max(1);
        }
    }
    let request = Request {
        config_json: checkpoint.config().map_or("{}", |config| &config.text),
        tensors: checkpoint.tensors(),
        ties: checkpoint.ties(),
        devices: &offered,
        settings: &settings,
        required_formats: &required_formats,
        failure,
    };
    cancel.check()?;
    let mut answer = policy.plan(&request)?;
    cancel.check()?;
    for (tensor, format) in required_formats {
        // Too few placements are found below.
        if let Some(placement) = answer.proposal.placements.get_mut(tensor) {
            placement.format = format;
        }
    }
    let plan = Plan::lay_out(
        checkpoint.tensors(),
        checkpoint.ties(),
        devices,
        &answer.proposal.placements,
        &answer.proposal.headroom,
        tail,
        cancel,
    )
    .map_err(|error| match error {
        PlanError::Bad(bad) => ProposeError::BadPlan {
            policy: label.to_owned(),
            bad,
        },
        source @ PlanError::DoesNotFit { .. } => ProposeError::DoesNotFit {
            policy: label.to_owned(),
            source,
        },
        PlanError::Cancelled => ProposeError::Cancelled,
    })?;
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
            .collect(),
        policy: description.name,
        version: description.version,
        fuel: answer.fuel,
        elapsed: start.elapsed(),
    })
}
