//! The devices' own kernels for products with a model's weights, made ready when they are first needed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tightfit_kernels::DYNAMIC_MAP;

use super::{Model, TailAllocation, Tensor};
use crate::device::{DeviceBytes, DeviceError, Multiplier, Workspace};
use crate::plan::{MEAN_BYTES, constants_bytes, is_multiplied};

/// What one device multiplies with.
#[derive(Debug, Default)]
pub(super) struct Multipliers {
    ready: OnceLock<Ready>,
    /// Held by whoever makes it.
    making: Mutex<()>,
}

/// A device's kernels, with what they need beside the weights.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) multiplier: Arc<dyn Multiplier>,
    /// Where the mean of a double-quantized weight's scales is among the constants, by its index. The map is
    /// at their beginning.
    pub(crate) means: HashMap<usize, u64>,
    /// Where the constants lie, if the plan has room for them behind the weights.
    _place: Option<TailAllocation>,
}

impl Model {
    /// What a device multiplies with: its kernels are loaded and the constants of its weights are in its
    /// memory, once for all. `None` where the device has no kernels of its own. An error is not remembered.
    pub(crate) fn multiplier(&self, device: usize) -> Result<Option<&Ready>, DeviceError> {
        let Some(multipliers) = self.multipliers.get(device) else {
            return Ok(None);
        };
        if let Some(ready) = multipliers.ready.get() {
            return Ok(Some(ready));
        }
        let making = &multipliers.making;
        let _alone = making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ready) = multipliers.ready.get() {
            return Ok(Some(ready));
        }
        let made = self.make_multiplier(device)?;
        Ok(made.map(|ready| multipliers.ready.get_or_init(|| ready)))
    }

    fn make_multiplier(&self, device: usize) -> Result<Option<Ready>, DeviceError> {
        let Some(Some(reservation)) = self.memory.get(device) else {
            return Ok(None);
        };
        if reservation.host_memory().is_some() {
            return Ok(None);
        }
        let mut means = HashMap::new();
        let mut constants: Vec<u8> = DYNAMIC_MAP.iter().flat_map(|v| v.to_le_bytes()).collect();
        // Where they lie: so the means of experts that lie as a stack are in its order.
        let codes = |tensor: &Tensor<'_>| tensor.parts().first().map(|part| part.offset);
        let mut tensors: Vec<_> = self.tensors().filter(|t| t.device() == device).collect();
        tensors.sort_by_key(codes);
        for tensor in tensors {
            if let Some(mean) = tensor.absmax_mean()
                && is_multiplied(tensor.shape())
            {
                means.insert(tensor.index(), constants.len() as u64);
                constants.extend_from_slice(&mean.to_le_bytes());
                constants.resize(constants.len().next_multiple_of(MEAN_BYTES as usize), 0);
            }
        }
        if means.is_empty() {
            constants.clear();
        }
        debug_assert_eq!(constants.len() as u64, constants_bytes(means.len() as u64));
        let len = constants.len() as u64;
        let (place, tail) = self.behind_the_weights(device, len);
        let multiplier = reservation.multiplier(&constants, place)?;
        Ok(multiplier.map(|multiplier| Ready {
            multiplier,
            means,
            _place: tail,
        }))
    }

    /// Memory of a device to compute in, all of it zero: behind the weights if the plan has reserved some
    /// for products, and it is still free. `None` for a device whose memory is the host's.
    pub(crate) fn memory_for_products(
        &self,
        device: usize,
        len: u64,
    ) -> Result<Option<(DeviceBytes, Option<TailAllocation>)>, DeviceError> {
        let Some(Some(reservation)) = self.memory.get(device) else {
            return Ok(None);
        };
        let (place, tail) = self.behind_the_weights(device, len);
        Ok(reservation.cleared(place)?.map(|memory| (memory, tail)))
    }

    /// Some bytes for products, behind the weights or, where the plan has none to spare there, beside them.
    fn behind_the_weights(&self, device: usize, len: u64) -> (Workspace, Option<TailAllocation>) {
        // What was reserved for the application is its own.
        let is_planned = self.plan.devices[device].products > 0 && len > 0;
        let tail = self.tail(device).filter(|_| is_planned);
        match tail.and_then(|tail| tail.allocate(len).ok()) {
            Some(piece) => (
                Workspace::Within {
                    offset: piece.offset(),
                    len,
                },
                Some(piece),
            ),
            None => (Workspace::Beside { len }, None),
        }
    }
}
