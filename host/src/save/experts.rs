//! Stacks of experts as single experts.
//!
//! transformers 5 holds the experts of a layer as `experts.gate_up_proj` [experts, 2 x
//! intermediate, hidden], gate rows before up rows, and `experts.down_proj` [experts, hidden,
//! intermediate], and some checkpoints store them so. Quantized, they are written as
//! `experts.N.gate_proj.weight`, `.up_proj.weight` and `.down_proj.weight`, as transformers 4 and
//! the 4-bit checkpoints that people share have them.

use crate::checkpoint::{Config, TensorInfo};
use crate::types::Format;

/// Splits the stacks that are to be quantized and that lie as described; others stay as they are.
pub(super) fn split_stacks(
    tensors: Vec<(TensorInfo, Format)>,
    config: Option<&Config>,
) -> Vec<(TensorInfo, Format)> {
    let hidden = config.and_then(|config| config.hidden_size);
    let mut split = Vec::with_capacity(tensors.len());
    for (tensor, format) in tensors {
        match stack(&tensor, format, hidden) {
            Some(stack) => split.extend(stack.experts().map(|expert| (expert, format))),
            None => split.push((tensor, format)),
        }
    }
    split
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
    fn experts(&self) -> impl Iterator<Item = TensorInfo> + '_ {
        let count = self.experts * self.projections.len() as u64;
        let bytes = self.tensor.bytes / count.max(1);
        (0..count).map(move |number| {
            let per_expert = self.projections.len() as u64;
            TensorInfo {
                name: format!(
                    "{}.{}.{}.weight",
                    self.prefix,
                    number / per_expert,
                    self.projections[(number % per_expert) as usize],
                ),
                dtype: self.tensor.dtype,
                shape: vec![self.rows, self.columns],
                bytes,
                shard: self.tensor.shard,
                offset: self.tensor.offset + number * bytes,
                quantized: None,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DType;

    const NF4: Format = Format::Nf4 {
        block_size: 64,
        double_quantized: true,
    };

    fn tensor(name: &str, shape: &[u64]) -> TensorInfo {
        TensorInfo {
            name: name.to_owned(),
            dtype: DType::Bf16,
            shape: shape.to_vec(),
            bytes: DType::Bf16.tensor_bytes(shape).unwrap(),
            shard: 0,
            offset: 1000,
            quantized: None,
        }
    }

    fn config(hidden: u64) -> Config {
        let text = format!("{{\"hidden_size\": {hidden}}}");
        Config::parse("config.json".as_ref(), text).unwrap()
    }

    fn names_and_offsets(tensor: TensorInfo, format: Format, hidden: u64) -> Vec<(String, u64)> {
        split_stacks(vec![(tensor, format)], Some(&config(hidden)))
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
