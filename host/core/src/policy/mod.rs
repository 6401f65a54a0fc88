//! Who decides where tensors go. The crate `tightfit-wasm` has policies in wasm.
//!
//! A policy sees metadata only and answers with one placement per tensor. Whatever it answers is
//! checked again when the plan is made, so a policy can be wrong but not harmful.

mod error;

use std::fmt;

pub use error::PolicyError;

use crate::checkpoint::{Checkpoint, TensorInfo, Tie};
use crate::device::DeviceInfo;
use crate::types::{Bytes, Format, Placement, Slice};

/// One setting that a policy understands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its name, as in `--set name=value`.
    pub name: String,
    /// The value that is used when none is given.
    pub default: String,
    /// One sentence of help.
    pub help: String,
}

/// Who a policy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// What can be set.
    pub settings: Vec<Setting>,
}

/// Why the previous plan could not be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreviousFailure {
    /// Index of the device that had too little memory.
    pub device: u32,
    /// Bytes that the plan needed there.
    pub needed: u64,
    /// Bytes that there were.
    pub available: u64,
}

/// Everything a policy is told.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The checkpoint's config.json as JSON that every parser reads, or `{}` when there is none: what
    /// Python writes as `NaN`, `Infinity` and `-Infinity` is `null`.
    pub config_json: &'a str,
    /// In checkpoint order.
    pub tensors: &'a [TensorInfo],
    /// Names that mean one parameter.
    pub ties: &'a [Tie],
    /// In the user's order.
    pub devices: &'a [DeviceInfo],
    /// Names and values; only names that the policy described, each at most once.
    pub settings: &'a [(String, String)],
    /// Formats that the user has fixed, by the tensor's index, in ascending order. Whatever a policy
    /// answers for these tensors is replaced.
    pub required_formats: &'a [(usize, Format)],
    /// Set when a plan could not be carried out and this is another attempt.
    pub failure: Option<PreviousFailure>,
}

impl<'a> Request<'a> {
    /// Asks for a plan of this checkpoint on these devices, with nothing set.
    pub fn new(checkpoint: &'a Checkpoint, devices: &'a [DeviceInfo]) -> Request<'a> {
        Request {
            config_json: checkpoint.config_json(),
            tensors: checkpoint.tensors(),
            ties: checkpoint.ties(),
            devices,
            settings: &[],
            required_formats: &[],
            failure: None,
        }
    }
}

/// A policy's answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Proposal {
    /// One entry per tensor of the request. One that has slices is placed nowhere here.
    pub placements: Vec<Placement>,
    /// Bytes to be left free on each device.
    pub headroom: Vec<u64>,
    /// Parts of tensors that are placed by themselves, those of a tensor in their order.
    pub slices: Vec<Slice>,
}

/// What kind of refusal it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalReason {
    /// The tensors do not fit on the devices.
    DoesNotFit,
    /// A setting has a value that the policy cannot use.
    BadSetting,
    /// The policy cannot handle this model or these devices.
    Unsupported,
}

/// A policy that cannot place a model says why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of refusal it is.
    pub reason: RefusalReason,
    /// One sentence for the user.
    pub message: String,
    /// How many bytes more would be needed, where that is known.
    pub missing_bytes: Option<u64>,
}

impl fmt::Display for Refusal {
    /// The message, with the bytes that are missing unless it says them itself.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match self.missing_bytes {
            Some(bytes) if bytes > 0 && !self.message.contains(" missing") => {
                let message = self.message.trim_end();
                let joint = if message.ends_with(['.', '!', '?']) {
                    ""
                } else {
                    ";"
                };
                write!(f, "{joint} {} are missing", Bytes(bytes))
            }
            _ => Ok(()),
        }
    }
}

/// A proposal with what it took to make it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The proposal.
    pub proposal: Proposal,
    /// Fuel that a wasm policy burnt: the same request always takes the same.
    pub fuel: Option<u64>,
}

/// Decides where tensors go and in which format. Implemented by `tightfit_wasm::WasmPolicy`, and
/// by applications that have their own rules.
pub trait Policy: Send + Sync {
    /// Who the policy is and what can be set.
    ///
    /// # Errors
    /// [`PolicyError::Failed`] when the policy itself fails.
    fn describe(&self) -> Result<Description, PolicyError>;

    /// How errors name it, which is as it was asked for: a built-in name, a file. By default, and
    /// for policies that nobody asks for by a name, it is what it calls itself.
    fn label(&self) -> Option<&str> {
        None
    }

    /// Places every tensor of the request.
    ///
    /// # Errors
    /// [`PolicyError::Refused`] when the policy cannot place them, [`PolicyError::Failed`] when it
    /// fails.
    fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError>;
}

/// Checks settings against a description; `policy` is how an error names it.
///
/// # Errors
/// [`PolicyError::UnknownSetting`], or [`PolicyError::RepeatedSetting`] for one given twice.
pub fn check_settings(
    policy: &str,
    description: &Description,
    settings: &[(String, String)],
) -> Result<(), PolicyError> {
    for (index, (name, _)) in settings.iter().enumerate() {
        if !description.settings.iter().any(|known| known.name == *name) {
            return Err(PolicyError::UnknownSetting {
                policy: policy.to_owned(),
                name: name.clone(),
                known: description
                    .settings
                    .iter()
                    .map(|known| known.name.clone())
                    .collect(),
            });
        }
        if settings[..index].iter().any(|(other, _)| other == name) {
            return Err(PolicyError::RepeatedSetting { name: name.clone() });
        }
    }
    Ok(())
}
