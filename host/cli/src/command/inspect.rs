//! `tightfit inspect`.

use crate::draw::Table;
use tightfit::cancel::CancelToken;
use tightfit::report::Inspection;
use tightfit::text::printable;
use tightfit::types::Bytes;

use crate::command::args::InspectOptions;
use crate::command::error::CommandError;
use crate::command::{output, session};

pub(crate) fn run(options: &InspectOptions) -> Result<(), CommandError> {
    let checkpoint = session::open_headers(&options.model, options.output.quiet)?;
    let proposed = session::propose_with(
        &options.policy,
        &checkpoint,
        &[session::anywhere()],
        &CancelToken::new(),
    )?;
    let inspection = Inspection::new(&checkpoint, &proposed.plan);
    if options.output.json {
        output::print_json(&inspection)
    } else if options.output.quiet {
        Ok(())
    } else {
        output::print(&text(&inspection))
    }
}

fn text(inspection: &Inspection) -> String {
    let mut text = format!(
        "{}{}: {} tensors in {} file{}, {} parameters, {}\n",
        printable(&inspection.path),
        match &inspection.architecture {
            Some(architecture) => format!(" ({})", printable(architecture)),
            None => String::new(),
        },
        inspection.tensors,
        inspection.shards,
        if inspection.shards == 1 { "" } else { "s" },
        count(inspection.parameters),
        Bytes(inspection.source_bytes),
    );
    if let Some(layers) = inspection.layers {
        text += &format!("{layers} layers");
        if let Some(experts) = inspection.experts_per_layer {
            text += &format!(", {experts} experts in each");
        }
        text += "\n";
    }
    if inspection.experts.tensors > 0 {
        text += &format!(
            "experts: {} of the parameters, {} in {} tensors\n",
            count(inspection.experts.elements),
            Bytes(inspection.experts.bytes),
            inspection.experts.tensors,
        );
    }
    if let Some(method) = &inspection.quantization {
        text += &format!("{method}\n");
    }
    for (tensor, alias) in &inspection.ties {
        text += &format!("tied: {} = {}\n", printable(alias), printable(tensor));
    }
    for (head, shares) in [
        ("in the files", &inspection.dtypes),
        ("stored as", &inspection.formats),
    ] {
        let mut table = Table::new([head, "tensors", "parameters", "bytes"]);
        for (name, share) in shares {
            table.row([
                name.clone(),
                share.tensors.to_string(),
                count(share.elements),
                Bytes(share.bytes).to_string(),
            ]);
        }
        let table = table.within(output::columns(), &["tensors", "parameters"]);
        text += &format!("\n{table}");
    }
    text += &format!(
        "\n{} of {} parameters in 4 bits as stored; {} in all\n",
        count(inspection.quantized_elements),
        count(inspection.parameters),
        Bytes(inspection.stored_bytes),
    );
    text
}

/// A count as people say it: 7.62 B, 494 M.
fn count(n: u64) -> String {
    for (unit, size) in [("B", 1e9), ("M", 1e6), ("K", 1e3)] {
        let value = n as f64 / size;
        if value >= 1.0 {
            let decimals = if value < 10.0 {
                2
            } else {
                usize::from(value < 100.0)
            };
            return format!("{value:.decimals$} {unit}");
        }
    }
    n.to_string()
}
