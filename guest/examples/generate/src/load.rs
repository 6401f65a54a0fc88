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
            loaded.stack_experts(checkpoint, layer)?;
        }
    }
    Ok(loaded)
}

/// Whether a tensor is a matrix of one of many experts: those are put together.
fn is_of_expert(name: &str) -> bool {
    let numbers = name.split('.').skip_while(|part| *part != "experts").nth(1);
    numbers.is_some_and(|part| part.parse::<u32>().is_ok())
}

fn place(tensor: &Tensor, options: &Options) -> Placement {
    let is_layers = tensor.name.contains(".layers.") && tensor.name.ends_with("_proj.weight");
    let is_stack = tensor.name.ends_with(".experts.gate_up_proj")
        || tensor.name.ends_with(".experts.down_proj");
    let format = if tensor.quantized.is_some() {
        Format::Stored
    } else if (is_layers && tensor.shape.len() == 2) || (is_stack && tensor.shape.len() == 3) {
        Format::NF4
    } else if tensor.dtype == options.float {
        Format::Stored
    } else {
        Format::Cast(options.float)
    };
    let is_float = matches!(tensor.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32);
    let is_loaded = (is_float || tensor.quantized.is_some()) && !is_of_expert(&tensor.name);
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

    /// Quantizes the experts of a layer that the checkpoint has one by one, each kind of matrix as a stack
    /// `[experts, out, in]`.
    fn stack_experts(&mut self, checkpoint: &Checkpoint, layer: usize) -> Result<(), GaveUp> {
        for (module, kinds) in [
            ("mlp", ["gate_proj", "up_proj", "down_proj"]),
            ("block_sparse_moe", ["w1", "w3", "w2"]),
        ] {
            for kind in kinds {
                let experts = format!("model.layers.{layer}.{module}.experts");
                let name = |expert: usize| format!("{experts}.{expert}.{kind}.weight");
                let count = (0..).take_while(|expert| self.has(&name(*expert))).count();
                if count == 0 {
                    continue;
                }
                let first = self.find(&name(0))? as usize;
                let shape = self.tensors[first].shape.clone();
                let elements: u64 = shape.iter().product();
                if shape.len() != 2 || !elements.is_multiple_of(BLOCK) {
                    return Err(format!("{} is {shape:?}", name(0)).into());
                }
                let (codes, scales) = (elements / 2, elements / BLOCK * 4);
                let all_codes = Buffer::allocate(self.device, codes * count as u64)?;
                let all_scales = Buffer::allocate(self.device, scales * count as u64)?;
                let staging = Buffer::allocate(self.device, self.tensors[first].bytes)?;
                let at = |buffer, offset| Place { buffer, offset };
                for expert in 0..count {
                    let index = self.find(&name(expert))?;
                    let tensor = &self.tensors[index as usize];
                    if tensor.shape != shape || tensor.bytes != staging.length() {
                        return Err(format!("{} is not like the others", tensor.name).into());
                    }
                    checkpoint.read_tensor(index, 0, tensor.bytes, &staging, 0)?;
                    let expert = expert as u64;
                    nf4::quantize(
                        &at(&staging, 0),
                        tensor.dtype,
                        elements,
                        BLOCK as u32,
                        &at(&all_codes, expert * codes),
                        &at(&all_scales, expert * scales),
                    )?;
                }
                let lengths = [count as u64, shape[0], shape[1]];
                let (codes, scales) = (at(&all_codes, 0), at(&all_scales, 0));
                let weight =
                    Weight::from_codes(QuantType::Nf4, &lengths, BLOCK as u32, &codes, &scales)?;
                self.stacks
                    .insert(format!("{layer}.{}", purpose(kind)), weight);
            }
        }
        Ok(())
    }
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
