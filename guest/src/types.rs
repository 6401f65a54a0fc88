//! What the generated types can do beyond holding data.

use crate::{DType, Device, DeviceKind, Failure, Refusal, RefusalReason, Request, Tensor};

impl Tensor {
    /// Whether [`Format::Nf4`](crate::Format::Nf4) is legal for it: `bf16`, `f16` and `f32` that
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
