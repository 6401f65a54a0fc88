//! What shall come of asking a policy.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::Deserialize;

use super::values::{Amount, Count, OneOrMany, Parsed, Range, Ratio, Size, TextOr};
use tightfit::policy::RefusalReason;
use tightfit::types::Format;
use tightfit_wasm::sandbox::GuestFailure;

/// What shall come of asking a policy: a plan with some properties, a refusal, or a failure.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Stated")]
pub struct Expect {
    pub(super) stated: Stated,
}

/// The keys of `[scenario.expect]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Stated {
    pub(super) fits: Option<bool>,
    pub(super) refused: Option<Refused>,
    pub(super) fails: Option<TextOr<Fails>>,
    #[serde(default)]
    pub(super) tensors: BTreeMap<String, TensorExpect>,
    pub(super) together: Option<OneOrMany<String>>,
    #[serde(default)]
    pub(super) devices: BTreeMap<String, DeviceExpect>,
    pub(super) total: Option<TotalExpect>,
    pub(super) balance: Option<Balance>,
    #[serde(default)]
    pub(super) slices: BTreeMap<String, SliceExpect>,
}

impl Stated {
    /// Whether anything is expected of a plan.
    fn wants_plan(&self) -> bool {
        self.fits == Some(true)
            || !self.tensors.is_empty()
            || self.together.is_some()
            || !self.devices.is_empty()
            || self.total.is_some()
            || self.balance.is_some()
            || !self.slices.is_empty()
    }
}

impl TryFrom<Stated> for Expect {
    type Error = String;

    fn try_from(stated: Stated) -> Result<Expect, String> {
        let refusal = stated.fits == Some(false) || stated.refused.is_some();
        let failure = stated.fails.is_some();
        match [stated.wants_plan(), refusal, failure]
            .into_iter()
            .filter(|&wanted| wanted)
            .count()
        {
            0 => Err("the scenario expects nothing".to_owned()),
            1 => Ok(Expect { stated }),
            _ => Err(
                "a plan (fits = true, tensors, together, devices, total, balance, slices), a refusal \
                 (fits = false, refused) and a failure (fails) exclude each other"
                    .to_owned(),
            ),
        }
    }
}

/// A refusal by the policy.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Refused {
    pub(super) reason: Option<Reason>,
    /// Text that the message contains.
    pub(super) message: Option<String>,
    pub(super) missing: Option<Range<Size>>,
}

/// [`RefusalReason`] by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reason {
    DoesNotFit,
    BadSetting,
    Unsupported,
}

impl Reason {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Reason::DoesNotFit => "does-not-fit",
            Reason::BadSetting => "bad-setting",
            Reason::Unsupported => "unsupported",
        }
    }

    pub(super) const fn of(reason: RefusalReason) -> Reason {
        match reason {
            RefusalReason::DoesNotFit => Reason::DoesNotFit,
            RefusalReason::BadSetting => Reason::BadSetting,
            RefusalReason::Unsupported => Reason::Unsupported,
        }
    }
}

/// A failure of the policy.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Fails {
    pub(super) kind: Parsed<FailureKind>,
    /// Text that the message contains.
    pub(super) message: Option<String>,
}

impl FromStr for Fails {
    type Err = String;

    fn from_str(text: &str) -> Result<Fails, String> {
        Ok(Fails {
            kind: Parsed(text.parse()?),
            message: None,
        })
    }
}

/// How a policy fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    NotAPolicy,
    TooLarge,
    TooMany,
    Compile,
    OutOfFuel,
    Deadline,
    Memory,
    Tables,
    HostCall,
    Handles,
    Resources,
    StackOverflow,
    EmptyWasi,
    Exit,
    Panic,
    Trap,
    /// Its plan contradicts the request.
    BadPlan,
    /// Its plan puts more on a device than fits.
    Overfull,
}

impl FailureKind {
    const ALL: [FailureKind; 18] = [
        FailureKind::NotAPolicy,
        FailureKind::TooLarge,
        FailureKind::TooMany,
        FailureKind::Compile,
        FailureKind::OutOfFuel,
        FailureKind::Deadline,
        FailureKind::Memory,
        FailureKind::Tables,
        FailureKind::HostCall,
        FailureKind::Handles,
        FailureKind::Resources,
        FailureKind::StackOverflow,
        FailureKind::EmptyWasi,
        FailureKind::Exit,
        FailureKind::Panic,
        FailureKind::Trap,
        FailureKind::BadPlan,
        FailureKind::Overfull,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            FailureKind::NotAPolicy => "not-a-policy",
            FailureKind::TooLarge => "too-large",
            FailureKind::TooMany => "too-many",
            FailureKind::Compile => "compile",
            FailureKind::OutOfFuel => "out-of-fuel",
            FailureKind::Deadline => "deadline",
            FailureKind::Memory => "memory",
            FailureKind::Tables => "tables",
            FailureKind::HostCall => "host-call",
            FailureKind::Handles => "handles",
            FailureKind::Resources => "resources",
            FailureKind::StackOverflow => "stack-overflow",
            FailureKind::EmptyWasi => "empty-wasi",
            FailureKind::Exit => "exit",
            FailureKind::Panic => "panic",
            FailureKind::Trap => "trap",
            FailureKind::BadPlan => "bad-plan",
            FailureKind::Overfull => "overfull",
        }
    }

    /// `None` where the policy is not to blame.
    pub(super) fn of(failure: &GuestFailure) -> Option<FailureKind> {
        failure.kind().parse().ok()
    }
}

impl FromStr for FailureKind {
    type Err = String;

    fn from_str(text: &str) -> Result<FailureKind, String> {
        FailureKind::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| {
                let known: Vec<&str> = FailureKind::ALL.map(FailureKind::name).to_vec();
                format!(
                    "'{text}' is no kind of failure; there are {}",
                    known.join(", ")
                )
            })
    }
}

/// What becomes of the tensors that a pattern matches.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "TensorKeys")]
pub(super) struct TensorExpect {
    pub(super) device: Option<DeviceRule>,
    pub(super) format: Option<Vec<Format>>,
    pub(super) loaded: Option<bool>,
    pub(super) count: Option<Range<Count>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct TensorKeys {
    device: Option<OneOrMany<String>>,
    format: Option<OneOrMany<Parsed<Format>>>,
    loaded: Option<bool>,
    count: Option<Range<Count>>,
}

/// Where tensors are.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum DeviceRule {
    /// All on one device, whichever.
    Same,
    /// On devices that one of these patterns matches.
    AnyOf(Vec<String>),
}

impl TryFrom<TensorKeys> for TensorExpect {
    type Error = String;

    fn try_from(keys: TensorKeys) -> Result<TensorExpect, String> {
        let device = match keys.device.map(|OneOrMany(names)| names) {
            None => None,
            Some(names) if names == ["same"] => Some(DeviceRule::Same),
            Some(names) if names.iter().any(|name| name == "same") => {
                return Err("'same' stands alone, not in a list of devices".to_owned());
            }
            Some(names) => Some(DeviceRule::AnyOf(names)),
        };
        let expect = TensorExpect {
            device,
            format: keys.format.map(|OneOrMany(formats)| {
                formats.into_iter().map(|Parsed(format)| format).collect()
            }),
            loaded: keys.loaded,
            count: keys.count,
        };
        if expect.device.is_none()
            && expect.format.is_none()
            && expect.loaded.is_none()
            && expect.count.is_none()
        {
            return Err("it expects nothing: give device, format, loaded or count".to_owned());
        }
        if expect.loaded == Some(false) && (expect.device.is_some() || expect.format.is_some()) {
            return Err("what is not loaded has no device and no format".to_owned());
        }
        Ok(expect)
    }
}

/// What the devices hold whose name a pattern matches, each of them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct DeviceExpect {
    /// Whether any tensor lies there.
    pub(super) used: Option<bool>,
    pub(super) tensors: Option<Range<Count>>,
    pub(super) requested: Option<Range<Size>>,
    pub(super) reserved: Option<Range<Size>>,
    /// What the policy leaves free on purpose.
    pub(super) headroom: Option<Range<Size>>,
    /// What is free beside the weights.
    pub(super) free: Option<Range<Size>>,
}

/// How the tensors are cut that a pattern matches, each of them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "SliceKeys")]
pub(super) struct SliceExpect {
    /// How many match.
    pub(super) count: Option<Range<Count>>,
    /// How many slices each has; 0 of what is not cut.
    pub(super) parts: Option<Range<Count>>,
    pub(super) dimension: Option<u32>,
    /// Whether each element is in one slice.
    pub(super) complete: Option<bool>,
    /// Whether each device has a slice that is all of it.
    pub(super) copies: Option<bool>,
    /// What the devices have whose name a pattern matches.
    pub(super) ranges: BTreeMap<String, Vec<Extent>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct SliceKeys {
    count: Option<Range<Count>>,
    parts: Option<Range<Count>>,
    dimension: Option<u32>,
    complete: Option<bool>,
    copies: Option<bool>,
    #[serde(default)]
    ranges: BTreeMap<String, OneOrMany<Parsed<Extent>>>,
}

impl TryFrom<SliceKeys> for SliceExpect {
    type Error = &'static str;

    fn try_from(keys: SliceKeys) -> Result<SliceExpect, &'static str> {
        let extents = |OneOrMany(extents): OneOrMany<Parsed<Extent>>| {
            extents.into_iter().map(|Parsed(extent)| extent).collect()
        };
        let ranges = keys.ranges.into_iter();
        let expect = SliceExpect {
            count: keys.count,
            parts: keys.parts,
            dimension: keys.dimension,
            complete: keys.complete,
            copies: keys.copies,
            ranges: ranges.map(|(name, given)| (name, extents(given))).collect(),
        };
        let is_empty = expect.count.is_none()
            && expect.parts.is_none()
            && expect.dimension.is_none()
            && expect.complete.is_none()
            && expect.copies.is_none()
            && expect.ranges.is_empty();
        match is_empty {
            true => {
                Err("it expects nothing: give count, parts, dimension, complete, copies or ranges")
            }
            false => Ok(expect),
        }
    }
}

/// A range of a dimension, written as slices are named: `0:1024`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl FromStr for Extent {
    type Err = String;

    fn from_str(text: &str) -> Result<Extent, String> {
        let number = |text: &str| text.trim().parse().ok();
        let both = text.split_once(':');
        both.and_then(|(start, end)| Some((number(start)?, number(end)?)))
            .filter(|(start, end)| start < end)
            .map(|(start, end)| Extent { start, end })
            .ok_or_else(|| format!("'{text}' is not a range such as 0:1024"))
    }
}

/// What all devices hold together.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct TotalExpect {
    /// Devices on which any tensor lies.
    pub(super) devices: Option<Range<Count>>,
    pub(super) tensors: Option<Range<Count>>,
    pub(super) requested: Option<Range<Size>>,
    pub(super) reserved: Option<Range<Size>>,
    pub(super) headroom: Option<Range<Size>>,
}

/// How far the fullest and the emptiest accelerator may be apart, weights and headroom together.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "BalanceKeys")]
pub(super) struct Balance {
    /// The fullest over the emptiest, at most.
    pub(super) ratio: Option<f64>,
    /// Bytes between them, at most.
    pub(super) within: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct BalanceKeys {
    ratio: Option<Ratio>,
    within: Option<Amount<Size>>,
}

impl TryFrom<BalanceKeys> for Balance {
    type Error = &'static str;

    fn try_from(keys: BalanceKeys) -> Result<Balance, &'static str> {
        if keys.ratio.is_none() && keys.within.is_none() {
            return Err("give ratio or within");
        }
        Ok(Balance {
            ratio: keys.ratio.map(|ratio| ratio.0),
            within: keys.within.map(|bytes| bytes.0),
        })
    }
}
