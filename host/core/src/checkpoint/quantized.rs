//! Weights that bitsandbytes has quantized already: several tensors of the file that are one.
//!
//! For a weight `W` these are `W` (packed codes, in any storage type), `W.absmax`, `W.quant_map`,
//! under double quantization `W.nested_absmax` and `W.nested_quant_map`, and
//! `W.quant_state.bitsandbytes__nf4` (or `__fp4`), a JSON text that says how to read them. They
//! may lie in different files. Source: `QuantState.as_dict` of bitsandbytes 0.50.

use std::collections::HashMap;

use serde::Deserialize;
use tightfit_kernels::{DYNAMIC_MAP, FP4, FloatType, NF4};

use super::error::shortened;
use super::{AbsmaxForm, CheckpointError, MAX_DIMENSIONS, Remark, Shard, TensorInfo};
use crate::cancel::{CancelToken, Watch};
use crate::types::{BlockSize, DType, QuantType, elements};

/// Longest quant state that is read; real ones take 200 bytes.
const MAX_QUANT_STATE_BYTES: u64 = 16 << 10;

/// Where some bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index of the file.
    pub shard: usize,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// How a weight is quantized in the checkpoint, and where the parts beside its codes lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantized {
    /// The table of values.
    pub quant_type: QuantType,
    /// Number of elements that share a scale.
    pub block_size: BlockSize,
    /// Scales: f32 or bf16, or u8 under double quantization.
    pub absmax: Extent,
    /// How they lie there.
    pub absmax_form: AbsmaxForm,
    /// What double quantization adds.
    pub nested: Option<Nested>,
}

impl Quantized {
    /// How many scales there are, where they are not as they are used.
    pub(crate) fn scales(&self) -> u64 {
        self.absmax_form.count(self.absmax.bytes)
    }

    /// Bytes in the file that stand for the first bytes of such scales as they are used.
    pub(crate) fn stored_bytes_until(&self, end: u64) -> u64 {
        let stored = u128::from(self.absmax.bytes + self.absmax_form.extra_bytes());
        let all = u128::from(4 * self.scales()).max(1);
        // No more than are stored.
        (stored * u128::from(end) / all) as u64
    }
}

/// What double quantization adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nested {
    /// One f32 for 256 scales.
    pub absmax: Extent,
    /// The mean of the scales, which was subtracted from them: bitsandbytes' `nested_offset`.
    pub absmax_mean: f32,
}

const STATES: [(&str, QuantType); 2] = [
    (".quant_state.bitsandbytes__nf4", QuantType::Nf4),
    (".quant_state.bitsandbytes__fp4", QuantType::Fp4),
];
const PARTS: [&str; 4] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
];

/// The JSON text, as bitsandbytes writes it.
#[derive(Debug, Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: u32,
    dtype: String,
    shape: Vec<u64>,
    nested_blocksize: Option<u64>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// Puts the tensors of quantized weights together: of `tensors` those remain that are a tensor of
/// the model, a quantized weight as one, with its own type and shape.
///
/// # Errors
/// [`CheckpointError::BadQuantized`] when a set is incomplete or contradicts itself, or as reading
/// from the files.
pub(super) fn assemble(
    tensors: Vec<TensorInfo>,
    shards: &[Shard],
    cancel: &CancelToken,
) -> Result<Vec<TensorInfo>, CheckpointError> {
    let mut watch = Watch::new(cancel);
    let mut states: Vec<(usize, &str, QuantType)> = Vec::new();
    let mut by_name: HashMap<&str, usize> = HashMap::with_capacity(tensors.len());
    for (index, tensor) in tensors.iter().enumerate() {
        watch.item(tensor.name.len())?;
        by_name.insert(&tensor.name, index);
        states.extend(STATES.iter().find_map(|&(suffix, quant_type)| {
            let weight = tensor.name.strip_suffix(suffix)?;
            Some((index, weight, quant_type))
        }));
    }
    check_orphans(&tensors, &by_name, shards, &mut watch)?;
    if states.is_empty() {
        return Ok(tensors);
    }
    let mut used = vec![false; tensors.len()];
    let mut replaced: Vec<(usize, TensorInfo)> = Vec::with_capacity(states.len());
    for (state, weight, quant_type) in states {
        // Each is read from the file, in several places.
        cancel.check()?;
        let set = Set {
            tensors: &tensors,
            by_name: &by_name,
            shards,
            weight,
        };
        // Their tables differ, so that one of them would be wrong: this says why.
        if STATES.iter().all(|(suffix, _)| set.find(suffix).is_some()) {
            return Err(set.bad(state, "it has two quant states".to_owned()));
        }
        let (index, info) = set.assemble(state, quant_type)?;
        used[index] = true;
        used[state] = true;
        for part in PARTS {
            if let Some(part) = set.find(part) {
                used[part] = true;
            }
        }
        replaced.push((index, info));
    }
    let mut replaced: HashMap<usize, TensorInfo> = replaced.into_iter().collect();
    let mut whole = Vec::with_capacity(tensors.len());
    for (index, tensor) in tensors.into_iter().enumerate() {
        watch.item(0)?;
        match replaced.remove(&index) {
            Some(info) => whole.push(info),
            None if used[index] => {}
            None => whole.push(tensor),
        }
    }
    whole.shrink_to_fit();
    Ok(whole)
}

/// What is to be said of scales that are not as bitsandbytes uses them.
pub(super) fn remark(
    tensors: &[TensorInfo],
    cancel: &CancelToken,
) -> Result<Option<Remark>, CheckpointError> {
    let mut watch = Watch::new(cancel);
    let (mut weights, mut transposed, mut double) = (0, 0, 0);
    for tensor in tensors {
        watch.item(0)?;
        let form = tensor
            .quantized
            .as_ref()
            .map(|quantized| quantized.absmax_form);
        weights += u64::from(form.is_some_and(|form| form != AbsmaxForm::AsUsed));
        transposed += u64::from(matches!(form, Some(AbsmaxForm::Bf16Transposed { .. })));
        double += u64::from(matches!(form, Some(AbsmaxForm::RoundedDouble { .. })));
    }
    Ok((weights > 0).then_some(Remark::RoundedScales {
        weights,
        transposed,
        double,
    }))
}

/// Parts of a quantized weight without the quant state that says how to read them.
fn check_orphans(
    tensors: &[TensorInfo],
    by_name: &HashMap<&str, usize>,
    shards: &[Shard],
    watch: &mut Watch<'_>,
) -> Result<(), CheckpointError> {
    for (index, tensor) in tensors.iter().enumerate() {
        watch.item(0)?;
        let Some(weight) = PARTS.iter().find_map(|part| tensor.name.strip_suffix(part)) else {
            continue;
        };
        let stated = STATES
            .iter()
            .any(|(suffix, _)| by_name.contains_key(format!("{weight}{suffix}").as_str()));
        watch.item(2 * weight.len())?;
        // Only beside a weight: other models may use such a name for something else.
        if !stated && by_name.contains_key(weight) {
            return Err(CheckpointError::BadQuantized {
                path: shards[tensors[index].shard].path().into(),
                weight: weight.to_owned(),
                problem: format!("there is '{}', but no quant state", tensor.name),
            });
        }
    }
    Ok(())
}

/// The tensors of one weight.
struct Set<'a> {
    tensors: &'a [TensorInfo],
    by_name: &'a HashMap<&'a str, usize>,
    shards: &'a [Shard],
    weight: &'a str,
}

impl Set<'_> {
    fn find(&self, suffix: &str) -> Option<usize> {
        let name = format!("{}{suffix}", self.weight);
        self.by_name.get(name.as_str()).copied()
    }

    fn bad(&self, tensor: usize, problem: String) -> CheckpointError {
        CheckpointError::BadQuantized {
            path: self.shards[self.tensors[tensor].shard].path().into(),
            weight: self.weight.to_owned(),
            problem,
        }
    }

    fn assemble(
        &self,
        state: usize,
        quant_type: QuantType,
    ) -> Result<(usize, TensorInfo), CheckpointError> {
        let bad = |problem: String| self.bad(state, problem);
        let parsed = self.read_state(state)?;
        let name = quant_type.name();
        if parsed.quant_type != name {
            return Err(bad(format!(
                "its quant state is named {name} and says {:?}",
                shortened(&parsed.quant_type)
            )));
        }
        let block_size = BlockSize::try_from(parsed.blocksize).map_err(|error| {
            let have = error.have;
            bad(format!(
                "its block size is {have}, not a power of two from 32 to 4096"
            ))
        })?;
        let dtype = match parsed.dtype.as_str() {
            "bfloat16" => DType::Bf16,
            "float16" => DType::F16,
            "float32" => DType::F32,
            other => {
                let other = shortened(other);
                return Err(bad(format!("it is of the unknown type {other:?}")));
            }
        };
        let dimensions = parsed.shape.len();
        if dimensions > MAX_DIMENSIONS {
            return Err(bad(format!(
                "its shape has {dimensions} dimensions, at most {MAX_DIMENSIONS} are read"
            )));
        }
        let n = elements(&parsed.shape)
            .filter(|_| dtype.tensor_bytes(&parsed.shape).is_some())
            .ok_or_else(|| bad("its shape has no size in 64 bits".to_owned()))?;
        let blocks = n.div_ceil(u64::from(block_size));
        let codes = self
            .by_name
            .get(self.weight)
            .copied()
            .ok_or_else(|| bad("it has a quant state, but there is no tensor".to_owned()))?;
        // In any storage type: the bytes are the same.
        self.check(codes, None, n.div_ceil(2))?;
        self.check_table("quant_map", &values(quant_type))?;
        let nested = match (
            parsed.nested_blocksize,
            parsed.nested_dtype,
            parsed.nested_offset,
        ) {
            (None, None, None) => None,
            (Some(256), Some(dtype), Some(offset)) if float(&dtype).is_some() => {
                // Written as the decimal form of the f32; anything else was not.
                let single = offset as f32;
                if !single.is_finite() {
                    return Err(bad(format!("its nested offset is {offset:?}")));
                }
                self.check_table("nested_quant_map", &DYNAMIC_MAP)?;
                let index = self.part("nested_absmax")?;
                self.check(index, Some(DType::F32), 4 * blocks.div_ceil(256))?;
                let nested = Nested {
                    absmax: self.extent(index),
                    absmax_mean: single,
                };
                float(&dtype).map(|float| (nested, float))
            }
            (block, dtype, offset) => {
                let dtype = dtype.as_deref().map(shortened);
                return Err(bad(format!(
                    "its double quantization is not of a known kind (block size {block:?}, type {dtype:?}, offset {offset:?}; need 256, a type of floating-point numbers and a number)"
                )));
            }
        };
        if nested.is_none() && self.find(".nested_absmax").is_some() {
            return Err(bad(
                "it has nested scales that its quant state does not mention".to_owned(),
            ));
        }
        let absmax = self.part("absmax")?;
        let absmax_form = match nested {
            None => self.absmax_form(absmax, &parsed.shape, block_size)?,
            Some((nested, float)) => {
                self.check(absmax, Some(DType::U8), blocks)?;
                match float {
                    FloatType::F32 => AbsmaxForm::AsUsed,
                    float => AbsmaxForm::RoundedDouble {
                        nested: nested.absmax,
                        absmax_mean: nested.absmax_mean,
                        float,
                    },
                }
            }
        };
        let info = TensorInfo {
            dtype,
            shape: parsed.shape,
            quantized: Some(Box::new(Quantized {
                quant_type,
                block_size,
                absmax: self.extent(absmax),
                absmax_form,
                // Rounded ones are f32 when they have been read.
                nested: nested
                    .map(|(nested, _)| nested)
                    .filter(|_| absmax_form == AbsmaxForm::AsUsed),
            })),
            ..self.tensors[codes].clone()
        };
        Ok((codes, info))
    }

    fn absmax_form(
        &self,
        index: usize,
        shape: &[u64],
        block_size: BlockSize,
    ) -> Result<AbsmaxForm, CheckpointError> {
        let absmax = &self.tensors[index];
        if absmax.dtype != DType::Bf16 {
            let blocks = elements(shape).unwrap_or(0).div_ceil(block_size.into());
            self.check(index, Some(DType::F32), 4 * blocks)?;
            return Ok(AbsmaxForm::AsUsed);
        }
        AbsmaxForm::of_bf16(&absmax.shape, shape, block_size.into()).ok_or_else(|| {
            self.bad(
                index,
                format!(
                    "'{}' is of type {} and shape {:?}, which is neither one scale for each of its blocks nor these transposed",
                    absmax.name, absmax.dtype, absmax.shape
                ),
            )
        })
    }

    fn part(&self, name: &str) -> Result<usize, CheckpointError> {
        self.find(&format!(".{name}")).ok_or_else(|| {
            let weight = self.by_name.get(self.weight).copied().unwrap_or(0);
            self.bad(weight, format!("its {name} is missing"))
        })
    }

    fn extent(&self, index: usize) -> Extent {
        let tensor = &self.tensors[index];
        Extent {
            shard: tensor.shard,
            offset: tensor.offset,
            bytes: tensor.bytes,
        }
    }

    fn check(&self, index: usize, dtype: Option<DType>, need: u64) -> Result<(), CheckpointError> {
        let tensor = &self.tensors[index];
        if let Some(dtype) = dtype.filter(|&dtype| dtype != tensor.dtype) {
            return Err(self.bad(
                index,
                format!(
                    "'{}' is of type {}, need {dtype}",
                    tensor.name, tensor.dtype
                ),
            ));
        }
        if tensor.bytes != need {
            return Err(self.bad(
                index,
                format!("'{}' has {} bytes, need {need}", tensor.name, tensor.bytes),
            ));
        }
        Ok(())
    }

    /// The table of values is the one that the kernels know.
    fn check_table(&self, name: &str, known: &[f32]) -> Result<(), CheckpointError> {
        let index = self.part(name)?;
        self.check(index, Some(DType::F32), 4 * known.len() as u64)?;
        let bytes = self.read(index)?;
        let (found, _) = bytes.as_chunks::<4>();
        // As numbers: a zero may have either sign.
        if found
            .iter()
            .zip(known)
            .any(|(found, known)| f32::from_le_bytes(*found) != *known)
        {
            return Err(self.bad(index, format!("its {name} is not the usual one")));
        }
        Ok(())
    }

    fn read(&self, index: usize) -> Result<Vec<u8>, CheckpointError> {
        let tensor = &self.tensors[index];
        let mut bytes = vec![0; tensor.bytes as usize];
        super::read_at(
            self.shards,
            self.tensors,
            tensor.shard,
            tensor.offset,
            &mut bytes,
        )?;
        Ok(bytes)
    }

    fn read_state(&self, index: usize) -> Result<QuantState, CheckpointError> {
        let length = self.tensors[index].bytes;
        if length > MAX_QUANT_STATE_BYTES {
            return Err(self.bad(
                index,
                format!(
                    "its quant state has {length} bytes, at most {MAX_QUANT_STATE_BYTES} are read"
                ),
            ));
        }
        serde_json::from_slice(&self.read(index)?).map_err(|error| {
            let error = shortened(&error.to_string());
            self.bad(index, format!("its quant state cannot be read: {error}"))
        })
    }
}

/// A type of floating-point numbers as torch names it.
fn float(dtype: &str) -> Option<FloatType> {
    match dtype {
        "bfloat16" => Some(FloatType::Bf16),
        "float16" => Some(FloatType::F16),
        "float32" => Some(FloatType::F32),
        _ => None,
    }
}

fn values(quant_type: QuantType) -> [f32; 16] {
    match quant_type {
        QuantType::Nf4 => NF4,
        QuantType::Fp4 => FP4,
    }
}
