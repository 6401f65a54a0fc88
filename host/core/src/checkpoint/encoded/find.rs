//! Which tensors of a checkpoint are one weight, by names and types.
//!
//! | codes | scales | who writes it so |
//! |---|---|---|
//! | `X.weight` or `X`, F8_E4M3 or F8_E5M2 | `X.weight_scale_inv`, `X.weight_scale`, `X.scale`, `X.qscale_weight`: floats or powers of two | DeepSeek and transformers' `fp8`, compressed-tensors' `float-quantized`, Mistral, `mxfp8` |
//! | `X_blocks`, U8 [.., rows, groups, 16] | `X_scales`, U8 | gpt-oss and transformers' `mxfp4` |
//! | `X.weight_packed`, U8 | `X.weight_scale`, U8 or F8_E8M0 | compressed-tensors' `mxfp4-pack-quantized` |
//! | `X.weight_packed`, U8 | `X.weight_scale`, F8_E4M3, and `X.weight_global_scale`, by which they are divided | compressed-tensors' `nvfp4-pack-quantized` |
//! | `X.weight`, U8 | `X.weight_scale`, F8_E4M3, and `X.weight_scale_2`, with which they are multiplied | modelopt's NVFP4 |
//! | `X.weight`, I8 | `X.scale`, F8_E8M0 | DeepSeek-V4's experts |
//! | `X.weight_packed`, I32 | `X.weight_scale`, and with `X.weight_zero_point` not symmetric | compressed-tensors' `pack-quantized` of 4 bits |

use serde_json::Value;
use tightfit_kernels::{FloatType, SourceCodes, SourceScale};

use super::layout::{Tiles, tiles};
use super::{Dequantize, Encoded, EncodedCounts, ScaleForm};
use crate::cancel::{CancelToken, Watch};
use crate::checkpoint::{CheckpointError, Config, Extent, TensorInfo, find as find_named};
use crate::types::{DType, elements};

/// What a checkpoint has of encoded weights.
#[derive(Debug)]
pub(in crate::checkpoint) struct Found {
    /// Its tensors, those that are decoded as one each.
    pub(in crate::checkpoint) tensors: Vec<TensorInfo>,
    pub(in crate::checkpoint) counts: EncodedCounts,
}

/// Gives the bytes of a small tensor, or `None` where only headers are here.
pub(in crate::checkpoint) type Read<'a> =
    dyn Fn(&TensorInfo) -> Result<Option<Vec<u8>>, CheckpointError> + 'a;

/// Puts together what is to be decoded. `by_name` has the indices of `tensors`, sorted by name.
///
/// # Errors
/// Those of `read`, and [`CheckpointError::Cancelled`].
pub(in crate::checkpoint) fn find(
    tensors: Vec<TensorInfo>,
    by_name: &[u32],
    config: Option<&Config>,
    dequantize: Dequantize,
    read: &Read<'_>,
    cancel: &CancelToken,
) -> Result<Found, CheckpointError> {
    let mut watch = Watch::new(cancel);
    let blocks = config
        .map(|config| Blocks::of(&config.json))
        .unwrap_or_default();
    let mut counts = EncodedCounts::default();
    let mut left = Left::default();
    let mut decoded: Vec<(usize, TensorInfo)> = Vec::new();
    let mut is_used = vec![false; tensors.len()];
    for (index, tensor) in tensors.iter().enumerate() {
        watch.item(tensor.name.len())?;
        let set = Set {
            tensors: &tensors,
            by_name,
            blocks: &blocks,
            codes: tensor,
            read,
        };
        let Some(kind) = set.kind() else { continue };
        watch.item(4 * tensor.name.len())?;
        let is_included = dequantize.includes(kind.codes);
        let stated = match is_included {
            true => set.stated_shape(&kind)?,
            false => None,
        };
        let Some(weight) = set.weight(&kind, stated) else {
            counts.unknown += 1;
            continue;
        };
        if !is_included {
            let parts = weight.parts.iter().map(|&part| &tensors[part]);
            left.add(&weight.info, parts.chain([tensor]));
            continue;
        }
        // Names can be such that two weights would have the same scales.
        if weight.parts.iter().any(|&part| is_used[part]) || is_used[index] {
            counts.unknown += 1;
            continue;
        }
        counts.decoded += 1;
        is_used[index] = true;
        for part in weight.parts {
            is_used[part] = true;
        }
        for part in set.unused(&kind) {
            counts.unused += u64::from(!std::mem::replace(&mut is_used[part], true));
        }
        decoded.push((index, weight.info));
    }
    left.count(&mut counts);
    if decoded.is_empty() {
        return Ok(Found { tensors, counts });
    }
    let mut whole = Vec::with_capacity(tensors.len());
    let mut decoded = decoded.into_iter().peekable();
    for (index, tensor) in tensors.into_iter().enumerate() {
        watch.item(0)?;
        match decoded.next_if(|&(codes, _)| codes == index) {
            Some((_, info)) => whole.push(info),
            None if is_used[index] => {}
            None => whole.push(tensor),
        }
    }
    whole.shrink_to_fit();
    Ok(Found {
        tensors: whole,
        counts,
    })
}

/// What is left as it is.
#[derive(Default)]
struct Left {
    weights: u64,
    elements: u128,
    stored_elements: u128,
    bytes: u128,
}

impl Left {
    fn add<'t>(&mut self, weight: &TensorInfo, stored: impl Iterator<Item = &'t TensorInfo>) {
        let number = |tensor: &TensorInfo| u128::from(elements(&tensor.shape).unwrap_or(0));
        self.weights += 1;
        self.elements += number(weight);
        self.stored_elements += stored.map(number).sum::<u128>();
        self.bytes += u128::from(weight.source_bytes());
    }

    fn count(&self, counts: &mut EncodedCounts) {
        let most = |number: u128| u64::try_from(number).unwrap_or(u64::MAX);
        let millibits = (self.bytes * 8000).checked_div(self.elements);
        counts.left = self.weights;
        counts.left_elements = most(self.elements);
        counts.left_stored_elements = most(self.stored_elements);
        counts.left_millibits = most(millibits.unwrap_or(0));
    }
}

/// Sizes of blocks that a configuration names.
#[derive(Debug, Default)]
struct Blocks(Vec<[u64; 2]>);

impl Blocks {
    /// Wherever it has them: `weight_block_size`, and compressed-tensors' `block_structure`.
    fn of(config: &Value) -> Blocks {
        let mut blocks = Blocks::default();
        blocks.collect(config);
        blocks
    }

    fn collect(&mut self, value: &Value) {
        match value {
            Value::Object(entries) => {
                for (key, value) in entries {
                    match (key.as_str(), value.as_array().map(Vec::as_slice)) {
                        ("weight_block_size" | "block_structure", Some([rows, columns])) => {
                            let block = rows.as_u64().zip(columns.as_u64());
                            self.0.extend(block.map(|(rows, columns)| [rows, columns]));
                        }
                        _ => self.collect(value),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| self.collect(value)),
            _ => {}
        }
    }
}

/// How the names of scales end.
const SCALES: [&str; 2] = ["scale", "scale_inv"];

/// Codes that look like those of a weight.
struct Kind<'a> {
    codes: SourceCodes,
    /// What comes before `.weight`, `.weight_packed` or `_blocks`; the name of what has no such end.
    stem: &'a str,
    /// The name of the weight.
    name: String,
    /// Its scales, and what they are multiplied with or divided by.
    scales: Option<usize>,
    nested: Option<(usize, bool)>,
    packing: Packing,
}

/// How many codes an element of the tensor holds.
#[derive(Clone, Copy, PartialEq)]
enum Packing {
    One,
    /// Two in a byte.
    Bytes,
    /// The last dimension is of 16 bytes for 32 codes.
    Blocks,
    /// Eight in an i32.
    Words,
}

/// Parts of a weight.
struct Weight {
    info: TensorInfo,
    /// Tensors beside the codes that it is made of.
    parts: Vec<usize>,
}

/// A tensor, and those beside it.
struct Set<'a> {
    tensors: &'a [TensorInfo],
    by_name: &'a [u32],
    blocks: &'a Blocks,
    codes: &'a TensorInfo,
    read: &'a Read<'a>,
}

impl<'a> Set<'a> {
    fn named(&self, stem: &str, end: &str) -> Option<usize> {
        find_named(&format!("{stem}{end}"), self.tensors, self.by_name)
    }

    /// The first of these that there is.
    fn first(&self, stem: &str, ends: &[&str]) -> Option<usize> {
        ends.iter().find_map(|end| self.named(stem, end))
    }

    fn of_type(&self, index: Option<usize>, types: &[DType]) -> Option<usize> {
        index.filter(|&index| types.contains(&self.tensors[index].dtype))
    }

    fn kind(&self) -> Option<Kind<'a>> {
        let (name, dtype) = (self.codes.name.as_str(), self.codes.dtype);
        if self.codes.quantized.is_some() || self.codes.shape.len() < 2 {
            return None;
        }
        let kind = |codes, stem: &'a str, name: &str, packing| Kind {
            codes,
            stem,
            name: name.to_owned(),
            scales: None,
            nested: None,
            packing,
        };
        match dtype {
            // Scales are no weights.
            DType::F8E4M3 | DType::F8E5M2 if !SCALES.iter().any(|end| name.ends_with(end)) => {
                let codes = match dtype {
                    DType::F8E4M3 => SourceCodes::F8E4M3,
                    _ => SourceCodes::F8E5M2,
                };
                let stem = name.strip_suffix(".weight").unwrap_or(name);
                let scales = self.first(name, &["_scale_inv", "_scale"]).or_else(|| {
                    let ends = [".scale", ".qscale_weight", ".scale_weight"];
                    self.first(stem, &ends)
                });
                Some(Kind {
                    scales,
                    ..kind(codes, stem, name, Packing::One)
                })
            }
            DType::U8 if name.ends_with("_blocks") => {
                let stem = name.strip_suffix("_blocks")?;
                let scales = self.of_type(self.named(stem, "_scales"), &[DType::U8])?;
                Some(Kind {
                    scales: Some(scales),
                    ..kind(SourceCodes::F4E2M1, stem, stem, Packing::Blocks)
                })
            }
            DType::I32 | DType::U8 if name.ends_with(".weight_packed") => {
                let stem = name.strip_suffix(".weight_packed")?;
                let scales = self.named(stem, ".weight_scale");
                let weight = format!("{stem}.weight");
                let (codes, packing) = match dtype {
                    DType::I32 => (SourceCodes::Int4, Packing::Words),
                    _ => (SourceCodes::F4E2M1, Packing::Bytes),
                };
                let global = self.named(stem, ".weight_global_scale");
                Some(Kind {
                    scales,
                    nested: self
                        .of_type(scales, &[DType::F8E4M3])
                        .and(global)
                        .map(|global| (global, true)),
                    ..kind(codes, stem, &weight, packing)
                })
            }
            DType::U8 => {
                let stem = name.strip_suffix(".weight")?;
                let scales = self.of_type(self.named(stem, ".weight_scale"), &[DType::F8E4M3])?;
                let global = self.named(stem, ".weight_scale_2")?;
                Some(Kind {
                    scales: Some(scales),
                    nested: Some((global, false)),
                    ..kind(SourceCodes::F4E2M1, stem, name, Packing::Bytes)
                })
            }
            DType::I8 => {
                let stem = name.strip_suffix(".weight")?;
                let scales = self.of_type(self.named(stem, ".scale"), &[DType::F8E8M0])?;
                Some(Kind {
                    scales: Some(scales),
                    ..kind(SourceCodes::F4E2M1, stem, name, Packing::Bytes)
                })
            }
            _ => None,
        }
    }

    /// The shape that is stated beside packed codes, whose rows are padded.
    fn stated_shape(&self, kind: &Kind<'_>) -> Result<Option<[u64; 2]>, CheckpointError> {
        let index = match kind.packing {
            Packing::Words => self.named(kind.stem, ".weight_shape"),
            _ => None,
        };
        let types = [DType::I64, DType::I32];
        let Some(index) = self.of_type(index, &types) else {
            return Ok(None);
        };
        let tensor = &self.tensors[index];
        if tensor.shape != [2] {
            return Ok(None);
        }
        let Some(bytes) = (self.read)(tensor)? else {
            return Ok(None);
        };
        // Negative ones are too large for what is stored, and found so.
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        let (rows, columns) = bytes.split_at(bytes.len() / 2);
        Ok(Some([number(rows), number(columns)]))
    }

    /// The weight, if its parts belong together, and are of the shape that is stated, if one is.
    fn weight(&self, kind: &Kind<'_>, stated: Option<[u64; 2]>) -> Option<Weight> {
        let index = kind.scales?;
        let scales = &self.tensors[index];
        let mut parts = vec![index];
        // Its own name, which nothing else may have.
        if kind.name != self.codes.name
            && find_named(&kind.name, self.tensors, self.by_name).is_some()
        {
            return None;
        }
        // With it, groups are of columns in another order.
        if self.named(kind.stem, ".weight_g_idx").is_some() {
            return None;
        }
        let scale = match (kind.nested, scales.dtype) {
            (Some((global, divides)), DType::F8E4M3) => {
                let factor = &self.tensors[global];
                if factor.dtype != DType::F32 || factor.bytes != 4 {
                    return None;
                }
                parts.push(global);
                ScaleForm::Nested {
                    global: extent(factor),
                    divides,
                }
            }
            (None, DType::F32) => ScaleForm::Plain(SourceScale::Float(FloatType::F32)),
            (None, DType::F16) => ScaleForm::Plain(SourceScale::Float(FloatType::F16)),
            (None, DType::Bf16) => ScaleForm::Plain(SourceScale::Float(FloatType::Bf16)),
            // They differ in what 255 means: `ldexp`, `exp2` and the type of that name.
            (None, DType::U8) if kind.packing == Packing::Blocks => {
                ScaleForm::Plain(SourceScale::Ldexp)
            }
            (None, DType::U8) => ScaleForm::Plain(SourceScale::Exponent),
            (None, DType::F8E8M0) => ScaleForm::Plain(SourceScale::E8M0),
            _ => return None,
        };
        let (shape, row_bytes) = self.shape(kind, stated)?;
        let Tiles { rows, tile } = self.tiles(kind, &shape, scales)?;
        let columns = *shape.last()?;
        if kind.codes.bits() == 4 {
            // Tiles begin with a byte, and rows.
            let is_whole = tile[1] >= columns || tile[1].is_multiple_of(2);
            if !is_whole {
                return None;
            }
        }
        let zeros = match self.named(kind.stem, ".weight_zero_point") {
            Some(zeros) if kind.codes == SourceCodes::Int4 => {
                let found = &self.tensors[zeros];
                let [matrix_rows, _] = shape[..] else {
                    return None;
                };
                let groups = columns.div_ceil(tile[1]);
                let need = [matrix_rows.div_ceil(8), groups];
                if found.dtype != DType::I32 || found.shape != need || tile[0].min(rows) != 1 {
                    return None;
                }
                parts.push(zeros);
                Some(extent(found))
            }
            // Other formats say with it that they are symmetric.
            _ => None,
        };
        let dtype = match scales.dtype {
            DType::F16 => DType::F16,
            _ => DType::Bf16,
        };
        dtype.tensor_bytes(&shape)?;
        Some(Weight {
            info: TensorInfo {
                name: kind.name.clone(),
                dtype,
                shape,
                encoded: Some(Box::new(Encoded {
                    codes: kind.codes,
                    columns,
                    row_bytes,
                    rows,
                    first_row: 0,
                    tile,
                    scale,
                    scales: extent(scales),
                    zeros,
                })),
                ..self.codes.clone()
            },
            parts,
        })
    }

    /// The shape of the weight, and the bytes of a row of codes.
    fn shape(&self, kind: &Kind<'_>, stated: Option<[u64; 2]>) -> Option<(Vec<u64>, u64)> {
        let stored = &self.codes.shape;
        let (last, rest) = stored.split_last()?;
        let with_columns = |rest: &[u64], columns: u64| {
            let mut shape = rest.to_vec();
            shape.push(columns);
            shape
        };
        match kind.packing {
            Packing::One => Some((stored.clone(), *last)),
            Packing::Bytes => Some((with_columns(rest, last.checked_mul(2)?), *last)),
            Packing::Blocks => {
                let (groups, rest) = rest.split_last()?;
                // A matrix at least.
                if *last != 16 || rest.is_empty() {
                    return None;
                }
                let columns = groups.checked_mul(32)?;
                Some((with_columns(rest, columns), columns / 2))
            }
            Packing::Words => {
                if rest.len() != 1 {
                    return None;
                }
                let columns = match stated {
                    None => last.checked_mul(8)?,
                    Some([rows, columns]) => {
                        let belongs = rows == rest[0] && columns.div_ceil(8) == *last;
                        belongs.then_some(columns)?
                    }
                };
                Some((with_columns(rest, columns), last.checked_mul(4)?))
            }
        }
    }

    fn tiles(&self, kind: &Kind<'_>, shape: &[u64], scales: &TensorInfo) -> Option<Tiles> {
        let found = match kind.packing {
            Packing::One => {
                let blocks = self.blocks.0.iter().copied().map(Some);
                // The first that fits. Without any, what shapes say.
                let mut stated = blocks.filter_map(|block| {
                    let found = tiles(shape, &scales.shape, block)?;
                    (Some(found.tile) == block).then_some(found)
                });
                stated.next().or_else(|| tiles(shape, &scales.shape, None))
            }
            // These have no blocks of several rows.
            _ => tiles(shape, &scales.shape, None)
                .filter(|found| found.tile[0] == 1 || found.rows == 1),
        }?;
        let columns = shape.last().copied()?;
        match kind.packing {
            Packing::Blocks => (found.tile[1].min(columns) == 32).then_some(found),
            _ => Some(found),
        }
    }

    /// Tensors beside the weight that only its method has a use for.
    fn unused(&self, kind: &Kind<'_>) -> Vec<usize> {
        const ENDS: [&str; 10] = [
            ".weight_shape",
            ".weight_zero_point",
            ".activation_scale",
            ".activation_scale_inv",
            ".input_scale",
            ".input_scale_inv",
            ".input_global_scale",
            ".input_zero_point",
            ".qscale_act",
            ".scale_input",
        ];
        let mut unused: Vec<usize> = ENDS
            .iter()
            .filter_map(|end| self.named(kind.stem, end))
            .collect();
        // Of stacks: `experts.gate_up_proj_activation_scale`.
        unused.extend(self.first(&kind.name, &["_activation_scale", "_input_scale"]));
        unused
    }
}

fn extent(tensor: &TensorInfo) -> Extent {
    Extent {
        shard: tensor.shard,
        offset: tensor.offset,
        bytes: tensor.bytes,
    }
}
