//! A policy that cuts tensors as the setting `behavior` tells it, right or wrong.
#![forbid(unsafe_code)]

use tightfit_guest::slices::{even_parts, nowhere};
use tightfit_guest::{
    Description, Dtype, Format, Nf4Format, Placement, Policy, Proposal, Refusal, Request, Setting,
    Slice, SlicedProposal, policy,
};

struct Slices;

policy!(Slices);

impl Policy for Slices {
    fn describe() -> Description {
        Description {
            name: "slices".to_owned(),
            version: "1.0.0".to_owned(),
            settings: vec![Setting {
                name: "behavior".to_owned(),
                default: "honest".to_owned(),
                help: "What to do.".to_owned(),
            }],
        }
    }

    /// For hosts that do not know of slices; this is never seen otherwise.
    fn plan(_: Request) -> Result<Proposal, Refusal> {
        Err(Refusal::unsupported("this host does not cut"))
    }

    fn plan_slices(request: Request) -> Result<SlicedProposal, Refusal> {
        let behavior = match request.settings.first() {
            Some((_, behavior)) => behavior.clone(),
            None => "honest".to_owned(),
        };
        if behavior == "plan" {
            return Self::plan(request).map(SlicedProposal::from);
        }
        let mut proposal = honest(&request);
        // The first that is cut, and the first that is copied.
        let first = 0;
        let slices = &mut proposal.slices;
        let tensor = slices[first].tensor as usize;
        match behavior.as_str() {
            "honest" => {}
            "gap" => {
                slices.remove(first);
            }
            "no-ranges" => slices[first].ranges.clear(),
            "backward" => slices[first].ranges = vec![range(2, 1)],
            "empty" => slices[first].ranges = vec![range(1, 1)],
            "overlap" => slices[first].ranges = vec![range(0, 2), range(1, 3)],
            "too-long" => slices[first].ranges[0].end += 1 << 20,
            "endless" => slices[first].ranges[0].end = u64::MAX,
            "no-such-dimension" => slices[first].dimension = u32::MAX,
            "no-such-tensor" => slices[first].tensor = u32::MAX,
            "no-such-device" => slices[first].placement.device = Some(u32::MAX),
            "nowhere" => slices[first].placement.device = None,
            "twice" => {
                let again = slices[first].clone();
                slices.insert(1, again);
            }
            "overlap-on-one-device" => {
                for slice in slices
                    .iter_mut()
                    .filter(|slice| slice.tensor as usize == tensor)
                {
                    slice.placement.device = Some(0);
                    slice.ranges[0].start = 0;
                }
            }
            "whole-too" => {
                proposal.placements[tensor] = Placement::on(0, Format::Stored);
            }
            "too-few" => {
                proposal.placements.pop();
            }
            "few-headrooms" => proposal.headroom.clear(),
            "block-48" => {
                slices[first].placement.format = Format::Nf4(Nf4Format {
                    block_size: 48,
                    double_quantized: false,
                });
            }
            "cast-i8" => slices[first].placement.format = Format::Cast(Dtype::I8),
            "too-many-ranges" => slices[first].ranges = vec![range(0, 1); 4097],
            // Less than a call may carry, more than anybody needs.
            "hundreds-of-thousands-of-ranges" => {
                let ranges = vec![range(0, 1); 1 << 16];
                for slice in slices.iter_mut().take(5) {
                    slice.ranges = ranges.clone();
                }
            }
            "millions-of-ranges" => slices[first].ranges = vec![range(0, 1); 3 << 20],
            "millions-of-slices" => {
                let one = slices[first].clone();
                *slices = vec![one; 1 << 20];
            }
            other => {
                return Err(Refusal::bad_setting(format!(
                    "no behavior is called `{other}`"
                )));
            }
        }
        Ok(proposal)
    }
}

fn range(start: u64, end: u64) -> tightfit_guest::SliceRange {
    tightfit_guest::SliceRange { start, end }
}

/// The rows of every matrix over all devices, in 4 bits where that can be; of everything else a copy on each. A
/// scalar, which has no slices, is on the first; second copies of tied tensors are left out.
fn honest(request: &Request) -> SlicedProposal {
    let devices = request.devices.len();
    let duplicates = request.duplicates();
    let mut placements = nowhere(request);
    let mut slices = Vec::new();
    for (t, tensor) in request.tensors.iter().enumerate() {
        if duplicates[t] {
            continue;
        }
        let format = match tensor.is_quantizable() {
            true => Format::NF4,
            false => Format::Stored,
        };
        match tensor.shape[..] {
            [] => placements[t] = Placement::on(0, Format::Stored),
            [rows, _] if rows >= devices as u64 => {
                for (device, part) in even_parts(rows, devices, 1).into_iter().enumerate() {
                    slices.push(Slice::new(t, 0, [part], Placement::on(device, format)));
                }
            }
            _ => slices.extend(Slice::copies(t, tensor, devices, Format::Stored)),
        }
    }
    SlicedProposal {
        placements,
        headroom: vec![0; devices],
        slices,
    }
}
