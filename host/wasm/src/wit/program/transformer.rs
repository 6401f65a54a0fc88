//! The interface `transformer`: what a decoder computes between products, by the device that it is on.

mod compute;

use std::num::NonZeroUsize;
use std::sync::Arc;

use tightfit_kernels::decoder::{Attention, Faults, Heads, Operation, RmsNorm, Rotation, Visible};
use tightfit_kernels::{Activation, FloatType, KernelError};

use super::ProgramCtxView;
use super::bindings::tightfit::host::{buffers::Place, transformer, types};
use super::error::CallError;
use super::models::{Loaded, LoadedModel};
use super::nf4::float;
use tightfit::device::Operation as Given;
use tightfit::types::Format;

pub(super) use compute::DeviceFaults;

/// What a program has given for an operand.
enum Source<'a> {
    Place(&'a Place),
    /// A tensor of a model, which is only read.
    Parameter(Parameter),
}

/// A matrix that is not quantized.
struct Parameter {
    loaded: Arc<Loaded>,
    /// Its number in the checkpoint.
    tensor: usize,
    device: usize,
    float: FloatType,
    rows: usize,
    columns: usize,
}

impl ProgramCtxView<'_> {
    fn parameter(&self, given: &transformer::Parameter) -> Result<Parameter, CallError> {
        let (model, number) = (&given.model, given.tensor);
        let model: &LoadedModel = self.table.get(model)?;
        let tensor = model.tensor(number)?;
        let stored = match tensor.format() {
            Format::Stored if tensor.quantization().is_none() => tensor.dtype(),
            Format::Cast(dtype) => dtype,
            _ => {
                return Err(CallError::unsupported(format_args!(
                    "tensor number {number} is in 4 bits: products with such are in `linear`"
                )));
            }
        };
        let float = stored.float_type().ok_or_else(|| {
            CallError::unsupported(format_args!(
                "tensor number {number} is {stored}, not bf16, f16 or f32"
            ))
        })?;
        let length = |length: u64| usize::try_from(length).unwrap_or(usize::MAX);
        let &[rows, columns] = tensor.shape() else {
            return Err(CallError::invalid(format_args!(
                "tensor number {number} is no matrix: it has {} lengths",
                tensor.shape().len()
            )));
        };
        Ok(Parameter {
            loaded: model.share(),
            tensor: tensor.index(),
            device: tensor.device(),
            float,
            rows: length(rows),
            columns: length(columns),
        })
    }

    fn heads(given: &transformer::Heads) -> Result<Heads, CallError> {
        Ok(Heads {
            float: float(given.float)?,
            rows: given.rows as usize,
            query_heads: given.query_heads as usize,
            kv_heads: given.kv_heads as usize,
            head_size: given.head_size as usize,
        })
    }
}

/// What a program is told where lengths cannot be; anything else would be a fault of ours.
fn told(error: KernelError) -> CallError {
    match error {
        KernelError::Shape { .. } => CallError::invalid(error),
        error => error.into(),
    }
}

fn count(elements: u64) -> Result<usize, CallError> {
    usize::try_from(elements)
        .map_err(|_| CallError::invalid(format_args!("{elements} elements have no size")))
}

/// What is seen, so many; not 0.
fn some(seen: u32) -> Result<NonZeroUsize, CallError> {
    NonZeroUsize::new(seen as usize).ok_or_else(|| CallError::invalid("a query sees something"))
}

impl transformer::Host for ProgramCtxView<'_> {
    fn gather(
        &mut self,
        table: transformer::Parameter,
        ids: Place,
        rows: u32,
        y: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let table = self.parameter(&table)?;
        let operation = Operation::Gather {
            float: table.float,
            rows: rows as usize,
            table_rows: table.rows,
            columns: table.columns,
        };
        let operands = [
            Source::Parameter(table),
            Source::Place(&ids),
            Source::Place(&y),
        ];
        self.compute(&operation, &operands)
    }

    fn dense(
        &mut self,
        weight: transformer::Parameter,
        x: Place,
        rows: u32,
        bias: Option<Place>,
        y: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let weight = self.parameter(&weight)?;
        let operation = Operation::Dense {
            float: weight.float,
            lengths: [rows as usize, weight.rows, weight.columns],
            bias: bias.is_some(),
        };
        let mut operands = vec![Source::Parameter(weight), Source::Place(&x)];
        operands.extend(bias.as_ref().map(Source::Place));
        operands.push(Source::Place(&y));
        self.compute(&operation, &operands)
    }

    fn rms_norm(
        &mut self,
        norm: transformer::Norm,
        x: Place,
        add: Option<Place>,
        y: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let operation = Operation::RmsNorm {
            norm: RmsNorm {
                float: float(norm.float)?,
                rows: norm.rows as usize,
                columns: norm.columns as usize,
                eps: norm.eps,
                weight_offset: norm.weight_offset,
            },
            add: add.is_some(),
        };
        let mut operands = vec![Source::Place(&x)];
        operands.extend(add.as_ref().map(Source::Place));
        operands.extend([Source::Place(&norm.weight), Source::Place(&y)]);
        self.compute(&operation, &operands)
    }

    fn add(
        &mut self,
        dtype: types::Dtype,
        elements: u64,
        x: Place,
        add: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let operation = Operation::Add {
            float: float(dtype)?,
            elements: count(elements)?,
        };
        self.compute(&operation, &[&x, &add].map(Source::Place))
    }

    fn gate(
        &mut self,
        dtype: types::Dtype,
        activation: transformer::Activation,
        elements: u64,
        gate: Place,
        up: Place,
        y: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let operation = Operation::Gate {
            float: float(dtype)?,
            activation: match activation {
                transformer::Activation::Silu => Activation::Silu,
                transformer::Activation::Gelu => Activation::Gelu,
                transformer::Activation::GeluTanh => Activation::GeluTanh,
            },
            elements: count(elements)?,
        };
        self.compute(&operation, &[&gate, &up, &y].map(Source::Place))
    }

    fn rotate(
        &mut self,
        heads: transformer::Heads,
        norms: transformer::HeadNorms,
        rotary: transformer::Rotary,
        positions: Place,
        queries: Place,
        keys: Place,
        values: Place,
        cache: transformer::Cache,
    ) -> Result<(), CallError> {
        self.begin()?;
        let operation = Operation::Rotate {
            rotation: Rotation {
                heads: Self::heads(&heads)?,
                rotary: rotary.dimensions as usize,
                scaling: rotary.scaling,
                capacity: cache.capacity as usize,
                norm_eps: norms.eps,
                norm_weight_offset: norms.weight_offset,
            },
            norms: [norms.queries.is_some(), norms.keys.is_some()],
        };
        let mut operands = vec![&queries, &keys, &values];
        operands.extend(&norms.queries);
        operands.extend(&norms.keys);
        operands.extend([&positions, &rotary.frequencies, &cache.keys, &cache.values]);
        let operands: Vec<Source<'_>> = operands.into_iter().map(Source::Place).collect();
        self.compute(&operation, &operands)
    }

    fn attend(
        &mut self,
        heads: transformer::Heads,
        cache: transformer::Cache,
        positions: Place,
        visible: transformer::Visible,
        most: u32,
        scale: f32,
        queries: Place,
        y: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let operation = Operation::Attend {
            attention: Attention {
                heads: Self::heads(&heads)?,
                capacity: cache.capacity as usize,
                visible: match visible {
                    transformer::Visible::Causal => Visible::Causal { window: None },
                    transformer::Visible::Window(window) => Visible::Causal {
                        window: Some(some(window)?),
                    },
                    transformer::Visible::First(first) => Visible::First(some(first)?),
                },
                scale,
            },
            most: most as usize,
        };
        let operands = [&queries, &cache.keys, &cache.values, &positions, &y];
        self.compute(&operation, &operands.map(Source::Place))
    }

    fn top(
        &mut self,
        dtype: types::Dtype,
        rows: u32,
        columns: u32,
        k: u32,
        x: Place,
        ids: Place,
        values: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let operation = Operation::Top {
            float: float(dtype)?,
            lengths: [rows, columns, k].map(|length| length as usize),
        };
        self.compute(&operation, &[&x, &ids, &values].map(Source::Place))
    }

    fn route(
        &mut self,
        dtype: types::Dtype,
        rows: u32,
        experts: u32,
        k: u32,
        normalize: bool,
        scores: Place,
        ids: Place,
        weights: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let operation = Operation::Route {
            float: float(dtype)?,
            lengths: [rows, experts, k].map(|length| length as usize),
            normalize,
        };
        self.compute(&operation, &[&scores, &ids, &weights].map(Source::Place))
    }

    fn combine(
        &mut self,
        dtype: types::Dtype,
        rows: u32,
        k: u32,
        columns: u32,
        x: Place,
        weights: Place,
        y: Place,
    ) -> Result<(), CallError> {
        self.begin()?;
        let operation = Operation::Combine {
            float: float(dtype)?,
            lengths: [rows, k, columns].map(|length| length as usize),
        };
        self.compute(&operation, &[&x, &weights, &y].map(Source::Place))
    }

    fn take_faults(&mut self, device: u32) -> Result<transformer::Faults, CallError> {
        let (context, _) = self.begin()?;
        // There is such a device.
        context.memory.usage(device)?;
        let faults = context.take_faults(device as usize)?;
        let mut found = transformer::Faults::empty();
        if faults.contains(Faults::ID) {
            found |= transformer::Faults::ID;
        }
        if faults.contains(Faults::POSITION) {
            found |= transformer::Faults::POSITION;
        }
        Ok(found)
    }
}
