//! Tensor parallelism: every weight is cut over all devices, in their order, by the styles of transformers'
//! `base_model_tp_plan`; what has no style is on each of them.
//!
//! Device `i` is rank `i` of the group. The parts are those that transformers gives to its ranks.

#![forbid(unsafe_code)]

mod cut;
mod experts;
mod heads;
mod plan;
mod room;
mod styles;
mod tables;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod promise_tests;
#[cfg(test)]
mod tests;

use tightfit_guest::config::{self, Value};
use tightfit_guest::formats::{self, Formats};
use tightfit_guest::settings::{RESERVE, Settings, Spec};
use tightfit_guest::{
    Description, Level, Placement, Policy, Proposal, Refusal, Request, SlicedProposal, log, policy,
};

use plan::Plan;
use styles::Style;

/// The setting with a plan.
const PLAN: &str = "plan";

/// The setting that says whether experts are given whole.
const EXPERT_PARALLEL: &str = "expert-parallel";

/// The setting that says whether the table of embeddings is cut.
const EMBEDDINGS: &str = "embeddings";

const SPECS: &[Spec] = &[
    Spec {
        name: PLAN,
        default: "",
        help: "JSON object from modules to styles, as a model's base_model_tp_plan: {\"layers.*.mlp.up_proj\": \
               \"colwise\"}. What it does not name is on every device. By default a table by architecture.",
    },
    Spec {
        name: EXPERT_PARALLEL,
        default: "auto",
        help: "Whether each expert is whole on one device (true), or a part of it on every device (false); auto \
               is as the architecture has it.",
    },
    Spec {
        name: EMBEDDINGS,
        default: "auto",
        help: "Whether the table of embeddings is cut by its entries (cut), or on every device (replicated); auto \
               is as the plan has it.",
    },
    formats::SKIP,
    formats::EXPERTS,
    formats::DOUBLE_QUANT,
    formats::BLOCK_SIZE,
    RESERVE,
];

/// The policy.
#[derive(Debug)]
pub struct TensorParallel;

policy!(TensorParallel);

impl Policy for TensorParallel {
    fn describe() -> Description {
        Description::new("tensor-parallel", env!("CARGO_PKG_VERSION"), SPECS)
    }

    fn plan(request: Request) -> Result<Proposal, Refusal> {
        let proposal = Self::plan_slices(request)?;
        match proposal.slices.is_empty() {
            true => Ok(Proposal {
                placements: proposal.placements,
                headroom: proposal.headroom,
            }),
            false => Err(Refusal::unsupported(
                "tensor parallelism cuts tensors, and this host does not",
            )),
        }
    }

    fn plan_slices(request: Request) -> Result<SlicedProposal, Refusal> {
        let settings = Settings::new(SPECS, &request);
        let formats = Formats::read(&settings)?;
        let reserve = settings.bytes(RESERVE.name)?;
        let embeddings = match settings.choice(EMBEDDINGS, &["auto", "cut", "replicated"])? {
            "cut" => Some(Style::Entries),
            "replicated" => Some(Style::Replicate),
            _ => None,
        };
        let mut plan = plan(&settings, &request)?;
        if request.devices.is_empty() {
            return Err(Refusal::unsupported(
                "there is no device to place anything on",
            ));
        }
        for warning in formats.warnings(&request) {
            log(Level::Warn, &warning);
        }
        let kinds = formats::kinds(&request);
        let formats = formats.choose(&request, &kinds);
        let parts = cut::cut(&request, &kinds, &formats, embeddings, &mut plan)?;
        let headroom = room::headroom(&request, &parts, &formats, reserve)?;
        for (level, note) in &parts.notes {
            log(*level, note);
        }
        let unused = plan.unused();
        if !settings.text(PLAN).is_empty() && !unused.is_empty() {
            let entries: Vec<String> = unused
                .iter()
                .take(cut::MOST_NOTED)
                .map(|module| format!("`{}`", plan::shown(module)))
                .collect();
            log(
                Level::Warn,
                &format!("setting `{PLAN}`: no tensor is of {}", entries.join(", ")),
            );
        }
        let placement = |(&device, &format)| Placement { device, format };
        Ok(SlicedProposal {
            placements: parts.devices.iter().zip(&formats).map(placement).collect(),
            headroom,
            slices: parts.slices,
        })
    }
}

/// Returns the styles that hold: the user's, or those of the architecture.
fn plan(settings: &Settings<'_>, request: &Request) -> Result<Plan, Refusal> {
    let whole_experts = match settings.choice(EXPERT_PARALLEL, &["auto", "true", "false"])? {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    };
    let given = settings.text(PLAN);
    if !given.is_empty() {
        let mut plan = Plan::parse(given)?;
        if whole_experts == Some(true) {
            plan.give_whole_experts();
        }
        return Ok(plan);
    }
    let root = config::parse(&request.config_json);
    let language_model = config::language_model(&root);
    let name = [language_model, &root]
        .into_iter()
        .find_map(|config| config.get("model_type").and_then(Value::as_str));
    let known = tables::of(name.unwrap_or(""));
    if !known.is_known {
        let of = match name {
            Some(name) => format!("of `{}`", plan::shown(name)),
            None => "of this model, whose config.json names no `model_type`".into(),
        };
        log(
            Level::Warn,
            &format!(
                "no plan {of} is known: modules are cut that are called as Llama's are; setting `{PLAN}` can \
                 say better"
            ),
        );
    }
    let mut plan = Plan::default();
    for table in known.tables {
        plan.add(table);
    }
    if whole_experts.unwrap_or(known.whole_experts) {
        plan.give_whole_experts();
    }
    Ok(plan)
}
