//! Plans and loads as text: what `tightfit plan` and `tightfit load` print.

use tightfit::checkpoint::TensorInfo;
use tightfit::plan::Plan;
use tightfit::report::{LoadReport, Report};
use tightfit::text::printable;
use tightfit::types::Bytes;

use super::paint::{self, Text};
use super::{BarStyle, Table, bar, map};

/// Returns a plan as text: its report, what fills each device, and where the layers are.
pub fn plan(
    report: &Report,
    tensors: &[TensorInfo],
    plan: &Plan,
    style: BarStyle,
    width: usize,
) -> Text {
    let mut text = self::report(report, width);
    text.push("\n");
    for device in &report.devices {
        text.append(bar(&device.name, device.capacity, &device.fill, style));
    }
    text.push(format!("\n{}", map(tensors, plan)));
    text.push(placements(report));
    text
}

/// Returns a report of a plan or a load as text with lines of at most `width` characters where that can
/// be, without a list of placements.
pub fn report(report: &Report, width: usize) -> Text {
    let mut text = Text::default();
    text.push(beginning(report));
    let table = devices(report, width);
    let (heads, rows) = table.split_once('\n').unwrap_or((&table, ""));
    text.paint(paint::HEAD, heads);
    text.push(format!("\n{rows}"));
    text.push(stored(report));
    if let Some(load) = &report.load {
        text.push(loaded(load));
        if let Some(warning) = nonfinite(load) {
            text.paint(paint::WARNING, "warning:");
            text.push(warning);
        }
        text.push(host(report));
    }
    text
}

/// What was planned, by whom, and what became of it.
fn beginning(report: &Report) -> String {
    let model = &report.model;
    let mut text = format!(
        "{}{}: {} tensors, {}\npolicy {} {}, {:.3} s\n\n",
        printable(&model.path),
        match &model.architecture {
            Some(architecture) => format!(" ({})", printable(architecture)),
            None => String::new(),
        },
        model.tensors,
        Bytes(model.source_bytes),
        printable(&report.policy.name),
        printable(&report.policy.version),
        report.policy.seconds,
    );
    text.truncate(text.len() - 1);
    if let Some(ranks) = &report.ranks {
        text += &match ranks.rank {
            Some(rank) => format!("rank {rank} of {}", ranks.world),
            None => format!("{} ranks", ranks.world),
        };
        text += match ranks.agreed {
            true => ", all with this plan",
            false => "",
        };
        text += &match ranks.turned_away {
            0 => "\n".to_owned(),
            1 => "; 1 connection of somebody else was turned away\n".to_owned(),
            many => format!("; {many} connections of somebody else were turned away\n"),
        };
    }
    text += &format!("digest {}\n\n", report.digest);
    if let Some(method) = &model.quantization {
        text += &format!("{method}\n\n");
    }
    for revision in &report.policy.revisions {
        text += &format!(
            "revised: {} had {} left where the plan needed {}\n\n",
            printable(&revision.device),
            Bytes(revision.available),
            Bytes(revision.needed),
        );
    }
    text
}

/// A line for each device below one of heads.
fn devices(report: &Report, width: usize) -> String {
    let mut table = Table::new([
        "device",
        "tensors",
        "allocated",
        "reserved",
        "peak",
        "headroom",
        "capacity",
        "used",
    ]);
    for device in &report.devices {
        let used = device.reserved.saturating_add(device.headroom) as f64;
        table.row([
            device.name.clone(),
            device.tensors.to_string(),
            Bytes(device.allocated).to_string(),
            Bytes(device.reserved).to_string(),
            Bytes(device.peak_reserved).to_string(),
            Bytes(device.headroom).to_string(),
            Bytes(device.capacity).to_string(),
            format!("{:.1} %", 100.0 * used / device.capacity.max(1) as f64),
        ]);
    }
    // What says most stays longest.
    let expendable = [
        "peak",
        "allocated",
        "tensors",
        "headroom",
        "capacity",
        "reserved",
    ];
    table.within(width, &expendable).to_string()
}

/// How much smaller it has become.
fn stored(report: &Report) -> String {
    let model = &report.model;
    let allocated: u64 = report.devices.iter().map(|device| device.allocated).sum();
    let is_share = report
        .ranks
        .as_ref()
        .is_some_and(|ranks| ranks.rank.is_some());
    match is_share {
        true => format!(
            "\n{} in the checkpoint, {} as stored of this rank\n",
            Bytes(model.source_bytes),
            Bytes(allocated),
        ),
        false => format!(
            "\n{} in the checkpoint, {} as stored ({:.2} x smaller)\n",
            Bytes(model.source_bytes),
            Bytes(allocated),
            model.source_bytes as f64 / allocated.max(1) as f64,
        ),
    }
}

/// What was done, and where.
fn loaded(load: &LoadReport) -> String {
    let mut text = format!(
        "loaded in {:.2} s ({:.2} GB/s): {} tensors quantized, {} stored\n",
        load.seconds,
        load.bytes_read as f64 / 1e9 / load.seconds.max(1e-9),
        load.quantized,
        load.stored,
    );
    for (device, bytes) in &load.quantized_on {
        if bytes.by_device > 0 {
            text += &format!(
                "quantized for {}: {} by the GPU, {} by the processor\n",
                printable(device),
                Bytes(bytes.by_device),
                Bytes(bytes.by_host),
            );
        }
    }
    text
}

/// What a warning says, if there is something to warn of.
fn nonfinite(load: &LoadReport) -> Option<String> {
    (load.nonfinite_blocks > 0).then(|| {
        format!(
            " {} blocks with infinities or NaN, in {}\n",
            load.nonfinite_blocks,
            load.nonfinite
                .keys()
                .map(|name| printable(name))
                .collect::<Vec<_>>()
                .join(", "),
        )
    })
}

/// What the load took of the host.
fn host(report: &Report) -> String {
    let mut text = format!("host: staging {}", Bytes(report.host.staging_bytes));
    if report.host.scratch_bytes > 0 {
        text += &format!(", scratch {}", Bytes(report.host.scratch_bytes));
    }
    if let Some(peak) = report.host.peak_rss_bytes {
        text += &format!(", peak resident {}", Bytes(peak));
    }
    text + "\n"
}

/// Returns the list of placements, where the report has one; otherwise nothing.
pub fn placements(report: &Report) -> String {
    let Some(placements) = &report.placements else {
        return String::new();
    };
    let mut table = Table::new(["tensor", "device", "format", "bytes"]);
    for placement in placements {
        table.row([
            placement.tensor.clone(),
            placement.device.clone().unwrap_or_else(|| "-".to_owned()),
            placement.format.clone(),
            placement.bytes.to_string(),
        ]);
    }
    format!("\n{table}")
}
