//! Loads a checkpoint onto one device: matrices of layers in NF4, everything else in the type of activations.

use std::collections::HashMap;

use tightfit_program::{
    Buffer, Checkpoint, Dtype, Format, GaveUp, Model, Place, Placement, QuantType, Statistics,
    Tensor, Weight, get_devices, nf4, transformer::Parameter,
};

use crate::config::Config;
use crate::options::Options;

/// Elements that share a scale.
const BLOCK: u64 = 64;

pub(crate) struct Loaded {
    model: Model,
    pub(crate) statistics: Statistics,
    names: HashMap<String, usize>,
    tensors: Vec<Tensor>,
    float: Dtype,
    device: u32,
    /// Codes and scales of stacks of experts, which products read in place.
    stacks: HashMap<String, Weight>,
}

pub(crate) fn load(
    checkpoint: &Checkpoint,
    config: &Config,
    options: &Options,
) -> Result<Loaded, GaveUp> {
    let tensors = checkpoint.all_tensors();
    let devices = get_devices().len();
    if options.device as usize >= devices {
        return Err(format!("there is no device {}", options.device).into());
    }
    let mut placements: Vec<Placement> = tensors
        .iter()
        .map(|tensor| place(tensor, options))
        .collect();
    let mut names: HashMap<String, usize> = HashMap::new();
    for (index, tensor) in tensors.iter().enumerate() {
        names.insert(tensor.name.clone(), index);
    }
    for tie in checkpoint.all_ties() {
        if let Some(alias) = tie.alias_tensor {
            placements[alias as usize].device = None;
        }
        names.insert(tie.alias, tie.tensor as usize);
    }
    let model = Model::load(checkpoint, &placements, &vec![0; devices])?;
    let mut loaded = Loaded {
        statistics: model.get_statistics(),
        model,
        names,
        tensors,
        float: options.float,
        device: options.device,
        stacks: HashMap::new(),
    };
    if config.experts.is_some() {
        for layer in 0..config.layers {
            loaded.stack_experts(checkpoint, config, layer)?;
        }
    }
    Ok(loaded)
}

/// Whether a tensor has matrices of experts, one or all of them: those become stacks of our own.
fn is_of_experts(name: &str) -> bool {
    let part = name.split('.').skip_while(|part| *part != "experts").nth(1);
    part.is_some_and(|part| {
        part.parse::<u32>().is_ok() || matches!(part, "gate_up_proj" | "down_proj")
    })
}

fn place(tensor: &Tensor, options: &Options) -> Placement {
    let is_layers = tensor.name.contains(".layers.") && tensor.name.ends_with("_proj.weight");
    let format = if tensor.quantized.is_some() {
        Format::Stored
    } else if is_layers && tensor.shape.len() == 2 {
        Format::NF4
    } else if tensor.dtype == options.float {
        Format::Stored
    } else {
        Format::Cast(options.float)
    };
    let is_float = matches!(tensor.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32);
    let is_loaded = (is_float || tensor.quantized.is_some()) && !is_of_experts(&tensor.name);
    Placement {
        device: is_loaded.then_some(options.device),
        format: if is_loaded { format } else { Format::Stored },
    }
}

impl Loaded {
    fn find(&self, name: &str) -> Result<u32, GaveUp> {
        match self.names.get(name) {
            Some(index) => Ok(*index as u32),
            None => Err(format!("the checkpoint has no {name}").into()),
        }
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// The lengths of a tensor.
    pub(crate) fn shape(&self, name: &str) -> Result<&[u64], GaveUp> {
        Ok(&self.tensors[self.find(name)? as usize].shape)
    }

    /// A matrix in 4 bits, or a stack of them.
    pub(crate) fn weight(&self, name: &str) -> Result<Weight, GaveUp> {
        Ok(Weight::of(&self.model, self.find(name)?)?)
    }

    /// A stack that was put together of matrices of experts.
    pub(crate) fn take_stack(&mut self, name: &str) -> Option<Weight> {
        self.stacks.remove(name)
    }

    /// A matrix that is not quantized, where it lies.
    pub(crate) fn parameter(&self, name: &str) -> Result<Parameter<'_>, GaveUp> {
        Ok(Parameter {
            model: &self.model,
            tensor: self.find(name)?,
        })
    }

    /// A vector in a buffer of its own, in the type of activations.
    pub(crate) fn vector(&self, name: &str, elements: usize) -> Result<Buffer, GaveUp> {
        let (tensor, shape) = (self.find(name)?, self.shape(name)?);
        if shape != [elements as u64] {
            return Err(format!("{name} is {shape:?}, not [{elements}]").into());
        }
        let bytes = (elements * bytes_of(self.float)) as u64;
        let buffer = Buffer::allocate(self.device, bytes)?;
        self.model
            .read_elements_into(tensor, 0, elements as u64, self.float, &buffer, 0)?;
        Ok(buffer)
    }

    /// Quantizes the experts of a layer, each kind of matrix as a stack `[experts, out, in]`.
    fn stack_experts(
        &mut self,
        checkpoint: &Checkpoint,
        config: &Config,
        layer: usize,
    ) -> Result<(), GaveUp> {
        for (module, kinds) in [
            ("mlp", ["gate_proj", "up_proj", "down_proj"]),
            ("block_sparse_moe", ["w1", "w3", "w2"]),
        ] {
            let experts = format!("model.layers.{layer}.{module}.experts");
            for kind in kinds {
                let matrices = match self.experts_one_by_one(&experts, kind)? {
                    Some(matrices) => matrices,
                    None => match self.experts_in_a_stack(&experts, purpose(kind), config)? {
                        Some(matrices) => matrices,
                        None => continue,
                    },
                };
                let weight = self.quantize(checkpoint, &matrices)?;
                self.stacks
                    .insert(format!("{layer}.{}", purpose(kind)), weight);
            }
        }
        Ok(())
    }

    /// Those that are tensors of their own.
    fn experts_one_by_one(&self, experts: &str, kind: &str) -> Result<Option<Matrices>, GaveUp> {
        let name = |expert: usize| format!("{experts}.{expert}.{kind}.weight");
        let count = (0..).take_while(|expert| self.has(&name(*expert))).count();
        if count == 0 {
            return Ok(None);
        }
        let numbers = (0..count).map(|expert| self.find(&name(expert)));
        let numbers = numbers.collect::<Result<Vec<u32>, GaveUp>>()?;
        let first = &self.tensors[numbers[0] as usize];
        let &[outputs, inputs] = &first.shape[..] else {
            return Err(format!("{} is {:?}", first.name, first.shape).into());
        };
        for number in &numbers {
            let tensor = &self.tensors[*number as usize];
            if (&tensor.shape, tensor.dtype) != (&first.shape, first.dtype) {
                return Err(format!("{} is not like the others", tensor.name).into());
            }
        }
        Ok(Some(Matrices {
            sources: numbers.into_iter().map(|number| (number, 0)).collect(),
            shape: [outputs, inputs],
            dtype: first.dtype,
        }))
    }

    /// Those of which a tensor has all: of gates and what they are for one `[experts, 2 * out, in]`, gates first.
    fn experts_in_a_stack(
        &self,
        experts: &str,
        purpose: &str,
        config: &Config,
    ) -> Result<Option<Matrices>, GaveUp> {
        let is_down = purpose == "down";
        let part = if is_down { "down_proj" } else { "gate_up_proj" };
        let name = format!("{experts}.{part}");
        if !self.has(&name) {
            return Ok(None);
        }
        let number = self.find(&name)?;
        let tensor = &self.tensors[number as usize];
        let (halves, hidden) = (if is_down { 1 } else { 2 }, config.hidden as u64);
        let shape = match tensor.shape[..] {
            [_, outputs, inputs] if is_down && outputs == hidden => [outputs, inputs],
            [_, both, inputs] if !is_down && inputs == hidden && both % 2 == 0 => {
                [both / 2, inputs]
            }
            _ => return Err(format!("{name} is {:?}", tensor.shape).into()),
        };
        let matrix = shape[0] * shape[1] * bytes_of(tensor.dtype) as u64;
        let second = u64::from(purpose == "up");
        let start = |expert: u64| (expert * halves + second) * matrix;
        Ok(Some(Matrices {
            sources: (0..tensor.shape[0])
                .map(|expert| (number, start(expert)))
                .collect(),
            shape,
            dtype: tensor.dtype,
        }))
    }

    /// Quantizes matrices into a weight that has them one after the other.
    fn quantize(&self, checkpoint: &Checkpoint, matrices: &Matrices) -> Result<Weight, GaveUp> {
        let [outputs, inputs] = matrices.shape;
        let (elements, dtype) = (outputs * inputs, matrices.dtype);
        let bytes = elements * bytes_of(dtype) as u64;
        let is_float = matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32);
        for (number, _) in &matrices.sources {
            let tensor = &self.tensors[*number as usize];
            if tensor.quantized.is_some() || !is_float || !elements.is_multiple_of(BLOCK) {
                let message = format!(
                    "{} cannot be quantized here: {:?} of {dtype:?}",
                    tensor.name, tensor.shape
                );
                return Err(message.into());
            }
        }
        let count = matrices.sources.len() as u64;
        let (codes, scales) = (elements / 2, elements / BLOCK * 4);
        let all_codes = Buffer::allocate(self.device, codes * count)?;
        let all_scales = Buffer::allocate(self.device, scales * count)?;
        let staging = Buffer::allocate(self.device, bytes)?;
        let at = |buffer, offset| Place { buffer, offset };
        for (expert, (number, start)) in (0..).zip(&matrices.sources) {
            checkpoint.read_tensor(*number, *start, bytes, &staging, 0)?;
            nf4::quantize(
                &at(&staging, 0),
                dtype,
                elements,
                BLOCK as u32,
                &at(&all_codes, expert * codes),
                &at(&all_scales, expert * scales),
            )?;
        }
        let lengths = [count, outputs, inputs];
        let (codes, scales) = (at(&all_codes, 0), at(&all_scales, 0));
        let nf4 = QuantType::Nf4;
        Ok(Weight::from_codes(
            nf4,
            &lengths,
            BLOCK as u32,
            &codes,
            &scales,
        )?)
    }
}

/// Matrices of one shape in the checkpoint: the tensor of each, and the byte at which it begins there.
struct Matrices {
    sources: Vec<(u32, u64)>,
    /// `[out, in]`.
    shape: [u64; 2],
    dtype: Dtype,
}

/// What a matrix of an expert is for, whatever it is called.
fn purpose(kind: &str) -> &str {
    match kind {
        "w1" | "gate_proj" => "gate",
        "w3" | "up_proj" => "up",
        _ => "down",
    }
}

/// Bytes of an element of a type of activations.
pub(crate) fn bytes_of(float: Dtype) -> usize {
    if float == Dtype::F32 { 4 } else { 2 }
}
