//! Which tensors a layer of experts is made of.

use tightfit_kernels::{Activation, GateLayout};

use super::super::LinearError;
use crate::model::Model;

/// The tensors that have the matrices of all experts, each [outputs, inputs].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpertsTensors {
    /// One for each expert, in their order.
    Each(Vec<String>),
    /// A stack [experts, outputs, inputs].
    Stack(String),
}

/// The tensors that have the gates and the other projections ("up") of all experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GateTensors {
    /// Both in one matrix of each expert, [2 * intermediate, hidden].
    Together(ExpertsTensors, GateLayout),
    /// Each in its own, [intermediate, hidden].
    Apart {
        /// The gates.
        gate: ExpertsTensors,
        /// The other projections.
        up: ExpertsTensors,
    },
}

/// The tensors of a layer of experts.
///
/// ```
/// use tightfit::kernels::GateLayout;
/// use tightfit::products::{ExpertsNames, ExpertsTensors, GateTensors};
///
/// let stack = |name: &str| ExpertsTensors::Stack(format!("model.layers.0.mlp.experts.{name}"));
/// let names = ExpertsNames {
///     gates: GateTensors::Together(stack("gate_up_proj"), GateLayout::Halves),
///     down: stack("down_proj"),
/// };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsNames {
    /// Gates and up projections.
    pub gates: GateTensors,
    /// Down projections, each [hidden, intermediate].
    pub down: ExpertsTensors,
}

impl ExpertsTensors {
    pub(super) fn first(&self) -> &str {
        match self {
            ExpertsTensors::Each(names) => names.first().map_or("", String::as_str),
            ExpertsTensors::Stack(name) => name,
        }
    }
}

impl ExpertsNames {
    pub(super) fn first(&self) -> &str {
        match &self.gates {
            GateTensors::Together(both, _) => both.first(),
            GateTensors::Apart { gate, .. } => gate.first(),
        }
    }

    /// Finds the tensors of a module as [`Model::experts`] does.
    ///
    /// # Errors
    /// [`LinearError::NoExperts`].
    pub fn find(
        model: &Model,
        module: &str,
        activation: Activation,
    ) -> Result<ExpertsNames, LinearError> {
        let found = |name: &str| {
            let parameter = format!("{module}.{name}");
            let weight = format!("{parameter}.weight");
            let mut names = [parameter, weight].into_iter();
            names.find(|name| model.tensor(name).is_some())
        };
        let layout = match activation {
            Activation::Clamped { .. } => GateLayout::Interleaved,
            _ => GateLayout::Halves,
        };
        let stacks = found("gate_up_proj").zip(found("down_proj"));
        if let Some((gate_up, down)) = stacks {
            return Ok(ExpertsNames {
                gates: GateTensors::Together(ExpertsTensors::Stack(gate_up), layout),
                down: ExpertsTensors::Stack(down),
            });
        }
        for [gate, up, down] in [["gate_proj", "up_proj", "down_proj"], ["w1", "w3", "w2"]] {
            let of = |expert: usize| {
                let of = |name| found(&format!("{expert}.{name}"));
                Some((of(gate)?, of(up)?, of(down)?))
            };
            let mut all = (vec![], vec![], vec![]);
            while let Some((gate, up, down)) = of(all.0.len()) {
                all.0.push(gate);
                all.1.push(up);
                all.2.push(down);
            }
            let (gate, up, down) = all;
            if !gate.is_empty() {
                return Ok(ExpertsNames {
                    gates: GateTensors::Apart {
                        gate: ExpertsTensors::Each(gate),
                        up: ExpertsTensors::Each(up),
                    },
                    down: ExpertsTensors::Each(down),
                });
            }
        }
        Err(LinearError::NoExperts {
            module: module.to_owned(),
        })
    }
}
