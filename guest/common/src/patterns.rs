//! Patterns over module names, as a user writes them in a setting.

use crate::names::module_of;

/// A list of patterns.
///
/// A pattern without wildcards matches whole components of a name: `self_attn`, `layers.1` and
/// `self_attn.q_proj` all match `model.layers.1.self_attn.q_proj`. `layers.1` does not match
/// `model.layers.10`, nor `gate` a `gate_proj`. A pattern with `*` (any number of characters) or
/// `?` (one character) is matched against the whole name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Patterns(Vec<String>);

impl Patterns {
    /// Reads patterns separated by commas. Spaces around them and empty ones are dropped.
    pub fn parse(list: &str) -> Patterns {
        let patterns = list
            .split(',')
            .map(|pattern| pattern.trim().trim_matches('.'))
            .filter(|pattern| !pattern.is_empty());
        Patterns(patterns.map(str::to_owned).collect())
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether any pattern matches a tensor, by its own name or its module's.
    pub fn matches(&self, tensor: &str) -> bool {
        self.0.iter().any(|pattern| is_match(pattern, tensor))
    }

    /// Returns the patterns that match none of these tensors.
    pub fn unmatched<'a>(&self, tensors: impl Iterator<Item = &'a str> + Clone) -> Vec<&str> {
        let patterns = self.0.iter().map(String::as_str);
        patterns
            .filter(|pattern| !tensors.clone().any(|tensor| is_match(pattern, tensor)))
            .collect()
    }
}

fn is_match(pattern: &str, tensor: &str) -> bool {
    if pattern.contains(['*', '?']) {
        glob(pattern, module_of(tensor)) || glob(pattern, tensor)
    } else {
        has_components(tensor, pattern)
    }
}

/// Returns whether `run` occurs in `name` with a dot or an end on both sides.
fn has_components(name: &str, run: &str) -> bool {
    name.match_indices(run).any(|(start, found)| {
        let end = start + found.len();
        (start == 0 || name.as_bytes()[start - 1] == b'.')
            && (end == name.len() || name.as_bytes()[end] == b'.')
    })
}

/// Returns whether a pattern matches the whole of `text`: `*` is any number of characters, `?` one.
///
/// Goes back to the last star only, so it takes at most `pattern.len() * text.len()` steps.
pub fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    p = after;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_patterns_match_whole_components() {
        let q10 = "model.layers.10.self_attn.q_proj.weight";
        for (pattern, matches) in [
            ("self_attn", true),
            ("self_attn.q_proj", true),
            ("layers.10", true),
            ("model.layers.10.self_attn.q_proj", true),
            ("model.layers.10.self_attn.q_proj.weight", true),
            ("model.layers.1", false),
            ("attn", false),
            ("q", false),
            ("k_proj, layers.10.", true),
            ("", false),
            (" , ,", false),
        ] {
            assert_eq!(Patterns::parse(pattern).matches(q10), matches, "{pattern}");
        }
        assert!(!Patterns::parse("gate").matches("model.layers.0.mlp.gate_proj.weight"));
        // The second occurrence is the whole component.
        assert!(Patterns::parse("gate").matches("a.gate_x.gate.weight"));
    }

    #[test]
    fn wildcards_match_the_whole_name() {
        for (pattern, name, matches) in [
            ("*.q_proj", "model.layers.0.self_attn.q_proj.weight", true),
            ("*gate*", "model.layers.0.mlp.gate_proj.weight", true),
            (
                "model.layers.?.*",
                "model.layers.7.mlp.up_proj.weight",
                true,
            ),
            (
                "model.layers.?.*",
                "model.layers.17.mlp.up_proj.weight",
                false,
            ),
            (
                "*.experts.gate_up_proj",
                "l.0.mlp.experts.gate_up_proj",
                true,
            ),
            ("*.weight", "a.b.weight", true),
            ("*a*b", "aXbXb.weight", true),
            ("*a*b", "aXbXc.weight", false),
            ("*", "", true),
            ("?", "", false),
        ] {
            assert_eq!(
                Patterns::parse(pattern).matches(name),
                matches,
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn a_hostile_pattern_ends() {
        let pattern = "a*".repeat(2000) + "b";
        assert!(!Patterns::parse(&pattern).matches(&"a".repeat(4000)));
    }
}
