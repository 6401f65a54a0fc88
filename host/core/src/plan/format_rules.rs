//! Formats that the user fixes, whatever the policy: `--set format:"*.experts.*"=nf4`.

use tightfit_common::patterns::Patterns;

use super::{SizeError, tensor_part_sizes};
use crate::checkpoint::{TensorInfo, Tie};
use crate::types::{Format, ParseFormatError};

/// What the names of such settings begin with.
const PREFIX: &str = "format:";

/// Rules from patterns of tensor names to formats, as settings named `format:PATTERN` give them.
///
/// Patterns are those of [`Patterns`]: whole components of a name, or with `*` and `?` all of it;
/// several are separated by commas. Of several rules that match a tensor the last one counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FormatRules(Vec<Rule>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    /// As it was given.
    pattern: String,
    patterns: Patterns,
    format: Format,
}

/// A rule that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatRuleError {
    /// The value names no format.
    #[error("setting 'format:{pattern}': {source}")]
    NotAFormat {
        /// The rule's pattern.
        pattern: String,
        /// What is wrong.
        source: ParseFormatError,
    },
    /// The pattern is empty.
    #[error("setting 'format:{pattern}' names no tensors")]
    NoPattern {
        /// The rule's pattern.
        pattern: String,
    },
    /// No tensor has such a name: probably a mistake in the pattern.
    #[error("setting 'format:{pattern}' matches none of the {tensors} tensors")]
    NoMatch {
        /// The rule's pattern.
        pattern: String,
        /// Tensors in the checkpoint.
        tensors: usize,
    },
    /// A tensor that it matches cannot be stored so.
    #[error("setting 'format:{pattern}' matches tensor '{tensor}': {source}")]
    Illegal {
        /// The rule's pattern.
        pattern: String,
        /// The tensor.
        tensor: String,
        /// Why not.
        source: SizeError,
    },
}

impl FormatRules {
    /// Returns whether a setting of this name is a rule.
    pub fn is_rule(name: &str) -> bool {
        name.starts_with(PREFIX)
    }

    /// Takes the rules out of `settings`. Gives them, and the settings that are left for the policy.
    ///
    /// # Errors
    /// [`FormatRuleError::NotAFormat`] and [`FormatRuleError::NoPattern`].
    pub fn take(
        settings: &[(String, String)],
    ) -> Result<(FormatRules, Vec<(String, String)>), FormatRuleError> {
        let mut rules = Vec::new();
        let mut others = Vec::new();
        for (name, value) in settings {
            let Some(pattern) = name.strip_prefix(PREFIX) else {
                others.push((name.clone(), value.clone()));
                continue;
            };
            let pattern = pattern.to_owned();
            let patterns = Patterns::parse(&pattern);
            if patterns.is_empty() {
                return Err(FormatRuleError::NoPattern { pattern });
            }
            let format = match value.trim().parse() {
                Ok(format) => format,
                Err(source) => return Err(FormatRuleError::NotAFormat { pattern, source }),
            };
            rules.push(Rule {
                pattern,
                patterns,
                format,
            });
        }
        Ok((FormatRules(rules), others))
    }

    /// Returns the formats that the rules fix: indices of tensors, ascending, and their formats.
    /// The names of a tied parameter are one: a rule that matches any of them is for all.
    ///
    /// # Errors
    /// [`FormatRuleError::NoMatch`] and [`FormatRuleError::Illegal`].
    pub fn formats(
        &self,
        tensors: &[TensorInfo],
        ties: &[Tie],
    ) -> Result<Vec<(usize, Format)>, FormatRuleError> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let mut fixed: Vec<Option<&Rule>> = vec![None; tensors.len()];
        for rule in &self.0 {
            let mut matched = false;
            for (tensor, fixed) in tensors.iter().zip(&mut fixed) {
                if rule.patterns.matches(&tensor.name) {
                    *fixed = Some(rule);
                    matched = true;
                }
            }
            for tie in ties {
                let stored = tie.alias_tensor.map(|alias| fixed[alias]);
                let named = rule.patterns.matches(&tie.alias);
                if named || fixed[tie.tensor] == Some(rule) || stored == Some(Some(rule)) {
                    fixed[tie.tensor] = Some(rule);
                    if let Some(alias) = tie.alias_tensor {
                        fixed[alias] = Some(rule);
                    }
                    matched = true;
                }
            }
            if !matched {
                return Err(FormatRuleError::NoMatch {
                    pattern: rule.pattern.clone(),
                    tensors: tensors.len(),
                });
            }
        }
        let mut formats = Vec::new();
        for (index, (tensor, rule)) in tensors.iter().zip(fixed).enumerate() {
            let Some(rule) = rule else { continue };
            if let Err(source) = tensor_part_sizes(tensor, rule.format) {
                return Err(FormatRuleError::Illegal {
                    pattern: rule.pattern.clone(),
                    tensor: tensor.name.clone(),
                    source,
                });
            }
            formats.push((index, rule.format));
        }
        Ok(formats)
    }

    /// Returns the rules as settings, in their order.
    pub fn settings(&self) -> impl Iterator<Item = (String, String)> + '_ {
        let setting = |rule: &Rule| {
            let name = format!("{PREFIX}{}", rule.pattern);
            (name, rule.format.to_string())
        };
        self.0.iter().map(setting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use crate::types::DType;

    fn tensor(name: &str, dtype: DType) -> TensorInfo {
        testing::tensor(name, dtype, &[64, 64])
    }

    fn model() -> (Vec<TensorInfo>, Vec<Tie>) {
        let tensors = vec![
            tensor("model.embed_tokens.weight", DType::Bf16),
            tensor("model.layers.0.mlp.experts.0.up_proj.weight", DType::Bf16),
            tensor("model.layers.0.mlp.up_proj.weight", DType::F32),
            tensor("model.layers.0.counts", DType::I64),
            tensor("lm_head.weight", DType::Bf16),
        ];
        let ties = vec![Tie {
            tensor: 0,
            alias: "lm_head.weight".to_owned(),
            alias_tensor: Some(4),
        }];
        (tensors, ties)
    }

    fn rules(settings: &[(&str, &str)]) -> Result<FormatRules, FormatRuleError> {
        let settings: Vec<_> = settings
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let (rules, others) = FormatRules::take(&settings)?;
        assert!(others.is_empty());
        Ok(rules)
    }

    fn formats(settings: &[(&str, &str)]) -> Result<Vec<(usize, Format)>, FormatRuleError> {
        let (tensors, ties) = model();
        rules(settings)?.formats(&tensors, &ties)
    }

    #[test]
    fn the_last_rule_that_matches_counts() {
        assert_eq!(
            formats(&[
                ("format:*.weight", "stored"),
                ("format:*.experts.*", "nf4"),
                ("format:up_proj", "bf16"),
                ("format:layers.0.mlp.up_proj", "f16"),
            ]),
            Ok(vec![
                (0, Format::Stored),
                (1, Format::Cast(DType::Bf16)),
                (2, Format::Cast(DType::F16)),
                (4, Format::Stored),
            ])
        );
        assert_eq!(formats(&[]), Ok(vec![]));
    }

    #[test]
    fn a_rule_for_one_name_of_a_tied_parameter_is_for_all() {
        for name in ["format:lm_head", "format:embed_tokens"] {
            assert_eq!(
                formats(&[(name, "nf4")]),
                Ok(vec![(0, Format::NF4), (4, Format::NF4)])
            );
        }
        let (tensors, mut ties) = model();
        ties[0].alias_tensor = None;
        let fixed = rules(&[("format:lm_head", "nf4")]).unwrap();
        // The name alone, and the stored tensor that happens to have it.
        assert_eq!(
            fixed.formats(&tensors[..4], &ties),
            Ok(vec![(0, Format::NF4)])
        );
    }

    #[test]
    fn a_rule_that_cannot_be_used_is_named() {
        for (setting, value, named) in [
            ("format:", "nf4", "names no tensors"),
            ("format: , ", "nf4", "names no tensors"),
            ("format:up_proj", "int8", "'int8' is not a format"),
            ("format:*.nothing", "nf4", "matches none of the 5 tensors"),
            ("format:*", "nf4", "'model.layers.0.counts'"),
        ] {
            let error = formats(&[(setting, value)]).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains(setting), "{error}");
        }
    }

    #[test]
    fn what_is_no_rule_is_left_for_the_policy() {
        let settings = [("skip", "visual"), ("format:a", "nf4"), ("context", "8")];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let (rules, others) = FormatRules::take(&settings).unwrap();
        assert_eq!(others, [settings[0].clone(), settings[2].clone()]);
        assert_eq!(rules.settings().collect::<Vec<_>>(), [settings[1].clone()]);
    }
}
