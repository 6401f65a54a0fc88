//! An error as data: what `--json` prints in place of a result.

use std::path::Path;

use serde::Serialize;

use tightfit::checkpoint::CheckpointError;
use tightfit::device::DeviceError;
use tightfit::hub::HubError;
use tightfit::load::{LoadError, ReserveError};
use tightfit::plan::{BadPlan, FormatRuleError, PlanError, ProposeError, ROWS_SETTING};
use tightfit::policy::{PolicyError, RefusalReason};
use tightfit::save::SaveError;
use tightfit::status::Status;
use tightfit_wasm::sandbox::GuestFailure;

/// What stopped a command, for programs. Fields that do not apply, or are not known, are `null`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorReport {
    /// The exit status.
    pub status: u8,
    /// What kind of error it is, finer than the status: `does-not-fit`, `out-of-fuel`, `checkpoint`.
    pub kind: &'static str,
    /// The sentence for people.
    pub message: String,
    /// The policy or program concerned, as it was asked for.
    pub guest: Option<String>,
    /// The device concerned.
    pub device: Option<String>,
    /// The tensor concerned.
    pub tensor: Option<String>,
    /// The setting concerned.
    pub setting: Option<String>,
    /// The file concerned.
    pub path: Option<String>,
    /// The limit that a guest ran into, as `--policy-limit` names it.
    pub limit: Option<String>,
    /// Bytes needed, headroom included.
    pub need_bytes: Option<u64>,
    /// Bytes that there are.
    pub have_bytes: Option<u64>,
    /// Bytes more with which it would do.
    pub missing_bytes: Option<u64>,
}

impl ErrorReport {
    /// Returns an error of which only the kind and the sentence are known.
    pub fn new(status: Status, kind: &'static str, error: &dyn std::fmt::Display) -> ErrorReport {
        ErrorReport {
            status: status as u8,
            kind,
            message: error.to_string(),
            guest: None,
            device: None,
            tensor: None,
            setting: None,
            path: None,
            limit: None,
            need_bytes: None,
            have_bytes: None,
            missing_bytes: None,
        }
    }

    /// Names the file concerned.
    pub fn at(mut self, path: &Path) -> ErrorReport {
        self.path = Some(path.display().to_string());
        self
    }

    /// Says how a guest failed, which `name` names.
    pub fn of_guest(mut self, name: &str, failure: &GuestFailure) -> ErrorReport {
        self.kind = failure.kind();
        self.guest = Some(name.to_owned());
        self.limit = failure.limit().map(str::to_owned);
        self
    }

    fn needing(mut self, need: u64, have: u64) -> ErrorReport {
        self.need_bytes = Some(need);
        self.have_bytes = Some(have);
        self.missing_bytes = Some(need.saturating_sub(have));
        self
    }
}

impl From<&CheckpointError> for ErrorReport {
    fn from(error: &CheckpointError) -> ErrorReport {
        use CheckpointError as E;
        let (path, tensor) = match error {
            E::DuplicateEntry { path, tensor }
            | E::MissingShard { path, tensor }
            | E::NotInShard { path, tensor }
            | E::UnsafeShardName { path, tensor, .. }
            | E::BadTensorName { path, tensor, .. }
            | E::UnknownDType { path, tensor, .. }
            | E::TooManyDimensions { path, tensor, .. }
            | E::ShapeOverflow { path, tensor, .. }
            | E::ReversedOffsets { path, tensor, .. }
            | E::SizeMismatch { path, tensor, .. }
            | E::Gap { path, tensor, .. }
            | E::Truncated { path, tensor, .. } => (Some(path), Some(tensor)),
            E::DuplicateTensor { first, tensor, .. } => (Some(first), Some(tensor)),
            E::Overlap { path, first, .. } => (Some(path), Some(first)),
            E::NotFound { path }
            | E::WrongKind { path, .. }
            | E::Adapter { path, .. }
            | E::DownloadNotEnded { path, .. }
            | E::NotACheckpoint { path, .. }
            | E::EmptyDirectory { path }
            | E::OnlyPickles { path, .. }
            | E::Ambiguous { path, .. }
            | E::IncompleteSet { path, .. }
            | E::BadCacheEntry { path, .. }
            | E::Io { path, .. }
            | E::NotAFile { path }
            | E::TooLarge { path, .. }
            | E::Json { path, .. }
            | E::NotUtf8 { path, .. }
            | E::NotAnObject { path, .. }
            | E::EmptyIndex { path }
            | E::NoHeader { path, .. }
            | E::HeaderPastEnd { path, .. }
            | E::TrailingBytes { path, .. }
            | E::LeadsOut { path, .. } => (Some(path), None),
            _ => (None, None),
        };
        let kind = match error {
            E::Cancelled => "interrupted",
            E::WrongKind { kind, .. } => kind.name(),
            E::OnlyPickles { .. } => "pickle",
            E::Adapter { .. } => "adapter",
            E::DownloadNotEnded { .. } => "download-not-ended",
            _ => "checkpoint",
        };
        ErrorReport {
            path: path.map(|path| path.display().to_string()),
            tensor: tensor.cloned(),
            ..ErrorReport::new(error.into(), kind, error)
        }
    }
}

impl From<&DeviceError> for ErrorReport {
    fn from(error: &DeviceError) -> ErrorReport {
        let kind = match error {
            DeviceError::OutOfMemory { .. }
            | DeviceError::Driver {
                out_of_memory: true,
                ..
            } => "out-of-memory",
            DeviceError::NamedTwice { .. } => "usage",
            DeviceError::Unavailable { .. } => "no-device",
            _ => "device",
        };
        let report = ErrorReport {
            device: Some(error.device().to_owned()),
            ..ErrorReport::new(error.into(), kind, error)
        };
        match *error {
            DeviceError::OutOfMemory { need, have, .. } => report.needing(need, have),
            _ => report,
        }
    }
}

impl From<&PolicyError> for ErrorReport {
    fn from(error: &PolicyError) -> ErrorReport {
        let report = |kind| ErrorReport::new(error.into(), kind, error);
        match error {
            PolicyError::Refused { policy, refusal } => ErrorReport {
                guest: Some(policy.clone()),
                missing_bytes: refusal.missing_bytes,
                ..report(match refusal.reason {
                    RefusalReason::DoesNotFit => "does-not-fit",
                    RefusalReason::BadSetting => "bad-setting",
                    RefusalReason::Unsupported => "unsupported",
                })
            },
            PolicyError::Failed { policy, .. } => match GuestFailure::of(error) {
                Some(failure) => report("").of_guest(policy, failure),
                None => ErrorReport {
                    guest: Some(policy.clone()),
                    ..report("policy")
                },
            },
            PolicyError::BadAnswer { policy, tensor, .. } => ErrorReport {
                guest: Some(policy.clone()),
                tensor: Some(tensor.clone()),
                ..report("bad-plan")
            },
            PolicyError::UnknownSetting { policy, name, .. } => ErrorReport {
                guest: Some(policy.clone()),
                setting: Some(name.clone()),
                ..report("bad-setting")
            },
            PolicyError::RepeatedSetting { name } => ErrorReport {
                setting: Some(name.clone()),
                ..report("bad-setting")
            },
            PolicyError::Unknown { name, .. } => ErrorReport {
                guest: Some(name.clone()),
                ..report("no-policy")
            },
            PolicyError::Unreadable { path, .. } => report("no-policy").at(path),
            _ => report("policy"),
        }
    }
}

impl From<&ProposeError> for ErrorReport {
    fn from(error: &ProposeError) -> ErrorReport {
        let report = |kind| ErrorReport::new(error.into(), kind, error);
        match error {
            ProposeError::Policy(error) => error.into(),
            ProposeError::FormatRule(rule) => {
                let (pattern, tensor) = match rule {
                    FormatRuleError::NotAFormat { pattern, .. }
                    | FormatRuleError::NoPattern { pattern }
                    | FormatRuleError::NoMatch { pattern, .. } => (pattern, None),
                    FormatRuleError::Illegal {
                        pattern, tensor, ..
                    } => (pattern, Some(tensor.clone())),
                    _ => return report("bad-setting"),
                };
                ErrorReport {
                    setting: Some(format!("format:{pattern}")),
                    tensor,
                    ..report("bad-setting")
                }
            }
            ProposeError::BadPlan { policy, bad } => ErrorReport {
                guest: Some(policy.clone()),
                tensor: match bad {
                    BadPlan::NoSuchDevice { tensor, .. }
                    | BadPlan::IllegalFormat { tensor, .. }
                    | BadPlan::TornTie { tensor, .. } => Some(tensor.clone()),
                    _ => None,
                },
                ..report("bad-plan")
            },
            ProposeError::DoesNotFit { policy, source } => {
                let report = ErrorReport {
                    guest: Some(policy.clone()),
                    ..report("does-not-fit")
                };
                match source {
                    PlanError::DoesNotFit {
                        device,
                        tensor,
                        need,
                        headroom,
                        have,
                        ..
                    } => ErrorReport {
                        device: Some(device.clone()),
                        tensor: Some(tensor.clone()),
                        ..report.needing(need.saturating_add(*headroom), *have)
                    },
                    _ => report,
                }
            }
            ProposeError::IllegalFormat { tensor, .. } => ErrorReport {
                tensor: Some(tensor.clone()),
                ..report("usage")
            },
            ProposeError::NotRows { .. } => ErrorReport {
                setting: Some(ROWS_SETTING.to_owned()),
                ..report("bad-setting")
            },
            ProposeError::NoSuchTensor { .. } => report("usage"),
            ProposeError::Cancelled => report("interrupted"),
            _ => report("internal"),
        }
    }
}

impl From<&LoadError> for ErrorReport {
    fn from(error: &LoadError) -> ErrorReport {
        let report = |kind| ErrorReport::new(error.into(), kind, error);
        match error {
            LoadError::Checkpoint(error) => error.into(),
            LoadError::Device(error) => error.into(),
            LoadError::NonFinite { tensor, .. } => ErrorReport {
                tensor: Some(tensor.clone()),
                ..report("non-finite")
            },
            LoadError::NoTransfer { device } => ErrorReport {
                device: Some(device.clone()),
                ..report("device")
            },
            LoadError::Staging(_) => report("usage"),
            LoadError::Cancelled => report("interrupted"),
            _ => report("internal"),
        }
    }
}

impl From<&ReserveError> for ErrorReport {
    fn from(error: &ReserveError) -> ErrorReport {
        match error {
            ReserveError::Propose(error) => error.into(),
            ReserveError::Revised { source, .. } => ErrorReport {
                message: error.to_string(),
                ..source.as_ref().into()
            },
            ReserveError::Load(error) => error.into(),
            _ => ErrorReport::new(error.into(), "internal", error),
        }
    }
}

impl From<&HubError> for ErrorReport {
    fn from(error: &HubError) -> ErrorReport {
        let report = |kind| ErrorReport::new(error.into(), kind, error);
        match error {
            HubError::Checkpoint(source) => ErrorReport {
                status: Status::from(error) as u8,
                ..source.into()
            },
            HubError::Cancelled => report("interrupted"),
            HubError::Io { path, .. } | HubError::LeadsOut { path } => report("hub").at(path),
            _ => report("hub"),
        }
    }
}

impl From<&SaveError> for ErrorReport {
    fn from(error: &SaveError) -> ErrorReport {
        let report = |kind| ErrorReport::new(error.into(), kind, error);
        match error {
            SaveError::Cancelled => report("interrupted"),
            SaveError::Exists { path } => report("exists").at(path),
            SaveError::Io {
                action: "list",
                path,
                ..
            } => report("checkpoint").at(path),
            SaveError::Io { path, .. } => report("output").at(path),
            SaveError::NotADirectoryName { path } => report("usage").at(path),
            SaveError::HeaderTooLarge { .. } => report("usage"),
            SaveError::Checkpoint(error) => error.into(),
            SaveError::Load(error) => error.into(),
            SaveError::OtherMethod { tensor, .. } => ErrorReport {
                tensor: Some(tensor.clone()),
                ..report("quantized-already")
            },
            SaveError::NoReader { tensor } => ErrorReport {
                tensor: Some(tensor.clone()),
                ..report("quantized-already")
            },
            SaveError::MixedMethods { .. } => report("quantized-already"),
            SaveError::SameName { name } => ErrorReport {
                tensor: Some(name.clone()),
                ..report("checkpoint")
            },
            _ => report("internal"),
        }
    }
}
