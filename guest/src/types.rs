//! What the generated types can do beyond holding data.

use crate::amounts;
use crate::names::{TensorKind, kind_of};
use crate::partition::{Bin, Item};
use crate::settings::{Spec, describe};
use crate::sizing::bits;
use crate::{
    Description, Device, DeviceKind, Dtype, Error, Format, Nf4Format, Placement, PreviousFailure,
    Proposal, Refusal, RefusalReason, Request, Tensor,
};
use tightfit_common::sizes::tensor_bytes;

impl Description {
    /// Returns a policy of this name and version with these settings.
    pub fn new(name: &str, version: &str, settings: &[Spec]) -> Description {
        Description {
            name: name.into(),
            version: version.into(),
            settings: describe(settings),
        }
    }
}

impl Format {
    /// NF4 as bitsandbytes does it by default: blocks of 64 elements, scales in f32.
    pub const NF4: Format = Format::Nf4(Nf4Format {
        block_size: 64,
        double_quantized: false,
    });

    /// The same with scales in 8 bits: bitsandbytes' `bnb_4bit_use_double_quant`.
    pub const NF4_DOUBLE: Format = Format::Nf4(Nf4Format {
        block_size: 64,
        double_quantized: true,
    });
}

impl Placement {
    /// On the device of this index.
    pub fn on(device: usize, format: Format) -> Placement {
        // More devices than this do not fit in a request.
        let device = u32::try_from(device).ok();
        Placement { device, format }
    }
}

impl Proposal {
    /// Returns a proposal that puts each tensor on its device, or nowhere, in its format. Left free on
    /// each device are the reserve of its bin, as much as there is room for, and what its items want.
    ///
    /// `devices`, `formats` and `items` have an entry for each tensor, `bins` for each device.
    ///
    /// # Panics
    /// When a device is not among the bins.
    pub fn new(
        devices: &[Option<usize>],
        formats: &[Format],
        items: &[Item],
        bins: &[Bin],
    ) -> Proposal {
        // Where nothing goes nothing can be eaten into, so a device without room for the reserve is
        // no reason to refuse.
        let mut headroom: Vec<u64> = bins
            .iter()
            .map(|bin| bin.reserve.min(bin.capacity))
            .collect();
        let mut placements = Vec::with_capacity(devices.len());
        for ((&device, &format), item) in devices.iter().zip(formats).zip(items) {
            if let Some(device) = device {
                headroom[device] = headroom[device].saturating_add(item.headroom);
            }
            placements.push(Placement {
                device: device.map(|device| device as u32),
                format,
            });
        }
        Proposal {
            placements,
            headroom,
        }
    }

    /// These placements, with nothing to be left free on any device.
    pub fn without_headroom(request: &Request, placements: Vec<Placement>) -> Proposal {
        Proposal {
            placements,
            headroom: vec![0; request.devices.len()],
        }
    }
}

impl Tensor {
    /// Returns a tensor that is not quantized, of the bytes that its type and shape take; mostly for
    /// tests.
    ///
    /// # Panics
    /// When the bytes do not fit in 64 bits or are no whole number.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[u64]) -> Tensor {
        Tensor {
            name: name.into(),
            dtype,
            shape: shape.into(),
            bytes: tensor_bytes(shape, bits(dtype)).expect("such a tensor has a size"),
            quantized: None,
        }
    }

    /// Returns whether it is the matrix of a linear layer, or of experts, by [`kind_of`].
    pub fn is_linear(&self) -> bool {
        matches!(kind_of(self), TensorKind::Linear | TensorKind::Expert)
    }

    /// Returns whether [`Format::Nf4`] is legal for it: `bf16`, `f16` and `f32` that are not
    /// quantized already.
    pub fn is_quantizable(&self) -> bool {
        self.quantized.is_none() && matches!(self.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32)
    }
}

impl Device {
    /// Returns a device of this name, all of whose bytes are free; mostly for tests. A name such as
    /// `cuda:0` or `sim:1` says its kind, any other is that of host memory. GPUs reserve in steps of
    /// 2 MiB, the others in steps of 4 KiB.
    pub fn new(name: &str, bytes: u64) -> Device {
        let kind = match name.split(':').next() {
            Some("cuda") => DeviceKind::Cuda,
            Some("sim") => DeviceKind::Sim,
            _ => DeviceKind::Cpu,
        };
        Device {
            name: name.into(),
            kind,
            capacity: bytes,
            available: bytes,
            granularity: match kind {
                DeviceKind::Cuda => 2 << 20,
                DeviceKind::Sim | DeviceKind::Cpu => 4 << 10,
            },
        }
    }

    /// Returns whether it is a GPU or a stand-in for one, rather than host memory.
    pub fn is_accelerator(&self) -> bool {
        matches!(self.kind, DeviceKind::Cuda | DeviceKind::Sim)
    }
}

impl Request {
    /// Returns a request about these tensors and devices, without a config, ties or settings; mostly
    /// for tests.
    pub fn new(tensors: Vec<Tensor>, devices: Vec<Device>) -> Request {
        Request {
            config_json: "{}".into(),
            tensors,
            ties: vec![],
            devices,
            settings: vec![],
            required_formats: vec![],
            failure: None,
        }
    }

    /// Returns the same request with a setting, in place of an earlier value of it.
    pub fn set(mut self, name: &str, value: &str) -> Request {
        self.settings.retain(|(known, _)| known != name);
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Returns a bin for each device, with what is [available](Request::available) there and this
    /// many bytes of it in reserve.
    pub fn bins(&self, reserve: u64) -> Vec<Bin> {
        let devices = self.devices.iter().zip(self.available());
        devices
            .map(|(device, available)| Bin::new(device, available, reserve))
            .collect()
    }

    /// Puts the formats that the user has fixed in the place of those that a policy has chosen, one
    /// for each tensor. The host does so in any case; a policy that counts bytes has to.
    pub fn fix_formats(&self, formats: &mut [Format]) {
        for required in &self.required_formats {
            if let Some(format) = formats.get_mut(required.tensor as usize) {
                *format = required.format;
            }
        }
    }

    /// Returns the bytes that may be used on each device: what is free, or less where the previous
    /// attempt found less.
    pub fn available(&self) -> Vec<u64> {
        let mut available: Vec<u64> = self.devices.iter().map(|device| device.available).collect();
        if let Some(PreviousFailure {
            device,
            available: found,
            ..
        }) = self.failure
            && let Some(bytes) = available.get_mut(device as usize)
        {
            *bytes = found.min(*bytes);
        }
        available
    }

    /// Refuses what does not fit on a device, given its index: `bytes` must be at most what is
    /// available there. `what` is the subject of the refusal's sentence, without its verb: of
    /// `layer 3` becomes `layer 3 takes 8.01 MiB, sim:1 has 1.00 MiB`.
    ///
    /// # Errors
    /// A refusal that says how many bytes are missing.
    ///
    /// # Panics
    /// When there is no such device.
    pub fn check_room(&self, device: usize, what: &str, bytes: u64) -> Result<(), Refusal> {
        let (name, free) = (&self.devices[device].name, self.available()[device]);
        match bytes.checked_sub(free) {
            None | Some(0) => Ok(()),
            missing => Err(Refusal::does_not_fit(
                format!(
                    "{what} takes {}, {name} has {}",
                    amounts::need(bytes),
                    amounts::have(free)
                ),
                missing,
            )),
        }
    }

    /// For each tensor, whether it is the second copy of a tied parameter. Such a tensor need not
    /// be loaded: its name resolves to the tensor it is tied to.
    pub fn duplicates(&self) -> Vec<bool> {
        let mut duplicates = vec![false; self.tensors.len()];
        for tie in &self.ties {
            if let Some(alias) = tie.alias_tensor
                && alias != tie.tensor
                && let Some(duplicate) = duplicates.get_mut(alias as usize)
            {
                *duplicate = true;
            }
        }
        // The one that holds the data is needed, whatever else it is an alias of.
        for tie in &self.ties {
            if let Some(duplicate) = duplicates.get_mut(tie.tensor as usize) {
                *duplicate = false;
            }
        }
        duplicates
    }
}

impl Refusal {
    /// Returns the refusal of tensors that do not fit; `missing` bytes more would do.
    pub fn does_not_fit(message: impl Into<String>, missing: Option<u64>) -> Refusal {
        Refusal {
            reason: RefusalReason::DoesNotFit,
            message: message.into(),
            missing_bytes: missing,
        }
    }

    /// Returns the refusal of a setting's value that cannot be used.
    pub fn bad_setting(message: impl Into<String>) -> Refusal {
        Refusal {
            reason: RefusalReason::BadSetting,
            message: message.into(),
            missing_bytes: None,
        }
    }

    /// Returns the refusal of a model or devices that the policy cannot handle.
    pub fn unsupported(message: impl Into<String>) -> Refusal {
        Refusal {
            reason: RefusalReason::Unsupported,
            message: message.into(),
            missing_bytes: None,
        }
    }
}

impl From<Error> for Refusal {
    /// For a size that the host cannot give: a tensor that no device can hold so.
    fn from(error: Error) -> Refusal {
        Refusal::unsupported(error.message)
    }
}
