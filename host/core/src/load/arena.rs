//! Cuts the reserved memory into the targets of the plan's parts. They are disjoint by
//! construction, so that workers can write them at the same time.

use super::LoadError;
use super::put::is_remote;
use crate::cancel::{self, CancelToken, Watch};
use crate::device::Reservation;
use crate::plan::{PartKind, Plan, PlannedPart};

/// The targets of one tensor's parts; empty ones for parts that its format does not have.
#[derive(Debug, Default)]
pub(super) struct PartTargets<'m> {
    pub(super) data: Target<'m>,
    pub(super) codes: Target<'m>,
    pub(super) absmax: Target<'m>,
    pub(super) nested_absmax: Target<'m>,
}

/// Where bytes go. Nobody else has the same target.
#[derive(Debug)]
pub(super) enum Target<'m> {
    /// Memory that the processor can write.
    Host(&'m mut [u8]),
    /// Bytes of a device that something must carry there.
    Device {
        /// The device's index in the plan.
        device: usize,
        /// First byte in its reservation, or in the workspace of its kernels.
        offset: u64,
        len: usize,
        in_workspace: bool,
    },
}

impl Default for Target<'_> {
    fn default() -> Self {
        Target::Host(&mut [])
    }
}

impl<'m> Target<'m> {
    pub(super) fn len(&self) -> usize {
        match self {
            Target::Host(bytes) => bytes.len(),
            Target::Device { len, .. } => *len,
        }
    }

    /// The device and the first byte there, where the processor cannot write.
    pub(super) fn on_device(&self) -> Option<(usize, u64)> {
        match self {
            Target::Host(_) => None,
            Target::Device { device, offset, .. } => Some((*device, *offset)),
        }
    }

    /// Cuts the first `length` bytes off, of which there are as many.
    pub(super) fn take(&mut self, length: usize) -> Target<'m> {
        match self {
            Target::Host(rest) => {
                let (first, others) = std::mem::take(rest).split_at_mut(length);
                *rest = others;
                Target::Host(first)
            }
            Target::Device {
                device,
                offset,
                len,
                in_workspace,
            } => {
                let first = Target::Device {
                    device: *device,
                    offset: *offset,
                    len: length,
                    in_workspace: *in_workspace,
                };
                *len -= length;
                *offset += length as u64;
                first
            }
        }
    }

    /// The same where there may be fewer.
    fn take_checked(&mut self, length: u64) -> Option<Target<'m>> {
        let length = usize::try_from(length).ok()?;
        (length <= self.len()).then(|| self.take(length))
    }
}

/// The targets of a plan, and the memory that the processor cannot write.
pub(super) struct Split<'m> {
    /// One for each tensor, in the order of the plan.
    pub(super) targets: Vec<PartTargets<'m>>,
    /// One for each device.
    pub(super) remote: Vec<Option<&'m dyn Reservation>>,
}

/// Cuts up what has been reserved for a plan.
///
/// # Errors
/// [`LoadError::OtherPlan`] for parts that overlap or lie outside the reservation, and
/// [`LoadError::Cancelled`].
pub(super) fn split<'m>(
    plan: &Plan,
    memory: &'m mut [Option<Box<dyn Reservation>>],
    cancel: &CancelToken,
) -> Result<Split<'m>, LoadError> {
    let mut watch = Watch::new(cancel);
    let mut targets: Vec<PartTargets<'m>> = Vec::with_capacity(plan.tensors.len());
    let mut parts = Vec::with_capacity(plan.tensors.len() * 2);
    for (index, tensor) in plan.tensors.iter().enumerate() {
        watch.item(0)?;
        targets.push(PartTargets::default());
        if let Some(device) = tensor.placement.device {
            parts.extend(tensor.parts.iter().map(|part| (device, part, index)));
        }
    }
    let key = |&(device, part, _): &(u32, &PlannedPart, usize)| (device, part.offset, part.bytes);
    let parts = cancel::sort_by(parts, cancel, |a, b| key(a).cmp(&key(b)))?;
    let mut parts = parts.into_iter().peekable();
    let mut all_remote = Vec::with_capacity(memory.len());
    for (number, reservation) in memory.iter_mut().enumerate() {
        let mut remote = None;
        let mut rest = match reservation {
            None => Target::default(),
            Some(reservation) => {
                let len = usize::try_from(reservation.len()).map_err(|_| LoadError::OtherPlan)?;
                if is_remote(&**reservation) {
                    remote = Some(&**reservation);
                    Target::Device {
                        device: number,
                        offset: 0,
                        len,
                        in_workspace: false,
                    }
                } else {
                    Target::Host(reservation.host_memory_mut().unwrap_or_default())
                }
            }
        };
        all_remote.push(remote);
        let mut position = 0;
        while let Some((_, part, tensor)) = parts.next_if(|&(device, ..)| device as usize == number)
        {
            watch.item(0)?;
            let gap = part.offset.checked_sub(position);
            let gap = gap.and_then(|gap| rest.take_checked(gap));
            let target = gap.and_then(|_| rest.take_checked(part.bytes));
            let target = target.ok_or(LoadError::OtherPlan)?;
            position = part.offset + part.bytes;
            let slot = &mut targets[tensor];
            match part.kind {
                PartKind::Data => slot.data = target,
                PartKind::Codes => slot.codes = target,
                PartKind::Absmax => slot.absmax = target,
                PartKind::NestedAbsmax => slot.nested_absmax = target,
            }
        }
    }
    Ok(Split {
        targets,
        remote: all_remote,
    })
}
