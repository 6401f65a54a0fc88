//! Devices of several processes as users name them: `1/cuda:0:32GiB`, or `cuda` for every rank's own GPU.
//!
//! A rank is one process of a world. All ranks are given the same devices and count with all of them;
//! each opens only its own.

use std::fmt;
use std::str::FromStr;

use super::spec::{self, CUDA_GRANULARITY};
use super::{Device, DeviceError, DeviceInfo, DeviceKind, DeviceSpec, HostDevice, SpecError};
use crate::status::Status;
use crate::types::parse_bytes;

/// A device as it was asked for, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankedSpec {
    /// The process that has it. `None`: every process has one such device.
    pub rank: Option<u32>,
    /// The device.
    pub device: LocalSpec,
}

/// A device of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalSpec {
    /// One that has a name of its own.
    Device(DeviceSpec),
    /// `cuda`: the GPU that has the number of the process among those of its machine, or the only one
    /// that it sees.
    LocalCuda {
        /// Bytes that may be used; by default what is free.
        capacity: Option<u64>,
    },
    /// What a process has where no device is named: the same GPU, and where there is none, its share of
    /// the free host memory.
    Default,
}

/// Why devices cannot be those of a world.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RankedSpecError {
    /// A device that cannot be understood.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// What stands before the device is not a rank.
    #[error("'{spec}' is not a device: '{rank}' is not a rank (example: 1/cuda:0:20GiB)")]
    NotARank {
        /// What was given.
        spec: String,
        /// What stands there.
        rank: String,
    },
    /// A device of a rank that there is not.
    #[error(
        "device {spec} is of rank {rank}, and there {} (from 0): --world says how many",
        Ranks(*size)
    )]
    NoSuchRank {
        /// The device.
        spec: String,
        /// Its rank.
        rank: u32,
        /// Number of ranks.
        size: u32,
    },
    /// Some devices name a rank and others do not.
    #[error("device {with} names a rank and {without} does not: either all do or none")]
    Mixed {
        /// The first that does.
        with: String,
        /// The first that does not.
        without: String,
    },
    /// `cuda` where there is one process.
    #[error(
        "device {spec} is the GPU of a rank, and there is only one process: which GPU (cuda:0)?"
    )]
    NoRanks {
        /// The device.
        spec: String,
    },
}

impl From<&RankedSpecError> for Status {
    fn from(_: &RankedSpecError) -> Status {
        Status::Usage
    }
}

struct Ranks(u32);

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("is 1 rank"),
            ranks => write!(f, "are {ranks} ranks"),
        }
    }
}

impl FromStr for RankedSpec {
    type Err = RankedSpecError;

    fn from_str(text: &str) -> Result<RankedSpec, RankedSpecError> {
        let (rank, device) = match text.split_once('/') {
            None => (None, text),
            Some((rank, device)) => {
                let is_number = rank.bytes().all(|b| b.is_ascii_digit());
                match rank.parse().ok().filter(|_| is_number) {
                    Some(number) => (Some(number), device),
                    None => {
                        return Err(RankedSpecError::NotARank {
                            spec: text.to_owned(),
                            rank: rank.to_owned(),
                        });
                    }
                }
            }
        };
        let local = match device.strip_prefix("cuda") {
            Some("") => Some(None),
            // A number alone is that of a GPU.
            Some(rest) => rest
                .strip_prefix(':')
                .filter(|size| !size.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|size| parse_bytes(size).ok())
                .map(Some),
            None => None,
        };
        let device = match local {
            Some(capacity) => LocalSpec::LocalCuda { capacity },
            None => LocalSpec::Device(device.parse()?),
        };
        Ok(RankedSpec { rank, device })
    }
}

impl fmt::Display for RankedSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rank) = self.rank {
            write!(f, "{rank}/")?;
        }
        let (name, capacity) = match self.device {
            LocalSpec::Default => ("the default".to_owned(), None),
            LocalSpec::LocalCuda { capacity } => ("cuda".to_owned(), capacity),
            LocalSpec::Device(DeviceSpec::Cuda { index, capacity }) => {
                (format!("cuda:{index}"), capacity)
            }
            LocalSpec::Device(DeviceSpec::Sim { capacity }) => ("sim".to_owned(), Some(capacity)),
            LocalSpec::Device(DeviceSpec::Cpu { capacity }) => ("cpu".to_owned(), capacity),
        };
        f.write_str(&name)?;
        match capacity {
            Some(capacity) => write!(f, ":{capacity}B"),
            None => Ok(()),
        }
    }
}

impl RankedSpec {
    /// Returns the devices of the only process that there is.
    ///
    /// # Errors
    /// [`RankedSpecError::NoSuchRank`] for one of another, and [`RankedSpecError::NoRanks`] for one that
    /// only a rank has.
    pub fn of_one_process(specs: &[RankedSpec]) -> Result<Vec<DeviceSpec>, RankedSpecError> {
        let own = |spec: &RankedSpec| match (spec.rank, &spec.device) {
            (Some(rank @ 1..), _) => Err(RankedSpecError::NoSuchRank {
                spec: spec.to_string(),
                rank,
                size: 1,
            }),
            (_, LocalSpec::Device(device)) => Ok(device.clone()),
            _ => Err(RankedSpecError::NoRanks {
                spec: spec.to_string(),
            }),
        };
        specs.iter().map(own).collect()
    }
}

/// A device of a world: whose it is, and what a plan has to know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankedDevice {
    /// The process that has it.
    pub rank: u32,
    /// The device, with a name that begins with its rank: `1/cuda:0`.
    pub info: DeviceInfo,
}

/// All devices of a world of several processes, in the order in which plans have them: as they were
/// named, or, where no ranks were, rank by rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorldDevices {
    devices: Vec<(u32, LocalSpec)>,
}

impl WorldDevices {
    /// Settles whose the devices are. Where none names a rank, each stands for one of every rank; no
    /// device at all stands for what each rank has by default.
    ///
    /// # Errors
    /// [`RankedSpecError::Mixed`] and [`RankedSpecError::NoSuchRank`].
    pub fn new(specs: &[RankedSpec], size: u32) -> Result<WorldDevices, RankedSpecError> {
        let with = specs.iter().find(|spec| spec.rank.is_some());
        let without = specs.iter().find(|spec| spec.rank.is_none());
        if let (Some(with), Some(without)) = (with, without) {
            return Err(RankedSpecError::Mixed {
                with: with.to_string(),
                without: without.to_string(),
            });
        }
        if let Some(spec) = specs.iter().find(|spec| spec.rank >= Some(size)) {
            return Err(RankedSpecError::NoSuchRank {
                spec: spec.to_string(),
                rank: spec.rank.unwrap_or(size),
                size,
            });
        }
        let devices = if with.is_some() {
            let ranked = |spec: &RankedSpec| Some((spec.rank?, spec.device.clone()));
            specs.iter().filter_map(ranked).collect()
        } else {
            let default = [LocalSpec::Default];
            let each: Vec<&LocalSpec> = match specs {
                [] => default.iter().collect(),
                specs => specs.iter().map(|spec| &spec.device).collect(),
            };
            let of_rank = |rank| each.iter().map(move |&device| (rank, device.clone()));
            (0..size).flat_map(of_rank).collect()
        };
        Ok(WorldDevices { devices })
    }

    /// Returns for every device of the plan whether it is of this rank.
    pub fn is_of(&self, rank: u32) -> Vec<bool> {
        self.devices.iter().map(|(of, _)| *of == rank).collect()
    }

    /// Returns whether all sizes are given, so that a plan can be made without asking any device.
    pub fn are_sized(&self) -> bool {
        self.devices
            .iter()
            .all(|(_, device)| device.size().is_some())
    }

    /// Returns what a plan has to know of devices that need not be there: each has the size that it was
    /// given, all of it free.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] for one without a size, and [`DeviceError::NamedTwice`].
    pub fn planned(&self) -> Result<Vec<RankedDevice>, DeviceError> {
        let mut sims = Sims::default();
        let planned = self.devices.iter().map(|(rank, device)| {
            let name = format!("{rank}/{}", device.name(sims.next(*rank, device)));
            let Some((kind, capacity, granularity)) = device.size() else {
                return Err(DeviceError::Unavailable {
                    reason: format!(
                        "how much memory it has is not known here: give it a size (as in {rank}/cpu:8GiB), \
                         or let the ranks tell each other (--rendezvous)"
                    ),
                    device: name,
                });
            };
            let info = DeviceInfo {
                name,
                kind,
                capacity,
                available: capacity,
                granularity,
            };
            Ok(RankedDevice { rank: *rank, info })
        });
        each_once(planned.collect::<Result<_, _>>()?)
    }

    /// Opens the devices of this rank, in the order of the plan. `local_rank` is its number among the
    /// `local_size` ranks of its machine, which share the host memory evenly where no size is given.
    ///
    /// # Errors
    /// As [`open_devices`](super::open_devices).
    pub fn open(
        &self,
        rank: u32,
        local_rank: u32,
        local_size: u32,
    ) -> Result<Vec<Box<dyn Device>>, DeviceError> {
        let own = self.devices.iter().filter(|(of, _)| *of == rank);
        let cuda = |capacity: Option<u64>| {
            let index = local_cuda(local_rank)?;
            Ok(DeviceSpec::Cuda { index, capacity })
        };
        let specs = own.map(|(_, device)| match device {
            LocalSpec::Device(DeviceSpec::Cpu { capacity: None }) => Ok(host_share(local_size)),
            LocalSpec::Device(device) => Ok(device.clone()),
            LocalSpec::LocalCuda { capacity } => cuda(*capacity),
            LocalSpec::Default => match spec::cuda_count() {
                0 => Ok(host_share(local_size)),
                _ => cuda(None),
            },
        });
        let specs: Vec<DeviceSpec> = specs.collect::<Result<_, DeviceError>>()?;
        match specs.is_empty() {
            // Not all that there are.
            true => Ok(Vec::new()),
            false => spec::open_devices(&specs),
        }
    }

    /// Puts together what every rank has said of its own devices, in their order.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] where a rank has not told of as many as were named, and
    /// [`DeviceError::NamedTwice`].
    pub fn gathered(&self, told: &[Vec<DeviceInfo>]) -> Result<Vec<RankedDevice>, DeviceError> {
        let mut rests: Vec<_> = told.iter().map(|devices| devices.iter()).collect();
        let mut gathered = Vec::with_capacity(self.devices.len());
        for (rank, device) in &self.devices {
            let Some(info) = rests.get_mut(*rank as usize).and_then(Iterator::next) else {
                return Err(other_devices(*rank, &device.name(0)));
            };
            let info = DeviceInfo {
                name: format!("{rank}/{}", info.name),
                ..info.clone()
            };
            gathered.push(RankedDevice { rank: *rank, info });
        }
        for (rank, mut rest) in rests.into_iter().enumerate() {
            if let Some(extra) = rest.next() {
                return Err(other_devices(rank as u32, &extra.name));
            }
        }
        each_once(gathered)
    }
}

/// A rank was given other devices than this one.
fn other_devices(rank: u32, name: &str) -> DeviceError {
    DeviceError::Unavailable {
        device: format!("{rank}/{name}"),
        reason: format!("rank {rank} was given other devices than others: give all the same"),
    }
}

impl LocalSpec {
    fn name(&self, sim: usize) -> String {
        match self {
            LocalSpec::Device(DeviceSpec::Sim { .. }) => format!("sim:{sim}"),
            LocalSpec::Device(DeviceSpec::Cpu { .. }) => "cpu".to_owned(),
            LocalSpec::Device(DeviceSpec::Cuda { index, .. }) => format!("cuda:{index}"),
            LocalSpec::LocalCuda { .. } => "cuda".to_owned(),
            LocalSpec::Default => "default".to_owned(),
        }
    }

    /// Its kind, its size and what is rounded up to, where the size is given.
    fn size(&self) -> Option<(DeviceKind, u64, u64)> {
        let (kind, capacity, granularity) = match *self {
            LocalSpec::Device(DeviceSpec::Sim { capacity }) => {
                (DeviceKind::Sim, Some(capacity), HostDevice::GRANULARITY)
            }
            LocalSpec::Device(DeviceSpec::Cpu { capacity }) => {
                (DeviceKind::Cpu, capacity, HostDevice::GRANULARITY)
            }
            LocalSpec::Device(DeviceSpec::Cuda { capacity, .. })
            | LocalSpec::LocalCuda { capacity } => (DeviceKind::Cuda, capacity, CUDA_GRANULARITY),
            LocalSpec::Default => return None,
        };
        Some((kind, capacity?, granularity))
    }
}

/// Numbers the simulated devices of each rank.
#[derive(Default)]
struct Sims(std::collections::HashMap<u32, usize>);

impl Sims {
    fn next(&mut self, rank: u32, device: &LocalSpec) -> usize {
        let next = self.0.entry(rank).or_default();
        let number = *next;
        *next += usize::from(matches!(device, LocalSpec::Device(DeviceSpec::Sim { .. })));
        number
    }
}

fn each_once(devices: Vec<RankedDevice>) -> Result<Vec<RankedDevice>, DeviceError> {
    let mut names = std::collections::HashSet::new();
    match devices
        .iter()
        .find(|device| !names.insert(&device.info.name))
    {
        None => Ok(devices),
        Some(twice) => Err(DeviceError::NamedTwice {
            device: twice.info.name.clone(),
        }),
    }
}

/// The GPU of a rank. Launchers that give each process a GPU show it only that one.
fn local_cuda(local_rank: u32) -> Result<u32, DeviceError> {
    match spec::cuda_count() {
        1 => Ok(0),
        // What opening one says is clearer than that there is none.
        0 => Ok(local_rank),
        count if local_rank < count => Ok(local_rank),
        count => Err(DeviceError::Unavailable {
            device: format!("cuda:{local_rank}"),
            reason: format!(
                "local rank {local_rank} has no GPU of its own: there are {count}; name devices with --device"
            ),
        }),
    }
}

/// An even share of the host memory that is free now.
fn host_share(local_size: u32) -> DeviceSpec {
    let free = HostDevice::cpu(None).info().available;
    let share = free / u64::from(local_size.max(1));
    let capacity = Some(share - share % HostDevice::GRANULARITY);
    DeviceSpec::Cpu { capacity }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Devices as they can be named.
    fn any_device() -> impl Strategy<Value = LocalSpec> {
        let size = 0u64..1 << 50;
        let some = prop::option::of(size.clone());
        let cuda = (any::<u32>(), some.clone())
            .prop_map(|(index, capacity)| LocalSpec::Device(DeviceSpec::Cuda { index, capacity }));
        prop_oneof![
            some.clone()
                .prop_map(|capacity| LocalSpec::LocalCuda { capacity }),
            some.prop_map(|capacity| LocalSpec::Device(DeviceSpec::Cpu { capacity })),
            size.prop_map(|capacity| LocalSpec::Device(DeviceSpec::Sim { capacity })),
            cuda,
        ]
    }

    proptest! {
        #[test]
        fn a_device_is_read_as_it_is_shown(
            rank in prop::option::of(any::<u32>()),
            device in any_device(),
        ) {
            let spec = RankedSpec { rank, device };
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }

        #[test]
        fn any_text_is_a_device_or_an_error(text in "[0-9]{0,3}/?(cuda|cpu|sim)?:?[0-9]{0,2}:?[0-9A-Za-z]{0,5}") {
            if let Ok(spec) = text.parse::<RankedSpec>() {
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }

        #[test]
        fn every_device_of_a_world_is_of_one_rank(
            devices in prop::collection::vec((0u32..4, any_device()), 1..8),
            are_ranked in any::<bool>(),
        ) {
            let spec = |(rank, device): &(u32, LocalSpec)| RankedSpec {
                rank: are_ranked.then_some(*rank),
                device: device.clone(),
            };
            let specs: Vec<RankedSpec> = devices.iter().map(spec).collect();
            let world = WorldDevices::new(&specs, 4).unwrap();
            let of: Vec<Vec<bool>> = (0..4).map(|rank| world.is_of(rank)).collect();
            let count = if are_ranked { specs.len() } else { 4 * specs.len() };
            for device in 0..count {
                prop_assert_eq!(of.iter().filter(|of| of[device]).count(), 1);
            }
            match world.planned() {
                Ok(planned) => {
                    prop_assert_eq!(planned.len(), count);
                    for (index, device) in planned.iter().enumerate() {
                        prop_assert!(of[device.rank as usize][index]);
                        let rank = format!("{}/", device.rank);
                        prop_assert!(device.info.name.starts_with(&rank));
                    }
                }
                Err(DeviceError::Unavailable { .. }) => prop_assert!(!world.are_sized()),
                Err(error) => {
                    let is_twice = matches!(error, DeviceError::NamedTwice { .. });
                    prop_assert!(is_twice, "{}", error);
                }
            }
        }
    }

    fn specs(texts: &[&str]) -> Vec<RankedSpec> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn names(devices: &[RankedDevice]) -> Vec<&str> {
        devices
            .iter()
            .map(|device| device.info.name.as_str())
            .collect()
    }

    #[test]
    fn a_device_may_name_its_rank() {
        let read = |text: &str| text.parse::<RankedSpec>().unwrap();
        assert_eq!(
            read("1/cuda:0:32GiB"),
            RankedSpec {
                rank: Some(1),
                device: LocalSpec::Device("cuda:0:32GiB".parse().unwrap()),
            }
        );
        assert_eq!(read("sim:4GiB").rank, None);
        let local = |capacity| LocalSpec::LocalCuda { capacity };
        assert_eq!(read("cuda").device, local(None));
        assert_eq!(read("3/cuda:20GiB").device, local(Some(20 << 30)));
        // A number is that of a GPU.
        assert_eq!(
            read("cuda:20").device,
            LocalSpec::Device("cuda:20".parse().unwrap())
        );
        for bad in [
            "",
            "/cpu",
            "x/cpu",
            "-1/cpu",
            "+1/cpu",
            "1/",
            "1/1/cpu",
            "4294967296/cpu",
            "cuda:",
            "cuda:x",
            "1/cudax",
            "gpu",
        ] {
            assert!(bad.parse::<RankedSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_device_without_a_rank_is_one_of_every_rank() {
        let told = |texts: &[&str], size| {
            let devices = WorldDevices::new(&specs(texts), size).unwrap();
            devices.planned().unwrap()
        };
        let both = told(&["sim:1GiB", "cpu:2GiB"], 2);
        assert_eq!(names(&both), ["0/sim:0", "0/cpu", "1/sim:0", "1/cpu"]);
        assert_eq!(both[3].info.available, 2 << 30);
        assert_eq!(both[3].rank, 1);
        let ranked = told(&["1/sim:1GiB", "0/cuda:0:3GiB", "1/sim:1GiB"], 2);
        assert_eq!(names(&ranked), ["1/sim:0", "0/cuda:0", "1/sim:1"]);
        assert_eq!(ranked[1].info.granularity, 2 << 20);
        assert_eq!(names(&told(&["cuda:4GiB"], 2)), ["0/cuda", "1/cuda"]);
        let devices = WorldDevices::new(&specs(&["1/sim:1GiB", "0/sim:1GiB"]), 2).unwrap();
        assert_eq!(devices.is_of(0), [false, true]);
    }

    #[test]
    fn what_no_world_can_have_is_refused() {
        let refused = |texts: &[&str], size| WorldDevices::new(&specs(texts), size).unwrap_err();
        let mixed = refused(&["0/sim:1GiB", "sim:1GiB"], 2);
        assert!(matches!(mixed, RankedSpecError::Mixed { .. }), "{mixed}");
        let beyond = refused(&["0/sim:1GiB", "2/sim:1GiB"], 2);
        assert!(matches!(
            beyond,
            RankedSpecError::NoSuchRank {
                rank: 2,
                size: 2,
                ..
            }
        ));
        let twice = WorldDevices::new(&specs(&["0/cpu:1GiB", "0/cpu:2GiB"]), 2).unwrap();
        assert!(matches!(
            twice.planned(),
            Err(DeviceError::NamedTwice { device }) if device == "0/cpu"
        ));
        for unsized_ in [&["cpu"][..], &["cuda:0"], &["cuda"], &[]] {
            let devices = WorldDevices::new(&specs(unsized_), 2).unwrap();
            assert!(!devices.are_sized());
            let error = devices.planned().unwrap_err();
            assert!(error.to_string().contains("give it a size"), "{error}");
        }
    }

    #[test]
    fn one_process_has_devices_as_ever() {
        let one = |text| RankedSpec::of_one_process(&specs(&[text]));
        assert_eq!(one("0/cpu:1GiB").unwrap(), one("cpu:1GiB").unwrap());
        assert!(matches!(
            one("1/cpu"),
            Err(RankedSpecError::NoSuchRank { .. })
        ));
        assert!(matches!(one("cuda"), Err(RankedSpecError::NoRanks { .. })));
    }

    #[test]
    fn ranks_of_a_machine_share_its_memory() {
        let devices = WorldDevices::new(&specs(&["cpu", "sim:1GiB"]), 4).unwrap();
        let all = HostDevice::cpu(None).info().capacity;
        let opened = devices.open(2, 2, 4).unwrap();
        let infos: Vec<DeviceInfo> = opened.iter().map(|device| device.info()).collect();
        assert!(infos[0].capacity <= all / 4);
        assert_eq!(infos[0].capacity % 4096, 0);
        let none: Vec<DeviceInfo> = Vec::new();
        let mut told = vec![infos.clone(); 4];
        let gathered = devices.gathered(&told).unwrap();
        assert_eq!(names(&gathered)[2..4], ["1/cpu", "1/sim:0"]);
        assert_eq!(gathered[0].info.available, infos[0].available);
        told[3] = none;
        assert!(matches!(
            devices.gathered(&told),
            Err(DeviceError::Unavailable { .. })
        ));
        told[3] = [infos.clone(), infos].concat();
        assert!(matches!(
            devices.gathered(&told),
            Err(DeviceError::Unavailable { .. })
        ));
    }
}
