//! `tightfit policy`.

use serde::Serialize;
use tightfit::policy::Policy;
use tightfit::text::printable;
use tightfit_wasm::policy::{BUILTIN_POLICIES, WasmPolicy};

use crate::command::args::PolicyCommand;
use crate::command::error::CommandError;
use crate::command::output;
use crate::command::output::Envelope;

#[derive(Serialize)]
struct Shown {
    name: String,
    version: String,
    settings: Vec<ShownSetting>,
    imports: Vec<String>,
}

#[derive(Serialize)]
struct ShownSetting {
    name: String,
    default: String,
    help: String,
}

#[derive(Serialize)]
struct PolicyList {
    policies: Vec<Listed>,
}

#[derive(Clone, Serialize)]
struct Listed {
    name: &'static str,
}

pub(crate) fn run(command: &PolicyCommand) -> Result<(), CommandError> {
    match command {
        PolicyCommand::List { output: options } if options.json => {
            let policies = BUILTIN_POLICIES.map(|name| Listed { name }).to_vec();
            output::print_json(&Envelope::new(PolicyList { policies }))
        }
        PolicyCommand::List { output: options } if options.quiet => Ok(()),
        PolicyCommand::List { .. } => output::print(&(BUILTIN_POLICIES.join("\n") + "\n")),
        PolicyCommand::Show {
            policy,
            sandbox,
            output: options,
        } => {
            let policy = WasmPolicy::open(policy, sandbox.options()?)?;
            let description = policy.describe()?;
            let shown = Shown {
                name: description.name,
                version: description.version,
                settings: description
                    .settings
                    .into_iter()
                    .map(|setting| ShownSetting {
                        name: setting.name,
                        default: setting.default,
                        help: setting.help,
                    })
                    .collect(),
                imports: policy.imports(),
            };
            if options.json {
                output::print_json(&Envelope::new(&shown))
            } else if options.quiet {
                Ok(())
            } else {
                output::print(&text(&shown))
            }
        }
    }
}

fn text(shown: &Shown) -> String {
    let mut text = format!("{} {}\n", printable(&shown.name), printable(&shown.version));
    if !shown.settings.is_empty() {
        text += "\nsettings (--set NAME=VALUE):\n";
    }
    for setting in &shown.settings {
        let default = match setting.default.as_str() {
            "" => "none",
            default => default,
        };
        text += &format!(
            "  {} (default: {})\n      {}\n",
            printable(&setting.name),
            printable(default),
            printable(&setting.help)
        );
    }
    text += "\nimports:\n";
    for import in &shown.imports {
        text += &format!("  {}\n", printable(import));
    }
    text
}
