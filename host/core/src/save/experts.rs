//! Stacks of experts as single experts.
//!
//! transformers 5 holds the experts of a layer as `experts.gate_up_proj` [experts, 2 x
//! intermediate, hidden], gate rows before up rows, and `experts.down_proj` [experts, hidden,
//! intermediate], and some checkpoints store them so. Quantized, they are written as
//! `experts.N.gate_proj.weight`, `.up_proj.weight` and `.down_proj.weight`, as transformers 4 and
//! the 4-bit checkpoints that people share have them.

use super::layout::tensors_of;
use super::{SaveError, is_4bit};
use crate::checkpoint::{Config, MAX_INDEX_BYTES, MAX_TENSORS, TensorInfo};
use crate::types::Format;

/// Splits the stacks that are to be quantized and that lie as described; others stay as they are.
///
/// # Errors
/// [`SaveError::TooLarge`] when more tensors would be written than can be opened. Nothing is made
/// before that is known: a few bytes of a header can claim any number of experts.
pub(super) fn split_stacks(
    tensors: Vec<(TensorInfo, Format)>,
    config: Option<&Config>,
) -> Result<Vec<(TensorInfo, Format)>, SaveError> {
    let hidden = config.and_then(|config| config.hidden_size);
    let mut size = WrittenSize::default();
    for (tensor, format) in &tensors {
        let (weights, name) = match stack(tensor, *format, hidden) {
            Some(stack) => (stack.weights(), tensor.name.len() + LONGEST_EXPERT),
            None => (1, tensor.name.len()),
        };
        size.add(tensor, *format, weights, name)?;
    }
    let mut split = Vec::with_capacity(tensors.len());
    for (tensor, format) in tensors {
        match stack(&tensor, format, hidden) {
            Some(stack) => split.extend(stack.experts().map(|expert| (expert, format))),
            None => split.push((tensor, format)),
        }
    }
    Ok(split)
}

/// Bytes that the number of an expert and `.gate_proj.weight` add to a name, at most.
const LONGEST_EXPERT: usize = 40;
/// Bytes that `.quant_state.bitsandbytes__nf4` adds to a name.
const LONGEST_SUFFIX: usize = 30;

/// How large the headers and the index of what is written become.
#[derive(Default)]
struct WrittenSize {
    tensors: u128,
    name_bytes: u128,
}

impl WrittenSize {
    /// Counts a number of weights in, whose names have at most `name` bytes.
    fn add(
        &mut self,
        tensor: &TensorInfo,
        format: Format,
        weights: u128,
        name: usize,
    ) -> Result<(), SaveError> {
        // At most 2^64 x 2 weights of 6 tensors, and names of some thousand bytes: far from 2^128.
        let tensors = weights * tensors_of(tensor, format) as u128;
        let name = match is_4bit(tensor, format) {
            true => name + LONGEST_SUFFIX,
            false => name,
        };
        self.tensors += tensors;
        self.name_bytes += tensors * name as u128;
        for (what, need, limit) in [
            ("the number of tensors", self.tensors, MAX_TENSORS as u128),
            (
                "the bytes of names",
                self.name_bytes,
                MAX_INDEX_BYTES.into(),
            ),
        ] {
            if need > limit {
                return Err(SaveError::TooLarge {
                    tensor: tensor.name.clone(),
                    what,
                    need: u64::try_from(need).unwrap_or(u64::MAX),
                    limit: limit as u64,
                });
            }
        }
        Ok(())
    }
}

struct Stack<'a> {
    tensor: &'a TensorInfo,
    /// What comes before the number of the expert: `...mlp.experts`.
    prefix: &'a str,
    /// The projections of an expert, one after the other.
    projections: &'static [&'static str],
    experts: u64,
    /// Rows and columns of one projection.
    rows: u64,
    columns: u64,
}

/// The tensor as a stack of experts, if it is one that can be cut.
fn stack(tensor: &TensorInfo, format: Format, hidden: Option<u64>) -> Option<Stack<'_>> {
    let (Format::Nf4 { .. }, None) = (format, &tensor.quantized) else {
        return None;
    };
    // Without elements, its other sizes say nothing: there may be 2^63 experts of no rows.
    if tensor.bytes == 0 || !tensor.dtype.is_quantizable() {
        return None;
    }
    let [experts, rows, columns] = tensor.shape[..] else {
        return None;
    };
    let hidden = hidden?;
    let (prefix, projection) = tensor.name.rsplit_once('.')?;
    if !prefix.ends_with(".experts") {
        return None;
    }
    // Where the layout is the other way round (transposed), rows and columns do not tell what
    // belongs to which expert's gate; a square one could be either and is left alone too.
    match projection {
        "gate_up_proj" if columns == hidden && rows % 2 == 0 && rows != hidden => Some(Stack {
            tensor,
            prefix,
            projections: &["gate_proj", "up_proj"],
            experts,
            rows: rows / 2,
            columns,
        }),
        "down_proj" if rows == hidden && columns != hidden => Some(Stack {
            tensor,
            prefix,
            projections: &["down_proj"],
            experts,
            rows,
            columns,
        }),
        _ => None,
    }
}

impl Stack<'_> {
    /// Weights that it becomes.
    fn weights(&self) -> u128 {
        u128::from(self.experts) * self.projections.len() as u128
    }

    fn experts(&self) -> impl Iterator<Item = TensorInfo> + '_ {
        let names = (0..self.experts).flat_map(move |expert| {
            let names = self.projections.iter();
            names.map(move |name| format!("{}.{expert}.{name}.weight", self.prefix))
        });
        names.zip(0u64..).map(move |(name, number)| {
            self.tensor
                .rows(name, number * self.rows, [self.rows, self.columns])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use crate::types::DType;

    const NF4: Format = Format::NF4_DOUBLE;

    fn tensor(name: &str, shape: &[u64]) -> TensorInfo {
        TensorInfo {
            offset: 1000,
            ..testing::tensor(name, DType::Bf16, shape)
        }
    }

    fn config(hidden: u64) -> Config {
        let text = format!("{{\"hidden_size\": {hidden}}}");
        Config::parse("config.json".as_ref(), text).unwrap()
    }

    fn names_and_offsets(tensor: TensorInfo, format: Format, hidden: u64) -> Vec<(String, u64)> {
        split_stacks(vec![(tensor, format)], Some(&config(hidden)))
            .unwrap()
            .into_iter()
            .map(|(tensor, _)| (tensor.name, tensor.offset))
            .collect()
    }

    #[test]
    fn gate_rows_come_before_up_rows_in_every_expert() {
        let stack = tensor("m.mlp.experts.gate_up_proj", &[2, 6, 8]);
        assert_eq!(
            names_and_offsets(stack, NF4, 8),
            [
                ("m.mlp.experts.0.gate_proj.weight".to_owned(), 1000),
                ("m.mlp.experts.0.up_proj.weight".to_owned(), 1048),
                ("m.mlp.experts.1.gate_proj.weight".to_owned(), 1096),
                ("m.mlp.experts.1.up_proj.weight".to_owned(), 1144),
            ]
        );
        let stack = tensor("m.mlp.experts.down_proj", &[2, 8, 3]);
        assert_eq!(
            names_and_offsets(stack, NF4, 8),
            [
                ("m.mlp.experts.0.down_proj.weight".to_owned(), 1000),
                ("m.mlp.experts.1.down_proj.weight".to_owned(), 1048),
            ]
        );
    }

    #[test]
    fn what_is_stored_transposed_or_square_stays_a_stack() {
        for (name, shape, format) in [
            ("m.experts.gate_up_proj", [2, 6, 8], Format::Stored),
            ("m.experts.gate_up_proj", [2, 8, 6], NF4),
            ("m.experts.gate_up_proj", [2, 8, 8], NF4),
            ("m.experts.down_proj", [2, 3, 8], NF4),
            ("m.experts.down_proj", [2, 8, 8], NF4),
            ("m.other.gate_up_proj", [2, 6, 8], NF4),
        ] {
            let found = names_and_offsets(tensor(name, &shape), format, 8);
            assert_eq!(found, [(name.to_owned(), 1000)], "{shape:?}");
        }
    }
}
