//! The interface `linear`: products with 4-bit weights, by the device that the weight is on.

mod on_device;
mod on_host;
mod weight;

use std::sync::Arc;

use tightfit_kernels::FloatType;
use wasmtime::component::Resource;

pub use weight::Weight;

use super::bindings::tightfit::host::{buffers::Place, linear, types};
use super::error::CallError;
use super::models::LoadedModel;
use super::nf4::{block_size, float};
use super::view::{Used, conflict, element_bytes};
use super::{ProgramCtx, ProgramCtxView};
use crate::wit::convert;
use tightfit::device::Queue;
use weight::Shared;

/// A product that has been looked at: its places are on the weight's device, as long as they have to be, begin
/// at multiples of their elements, and nothing overlaps the output.
struct Checked<'a> {
    weight: Arc<Shared>,
    float: FloatType,
    rows: u64,
    by_row: bool,
    input: &'a Place,
    bias: Option<&'a Place>,
    experts: Option<&'a Place>,
    output: &'a Place,
}

impl Checked<'_> {
    /// Bytes of a row of the input, and of the output.
    fn row_bytes(&self) -> [u64; 2] {
        let shape = &self.weight.shape;
        [shape.inputs, shape.outputs].map(|count| (count * self.float.bytes()) as u64)
    }

    /// Bytes of the bias.
    fn bias_bytes(&self) -> u64 {
        (self.weight.shape.all_outputs() * self.float.bytes()) as u64
    }
}

/// What the operands of a product are called.
const NAMES: [&str; 4] = ["output", "input", "bias", "experts"];

impl ProgramCtxView<'_> {
    fn check_product<'a>(&self, product: &'a linear::Product) -> Result<Checked<'a>, CallError> {
        let weight = Arc::clone(&self.table.get(&product.weight)?.0);
        let checked = Checked {
            float: float(product.float)?,
            rows: product.rows.into(),
            by_row: product.rounding == linear::Rounding::ByRow,
            input: &product.input,
            bias: product.bias.as_ref(),
            experts: product.experts.as_ref(),
            output: &product.output,
            weight,
        };
        match (checked.weight.shape.experts, checked.experts) {
            (Some(_), None) => {
                let message = "the weight has experts: a product needs to know that of each row";
                return Err(CallError::invalid(message));
            }
            (None, Some(_)) => {
                let message = "the weight has no experts, and the product names one for each row";
                return Err(CallError::invalid(message));
            }
            _ => {}
        }
        let each = checked.float.bytes();
        let [input, output] = checked.row_bytes();
        let all = |row| element_bytes(checked.rows, row as usize);
        let none = Used::read(checked.input, 0, 1);
        let used = [
            Used::written(checked.output, all(output)?, each),
            Used::read(checked.input, all(input)?, each),
            checked
                .bias
                .map_or(none, |bias| Used::read(bias, checked.bias_bytes(), each)),
            match checked.experts {
                Some(experts) => Used::read(experts, all(4)?, 4),
                None => none,
            },
        ];
        for (used, name) in used.iter().zip(NAMES) {
            let buffer = self.table.get(&used.place.buffer)?;
            buffer.check(used.place.offset, used.bytes)?;
            let (have, need) = (buffer.device(), checked.weight.device);
            if have != need {
                return Err(CallError::invalid(format_args!(
                    "{name} is on device {have}, and the weight on {need}"
                )));
            }
            if !used.is_aligned() {
                return Err(CallError::invalid(format_args!(
                    "{name} begins at byte {}, not at a multiple of {}",
                    used.place.offset, used.each
                )));
            }
        }
        if let Some((one, two)) = conflict(&used) {
            return Err(CallError::invalid(format_args!(
                "{} and {} overlap",
                NAMES[one], NAMES[two]
            )));
        }
        let written = &used[0];
        let buffer = self.table.get(&written.place.buffer)?;
        if checked
            .weight
            .overlaps(buffer, written.place.offset, written.bytes)
        {
            return Err(CallError::invalid("output and the weight overlap"));
        }
        Ok(checked)
    }

    /// Makes a weight ready: what it needs on its device beside itself is taken, and kernels are loaded.
    fn push(&mut self, weight: Shared) -> Result<Resource<Weight>, CallError> {
        Ok(self.table.push(Weight(Arc::new(weight)))?)
    }
}

/// Returns the lengths of a weight as they are given.
///
/// # Errors
/// Where there are not two or three, one is zero, or all together are too many.
fn shape(given: &[u64], block: u32) -> Result<tightfit::device::MatrixShape, CallError> {
    let (experts, outputs, inputs) = match *given {
        [outputs, inputs] => (None, outputs, inputs),
        [experts, outputs, inputs] => (Some(experts), outputs, inputs),
        _ => {
            return Err(CallError::invalid(format_args!(
                "a weight is [out, in] or [experts, out, in], not of {} lengths",
                given.len()
            )));
        }
    };
    if given.contains(&0) {
        return Err(CallError::invalid("a weight has no length of 0"));
    }
    let elements = given
        .iter()
        .try_fold(1u64, |all, &length| all.checked_mul(length));
    let outputs_of_all = experts.unwrap_or(1).saturating_mul(outputs);
    let most = tightfit_kernels::cuda::experts::MOST_EXPERTS as u64;
    if elements.is_none()
        || outputs_of_all > MOST_LENGTH
        || inputs > MOST_LENGTH
        || experts.is_some_and(|experts| experts > most)
    {
        return Err(CallError::unsupported(format_args!(
            "{given:?} is too much for one weight: at most {MOST_LENGTH} out of all experts, as many in, and {most} experts"
        )));
    }
    Ok(tightfit::device::MatrixShape {
        experts: experts.map(|experts| experts as usize),
        outputs: outputs as usize,
        inputs: inputs as usize,
        block_size: block_size(block)?,
    })
}

/// What a length is at most: kernels count with 32 bits.
const MOST_LENGTH: u64 = u32::MAX as u64 / 2;

impl linear::HostWeight for ProgramCtxView<'_> {
    fn of(
        &mut self,
        model: Resource<LoadedModel>,
        tensor: u32,
    ) -> Result<Resource<Weight>, CallError> {
        self.begin()?;
        let weight = self.weight_of(&model, tensor)?;
        self.push(weight)
    }

    fn from_codes(
        &mut self,
        quant_type: types::QuantType,
        shape: Vec<u64>,
        block: u32,
        codes: Place,
        absmax: Place,
    ) -> Result<Resource<Weight>, CallError> {
        self.begin()?;
        let quant_type = convert::quant_type(quant_type);
        let shape = self::shape(&shape, block)?;
        let weight = self.weight_from_codes(quant_type, shape, &codes, &absmax)?;
        self.push(weight)
    }

    fn shape(&mut self, weight: Resource<Weight>) -> wasmtime::Result<Vec<u64>> {
        let (_, table) = self.begin()?;
        let shape = &table.get(&weight)?.0.shape;
        let lengths = [Some(shape.outputs), Some(shape.inputs)];
        let all = [shape.experts].into_iter().chain(lengths).flatten();
        Ok(all.map(|length| length as u64).collect())
    }

    fn device(&mut self, weight: Resource<Weight>) -> wasmtime::Result<u32> {
        let (_, table) = self.begin()?;
        Ok(u32::try_from(table.get(&weight)?.0.device)?)
    }

    fn scratch_bytes(&mut self, weight: Resource<Weight>, rows: u32) -> wasmtime::Result<u64> {
        let (_, table) = self.begin()?;
        Ok(table.get(&weight)?.0.scratch_bytes(rows))
    }

    fn drop(&mut self, weight: Resource<Weight>) -> wasmtime::Result<()> {
        self.table.delete(weight)?;
        Ok(())
    }
}

impl linear::Host for ProgramCtxView<'_> {
    fn multiply(&mut self, products: Vec<linear::Product>) -> Result<(), CallError> {
        self.begin()?;
        let mut checked = Vec::with_capacity(products.len());
        for product in &products {
            self.context.stop.check()?;
            checked.push(self.check_product(product)?);
        }
        for product in &checked {
            match product.weight.queue() {
                Some(queue) => self.multiply_on_device(&**queue, product)?,
                None => self.multiply_on_host(product)?,
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), CallError> {
        let (context, _) = self.begin()?;
        Ok(context.memory.finish()?)
    }
}

impl ProgramCtx {
    /// Returns a device's memory for products to work in, at least this long, as a range for its queue. It
    /// is taken when it is first needed, and again when more is.
    pub(super) fn scratch(
        &mut self,
        queue: &dyn Queue,
        device: usize,
        bytes: u64,
    ) -> Result<tightfit::device::DeviceBytes, CallError> {
        use super::view::not_there;
        if self
            .scratch
            .get(&device)
            .is_none_or(|have| have.bytes() < bytes)
        {
            // What is too short goes back first: there may be no room for both.
            self.scratch.remove(&device);
            let index = u32::try_from(device).unwrap_or(u32::MAX);
            let scratch = self.memory.allocate(index, bytes)?;
            let counters = bytes.min(tightfit_kernels::cuda::linear::COUNTERS as u64);
            let range = scratch.range(0, counters)?.ok_or_else(not_there)?;
            queue.give(&tightfit::device::Operation::Clear(range))?;
            self.scratch.insert(device, scratch);
        }
        let scratch = self.scratch.get(&device);
        let range = scratch.map(|scratch| scratch.range(0, bytes)).transpose()?;
        range.flatten().ok_or_else(not_there)
    }
}
