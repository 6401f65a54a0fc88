//! What the generated types can do beyond holding data.

use crate::names::{TensorKind, kind_of};
use crate::settings::{Spec, describe};
use crate::{
    DType, Description, Device, DeviceKind, Error, Failure, Format, Nf4Format, Placement, Proposal,
    Refusal, RefusalReason, Request, Tensor,
};

impl Description {
    /// A policy of this name and version with these settings.
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
    /// These placements, with nothing to be left free on any device.
    pub fn without_headroom(request: &Request, placements: Vec<Placement>) -> Proposal {
        Proposal {
            placements,
            headroom: vec![0; request.devices.len()],
        }
    }
}

impl Tensor {
    /// Whether it is the matrix of a linear layer, or of experts, by [`kind_of`].
    pub fn is_linear(&self) -> bool {
        matches!(kind_of(self), TensorKind::Linear | TensorKind::Expert)
    }

    /// Whether [`Format::Nf4`] is legal for it: `bf16`, `f16` and `f32` that
    /// are not quantized already.
    pub fn is_quantizable(&self) -> bool {
        self.quantized.is_none() && matches!(self.dtype, DType::Bf16 | DType::F16 | DType::F32)
    }
}

impl Device {
    /// Whether it is a GPU or a stand-in for one, rather than host memory.
    pub fn is_accelerator(&self) -> bool {
        matches!(self.kind, DeviceKind::Cuda | DeviceKind::Sim)
    }
}

impl Request {
    /// Bytes that may be used on each device: what is free, or less where the previous attempt
    /// found less.
    pub fn available(&self) -> Vec<u64> {
        let mut available: Vec<u64> = self.devices.iter().map(|device| device.available).collect();
        if let Some(Failure {
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

    /// Refuses what does not fit on a device, given its index: `what` takes `bytes`, which must be
    /// at most what is available there.
    ///
    /// # Errors
    /// A refusal that says how much is missing.
    pub fn check_room(&self, device: usize, what: &str, bytes: u64) -> Result<(), Refusal> {
        let (name, free) = (&self.devices[device].name, self.available()[device]);
        match bytes.checked_sub(free) {
            None | Some(0) => Ok(()),
            missing => Err(Refusal::does_not_fit(
                format!("{what} takes {bytes} bytes, {name} has {free}"),
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
    /// The tensors do not fit; `missing` bytes more would do.
    pub fn does_not_fit(message: impl Into<String>, missing: Option<u64>) -> Refusal {
        Refusal {
            reason: RefusalReason::DoesNotFit,
            message: message.into(),
            missing_bytes: missing,
        }
    }

    /// A setting has a value that cannot be used.
    pub fn bad_setting(message: impl Into<String>) -> Refusal {
        Refusal {
            reason: RefusalReason::BadSetting,
            message: message.into(),
            missing_bytes: None,
        }
    }

    /// The policy cannot handle this model or these devices.
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
