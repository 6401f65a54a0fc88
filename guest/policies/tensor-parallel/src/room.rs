//! Whether everything fits, and what is left free.

use tightfit_guest::partition::{Bin, Item};
use tightfit_guest::sizing::Sizer;
use tightfit_guest::{Format, Refusal, Request, Slice, Tensor, amounts};

use crate::cut::Parts;

/// Scales that share one under double quantization.
const NESTED: u64 = 256;

/// Returns what is left free on each device.
///
/// # Errors
/// A refusal where a device has too little for its parts.
pub(crate) fn headroom(
    request: &Request,
    parts: &Parts,
    formats: &[Format],
    reserve: u64,
) -> Result<Vec<u64>, Refusal> {
    let mut sizer = Sizer::new();
    let mut loads = vec![Item::default(); request.devices.len()];
    let mut add = |device: Option<u32>, tensor: &Tensor, format| {
        let size = sizer
            .size(tensor, format)
            .map_err(|error| Refusal::unsupported(format!("{}: {}", tensor.name, error.message)))?;
        if let Some(load) = device.and_then(|device| loads.get_mut(device as usize)) {
            load.bytes = load.bytes.saturating_add(size.padded);
        }
        Ok::<(), Refusal>(())
    };
    for ((tensor, &format), &device) in request.tensors.iter().zip(formats).zip(&parts.devices) {
        if device.is_some() {
            add(device, tensor, format)?;
        }
    }
    for slice in &parts.slices {
        let piece = piece(&request.tensors[slice.tensor as usize], slice);
        add(slice.placement.device, &piece, slice.placement.format)?;
    }
    let available = request.available();
    for (d, load) in loads.iter().enumerate() {
        let bin = Bin::new(&request.devices[d], available[d], reserve);
        let used = match load.bytes {
            0 => 0,
            _ => bin.used(*load).unwrap_or(u64::MAX),
        };
        let with = match reserve {
            0 => String::new(),
            reserve => format!(" with the reserve of {}", amounts::need(reserve)),
        };
        if let Some(missing) = used
            .checked_sub(available[d])
            .filter(|&missing| missing > 0)
        {
            return Err(Refusal::does_not_fit(
                format!(
                    "each of {} devices needs its part, which takes {}{with} on {}, which has {}: {} are missing; \
                     more devices would help",
                    request.devices.len(),
                    amounts::need(used),
                    request.devices[d].name,
                    amounts::have(available[d]),
                    amounts::need(missing)
                ),
                Some(missing),
            ));
        }
    }
    Ok(available.iter().map(|&bytes| reserve.min(bytes)).collect())
}

/// Returns the tensor that a slice becomes, without its name.
fn piece(tensor: &Tensor, slice: &Slice) -> Tensor {
    let shape = slice.shape(&tensor.shape);
    let mut quantized = tensor.quantized;
    if let Some(quantized) = &mut quantized {
        // Scales are cut with their nested ones, or become what they stand for.
        let nested = u64::from(quantized.block_size).saturating_mul(NESTED);
        let is_one_run = slice.ranges.len() == 1
            && tensor.shape[..slice.dimension as usize]
                .iter()
                .all(|&length| length == 1);
        quantized.double_quantized &=
            is_one_run && slice.keeps_blocks(&tensor.shape, nested) || shape == tensor.shape;
    }
    Tensor {
        name: String::new(),
        dtype: tensor.dtype,
        shape,
        bytes: tensor.bytes,
        quantized,
    }
}
