//! Launching a product, wherever its weight was found.

use cudarc::driver::sys::CUstream;
use tightfit_kernels::QuantType;
use tightfit_kernels::cuda::linear::{Gpu, Linear, MOST_MULTIPROCESSORS};
use tightfit_kernels::cuda::quant_type_argument;

use super::kernels::Shape;
use super::multiply::Found;
use super::tiles::TensorMap;
use super::{Context, KernelModule, unavailable};
use crate::device::{DeviceError, DeviceOperands};

/// What launches depend on of a device.
pub(super) fn gpu_of(context: &Context) -> Result<Gpu, DeviceError> {
    Ok(Gpu {
        compute_capability: context.compute_capability()?,
        // A workspace that a plan has room for is for no more; with more the rest would be idle.
        multiprocessors: context.multiprocessors()?.min(MOST_MULTIPROCESSORS),
    })
}

/// Gives a product to a stream of the kernels' device, whose context is current: with the transposed weight
/// where that is said.
///
/// # Safety
/// As [`crate::device::Multiplier::multiply`]; `found` is a matrix of as many elements in the device's
/// memory, which is kept until the stream is done. Where it overlaps with what the stream was given before, that does
/// not write the matrix.
pub(super) unsafe fn launch_product(
    kernels: &KernelModule,
    gpu: Gpu,
    linear: Linear,
    (quant_type, transposed): (QuantType, bool),
    found: &Found,
    operands: &DeviceOperands,
    overlaps: bool,
) -> Result<(), DeviceError> {
    let context = kernels.context();
    let used = [operands.x, operands.bias, operands.y];
    let linear = Linear {
        aligned: used.iter().chain(&found.all()).all(|at| at % 16 == 0),
        ..linear
    };
    let launch = match transposed {
        false => linear.launch(gpu),
        true => linear.launch_transposed(gpu),
    };
    let launch = launch.map_err(|error| unavailable(context.name(), error.to_string()))?;
    let need = launch.workspace_bytes as u64;
    if need > operands.workspace_bytes {
        return Err(DeviceError::OutOfBounds {
            device: context.name().to_owned(),
            offset: 0,
            end: need,
            len: operands.workspace_bytes,
        });
    }
    let shape = Shape {
        kernel: launch.kernel,
        grid: launch.grid,
        threads: launch.threads,
        shared_bytes: launch.shared_bytes,
        overlaps,
    };
    let (of_x, of_y) = match transposed {
        false => (linear.inputs, linear.outputs),
        true => (linear.outputs, linear.inputs),
    };
    let row_bytes = |elements: usize| (elements * linear.float.bytes()) as u64;
    for first in (0..linear.rows).step_by(launch.rows.max(1)) {
        let [codes, absmax, nested, mean, map] = found.all();
        let rows = launch.rows.min(linear.rows - first);
        let mut arguments = [
            codes,
            absmax,
            nested,
            mean,
            map,
            operands.x + first as u64 * row_bytes(of_x),
            operands.bias,
            operands.y + first as u64 * row_bytes(of_y),
            if need == 0 { 0 } else { operands.workspace },
            rows as u64,
            linear.outputs as u64,
            linear.inputs as u64,
            u64::from(linear.block_size),
            u64::from(quant_type_argument(quant_type)),
            u64::from(launch.shares),
        ];
        let maps = match &launch.maps {
            None => &[][..],
            Some([of_x, of_codes]) => {
                let x = TensorMap::new(context, arguments[5], of_x)?;
                &[x, TensorMap::new(context, codes, of_codes)?]
            }
        };
        // SAFETY: the arguments that the kernels of products have, and the rest is the caller's promise.
        unsafe { kernels.launch_in(operands.stream as CUstream, shape, &mut arguments, maps) }?;
    }
    Ok(())
}
