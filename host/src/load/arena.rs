//! Cuts the reserved memory into the places of the plan's parts. They are disjoint by
//! construction, so that workers can write them at the same time.

use super::LoadError;
use crate::device::Reservation;
use crate::plan::{PartKind, Plan};

/// The places of one tensor's parts; empty slices for parts that its format does not have.
#[derive(Debug, Default)]
pub(super) struct Place<'m> {
    pub(super) data: &'m mut [u8],
    pub(super) codes: &'m mut [u8],
    pub(super) absmax: &'m mut [u8],
    pub(super) nested_absmax: &'m mut [u8],
}

/// One place per tensor, in the order of the plan.
///
/// # Errors
/// [`LoadError::NoTransfer`] for memory that the processor cannot write, and
/// [`LoadError::OtherPlan`] for parts that overlap or lie outside the reservation.
pub(super) fn split<'m>(
    plan: &Plan,
    memory: &'m mut [Option<Box<dyn Reservation>>],
) -> Result<Vec<Place<'m>>, LoadError> {
    let mut places: Vec<Place<'m>> = plan.tensors.iter().map(|_| Place::default()).collect();
    let mut parts = Vec::with_capacity(plan.tensors.len() * 2);
    for (index, tensor) in plan.tensors.iter().enumerate() {
        if let Some(device) = tensor.placement.device {
            parts.extend(tensor.parts.iter().map(|part| (device, part, index)));
        }
    }
    parts.sort_unstable_by_key(|&(device, part, _)| (device, part.offset, part.bytes));
    let mut parts = parts.into_iter().peekable();
    for (number, reservation) in memory.iter_mut().enumerate() {
        let mut rest: &'m mut [u8] = match reservation {
            None => &mut [],
            Some(reservation) => {
                reservation
                    .host_memory_mut()
                    .ok_or_else(|| LoadError::NoTransfer {
                        device: plan.devices[number].device.name.clone(),
                    })?
            }
        };
        let mut position = 0;
        while let Some((_, part, tensor)) = parts.next_if(|&(device, ..)| device as usize == number)
        {
            let gap = part.offset.checked_sub(position);
            let cut = gap.and_then(|gap| usize::try_from(gap).ok());
            let length = usize::try_from(part.bytes).ok();
            let (Some(cut), Some(length)) = (cut, length) else {
                return Err(LoadError::OtherPlan);
            };
            let (_, after_gap) = rest.split_at_mut_checked(cut).ok_or(LoadError::OtherPlan)?;
            let (place, after) = after_gap
                .split_at_mut_checked(length)
                .ok_or(LoadError::OtherPlan)?;
            position = part.offset + part.bytes;
            rest = after;
            let slot = &mut places[tensor];
            match part.kind {
                PartKind::Data => slot.data = place,
                PartKind::Codes => slot.codes = place,
                PartKind::Absmax => slot.absmax = place,
                PartKind::NestedAbsmax => slot.nested_absmax = place,
            }
        }
    }
    Ok(places)
}
