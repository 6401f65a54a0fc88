//! What becomes of a module's parameters under each style of a `base_model_tp_plan`.
//!
//! What styles do in a forward pass (which results are gathered or summed) is nothing to a plan: only which
//! part of a parameter a rank has.

/// How a parameter is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Every rank has all of it.
    Replicate,
    /// Outputs: rows of a matrix, the last dimension but one of a stack, all of a bias.
    Columns {
        /// What comes out is put together again, so that any cut will do. Otherwise each rank goes on with
        /// its part, which has to be whole heads.
        gathered: bool,
    },
    /// Inputs: columns of a matrix. Biases are replicated: they are added to the sum.
    Rows,
    /// As `Columns`, of two matrices that lie one behind the other.
    PackedColumns,
    /// As `Rows`, of two matrices that lie side by side.
    PackedRows,
    /// Entries of a table.
    Entries,
    /// Elements of a table's entries.
    Elements,
    /// Whole experts of a stack.
    Experts,
}

/// The styles by their names: those of transformers, and those that it had in earlier versions.
const NAMES: &[(&str, Style)] = &[
    ("colwise", Style::Columns { gathered: false }),
    ("colwise_gather_output", Style::Columns { gathered: true }),
    ("colwise_rep", Style::Columns { gathered: true }),
    ("rowwise", Style::Rows),
    ("rowwise_split_input", Style::Rows),
    ("rowwise_rep", Style::Rows),
    ("packed_colwise", Style::PackedColumns),
    ("packed_rowwise", Style::PackedRows),
    ("embedding_rowwise", Style::Entries),
    ("embedding_colwise", Style::Elements),
    ("grouped_gemm", Style::Experts),
    ("ep", Style::Experts),
    ("replicate", Style::Replicate),
    ("replicated_with_grad_allreduce", Style::Replicate),
    ("mla_kv_a_proj", Style::Replicate),
    ("sequence_parallel", Style::Replicate),
    ("all_reduce", Style::Replicate),
    ("moe_tp_experts", Style::Replicate),
    ("moe_identity_expert", Style::Replicate),
    ("ep_dispatch_experts", Style::Replicate),
    ("local_params", Style::Replicate),
    ("local_colwise", Style::Columns { gathered: false }),
    ("local_rowwise", Style::Rows),
    ("local_packed_rowwise", Style::PackedRows),
    ("ep_router", Style::Replicate),
    ("gather", Style::Replicate),
    ("local", Style::Replicate),
    ("isolated", Style::Replicate),
];

impl Style {
    /// Returns the style of this name.
    pub(crate) fn named(name: &str) -> Option<Style> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, style)| *style)
    }

    /// Returns the names that cut something.
    pub(crate) fn cutting() -> impl Iterator<Item = &'static str> {
        let cut = NAMES.iter().filter(|(_, style)| *style != Style::Replicate);
        cut.map(|(name, _)| *name)
    }

    /// Returns the dimension along which a parameter of so many dimensions is cut, and how many matrices lie
    /// one behind the other along it. `None` where every rank has all of it.
    pub(crate) fn cut(self, dimensions: usize, is_bias: bool) -> Option<(usize, usize)> {
        let last = dimensions.checked_sub(1)?;
        let outputs = match is_bias {
            true => last,
            false => last.saturating_sub(1),
        };
        match self {
            Style::Replicate => None,
            Style::Columns { .. } => Some((outputs, 1)),
            Style::PackedColumns => Some((outputs, 2)),
            Style::Rows | Style::PackedRows if is_bias => None,
            Style::Rows => Some((last, 1)),
            Style::PackedRows => Some((last, 2)),
            Style::Entries | Style::Experts => Some((0, 1)),
            Style::Elements => Some((last, 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn styles_cut_the_dimensions_that_transformers_does() {
        for (name, matrix, stack, bias) in [
            ("colwise", Some((0, 1)), Some((1, 1)), Some((0, 1))),
            (
                "colwise_gather_output",
                Some((0, 1)),
                Some((1, 1)),
                Some((0, 1)),
            ),
            ("rowwise", Some((1, 1)), Some((2, 1)), None),
            ("rowwise_split_input", Some((1, 1)), Some((2, 1)), None),
            ("packed_colwise", Some((0, 2)), Some((1, 2)), Some((0, 2))),
            ("packed_rowwise", Some((1, 2)), Some((2, 2)), None),
            (
                "embedding_rowwise",
                Some((0, 1)),
                Some((0, 1)),
                Some((0, 1)),
            ),
            (
                "embedding_colwise",
                Some((1, 1)),
                Some((2, 1)),
                Some((0, 1)),
            ),
            ("grouped_gemm", Some((0, 1)), Some((0, 1)), Some((0, 1))),
            ("mla_kv_a_proj", None, None, None),
        ] {
            let style = Style::named(name).unwrap();
            assert_eq!(style.cut(2, false), matrix, "{name}");
            assert_eq!(style.cut(3, false), stack, "{name}");
            assert_eq!(style.cut(1, true), bias, "{name}");
            assert_eq!(style.cut(0, false), None, "{name}");
        }
        // A vector that is no bias: attention sinks.
        assert_eq!(Style::named("rowwise").unwrap().cut(1, false), Some((0, 1)));
        assert!(Style::named("columnwise").is_none());
        assert!(Style::cutting().any(|name| name == "packed_colwise"));
    }
}
