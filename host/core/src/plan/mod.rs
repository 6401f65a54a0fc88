//! From placements to an exact layout. Pure: no files, no devices, the same input gives the same
//! plan.
//!
//! Every stored part gets an offset in one arena per device. Quantized tensors come first, plain
//! ones last: plain tensors are transferred last, so that their still unwritten end of the arena
//! can serve as staging on a device that needs some. The experts of a layer lie as stacks where they can:
//! `stacks` says when.

mod error;
mod format_rules;
mod products;
mod propose;
#[cfg(test)]
mod propose_tests;
mod size;
mod stacks;

use std::collections::HashMap;

pub use error::{BadPlan, DeviceTotal, PlanError};
pub use format_rules::{FormatRuleError, FormatRules};
pub(crate) use products::{MEAN_BYTES, constants_bytes, is_multiplied, is_of_gates};
pub(crate) use propose::propose_again;
pub use propose::{ProposeError, Proposed, ROWS_SETTING, is_setting, propose, propose_with};
pub use size::{
    NESTED_BLOCK_SIZE, PART_ALIGNMENT, PartKind, PartSizes, SizeError, part_sizes,
    tensor_part_sizes,
};

use crate::cancel::{CancelToken, Cancelled, Watch};
use crate::checkpoint::{self, Came, Checkpoint, SliceError, TensorInfo, Tie};
use crate::device::DeviceInfo;
use crate::memory::ReservationSize;
use crate::policy::Proposal;
use crate::types::{Format, Placement, Slice};
use products::{ProductBytes, Wanted};

/// Where one part of a tensor lies in its device's arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedPart {
    /// What it holds.
    pub kind: PartKind,
    /// First byte, a multiple of [`PART_ALIGNMENT`].
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// What becomes of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Its device and format.
    pub placement: Placement,
    /// Its parts; none when it is not loaded.
    pub parts: Vec<PlannedPart>,
}

impl PlannedTensor {
    /// Returns the number of bytes of all its parts.
    pub fn requested(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// Bytes of f32 scales that it keeps while it is loaded, until their mean is known; only when
    /// it is double-quantized on the way.
    pub(crate) fn scratch_bytes(&self) -> u64 {
        match self.part(PartKind::NestedAbsmax) {
            Some(_) if !is_plain(self.placement.format) => {
                self.part(PartKind::Absmax).map_or(0, |part| 4 * part.bytes)
            }
            _ => 0,
        }
    }

    /// Returns the part of this kind.
    pub fn part(&self, kind: PartKind) -> Option<PlannedPart> {
        self.parts.iter().copied().find(|part| part.kind == kind)
    }
}

/// What one device will hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevicePlan {
    /// The device as it was when the plan was made.
    pub device: DeviceInfo,
    /// What will be reserved, in one piece. Zero when nothing is placed there.
    pub size: ReservationSize,
    /// Bytes to be left free beside the weights.
    pub headroom: u64,
    /// Bytes behind the weights that are reserved with them, for the application: see
    /// [`PlanOptions::reserve_headroom`]. They begin at `size.padded`.
    pub tail: u64,
    /// Bytes of the tail that products with its 4-bit weights need: [`PlanOptions::rows`].
    pub products: u64,
    /// How many tensors it will hold.
    pub tensors: u64,
}

impl DevicePlan {
    /// Returns the device's name, for example `cuda:0`.
    pub fn name(&self) -> &str {
        &self.device.name
    }

    /// Returns the number of bytes that will be reserved.
    pub fn reserved(&self) -> u64 {
        self.size.reserved
    }
}

/// An exact layout: what goes where, to the byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// One entry per device, in the order of the request.
    pub devices: Vec<DevicePlan>,
    /// One entry per tensor of the checkpoint, in its order: of the one that [`Checkpoint::cut`] gives for
    /// `slices`, if there are any.
    pub tensors: Vec<PlannedTensor>,
    /// Parts of tensors that are placed by themselves.
    pub slices: Vec<Slice>,
}

/// How a plan is made.
///
/// ```
/// use tightfit::CancelToken;
/// use tightfit::plan::PlanOptions;
///
/// let cancel = CancelToken::new();
/// let options = PlanOptions::default()
///     .with_reserved_headroom(true)
///     .with_cancel(cancel.clone());
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct PlanOptions {
    /// Whether the headroom of a device that holds weights is reserved in one piece with them, as the
    /// tail that [`Model::tail`](crate::Model::tail) hands out, and not merely left free. It is
    /// rounded up to [`PART_ALIGNMENT`].
    pub reserve_headroom: bool,
    /// Rows of the largest product with 4-bit weights for which there shall be room: an accelerator that
    /// holds such weights gets a tail with a workspace that is enough for as many rows and for any fewer,
    /// and what its kernels need to know of double-quantized weights. So products take nothing beyond the
    /// plan. 0, the default, reserves nothing for them. How large a workspace is does not depend on the
    /// GPU, which need not be there: some 3 MiB for 8 rows, 25 MiB for 64, and no more for any number.
    ///
    /// Layers of experts ([`Model::experts`](crate::Model::experts)) are counted for as many tokens: what
    /// lies between their launches comes to it, at most about 64 MiB, and some bytes of each row.
    pub rows: u64,
    /// Experts that a router chooses for a token, which layers of experts need a workspace for. 0, the
    /// default: as many as config.json says (`num_experts_per_tok`), where [`propose`] asks a policy, or
    /// else 8.
    pub experts_per_token: u64,
    /// Whether gradients of inputs ([`Linear::input_gradient`](crate::Linear::input_gradient)) of `rows` rows
    /// shall have room, too: up to 16 MiB. Not by default.
    pub gradients: bool,
    /// Formats of tensors, by their indices in the checkpoint, whatever the policy says; of one that
    /// [`FormatRules`] fix too, this one holds. For programs that know of each tensor what becomes of it.
    pub formats: Vec<(usize, Format)>,
    /// Looked at every few milliseconds: a checkpoint can have a million tensors.
    pub cancel: CancelToken,
}

tightfit_common::setters!([] PlanOptions:
    with_reserved_headroom: reserve_headroom, bool;
    with_rows: rows, u64;
    with_experts_per_token: experts_per_token, u64;
    with_gradients: gradients, bool;
    with_formats: formats, Vec<(usize, Format)>;
    with_cancel: cancel, CancelToken;
);

/// Bytes of f32 scales that are kept while tensors are loaded, unless two tensors have more.
const SCALES_UNDER_WAY: u64 = 16 << 20;

/// Where nobody says how many experts a token has.
const EXPERTS_PER_TOKEN: u64 = 8;

impl PlanOptions {
    fn wanted(&self) -> Wanted {
        let length = |length: u64| usize::try_from(length).unwrap_or(usize::MAX);
        Wanted {
            rows: length(self.rows),
            experts_per_token: length(match self.experts_per_token {
                0 => EXPERTS_PER_TOKEN,
                given => given,
            }),
            gradients: self.gradients,
        }
    }
}

impl Plan {
    /// Lays out a checkpoint as `proposal` says, which an application may have made by itself. A
    /// [`Policy`](crate::Policy) is asked by [`propose`].
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn of(
        checkpoint: &Checkpoint,
        devices: &[DeviceInfo],
        proposal: &Proposal,
    ) -> Result<Plan, PlanError> {
        Plan::of_with(checkpoint, devices, proposal, &PlanOptions::default())
    }

    /// [`Plan::of`] with options, of which [`PlanOptions::formats`] are not looked at.
    ///
    /// # Errors
    /// [`PlanError::Cancelled`], and as [`Plan::of`].
    pub fn of_with(
        checkpoint: &Checkpoint,
        devices: &[DeviceInfo],
        proposal: &Proposal,
        options: &PlanOptions,
    ) -> Result<Plan, PlanError> {
        let Proposal {
            placements,
            headroom,
            slices,
        } = proposal;
        let new = |checkpoint: &Checkpoint, placements: &[Placement]| {
            let (tensors, ties) = (checkpoint.tensors(), checkpoint.ties());
            Plan::new_with(tensors, ties, devices, placements, headroom, options)
        };
        if slices.is_empty() {
            return new(checkpoint, placements);
        }
        let tensors = checkpoint.tensors();
        if placements.len() != tensors.len() {
            return Err(PlanError::Bad(BadPlan::PlacementCount {
                need: tensors.len(),
                have: placements.len(),
            }));
        }
        let bad = |error: SliceError| PlanError::Bad(error.into());
        let order = checkpoint::order(tensors.len(), slices).map_err(bad)?;
        let also_whole = |slice: &&Slice| placements[slice.tensor as usize].device.is_some();
        if let Some(slice) = slices.iter().find(also_whole) {
            let tensor = tensors[slice.tensor as usize].name.clone();
            return Err(bad(SliceError::AlsoWhole { tensor }));
        }
        let of = |came: Came| match came {
            Came::Tensor(tensor) => placements[tensor],
            Came::Slice(slice) => slices[slice].placement,
        };
        let placements: Vec<Placement> = order.into_iter().map(of).collect();
        let cut = checkpoint.cut(slices).map_err(bad)?;
        Ok(Plan {
            slices: slices.clone(),
            ..new(&cut, &placements)?
        })
    }

    /// What one of several processes carries out: what is on the devices for which `keep` holds, as if
    /// nothing else were loaded. Offsets and sizes are those of the whole plan, as are the numbers of tensors;
    /// devices that are kept are numbered anew, in their order.
    ///
    /// # Panics
    /// When `keep` does not have an entry for each device.
    pub fn share(&self, keep: &[bool]) -> Plan {
        assert_eq!(keep.len(), self.devices.len(), "one for each device");
        let mut next = 0;
        let numbers: Vec<Option<u32>> = keep
            .iter()
            .map(|&is_kept| {
                let number = is_kept.then_some(next);
                next += u32::from(is_kept);
                number
            })
            .collect();
        let moved = |placement: Placement| {
            let device = placement.device.map(|device| numbers.get(device as usize));
            Placement {
                device: device.flatten().copied().flatten(),
                ..placement
            }
        };
        let kept = self.devices.iter().zip(keep);
        Plan {
            devices: kept
                .filter(|(_, is_kept)| **is_kept)
                .map(|(device, _)| device.clone())
                .collect(),
            tensors: self
                .tensors
                .iter()
                .map(|tensor| {
                    let placement = moved(tensor.placement);
                    PlannedTensor {
                        placement,
                        parts: match placement.device {
                            Some(_) => tensor.parts.clone(),
                            None => Vec::new(),
                        },
                    }
                })
                .collect(),
            // As they were: what they are called depends on the devices of all.
            slices: self.slices.clone(),
        }
    }

    /// Lays out `tensors` as `placements` say (one for each), leaving `headroom` bytes free on
    /// each device.
    ///
    /// # Errors
    /// [`PlanError::Bad`] for placements that contradict the tensors, ties or devices, and
    /// [`PlanError::DoesNotFit`] when a device is too small.
    pub fn new(
        tensors: &[TensorInfo],
        ties: &[Tie],
        devices: &[DeviceInfo],
        placements: &[Placement],
        headroom: &[u64],
    ) -> Result<Plan, PlanError> {
        let options = PlanOptions::default();
        Plan::new_with(tensors, ties, devices, placements, headroom, &options)
    }

    /// Returns the checkpoint whose tensors are those of the plan, cut as the plan's slices say; `None` where it
    /// has none, or the checkpoint is cut already.
    ///
    /// # Errors
    /// [`SliceError`], which does not happen with the checkpoint that the plan was made for.
    pub fn cut(&self, checkpoint: &Checkpoint) -> Result<Option<Checkpoint>, SliceError> {
        match self.slices.is_empty() || checkpoint.is_cut() {
            true => Ok(None),
            false => checkpoint.cut(&self.slices).map(Some),
        }
    }

    /// Returns whether the plan can have been made for these tensors: one entry for each, with the
    /// parts that its type, shape and format give. What is loaded is found by the parts, so a plan for
    /// another checkpoint would write past their ends.
    pub fn is_for(&self, tensors: &[TensorInfo]) -> bool {
        self.tensors.len() == tensors.len()
            && self.tensors.iter().zip(tensors).all(|(planned, tensor)| {
                if planned.placement.device.is_none() {
                    return planned.parts.is_empty();
                }
                tensor_part_sizes(tensor, planned.placement.format).is_ok_and(|sizes| {
                    let parts = planned.parts.iter().map(|part| (part.kind, part.bytes));
                    sizes.iter().eq(parts)
                })
            })
    }

    /// [`Plan::new`] with options.
    ///
    /// # Errors
    /// [`PlanError::Cancelled`], and as [`Plan::new`].
    pub fn new_with(
        tensors: &[TensorInfo],
        ties: &[Tie],
        devices: &[DeviceInfo],
        placements: &[Placement],
        headroom: &[u64],
        options: &PlanOptions,
    ) -> Result<Plan, PlanError> {
        if placements.len() != tensors.len() {
            return Err(PlanError::Bad(BadPlan::PlacementCount {
                need: tensors.len(),
                have: placements.len(),
            }));
        }
        if headroom.len() != devices.len() {
            return Err(PlanError::Bad(BadPlan::HeadroomCount {
                need: devices.len(),
                have: headroom.len(),
            }));
        }
        check_ties(tensors, ties, placements)?;
        let mut watch = Watch::new(&options.cancel);
        let sizes = sizes(tensors, devices, placements, &mut watch)?;
        let mut arenas: Vec<Arena> = devices.iter().map(|_| Arena::default()).collect();
        let mut planned = Vec::with_capacity(placements.len());
        for &placement in placements {
            watch.item(0)?;
            planned.push(PlannedTensor {
                placement,
                parts: Vec::new(),
            });
        }
        let mut stacks = stacks::possible(tensors, &mut watch)?;
        stacks.retain(|stack| stack.is_one(placements, &sizes));
        let stack_of = stack_of(tensors.len(), &stacks);
        for plain in [false, true] {
            for (index, placement) in placements.iter().enumerate() {
                watch.item(0)?;
                let Some((device, sizes)) = placement.device.zip(sizes[index]) else {
                    continue;
                };
                if plain != is_plain(placement.format) {
                    continue;
                }
                let alone = [index];
                let members = match stack_of[index] {
                    // It is where its stack is, which began with another.
                    Some(_) if !planned[index].parts.is_empty() => continue,
                    Some(stack) => &stacks[stack].members[..],
                    None => &alone,
                };
                arenas[device as usize].add(
                    members,
                    &sizes,
                    &devices[device as usize],
                    headroom[device as usize],
                    &mut planned,
                    &mut watch,
                )?;
            }
        }
        let wanted = options.wanted();
        let products = product_bytes(tensors, devices, placements, &stacks, &wanted, &mut watch)?;
        let plan = Plan {
            slices: Vec::new(),
            tensors: planned,
            devices: arenas
                .iter()
                .zip(devices)
                .zip(headroom)
                .zip(products)
                .map(|(((arena, device), &headroom), products)| {
                    let (headroom, tail) = match options.reserve_headroom {
                        false => (headroom, 0),
                        true if arena.padded == 0 => (0, 0),
                        true => (0, round_up(headroom, PART_ALIGNMENT)),
                    };
                    let tail = tail.saturating_add(products);
                    DevicePlan {
                        device: device.clone(),
                        size: arena.size(tail, device.granularity),
                        headroom,
                        tail,
                        products,
                        tensors: arena.tensors,
                    }
                })
                .collect(),
        };
        plan.check_fit(tensors, &arenas)?;
        Ok(plan)
    }

    /// Host bytes that a load keeps for the f32 scales of double-quantized tensors in flight: two
    /// of the largest, so that one can be read while the scales of another are quantized, or 16 MiB, with
    /// which many workers wait for none; but not more than there are.
    pub fn scratch_budget(&self) -> u64 {
        let each = self.tensors.iter().map(PlannedTensor::scratch_bytes);
        // Many devices can hold more than one number can say.
        let all = each.fold(0, u64::saturating_add);
        let largest = self.tensors.iter().map(PlannedTensor::scratch_bytes).max();
        all.min((2 * largest.unwrap_or(0)).max(SCALES_UNDER_WAY))
    }

    fn check_fit(&self, tensors: &[TensorInfo], arenas: &[Arena]) -> Result<(), PlanError> {
        let broken = self.devices.iter().zip(arenas).find(|(plan, _)| {
            let need = plan.size.reserved.saturating_add(plan.headroom);
            // Headroom on a device that holds nothing constrains nothing. What is beyond 64 bits is
            // not the number that stands for it.
            plan.size.reserved > 0 && (need > plan.device.available || need == u64::MAX)
        });
        let Some((plan, arena)) = broken else {
            return Ok(());
        };
        Err(PlanError::DoesNotFit {
            device: plan.device.name.clone(),
            // Where only rounding to the granularity breaks it, that is the last tensor.
            tensor: arena
                .overflowing
                .or(arena.last)
                .map_or_else(String::new, |index| tensors[index].name.clone()),
            need: plan.size.reserved,
            headroom: plan.headroom,
            have: plan.device.available,
            totals: self.devices.iter().map(DeviceTotal::from).collect(),
        })
    }
}

/// Whether a tensor is kept in its elements' own form.
fn is_plain(format: Format) -> bool {
    match format {
        Format::Stored | Format::Cast(_) => true,
        Format::Nf4 { .. } => false,
    }
}

/// One device's arena while it is being filled.
#[derive(Default)]
struct Arena {
    requested: u64,
    /// End of the last part, rounded up to the alignment.
    padded: u64,
    tensors: u64,
    last: Option<usize>,
    /// The first tensor that ended beyond what is available.
    overflowing: Option<usize>,
}

impl Arena {
    /// Adds tensors with parts of the same sizes: all parts of the first kind, then those of the next.
    fn add(
        &mut self,
        members: &[usize],
        sizes: &PartSizes,
        device: &DeviceInfo,
        headroom: u64,
        planned: &mut [PlannedTensor],
        watch: &mut Watch<'_>,
    ) -> Result<(), Cancelled> {
        for (kind, bytes) in sizes.iter() {
            for &tensor in members {
                watch.item(0)?;
                let offset = self.padded;
                self.requested = self.requested.saturating_add(bytes);
                self.padded = offset.saturating_add(round_up(bytes, PART_ALIGNMENT));
                planned[tensor].parts.push(PlannedPart {
                    kind,
                    offset,
                    bytes,
                });
                self.last = Some(tensor);
                let need = self.padded.saturating_add(headroom);
                if self.overflowing.is_none() && need > device.available {
                    self.overflowing = Some(tensor);
                }
            }
        }
        self.tensors += members.len() as u64;
        Ok(())
    }

    /// With `tail` bytes behind the weights.
    fn size(&self, tail: u64, granularity: u64) -> ReservationSize {
        ReservationSize {
            requested: self.requested,
            padded: self.padded,
            reserved: round_up(self.padded.saturating_add(tail), granularity.max(1)),
        }
    }
}

/// The next multiple, or the largest number where 64 bits do not hold it.
fn round_up(bytes: u64, multiple: u64) -> u64 {
    bytes.checked_next_multiple_of(multiple).unwrap_or(u64::MAX)
}

/// The size of every tensor that is loaded.
fn sizes(
    tensors: &[TensorInfo],
    devices: &[DeviceInfo],
    placements: &[Placement],
    watch: &mut Watch<'_>,
) -> Result<Vec<Option<PartSizes>>, PlanError> {
    tensors
        .iter()
        .zip(placements)
        .map(|(tensor, placement)| {
            watch.item(0)?;
            let Some(device) = placement.device else {
                return Ok(None);
            };
            if device as usize >= devices.len() {
                return Err(PlanError::Bad(BadPlan::NoSuchDevice {
                    tensor: tensor.name.clone(),
                    device,
                    devices: devices.len(),
                }));
            }
            tensor_part_sizes(tensor, placement.format)
                .map(Some)
                .map_err(|source| {
                    PlanError::Bad(BadPlan::IllegalFormat {
                        tensor: tensor.name.clone(),
                        source,
                    })
                })
        })
        .collect()
}

/// The stack that each tensor is of, if it is of one.
fn stack_of(tensors: usize, stacks: &[stacks::Stack]) -> Vec<Option<usize>> {
    let mut stack_of = vec![None; tensors];
    for (number, stack) in stacks.iter().enumerate() {
        for &member in &stack.members {
            stack_of[member] = Some(number);
        }
    }
    stack_of
}

/// What products need on each device.
fn product_bytes(
    tensors: &[TensorInfo],
    devices: &[DeviceInfo],
    placements: &[Placement],
    stacks: &[stacks::Stack],
    wanted: &Wanted,
    watch: &mut Watch<'_>,
) -> Result<Vec<u64>, PlanError> {
    let mut all = vec![ProductBytes::default(); devices.len()];
    if wanted.rows > 0 {
        for (tensor, placement) in tensors.iter().zip(placements) {
            watch.item(0)?;
            let Some(device) = placement.device else {
                continue;
            };
            let device = device as usize;
            if products::are_computed_on(&devices[device]) {
                all[device].add(tensor, placement.format, wanted);
            }
        }
        for stack in stacks {
            watch.item(0)?;
            let first = stack.members[0];
            let placement = placements[first];
            let device = placement.device.map_or(0, |device| device as usize);
            if products::are_computed_on(&devices[device]) {
                all[device].add_stack(stack, &tensors[first], placement.format, wanted);
            }
        }
    }
    Ok(all.into_iter().map(ProductBytes::bytes).collect())
}

/// A stored alias is left out, or lies with the tensor it is tied to and in the same format.
fn check_ties(
    tensors: &[TensorInfo],
    ties: &[Tie],
    placements: &[Placement],
) -> Result<(), PlanError> {
    let names: HashMap<usize, &str> = ties
        .iter()
        .filter_map(|tie| Some((tie.alias_tensor?, tie.alias.as_str())))
        .collect();
    for tie in ties {
        let Some(alias) = tie.alias_tensor else {
            continue;
        };
        if placements[alias].device.is_some() && placements[alias] != placements[tie.tensor] {
            return Err(PlanError::Bad(BadPlan::TornTie {
                tensor: tensors[tie.tensor].name.clone(),
                alias: names[&alias].to_owned(),
            }));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
