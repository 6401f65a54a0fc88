//! What equal plans for equal files have in common: a digest over all that decides the bytes.
//!
//! It is SHA-256 over a form that is the same on every machine: numbers in 64 bits, little-endian, texts with
//! their length before them, everything in the order of checkpoint and plan.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::checkpoint::Checkpoint;
use crate::device::DeviceKind;
use crate::plan::{PartKind, Plan};
use crate::types::Placement;

/// A SHA-256 digest; it prints as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Its bytes.
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Its first characters, to tell two apart in a sentence.
    pub(super) fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// A text that is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a digest, which has 64 hexadecimal digits")]
pub struct ParseDigestError {
    /// The text.
    pub text: String,
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        let error = || ParseDigestError {
            text: text.to_owned(),
        };
        let digits: Vec<u8> = text
            .chars()
            .map(|c| c.to_digit(16).map(|digit| digit as u8))
            .collect::<Option<_>>()
            .ok_or_else(error)?;
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() {
            return Err(error());
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Digest(bytes))
    }
}

/// The digest of a plan and of what it was made for, and those of its parts, which say where two plans
/// differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanDigest {
    /// Of everything, this crate's version included.
    pub whole: Digest,
    /// Of the tensors - names, types, shapes, where they lie, how they are quantized - and the lengths of
    /// the files.
    pub checkpoint: Digest,
    /// Of the devices: names, kinds, what they have and what was free.
    pub devices: Digest,
    /// Of what the plan puts where.
    pub placements: Digest,
}

impl PlanDigest {
    /// Returns the digest of `plan`, which was made for `checkpoint`. It depends on what the files begin
    /// with and on their lengths, not on where they are.
    pub fn of(checkpoint: &Checkpoint, plan: &Plan) -> PlanDigest {
        let (files, devices, placements) = (
            of_checkpoint(checkpoint),
            of_devices(plan),
            of_placements(plan),
        );
        let mut hash = Hash::new("plan");
        hash.text(env!("CARGO_PKG_VERSION"));
        for part in [&files, &devices, &placements] {
            hash.0.update(part.0);
        }
        PlanDigest {
            whole: hash.finish(),
            checkpoint: files,
            devices,
            placements,
        }
    }
}

/// A digest in the making.
struct Hash(Sha256);

impl Hash {
    fn new(domain: &str) -> Hash {
        let mut hash = Hash(Sha256::new());
        hash.text("tightfit digest 1");
        hash.text(domain);
        hash
    }

    fn number(&mut self, number: u64) {
        self.0.update(number.to_le_bytes());
    }

    fn index(&mut self, number: usize) {
        // No platform has more than 64 bits.
        self.number(number as u64);
    }

    fn text(&mut self, text: &str) {
        self.index(text.len());
        self.0.update(text);
    }

    /// What may be absent.
    fn option(&mut self, number: Option<u64>) {
        self.number(number.is_some().into());
        self.number(number.unwrap_or(0));
    }

    fn placement(&mut self, placement: Placement) {
        self.option(placement.device.map(u64::from));
        self.text(&placement.format.to_string());
    }

    fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

fn of_checkpoint(checkpoint: &Checkpoint) -> Digest {
    let mut hash = Hash::new("checkpoint");
    hash.index(checkpoint.shards().len());
    for shard in checkpoint.shards() {
        hash.number(shard.length());
    }
    hash.index(checkpoint.tensors().len());
    for tensor in checkpoint.tensors() {
        hash.text(&tensor.name);
        hash.text(tensor.dtype.safetensors_name());
        hash.index(tensor.shape.len());
        tensor.shape.iter().for_each(|&length| hash.number(length));
        hash.index(tensor.shard);
        hash.number(tensor.offset);
        hash.number(tensor.bytes);
        // As text, which has every field also of types that grow: the version stands beside it.
        for how in [
            tensor.quantized.as_ref().map(|how| format!("{how:?}")),
            tensor.encoded.as_ref().map(|how| format!("{how:?}")),
            tensor.piece.as_ref().map(|how| format!("{how:?}")),
        ] {
            hash.number(how.is_some().into());
            hash.text(&how.unwrap_or_default());
        }
    }
    hash.index(checkpoint.ties().len());
    for tie in checkpoint.ties() {
        hash.index(tie.tensor);
        hash.text(&tie.alias);
        hash.option(tie.alias_tensor.map(|index| index as u64));
    }
    hash.finish()
}

fn of_devices(plan: &Plan) -> Digest {
    let mut hash = Hash::new("devices");
    hash.index(plan.devices.len());
    for planned in &plan.devices {
        let device = &planned.device;
        hash.text(&device.name);
        hash.number(match device.kind {
            DeviceKind::Cuda => 0,
            DeviceKind::Sim => 1,
            DeviceKind::Cpu => 2,
        });
        hash.number(device.capacity);
        hash.number(device.available);
        hash.number(device.granularity);
    }
    hash.finish()
}

fn of_placements(plan: &Plan) -> Digest {
    let mut hash = Hash::new("placements");
    hash.index(plan.devices.len());
    for planned in &plan.devices {
        hash.number(planned.size.requested);
        hash.number(planned.size.padded);
        hash.number(planned.size.reserved);
        hash.number(planned.headroom);
        hash.number(planned.tail);
        hash.number(planned.products);
        hash.number(planned.tensors);
    }
    hash.index(plan.slices.len());
    for slice in &plan.slices {
        hash.number(slice.tensor.into());
        hash.number(slice.dimension.into());
        hash.index(slice.ranges.len());
        for range in &slice.ranges {
            hash.number(range.start);
            hash.number(range.end);
        }
        hash.placement(slice.placement);
    }
    hash.index(plan.tensors.len());
    for planned in &plan.tensors {
        hash.placement(planned.placement);
        hash.index(planned.parts.len());
        for part in &planned.parts {
            hash.number(match part.kind {
                PartKind::Data => 0,
                PartKind::Codes => 1,
                PartKind::Absmax => 2,
                PartKind::NestedAbsmax => 3,
            });
            hash.number(part.offset);
            hash.number(part.bytes);
        }
    }
    hash.finish()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::device::DeviceInfo;
    use crate::testing::{Source, device, source, write_checkpoint};
    use crate::types::{DType, Format, Slice};

    fn sources() -> Vec<Source> {
        vec![
            source("model.layers.0.mlp.up_proj.weight", DType::Bf16, &[64, 64]),
            source(
                "model.layers.0.mlp.down_proj.weight",
                DType::Bf16,
                &[64, 64],
            ),
            source("model.norm.weight", DType::F32, &[64]),
        ]
    }

    fn checkpoint(directory: &Path, sources: &[Source]) -> Checkpoint {
        write_checkpoint(directory, sources);
        Checkpoint::open(directory).unwrap()
    }

    fn plan(
        checkpoint: &Checkpoint,
        devices: &[DeviceInfo],
        format: Format,
        headroom: u64,
    ) -> Plan {
        let place = |at| Placement {
            device: Some(at as u32 % 2),
            format: if at == 2 { Format::Stored } else { format },
        };
        let placements: Vec<Placement> = (0..checkpoint.tensors().len()).map(place).collect();
        let headroom = [headroom, 0];
        Plan::new(checkpoint.tensors(), &[], devices, &placements, &headroom).unwrap()
    }

    fn devices() -> Vec<DeviceInfo> {
        vec![
            device("0/sim:0", 1 << 20, 4096),
            device("1/sim:0", 1 << 20, 4096),
        ]
    }

    #[test]
    fn equal_files_in_two_places_have_one_digest() {
        let [a, b] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let digest = |directory: &Path| {
            let checkpoint = checkpoint(directory, &sources());
            PlanDigest::of(&checkpoint, &plan(&checkpoint, &devices(), Format::NF4, 0))
        };
        assert_eq!(digest(a.path()), digest(b.path()));
    }

    #[test]
    fn every_part_of_a_checkpoint_counts() {
        let digest = |sources: &[Source]| {
            let directory = tempfile::tempdir().unwrap();
            let checkpoint = checkpoint(directory.path(), sources);
            let plan = plan(&checkpoint, &devices(), Format::NF4, 0);
            PlanDigest::of(&checkpoint, &plan)
        };
        let first = digest(&sources());
        let changes: [fn(&mut Vec<Source>); 5] = [
            |sources| sources[0].name = "model.layers.0.mlp.gate_proj.weight",
            |sources| sources[0].dtype = DType::F16,
            |sources| sources[0].shape = vec![32, 128],
            |sources| sources.swap(0, 1),
            |sources| {
                sources.pop();
            },
        ];
        let mut seen = vec![first.checkpoint];
        for change in changes {
            let mut sources = sources();
            change(&mut sources);
            let other = digest(&sources);
            assert!(!seen.contains(&other.checkpoint), "{}", seen.len());
            assert_ne!(other.whole, first.whole);
            assert_eq!(other.devices, first.devices);
            seen.push(other.checkpoint);
        }
    }

    #[test]
    fn every_field_of_a_plan_counts() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(directory.path(), &sources());
        let first = plan(&checkpoint, &devices(), Format::NF4_DOUBLE, 7);
        let digest = |plan: &Plan| PlanDigest::of(&checkpoint, plan);
        let of_devices: [fn(&mut DeviceInfo); 5] = [
            |device| device.name.push('0'),
            |device| device.kind = DeviceKind::Cpu,
            |device| device.capacity += 1,
            |device| device.available -= 1,
            |device| device.granularity *= 2,
        ];
        let mut seen = vec![digest(&first)];
        for change in of_devices {
            let mut plan = first.clone();
            change(&mut plan.devices[1].device);
            let other = digest(&plan);
            assert!(
                seen.iter()
                    .all(|seen| seen.devices != other.devices && seen.whole != other.whole)
            );
            assert_eq!(other.placements, seen[0].placements);
            seen.push(other);
        }
        let of_plan: [fn(&mut Plan); 13] = [
            |plan| plan.devices[0].headroom += 1,
            |plan| plan.devices[0].tail += 1,
            |plan| plan.devices[0].products += 1,
            |plan| plan.devices[0].tensors += 1,
            |plan| plan.devices[0].size.requested += 1,
            |plan| plan.devices[0].size.padded += 1,
            |plan| plan.devices[0].size.reserved += 1,
            |plan| plan.tensors[0].placement.device = Some(1),
            |plan| plan.tensors[0].placement.device = None,
            |plan| plan.tensors[0].placement.format = Format::NF4,
            |plan| plan.tensors[0].parts[1].offset += 256,
            |plan| plan.tensors[0].parts[1].bytes += 1,
            |plan| plan.tensors[0].parts[0].kind = PartKind::Data,
        ];
        let mut seen = vec![digest(&first)];
        for change in of_plan {
            let mut plan = first.clone();
            change(&mut plan);
            let other = digest(&plan);
            assert!(
                seen.iter()
                    .all(|seen| seen.placements != other.placements && seen.whole != other.whole),
                "{}",
                seen.len()
            );
            assert_eq!(other.devices, seen[0].devices);
            assert_eq!(other.checkpoint, seen[0].checkpoint);
            seen.push(other);
        }
    }

    #[test]
    fn every_field_of_a_slice_counts() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(directory.path(), &sources());
        let mut plan = plan(&checkpoint, &devices(), Format::NF4, 0);
        let slice = |ranges: &[(u64, u64)]| Slice {
            tensor: 0,
            dimension: 0,
            ranges: ranges.iter().map(|&(start, end)| start..end).collect(),
            placement: Placement {
                device: Some(0),
                format: Format::NF4,
            },
        };
        let mut seen = vec![PlanDigest::of(&checkpoint, &plan).placements];
        let first = slice(&[(0, 32), (40, 64)]);
        let changed = |change: fn(&mut Slice)| {
            let mut slice = first.clone();
            change(&mut slice);
            slice
        };
        for slices in [
            vec![first.clone()],
            vec![slice(&[(0, 32)]), slice(&[(40, 64)])],
            vec![changed(|slice| slice.tensor = 1)],
            vec![changed(|slice| slice.dimension = 1)],
            vec![changed(|slice| slice.ranges[1].end = 63)],
            vec![changed(|slice| slice.ranges[0].start = 1)],
            vec![changed(|slice| slice.placement.device = Some(1))],
            vec![changed(|slice| slice.placement.format = Format::Stored)],
        ] {
            plan.slices = slices;
            let other = PlanDigest::of(&checkpoint, &plan).placements;
            assert!(!seen.contains(&other), "{}", seen.len());
            seen.push(other);
        }
    }

    #[test]
    fn the_form_is_the_same_everywhere() {
        // As another implementation computes it.
        let mut hash = Hash::new("x");
        hash.number(258);
        hash.option(None);
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let mut bytes = [text("tightfit digest 1"), text("x")].concat();
        bytes.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        bytes.extend([0; 16]);
        assert_eq!(hash.finish().0, <[u8; 32]>::from(Sha256::digest(bytes)));
    }

    #[test]
    fn digests_are_read_as_they_are_printed() {
        let digest = Hash::new("x").finish();
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(digest.to_string().to_uppercase().parse(), Ok(digest));
        let long = format!("{digest}00");
        for bad in [
            "",
            "12",
            &digest.to_string()[1..],
            &long,
            &"g".repeat(64),
            &"é".repeat(32),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
