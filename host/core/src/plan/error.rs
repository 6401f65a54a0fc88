//! Why placements do not make a plan.

use std::fmt;

use super::{DevicePlan, SizeError};
use crate::cancel::Cancelled;
use crate::checkpoint::SliceError;
use crate::types::Bytes;

/// What a plan would put on one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceTotal {
    /// The device's name.
    pub device: String,
    /// Bytes that would be reserved.
    pub reserved: u64,
    /// Bytes to be left free beside them.
    pub headroom: u64,
    /// Bytes that are free.
    pub available: u64,
}

impl From<&DevicePlan> for DeviceTotal {
    fn from(plan: &DevicePlan) -> DeviceTotal {
        DeviceTotal {
            device: plan.device.name.clone(),
            reserved: plan.size.reserved,
            headroom: plan.headroom,
            available: plan.device.available,
        }
    }
}

impl fmt::Display for DeviceTotal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.device, Bytes(self.reserved))?;
        if self.headroom > 0 {
            write!(f, " + {} headroom", Bytes(self.headroom))?;
        }
        write!(f, " of {}", Bytes(self.available))
    }
}

/// Placements that contradict what they are for. Whoever made them is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadPlan {
    /// Too few or too many placements.
    #[error("it placed {have} tensors, the checkpoint has {need}")]
    PlacementCount {
        /// Tensors in the checkpoint.
        need: usize,
        /// Placements given.
        have: usize,
    },
    /// Too few or too many headrooms.
    #[error("it gave headroom for {have} devices, there are {need}")]
    HeadroomCount {
        /// Devices.
        need: usize,
        /// Headrooms given.
        have: usize,
    },
    /// A device that is not there.
    #[error("it placed tensor '{tensor}' on device number {device}, there are {devices} (from 0)")]
    NoSuchDevice {
        /// The tensor.
        tensor: String,
        /// The index given.
        device: u32,
        /// How many devices there are.
        devices: usize,
    },
    /// A format that cannot hold the tensor.
    #[error("tensor '{tensor}': {source}")]
    IllegalFormat {
        /// The tensor.
        tensor: String,
        /// Why not.
        source: SizeError,
    },
    /// A stored alias placed elsewhere, or in another format, than the tensor it is tied to.
    #[error(
        "it tore apart '{tensor}' and '{alias}', which are one parameter: same device and format, or leave '{alias}' out"
    )]
    TornTie {
        /// The tensor that holds the data.
        tensor: String,
        /// Its other name.
        alias: String,
    },
    /// A slice that there cannot be.
    #[error("{0}")]
    Slice(#[from] SliceError),
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The placements contradict what they are for.
    #[error("bad plan: {0}")]
    Bad(BadPlan),
    /// A device is too small.
    #[error(
        "{device} is too small: need {}{}, have {}; tensor '{tensor}' is the first that does not fit (in all: {})",
        Bytes(*need),
        Headroom(*headroom),
        Bytes(*have),
        List(totals)
    )]
    DoesNotFit {
        /// The device.
        device: String,
        /// The first tensor, in the order of the layout, that does not fit.
        tensor: String,
        /// Bytes that would be reserved.
        need: u64,
        /// Bytes to be left free beside them.
        headroom: u64,
        /// Bytes that are free.
        have: u64,
        /// Every device.
        totals: Vec<DeviceTotal>,
    },
    /// It was asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl From<Cancelled> for PlanError {
    fn from(_: Cancelled) -> PlanError {
        PlanError::Cancelled
    }
}

struct Headroom(u64);

impl fmt::Display for Headroom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            bytes => write!(f, " + {} headroom", Bytes(bytes)),
        }
    }
}

struct List<'a>(&'a [DeviceTotal]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, total) in self.0.iter().enumerate() {
            write!(f, "{}{total}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}
