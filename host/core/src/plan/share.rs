//! What of a plan is of some of its devices.

use super::{Plan, PlannedTensor};
use crate::checkpoint::Checkpoint;

impl Plan {
    /// Returns what of the plan is of the devices for which `keep` holds, in their order: these devices
    /// alone, with all their tensors at the same places in the same sizes. All other tensors are not
    /// loaded. So several processes that have made one plan load it together, each on its own devices.
    ///
    /// `checkpoint` is the one that the plan was made for. Devices beyond the end of `keep` are not kept.
    pub fn share(&self, checkpoint: &Checkpoint, keep: &[bool]) -> Plan {
        debug_assert!(self.is_for(checkpoint.tensors()));
        let is_kept = |device: usize| keep.get(device).copied().unwrap_or(false);
        let mut next = 0;
        let places: Vec<Option<u32>> = (0..self.devices.len())
            .map(|device| {
                is_kept(device).then(|| {
                    next += 1;
                    next - 1
                })
            })
            .collect();
        let devices = self.devices.iter().enumerate();
        let share = |tensor: &PlannedTensor| {
            let mut tensor = tensor.clone();
            let device = tensor
                .placement
                .device
                .and_then(|device| places[device as usize]);
            tensor.placement.device = device;
            if device.is_none() {
                tensor.parts.clear();
            }
            tensor
        };
        Plan {
            devices: devices
                .filter(|(device, _)| is_kept(*device))
                .map(|(_, device)| device.clone())
                .collect(),
            tensors: self.tensors.iter().map(share).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{device, source, write_checkpoint};
    use crate::types::{DType, Format, Placement};

    #[test]
    fn shares_are_disjoint_and_all_of_them_are_the_plan() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["a.weight", "b.weight", "c.weight", "d.weight", "e.weight"];
        write_checkpoint(
            directory.path(),
            &names.map(|name| source(name, DType::Bf16, &[64, 64])),
        );
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let devices = ["0/sim:0", "1/sim:0", "1/cpu"].map(|name| device(name, 1 << 20, 4096));
        let placements: Vec<Placement> = [Some(0), Some(2), Some(1), None, Some(2)]
            .map(|device| Placement {
                device,
                format: Format::NF4_DOUBLE,
            })
            .into();
        let plan = Plan::new(checkpoint.tensors(), &[], &devices, &placements, &[0; 3]).unwrap();
        let first = plan.share(&checkpoint, &[true, false, false]);
        let second = plan.share(&checkpoint, &[false, true, true]);
        assert_eq!(first.devices, plan.devices[..1]);
        assert_eq!(second.devices, plan.devices[1..]);
        for share in [&first, &second] {
            assert!(share.is_for(checkpoint.tensors()));
        }
        for (index, whole) in plan.tensors.iter().enumerate() {
            let parts = [&first, &second].map(|share| &share.tensors[index]);
            let held: Vec<_> = parts
                .iter()
                .filter(|part| part.placement.device.is_some())
                .collect();
            assert_eq!(held.len(), usize::from(whole.placement.device.is_some()));
            if let Some(held) = held.first() {
                assert_eq!(held.parts, whole.parts);
                assert_eq!(held.placement.format, whole.placement.format);
            }
        }
        assert_eq!(second.tensors[1].placement.device, Some(1));
        assert_eq!(second.tensors[2].placement.device, Some(0));
        assert_eq!(plan.share(&checkpoint, &[true; 3]), plan);
        assert!(plan.share(&checkpoint, &[]).devices.is_empty());
    }
}
