//! Takes the memory that a plan needs, and has the plan revised where there is less than was said.

use std::fmt;
use std::time::{Duration, Instant};

use super::LoadError;
use crate::checkpoint::Checkpoint;
use crate::device::{Device, DeviceError, DeviceInfo, Reservation};
use crate::plan::{Plan, PlanOptions, ProposeError, Proposed, propose_again};
use crate::policy::{Policy, PreviousFailure};
use crate::status::Status;
use crate::types::Bytes;

/// How often a policy is asked again because a device had less memory than it said.
pub const MAX_REVISIONS: usize = 3;

/// The memory that a plan needs, taken from its devices. Dropping it gives it back.
#[derive(Debug)]
pub struct Reserved {
    pub(super) plan: Plan,
    pub(super) memory: Vec<Option<Box<dyn Reservation>>>,
    pub(super) elapsed: Duration,
}

impl Reserved {
    /// Reserves what `plan` needs on each of `devices`, which are those that it was made for, in
    /// its order; nothing where it puts nothing.
    ///
    /// # Errors
    /// [`LoadError::Device`] and [`LoadError::OtherPlan`], with everything given back.
    pub fn take(plan: Plan, devices: &[Box<dyn Device>]) -> Result<Reserved, LoadError> {
        match take(plan, devices) {
            Ok(reserved) => Ok(reserved),
            Err(Refused::OtherPlan) => Err(LoadError::OtherPlan),
            Err(Refused::Device { error, .. }) => Err(LoadError::Device(error)),
        }
    }

    /// Returns the plan that it was taken for.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }
}

/// Why a plan's memory could not be taken.
enum Refused {
    OtherPlan,
    Device { index: usize, error: DeviceError },
}

fn take(plan: Plan, devices: &[Box<dyn Device>]) -> Result<Reserved, Refused> {
    let start = Instant::now();
    if plan.devices.len() != devices.len() {
        return Err(Refused::OtherPlan);
    }
    let mut memory = Vec::with_capacity(devices.len());
    for (index, (planned, device)) in plan.devices.iter().zip(devices).enumerate() {
        memory.push(match planned.size {
            size if size.reserved == 0 => None,
            size => match device.reserve(size) {
                Ok(reservation) => Some(reservation),
                Err(error) => return Err(Refused::Device { index, error }),
            },
        });
    }
    let elapsed = start.elapsed();
    tracing::debug!("memory of the devices is reserved in {elapsed:.1?}");
    Ok(Reserved {
        plan,
        memory,
        elapsed,
    })
}

/// A device had less memory than it had said, and the policy was asked again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// The device's name.
    pub device: String,
    /// Bytes that the plan needed there, headroom included.
    pub needed: u64,
    /// Bytes that there were.
    pub available: u64,
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (needed, available) = (Bytes(self.needed), Bytes(self.available));
        write!(
            f,
            "{} had {available} left where the plan needed {needed}",
            self.device
        )
    }
}

/// A plan whose memory has been taken.
#[derive(Debug)]
pub struct ReservedPlan {
    /// The plan and who made it.
    pub proposed: Proposed,
    /// Its memory.
    pub reserved: Reserved,
    /// Why earlier plans were given up, in their order.
    pub revisions: Vec<Revision>,
}

/// Why there is no plan whose memory could be taken. Nothing is left reserved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// The policy gave no plan.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// It gave none when it was asked again.
    #[error("{}, and asked again {source}", Joined(revisions))]
    Revised {
        /// What made it necessary to ask again.
        revisions: Vec<Revision>,
        /// What came of it.
        source: Box<ProposeError>,
    },
    /// A device failed, or had too little memory even for the last revision.
    #[error(transparent)]
    Load(#[from] LoadError),
}

impl From<&ReserveError> for Status {
    fn from(error: &ReserveError) -> Status {
        match error {
            ReserveError::Propose(error) => error.into(),
            ReserveError::Revised { source, .. } => source.as_ref().into(),
            ReserveError::Load(error) => error.into(),
        }
    }
}

struct Joined<'a>(&'a [Revision]);

impl fmt::Display for Joined<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, revision) in self.0.iter().enumerate() {
            write!(f, "{}{revision}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// Asks `policy` for a plan and takes its memory. Where a device then has less than it said (others
/// use it too), the policy is asked again with what was found, at most [`MAX_REVISIONS`] times.
///
/// A plan's headroom counts: where it is gone by the time of the reservation, the plan is revised.
///
/// # Errors
/// [`ReserveError`].
pub fn reserve(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[Box<dyn Device>],
    settings: &[(String, String)],
) -> Result<ReservedPlan, ReserveError> {
    reserve_with(
        checkpoint,
        policy,
        devices,
        settings,
        &PlanOptions::default(),
    )
}

/// [`reserve`] with options.
///
/// # Errors
/// [`ReserveError`].
pub fn reserve_with(
    checkpoint: &Checkpoint,
    policy: &dyn Policy,
    devices: &[Box<dyn Device>],
    settings: &[(String, String)],
    options: &PlanOptions,
) -> Result<ReservedPlan, ReserveError> {
    let mut infos: Vec<DeviceInfo> = devices.iter().map(|device| device.info()).collect();
    let mut revisions: Vec<Revision> = Vec::new();
    let mut failure = None;
    loop {
        let proposed = propose_again(checkpoint, policy, &infos, settings, failure, options);
        let proposed = match proposed {
            Ok(proposed) => proposed,
            Err(error) if revisions.is_empty() => return Err(error.into()),
            Err(error) => {
                let source = Box::new(error);
                return Err(ReserveError::Revised { revisions, source });
            }
        };
        let refused = match shortage(&proposed.plan, devices) {
            Some(refused) => refused,
            None => match take(proposed.plan.clone(), devices) {
                Ok(reserved) => {
                    return Ok(ReservedPlan {
                        proposed,
                        reserved,
                        revisions,
                    });
                }
                Err(refused) => refused,
            },
        };
        let Refused::Device { index, error } = refused else {
            return Err(LoadError::OtherPlan.into());
        };
        let device = &proposed.plan.devices[index];
        let needed = device.size.reserved.saturating_add(device.headroom);
        let available = match &error {
            DeviceError::OutOfMemory { have, .. } => *have,
            // It did not say how much there is.
            _ => devices[index].info().available,
        };
        if available >= needed || revisions.len() == MAX_REVISIONS {
            return Err(LoadError::Device(error).into());
        }
        tracing::info!(device = device.device.name, needed, available, "revising");
        revisions.push(Revision {
            device: device.device.name.clone(),
            needed,
            available,
        });
        infos[index].available = available.min(infos[index].available);
        failure = Some(PreviousFailure {
            device: index as u32,
            needed,
            available,
        });
    }
}

/// A device that by now has less than weights and headroom need.
fn shortage(plan: &Plan, devices: &[Box<dyn Device>]) -> Option<Refused> {
    let used = plan.devices.iter().zip(devices).enumerate();
    let mut used = used.filter(|(_, (plan, _))| plan.size.reserved > 0);
    used.find_map(|(index, (plan, device))| {
        let need = plan.size.reserved.saturating_add(plan.headroom);
        let have = device.info().available;
        (have < need).then(|| Refused::Device {
            index,
            error: DeviceError::OutOfMemory {
                device: plan.device.name.clone(),
                need,
                have,
            },
        })
    })
}
