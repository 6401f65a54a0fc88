//! A plan as a drawing: for each device a bar of its modules and layers, and below it one of what
//! its bytes are for.

use std::borrow::Cow;
use std::fmt::Write;

use tightfit_common::names::{layer_of, module_of, side_branch_of};

use super::paint;
use super::places::{Names, short};
use tightfit::checkpoint::TensorInfo;
use tightfit::plan::Plan;
use tightfit::report::{Content, Fill, fills, purpose};
use tightfit::text::printable;
use tightfit::types::Bytes;

/// What stands above the drawing.
#[derive(Debug, Clone, Copy)]
pub struct Heading<'a> {
    /// The model.
    pub model: &'a str,
    /// The policy.
    pub policy: &'a str,
}

/// Width of a bar; a bar's whole width is the device's capacity.
const WIDTH: f64 = 760.0;
const MARGIN: f64 = 20.0;
/// From one device to the next.
const PITCH: f64 = 92.0;
/// Segments of a bar. More of them could not be told apart.
const MOST_SEGMENTS: usize = 256;
/// Devices that are drawn.
const MOST_DEVICES: usize = 64;

/// Light and dark: `prefers-color-scheme` also holds where the drawing is an image in a page.
const STYLE: &str = "
text{font:13px system-ui,sans-serif;fill:#1f2328}
.title{font-size:16px;font-weight:600}.small{font-size:11px;fill:#59636e}
.page{fill:#fff}.frame{fill:none;stroke:#59636e}.line{stroke:#fff;stroke-width:.5}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.small{fill:#9198a1}
.page{fill:#0d1117}.frame{stroke:#9198a1}.line{stroke:#0d1117}.free{fill:#30363d}}
";

/// One colored part of a bar.
struct Segment<'a> {
    name: Cow<'a, str>,
    bytes: u64,
    content: Content,
}

/// Returns a standalone SVG of a plan for these tensors, without scripts.
pub fn svg(heading: Heading<'_>, tensors: &[TensorInfo], plan: &Plan) -> String {
    let fills = fills(tensors, plan);
    let shown = plan.devices.len().min(MOST_DEVICES);
    let height = 120.0 + PITCH * shown as f64;
    let width = WIDTH + 2.0 * MARGIN;
    let title = format!(
        "{}, placed by {}",
        short(heading.model),
        short(heading.policy)
    );
    let mut out = page_begin(&title, width, height, "");
    let segments = segments(tensors, plan);
    for (index, (device, fill)) in plan.devices.iter().zip(&fills).take(shown).enumerate() {
        let y = 56.0 + PITCH * index as f64;
        let capacity = device.device.capacity;
        let _ = writeln!(
            out,
            "<text x=\"{MARGIN}\" y=\"{}\">{}: {} reserved{} of {}</text>",
            y + 12.0,
            escaped(&short(&device.device.name)),
            Bytes(device.size.reserved),
            match fill.headroom {
                0 => String::new(),
                bytes => format!(" + {} headroom", Bytes(bytes)),
            },
            Bytes(capacity),
        );
        let mut layers = merged(&segments[index]);
        for content in REST {
            layers.push(Segment {
                name: content.name().into(),
                bytes: fill.get(content),
                content,
            });
        }
        let kinds = fill.parts().map(|(content, bytes)| Segment {
            name: content.name().into(),
            bytes,
            content,
        });
        bar(&mut out, "layers", y + 20.0, 34.0, capacity, &layers);
        bar(&mut out, "kinds", y + 58.0, 12.0, capacity, &kinds);
    }
    let mut y = 56.0 + PITCH * shown as f64;
    if plan.devices.len() > shown {
        let more = plan.devices.len() - shown;
        let _ = writeln!(
            out,
            "<text x=\"{MARGIN}\" y=\"{y}\">and {more} more devices</text>"
        );
        y += 16.0;
    }
    legend(&mut out, y, &fills);
    out + "</svg>\n"
}

/// The beginning of a drawing of this size, with styles beside those that all have.
pub(super) fn page_begin(title: &str, width: f64, height: f64, style: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\" role=\"img\">\n<title>{title}</title>\n\
         <style>{STYLE}{style}</style>\n<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n\
         <text class=\"title\" x=\"{MARGIN}\" y=\"32\">{title}</text>\n",
        title = escaped(title),
    )
}

/// What is on a device besides tensors.
const REST: [Content; 4] = [
    Content::Padding,
    Content::Headroom,
    Content::InUse,
    Content::Free,
];

/// For each device its layers and modules, in checkpoint order, embeddings first and the output
/// head last.
fn segments<'a>(tensors: &'a [TensorInfo], plan: &Plan) -> Vec<Vec<Segment<'a>>> {
    let mut names = Names::default();
    let mut keys = Vec::new();
    for (index, (tensor, planned)) in tensors.iter().zip(&plan.tensors).enumerate() {
        let Some(device) = planned.placement.device else {
            continue;
        };
        let content = Content::of(purpose(tensor));
        let (rank, name, layer) = match layer_of(&tensor.name) {
            Some((stack, layer)) => (1, stack, Some(layer)),
            None => {
                let rank = match content {
                    Content::Embeddings => 0,
                    Content::OutputHead => 3,
                    _ => 2,
                };
                let branch = side_branch_of(&tensor.name);
                (
                    rank,
                    branch.unwrap_or_else(|| module_of(&tensor.name)),
                    None,
                )
            }
        };
        let place = (device, rank, names.number(name), layer);
        keys.push((place, index, content));
    }
    keys.sort_unstable_by_key(|&(place, index, _)| (place, index));
    let mut all: Vec<Vec<Segment<'a>>> = plan.devices.iter().map(|_| Vec::new()).collect();
    for group in keys.chunk_by(|a, b| a.0 == b.0) {
        let (device, _, name, layer) = group[0].0;
        let name = names.names[name as usize];
        let mut of_kind = [0u64; Content::ALL.len()];
        for &(_, index, content) in group {
            of_kind[content as usize] += plan.tensors[index].requested();
        }
        // A layer has the color of what most of it is.
        let largest = Content::ALL
            .into_iter()
            .rev()
            .max_by_key(|&c| of_kind[c as usize]);
        all[device as usize].push(Segment {
            name: match layer {
                Some(layer) => format!("{} {layer}", short(name)).into(),
                None => short(name),
            },
            bytes: of_kind.iter().sum(),
            content: largest.unwrap_or(Content::Other),
        });
    }
    all
}

/// At most [`MOST_SEGMENTS`], neighbors put together where there are more.
fn merged<'a>(segments: &'a [Segment<'a>]) -> Vec<Segment<'a>> {
    let size = segments.len().div_ceil(MOST_SEGMENTS).max(1);
    segments
        .chunks(size)
        .map(|chunk| Segment {
            name: match chunk {
                [first, .., last] => format!("{} to {}", first.name, last.name).into(),
                _ => Cow::Borrowed(&*chunk[0].name),
            },
            bytes: chunk.iter().map(|segment| segment.bytes).sum(),
            content: chunk[0].content,
        })
        .collect()
}

fn bar(
    out: &mut String,
    class: &str,
    y: f64,
    height: f64,
    capacity: u64,
    segments: &[Segment<'_>],
) {
    let _ = writeln!(out, "<g class=\"{class}\">");
    let mut before: u64 = 0;
    for segment in segments.iter().filter(|segment| segment.bytes > 0) {
        let scale = WIDTH / capacity.max(1) as f64;
        let free = if segment.content == Content::Free {
            " free"
        } else {
            ""
        };
        let _ = writeln!(
            out,
            "<rect class=\"line{free}\" x=\"{:.6}\" y=\"{y}\" width=\"{:.6}\" height=\"{height}\" \
             fill=\"{}\" data-bytes=\"{}\"><title>{}: {}</title></rect>",
            MARGIN + before as f64 * scale,
            segment.bytes as f64 * scale,
            color(segment.content),
            segment.bytes,
            escaped(&segment.name),
            Bytes(segment.bytes),
        );
        before = before.saturating_add(segment.bytes);
    }
    let _ = writeln!(
        out,
        "</g>\n<rect class=\"frame\" x=\"{MARGIN}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{height}\"/>"
    );
}

fn legend(out: &mut String, y: f64, fills: &[Fill]) {
    let there = |content: &Content| fills.iter().any(|fill| fill.get(*content) > 0);
    for (place, content) in Content::ALL.into_iter().filter(there).enumerate() {
        let x = MARGIN + 190.0 * (place % 4) as f64;
        let y = y + 18.0 * (place / 4) as f64;
        let free = if content == Content::Free {
            " free"
        } else {
            ""
        };
        let _ = writeln!(
            out,
            "<rect class=\"line{free}\" x=\"{x}\" y=\"{y}\" width=\"11\" height=\"11\" fill=\"{}\"/>\
             <text class=\"small\" x=\"{}\" y=\"{}\">{}, {}</text>",
            color(content),
            x + 16.0,
            y + 9.5,
            content.name(),
            Bytes(
                fills
                    .iter()
                    .fold(0, |sum, fill| fill.get(content).saturating_add(sum))
            ),
        );
    }
}

/// As SVG writes it.
fn color(content: Content) -> String {
    let [red, green, blue] = paint::color(content);
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Text as XML holds it: what is no character of XML is escaped as everywhere.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in printable(text).chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
#[path = "svg_tests.rs"]
mod tests;
