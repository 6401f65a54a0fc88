//! Devices as users name them: `cuda:0`, `cuda:0:20GiB`, `sim:32GiB`, `cpu`, `cpu:16GiB`.

use std::str::FromStr;
use std::sync::Arc;

use super::host::OfHostMemory;
use super::{Device, DeviceError, DeviceInfo, DeviceKind, HostDevice};
use crate::types::parse_bytes;

/// One device as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceSpec {
    /// `cuda:<index>` with at most this many bytes.
    Cuda {
        /// The driver's index.
        index: u32,
        /// Bytes that may be used; by default what is free.
        capacity: Option<u64>,
    },
    /// `sim:<capacity>`.
    Sim {
        /// Bytes.
        capacity: u64,
    },
    /// `cpu` with at most this many bytes.
    Cpu {
        /// Bytes that may be used; by default what is free.
        capacity: Option<u64>,
    },
}

/// A device that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{spec}' is not a device: {reason} (examples: cuda:0, cuda:0:20GiB, sim:32GiB, cpu, cpu:16GiB)"
)]
pub struct SpecError {
    spec: String,
    reason: String,
}

impl FromStr for DeviceSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<DeviceSpec, SpecError> {
        let error = |reason: String| SpecError {
            spec: text.to_owned(),
            reason,
        };
        let bytes = |part: &str| parse_bytes(part).map_err(&error);
        let parts: Vec<&str> = text.split(':').collect();
        match parts[..] {
            ["cpu"] => Ok(DeviceSpec::Cpu { capacity: None }),
            ["cpu", capacity] => Ok(DeviceSpec::Cpu {
                capacity: Some(bytes(capacity)?),
            }),
            ["sim", capacity] => Ok(DeviceSpec::Sim {
                capacity: bytes(capacity)?,
            }),
            ["sim"] => Err(error("a simulated device needs a capacity".to_owned())),
            ["cuda", index] | ["cuda", index, _] => {
                let index = index
                    .parse()
                    .map_err(|_| error(format!("'{index}' is not a device number")))?;
                let capacity = parts.get(2).map(|part| bytes(part)).transpose()?;
                Ok(DeviceSpec::Cuda { index, capacity })
            }
            _ => Err(error("it starts with cuda, sim or cpu".to_owned())),
        }
    }
}

/// Opens devices in the given order; without any, all CUDA devices, and where there are none, the
/// host's memory. What a GPU may take of the host's memory, because it has none of its own or has lent it to the
/// system, is not counted for `cpu` again.
///
/// # Errors
/// [`DeviceError::Unavailable`] for a device that is not there, [`DeviceError::NamedTwice`], and
/// [`DeviceError::Driver`] for one that cannot be used.
pub fn open_devices(specs: &[DeviceSpec]) -> Result<Vec<Box<dyn Device>>, DeviceError> {
    if specs.is_empty() {
        return default_devices();
    }
    names(specs)?;
    let mut shared = Shared::beside_cpu(specs);
    let opened = specs.iter().zip(sim_numbers(specs));
    let opened = opened.map(|(spec, sim)| open(spec, sim, &mut shared));
    let mut devices = opened.collect::<Result<Vec<_>, _>>()?;
    if let Some((index, cpu)) = shared.cpu(specs) {
        devices[index] = Box::new(cpu);
    }
    Ok(devices)
}

/// Devices that share the host's memory, where it is asked for, too: it counts once, as theirs.
struct Shared {
    /// Not looked for where there is nothing to share with.
    devices: Option<Vec<Arc<dyn OfHostMemory>>>,
}

impl Shared {
    fn beside_cpu(specs: &[DeviceSpec]) -> Shared {
        let is_cpu = |spec: &DeviceSpec| matches!(spec, DeviceSpec::Cpu { .. });
        Shared {
            devices: specs.iter().any(is_cpu).then(Vec::new),
        }
    }

    /// The host's memory without what these devices may take, and where it is among all; `None` where
    /// there are no such devices.
    fn cpu(self, specs: &[DeviceSpec]) -> Option<(usize, HostDevice)> {
        let shared = self.devices.filter(|devices| !devices.is_empty())?;
        let cpu = |(index, spec): (usize, &DeviceSpec)| match *spec {
            DeviceSpec::Cpu { capacity } => Some((index, capacity)),
            _ => None,
        };
        let (index, capacity) = specs.iter().enumerate().find_map(cpu)?;
        Some((index, HostDevice::cpu(capacity).beside(shared)))
    }
}

/// Returns what a plan has to know of devices that need not be there, in the given order. One that
/// is given a size has that size, all of it free, whatever this machine has; of others it is asked
/// here, and without any device they are those of [`open_devices`].
///
/// # Errors
/// As [`open_devices`].
pub fn planned_devices(specs: &[DeviceSpec]) -> Result<Vec<DeviceInfo>, DeviceError> {
    if specs.is_empty() {
        let devices = default_devices()?;
        return Ok(devices.iter().map(|device| device.info()).collect());
    }
    let names = names(specs)?;
    let sims = sim_numbers(specs);
    let mut shared = Shared::beside_cpu(specs);
    let planned = specs
        .iter()
        .zip(names)
        .zip(sims)
        .map(|((spec, name), sim)| {
            let (kind, capacity, granularity) = match *spec {
                DeviceSpec::Cpu {
                    capacity: Some(capacity),
                } => (DeviceKind::Cpu, capacity, HostDevice::GRANULARITY),
                DeviceSpec::Cuda {
                    capacity: Some(capacity),
                    ..
                } => (DeviceKind::Cuda, capacity, CUDA_GRANULARITY),
                _ => return Ok(open(spec, sim, &mut shared)?.info()),
            };
            Ok(DeviceInfo {
                name,
                kind,
                capacity,
                available: capacity,
                granularity,
            })
        });
    let mut planned = planned.collect::<Result<Vec<_>, _>>()?;
    if let Some((index, cpu)) = shared.cpu(specs)
        && matches!(specs[index], DeviceSpec::Cpu { capacity: None })
    {
        planned[index] = cpu.info();
    }
    Ok(planned)
}

/// What memory of an NVIDIA GPU is rounded up to.
pub(super) const CUDA_GRANULARITY: u64 = 2 << 20;

/// The names of devices; simulated ones are numbered.
fn names(specs: &[DeviceSpec]) -> Result<Vec<String>, DeviceError> {
    let mut names: Vec<String> = Vec::new();
    for (spec, sim) in specs.iter().zip(sim_numbers(specs)) {
        let name = match spec {
            DeviceSpec::Sim { .. } => format!("sim:{sim}"),
            DeviceSpec::Cpu { .. } => "cpu".to_owned(),
            DeviceSpec::Cuda { index, .. } => format!("cuda:{index}"),
        };
        if names.contains(&name) {
            return Err(DeviceError::NamedTwice { device: name });
        }
        names.push(name);
    }
    Ok(names)
}

/// For each device how many simulated ones are before it.
fn sim_numbers(specs: &[DeviceSpec]) -> impl Iterator<Item = usize> {
    specs.iter().scan(0, |sims, spec| {
        let number = *sims;
        *sims += usize::from(matches!(spec, DeviceSpec::Sim { .. }));
        Some(number)
    })
}

fn open(
    spec: &DeviceSpec,
    sim: usize,
    shared: &mut Shared,
) -> Result<Box<dyn Device>, DeviceError> {
    Ok(match *spec {
        DeviceSpec::Sim { capacity } => Box::new(HostDevice::sim(sim, capacity)),
        DeviceSpec::Cpu { capacity } => Box::new(HostDevice::cpu(capacity)),
        DeviceSpec::Cuda { index, capacity } => open_cuda(index, capacity, shared)?,
    })
}

#[cfg(feature = "cuda")]
fn open_cuda(
    index: u32,
    capacity: Option<u64>,
    shared: &mut Shared,
) -> Result<Box<dyn Device>, DeviceError> {
    let device = super::CudaDevice::open(index, capacity)?;
    if let Some(shared) = &mut shared.devices {
        shared.extend(device.of_host_memory()?);
    }
    Ok(Box::new(device))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(index: u32, _: Option<u64>, _: &mut Shared) -> Result<Box<dyn Device>, DeviceError> {
    Err(DeviceError::Unavailable {
        device: format!("cuda:{index}"),
        reason: "tightfit was built without its feature 'cuda'".to_owned(),
    })
}

fn default_devices() -> Result<Vec<Box<dyn Device>>, DeviceError> {
    match cuda_count() {
        0 => Ok(vec![Box::new(HostDevice::cpu(None))]),
        count => {
            let mut shared = Shared::beside_cpu(&[]);
            let devices = (0..count).map(|index| open_cuda(index, None, &mut shared));
            devices.collect()
        }
    }
}

/// How many CUDA devices there are.
pub(super) fn cuda_count() -> u32 {
    #[cfg(feature = "cuda")]
    match super::CudaDevice::count() {
        Ok(count) => return count,
        // Most machines have no driver, and a broken one does not make the processor useless.
        Err(error) => tracing::info!("no CUDA devices: {error}"),
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_users_name_them() {
        let read = |text: &str| text.parse::<DeviceSpec>().unwrap();
        assert_eq!(read("cpu"), DeviceSpec::Cpu { capacity: None });
        assert_eq!(
            read("cpu:16GiB"),
            DeviceSpec::Cpu {
                capacity: Some(16 << 30)
            }
        );
        assert_eq!(read("sim:32GiB"), DeviceSpec::Sim { capacity: 32 << 30 });
        assert_eq!(
            read("cuda:1:20GiB"),
            DeviceSpec::Cuda {
                index: 1,
                capacity: Some(20 << 30)
            }
        );
        for bad in [
            "", "gpu:0", "sim", "sim:", "cuda", "cuda:x", "cuda:0:y", "cpu:1:2", "cuda:-1",
        ] {
            assert!(bad.parse::<DeviceSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_plan_is_for_the_sizes_that_were_given() {
        let specs: Vec<DeviceSpec> = ["sim:1GiB", "cuda:7:80GiB", "cpu:4096GiB", "sim:2GiB"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let devices = planned_devices(&specs).unwrap();
        let told: Vec<(&str, u64, u64)> = devices
            .iter()
            .map(|device| (device.name.as_str(), device.capacity, device.available))
            .collect();
        let sized = |name, gib: u64| (name, gib << 30, gib << 30);
        let expected = [
            sized("sim:0", 1),
            sized("cuda:7", 80),
            sized("cpu", 4096),
            sized("sim:1", 2),
        ];
        assert_eq!(told, expected);
        assert_eq!(devices[1].kind, DeviceKind::Cuda);
        assert_eq!(devices[1].granularity, 2 << 20);
        let sims = open_devices(&specs[3..]).unwrap()[0].info();
        assert_eq!(devices[2].granularity, sims.granularity);
        let twice = ["cuda:0:1GiB", "cuda:0:2GiB"].map(|text| text.parse().unwrap());
        assert!(matches!(
            planned_devices(&twice),
            Err(DeviceError::NamedTwice { device }) if device == "cuda:0"
        ));
    }

    #[test]
    fn simulated_devices_are_numbered_and_the_cpu_is_there_once() {
        let specs: Vec<DeviceSpec> = ["sim:1GiB", "sim:2GiB", "cpu"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let names: Vec<String> = open_devices(&specs)
            .unwrap()
            .iter()
            .map(|device| device.info().name)
            .collect();
        assert_eq!(names, ["sim:0", "sim:1", "cpu"]);
        let twice = [
            DeviceSpec::Cpu { capacity: None },
            DeviceSpec::Cpu { capacity: Some(1) },
        ];
        assert!(matches!(
            open_devices(&twice),
            Err(DeviceError::NamedTwice { device }) if device == "cpu"
        ));
    }
}
