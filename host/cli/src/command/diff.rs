//! `tightfit plan --diff`.

use crate::draw::Comparison;
use crate::error_report::ErrorReport;
use tightfit::checkpoint::Checkpoint;
use tightfit::device::DeviceInfo;
use tightfit::plan::{Proposed, is_setting, propose};
use tightfit::policy::{Description, Policy};
use tightfit_wasm::policy::WasmPolicy;

use crate::command::args::{OutputOptions, PolicyOptions};
use crate::command::error::CommandError;
use crate::command::output;

type Settings = Vec<(String, String)>;

/// Compares what two policies propose for a checkpoint on the same devices.
pub(crate) fn run(
    checkpoint: &Checkpoint,
    devices: &[DeviceInfo],
    asked: [&str; 2],
    policy: &PolicyOptions,
    options: &OutputOptions,
) -> Result<(), CommandError> {
    let sandbox = policy.sandbox.options()?;
    let open = |name: &str| WasmPolicy::open(name, sandbox.clone());
    let policies = [open(asked[0])?, open(asked[1])?];
    let known = [policies[0].describe()?, policies[1].describe()?];
    let [for_a, for_b] = divide(&policy.settings, &known, asked)?;
    type Answer = Result<Proposed, ErrorReport>;
    let answer = |policy: &WasmPolicy, settings: &Settings| -> Result<Answer, CommandError> {
        match propose(checkpoint, policy, devices, settings).map_err(CommandError::from) {
            Ok(proposed) => Ok(Ok(proposed)),
            Err(refusal) if refusal.is_refusal() => Ok(Err(refusal.report())),
            Err(failure) => Err(failure),
        }
    };
    let (a, b) = (answer(&policies[0], &for_a)?, answer(&policies[1], &for_b)?);
    let comparison = Comparison::new(checkpoint.tensors(), asked, a.as_ref(), b.as_ref());
    if a.is_err() && b.is_err() {
        return Err(CommandError::BothRefuse(Box::new(comparison)));
    }
    if options.json {
        output::print_json(&comparison)
    } else if options.quiet {
        Ok(())
    } else {
        output::print(&comparison.text())
    }
}

/// Gives every setting to the policies that have it; `A.KEY` and `B.KEY` to one of them.
fn divide(
    settings: &[(String, String)],
    known: &[Description; 2],
    asked: [&str; 2],
) -> Result<[Settings; 2], CommandError> {
    let has = |policy: &Description, name: &str| policy.settings.iter().any(|s| s.name == name);
    let mut divided = [Settings::new(), Settings::new()];
    for (name, value) in settings {
        let mut found = false;
        for (index, prefix) in ["A.", "B."].into_iter().enumerate() {
            // A policy may have a setting of a name that begins like this.
            let general = has(&known[0], name) || has(&known[1], name);
            let own = match name.strip_prefix(prefix) {
                Some(own) if !general => own,
                _ => name,
            };
            if has(&known[index], own) || is_setting(own) {
                divided[index].push((own.to_owned(), value.clone()));
                found = true;
            }
        }
        if !found {
            return Err(CommandError::NobodysSetting {
                name: name.clone(),
                a: asked[0].to_owned(),
                b: asked[1].to_owned(),
            });
        }
    }
    Ok(divided)
}

#[cfg(test)]
mod tests {
    use tightfit::policy::Setting;

    use super::*;

    fn with(names: &[&str]) -> Description {
        Description {
            name: "some".to_owned(),
            version: "1.0.0".to_owned(),
            settings: names
                .iter()
                .map(|&name| Setting {
                    name: name.to_owned(),
                    default: String::new(),
                    help: String::new(),
                })
                .collect(),
        }
    }

    fn divided(settings: &[&str], known: &[Description; 2]) -> Option<[Vec<String>; 2]> {
        let settings: Settings = settings
            .iter()
            .map(|&name| (name.to_owned(), "1".to_owned()))
            .collect();
        let names = |settings: Settings| settings.into_iter().map(|(name, _)| name).collect();
        divide(&settings, known, ["a", "b"])
            .ok()
            .map(|both| both.map(names))
    }

    #[test]
    fn settings_go_to_those_that_have_them() {
        let known = [with(&["x", "y"]), with(&["y", "z"])];
        let [a, b] = divided(&["x", "y", "z"], &known).unwrap();
        assert_eq!(
            (a, b),
            (vec!["x".into(), "y".into()], vec!["y".into(), "z".into()])
        );
        let [a, b] = divided(&["A.y", "B.z"], &known).unwrap();
        assert_eq!((a, b), (vec!["y".to_owned()], vec!["z".to_owned()]));
        let rules = ["format:*.mlp.*", "B.format:norm"];
        let [a, b] = divided(&rules, &known).unwrap();
        assert_eq!(
            (a, b),
            (
                vec![rules[0].to_owned()],
                vec![rules[0].to_owned(), "format:norm".to_owned()]
            )
        );
        for nobodys in ["w", "A.z", "B.x", "A.", "C.y"] {
            assert_eq!(divided(&[nobodys], &known), None, "{nobodys}");
        }
    }

    #[test]
    fn a_name_that_looks_like_a_prefix_is_a_name_first() {
        let known = [with(&["A.y", "y"]), with(&["y"])];
        let [a, b] = divided(&["A.y"], &known).unwrap();
        assert_eq!((a, b), (vec!["A.y".to_owned()], vec![]));
    }
}
