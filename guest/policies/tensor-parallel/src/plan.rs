//! Which style each parameter has.

use std::collections::BTreeMap;

use serde_json::Value;
use tightfit_guest::Refusal;
use tightfit_guest::names::side_branch_of;

use crate::PLAN;
use crate::styles::Style;
use crate::tables::{self, Table};

/// Most bytes of a name that a message repeats.
const MOST_SHOWN: usize = 80;

/// Modules with their styles.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    entries: BTreeMap<String, Entry>,
    /// Some entry names a layer by its number.
    has_numbers: bool,
    /// What has been found, by names with `*` for numbers: there are few, in whatever layer.
    found: BTreeMap<String, Option<Found>>,
}

/// A style that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) style: Style,
    /// It is that of the parameter's module, which may have other parameters too.
    pub(crate) is_of_module: bool,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    style: Style,
    is_used: bool,
}

impl Plan {
    /// Reads a JSON object from modules to styles, such as a `base_model_tp_plan`.
    ///
    /// # Errors
    /// A refusal for what is no such object, and for a style that does not exist.
    pub(crate) fn parse(json: &str) -> Result<Plan, Refusal> {
        let bad = |problem: String| {
            Refusal::bad_setting(format!(
                "setting `{PLAN}` is no plan: {problem}; it is a JSON object from modules to styles, for \
                 example {{\"layers.*.mlp.up_proj\": \"colwise\"}}"
            ))
        };
        let value: Value = serde_json::from_str(json).map_err(|error| bad(error.to_string()))?;
        let Value::Object(object) = value else {
            return Err(bad("it is no object".into()));
        };
        let mut plan = Plan::default();
        for (module, style) in object {
            let Some(name) = style.as_str() else {
                return Err(bad(format!("the style of `{}` is no text", shown(&module))));
            };
            let Some(style) = Style::named(name) else {
                let known: Vec<&str> = Style::cutting().collect();
                return Err(bad(format!(
                    "`{}` has the style `{}`, which is not known (those that cut are: {})",
                    shown(&module),
                    shown(name),
                    known.join(", ")
                )));
            };
            plan.insert(module, style);
        }
        Ok(plan)
    }

    /// Adds modules, in place of what there is for them.
    pub(crate) fn add(&mut self, table: Table) {
        for (module, style) in table {
            let style = Style::named(style).expect("tables have styles that exist");
            self.insert((*module).to_owned(), style);
        }
    }

    fn insert(&mut self, module: String, style: Style) {
        self.has_numbers |= module.split('.').any(is_number);
        let is_used = false;
        self.entries.insert(module, Entry { style, is_used });
    }

    /// Gives experts whole, whatever the plan says of them.
    pub(crate) fn give_whole_experts(&mut self) {
        self.entries.retain(|module, _| {
            let is_of_experts = tables::WHOLE_EXPERTS
                .iter()
                .any(|(name, _)| ends_with(module, name));
            !is_of_experts
        });
        self.add(tables::WHOLE_EXPERTS);
    }

    /// Returns the style of a parameter: of its own, or else of its module. `None` where the plan says
    /// nothing.
    ///
    /// A module matches where its name ends with an entry's, with `*` for numbers: plans name modules as the
    /// base model has them, checkpoints with what the whole model calls it. Not so in a vision tower or
    /// another side branch, whose modules may be called the same: there an entry has to have all of the name,
    /// or all but `model`.
    pub(crate) fn style(&mut self, parameter: &str) -> Option<Found> {
        let generic = with_wildcards(parameter);
        if self.has_numbers {
            return self
                .find(parameter, parameter)
                .or_else(|| self.find(parameter, &generic));
        }
        if let Some(found) = self.found.get(&generic) {
            return *found;
        }
        let found = self.find(parameter, &generic);
        self.found.insert(generic, found);
        found
    }

    fn find(&mut self, parameter: &str, name: &str) -> Option<Found> {
        let is_beside = side_branch_of(parameter).is_some();
        let module = name.rsplit_once('.').map(|(module, _)| module);
        let names = [(Some(name), false), (module, true)];
        for (name, is_of_module) in names {
            let Some(name) = name else { continue };
            let dots = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
            let ends: Vec<&str> = [name].into_iter().chain(dots).collect();
            let is_asked =
                |end: &str| !is_beside || end == name || name.strip_prefix("model.") == Some(end);
            for end in ends.into_iter().filter(|end| is_asked(end)) {
                if let Some(entry) = self.entries.get_mut(end) {
                    entry.is_used = true;
                    let style = entry.style;
                    return Some(Found {
                        style,
                        is_of_module,
                    });
                }
            }
        }
        None
    }

    /// Returns the entries that cut something and that no parameter has.
    pub(crate) fn unused(&self) -> Vec<&str> {
        let odd = self
            .entries
            .iter()
            .filter(|(_, entry)| !entry.is_used && entry.style != Style::Replicate);
        odd.map(|(module, _)| module.as_str()).collect()
    }
}

fn is_number(component: &str) -> bool {
    !component.is_empty() && component.bytes().all(|c| c.is_ascii_digit())
}

/// Whether a name is this one, or ends with it behind a dot.
fn ends_with(name: &str, end: &str) -> bool {
    name.strip_suffix(end)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Returns a name with `*` for every component that is a number.
fn with_wildcards(name: &str) -> String {
    let mut generic = String::with_capacity(name.len());
    for (number, component) in name.split('.').enumerate() {
        if number > 0 {
            generic.push('.');
        }
        generic.push_str(if is_number(component) { "*" } else { component });
    }
    generic
}

/// Returns the beginning of a text.
pub(crate) fn shown(text: &str) -> String {
    match text.char_indices().nth(MOST_SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Plan {
        Plan::parse(json).unwrap()
    }

    #[test]
    fn modules_are_found_by_the_ends_of_their_names() {
        let mut plan = plan(
            r#"{"layers.*.self_attn.q_proj": "colwise", "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
                "layers.*.mlp.experts": "moe_tp_experts", "visual.merger.fc1": "colwise", "lm_head": "colwise_rep"}"#,
        );
        let columns = Some(Style::Columns { gathered: false });
        for (name, style) in [
            ("model.layers.3.self_attn.q_proj.weight", columns),
            ("model.layers.3.self_attn.q_proj.bias", columns),
            (
                "model.language_model.layers.11.self_attn.q_proj.weight",
                columns,
            ),
            ("layers.0.self_attn.q_proj.weight", columns),
            ("model.layers.3.self_attn.k_proj.weight", None),
            ("model.layers.3.self_attn.xq_proj.weight", None),
            ("model.visual.layers.3.self_attn.q_proj.weight", None),
            ("model.visual.merger.fc1.weight", columns),
            (
                "model.layers.3.mlp.experts.gate_up_proj",
                Some(Style::PackedColumns),
            ),
            ("model.layers.3.mlp.experts.other", Some(Style::Replicate)),
            (
                "model.layers.3.mlp.experts.down_proj",
                Some(Style::Replicate),
            ),
            ("lm_head.weight", Some(Style::Columns { gathered: true })),
            ("", None),
            ("...", None),
        ] {
            let found = plan.style(name).map(|found| found.style);
            assert_eq!(found, style, "{name}");
        }
        assert!(plan.unused().is_empty());
    }

    #[test]
    fn one_layer_can_be_named_by_its_number() {
        let mut plan = plan(
            r#"{"layers.*.mlp.up_proj": "colwise", "layers.1.mlp.up_proj": "replicate",
                "layers.7.mlp.up_proj": "rowwise"}"#,
        );
        let up = |layer| format!("model.layers.{layer}.mlp.up_proj.weight");
        let mut style = |layer| plan.style(&up(layer)).map(|found| found.style);
        assert_eq!(style(0), Some(Style::Columns { gathered: false }));
        assert_eq!(style(1), Some(Style::Replicate));
        assert_eq!(plan.unused(), ["layers.7.mlp.up_proj"]);
    }

    #[test]
    fn experts_are_given_whole_whatever_the_plan_says() {
        let mut plan = plan(
            r#"{"layers.*.mlp.experts.gate_up_proj": "packed_colwise", "layers.*.mlp.up_proj": "colwise"}"#,
        );
        plan.give_whole_experts();
        let style = plan.style("model.layers.0.mlp.experts.gate_up_proj");
        let style = style.map(|found| found.style);
        assert_eq!(style, Some(Style::Experts));
        assert!(plan.style("model.layers.0.mlp.up_proj.weight").is_some());
    }

    #[test]
    fn what_is_no_plan_is_refused_with_a_reason() {
        for (json, says) in [
            ("", "is no plan"),
            ("[]", "it is no object"),
            (r#"{"a": 1}"#, "style of `a` is no text"),
            (
                r#"{"a": "columns"}"#,
                "style `columns`, which is not known (those that cut are: colwise,",
            ),
        ] {
            let message = Plan::parse(json).unwrap_err().message;
            assert!(message.contains(says), "{message}");
        }
        let long = format!("{{\"{}\": \"{}\"}}", "é".repeat(10_000), "x".repeat(10_000));
        assert!(Plan::parse(&long).unwrap_err().message.len() < 1000);
    }
}
