//! A load as a drawing: for each device what was reserved and what was written there, over time, with what
//! the plan says as a line; and below it the staging.

use std::fmt::Write;

use super::places::short;
use super::svg::{escaped, page_begin};
use tightfit::types::Bytes;

/// What a load did, as it was watched.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// What stands above the drawing.
    pub title: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// The devices, then the staging.
    pub lanes: Vec<Lane>,
}

/// What became of one memory. Points are seconds since the beginning, ascending, and bytes from then on.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Lane {
    /// Whose memory it is.
    pub name: String,
    /// Bytes that were planned.
    pub planned: u64,
    /// Bytes that were reserved.
    pub reserved: Vec<(f64, u64)>,
    /// Bytes that were written.
    pub written: Vec<(f64, u64)>,
}

impl Lane {
    fn peak(&self) -> u64 {
        let points = self.reserved.iter().chain(&self.written);
        points.map(|&(_, bytes)| bytes).max().unwrap_or(0)
    }
}

const WIDTH: f64 = 760.0;
const MARGIN: f64 = 20.0;
/// Height of what one memory has, and from one to the next.
const HEIGHT: f64 = 96.0;
const PITCH: f64 = 140.0;
/// Memories that are drawn.
const MOST_LANES: usize = 64;
/// Points of a line. More of them could not be told apart.
const MOST_POINTS: usize = 1024;

const STYLE: &str = "
.reserved{fill:#0072b2;fill-opacity:.2}.written{fill:none;stroke:#0072b2;stroke-width:2}
.planned{stroke:#d55e00;stroke-width:1.5;stroke-dasharray:6 4}
";

/// Returns a standalone SVG of a load, without scripts.
pub fn timeline(load: &Timeline) -> String {
    let shown = load.lanes.len().min(MOST_LANES);
    let height = 100.0 + PITCH * shown as f64;
    let title = format!("{}, {:.3} s", short(&load.title), load.seconds);
    let mut out = page_begin(&title, WIDTH + 2.0 * MARGIN, height, STYLE);
    for (index, lane) in load.lanes.iter().take(shown).enumerate() {
        draw(&mut out, lane, load.seconds, 60.0 + PITCH * index as f64);
    }
    let y = 72.0 + PITCH * shown as f64;
    if load.lanes.len() > shown {
        let more = load.lanes.len() - shown;
        let _ = writeln!(out, "<text x=\"{MARGIN}\" y=\"{y}\">and {more} more</text>");
    }
    let _ = writeln!(
        out,
        "<text class=\"small\" x=\"{MARGIN}\" y=\"{}\">dashed: as planned; area: reserved; line: written</text>",
        y + 16.0
    );
    out + "</svg>\n"
}

fn draw(out: &mut String, lane: &Lane, seconds: f64, top: f64) {
    let most = lane.planned.max(lane.peak()).max(1) as f64;
    let x = |at: f64| MARGIN + (at / seconds.max(1e-9)).clamp(0.0, 1.0) * WIDTH;
    let bottom = top + HEIGHT;
    // A tenth above what is most, so that lines do not lie on the frame.
    let y = |bytes: u64| bottom - bytes as f64 / most * HEIGHT / 1.1;
    let _ = writeln!(
        out,
        "<g class=\"lane\" data-planned=\"{}\" data-peak=\"{}\"><text x=\"{MARGIN}\" y=\"{}\">{}: {} planned, {} at most</text>",
        lane.planned,
        lane.peak(),
        top - 6.0,
        escaped(&short(&lane.name)),
        Bytes(lane.planned),
        Bytes(lane.peak()),
    );
    let steps = path(&thinned(&lane.reserved), seconds, true, &x, &y);
    if !steps.is_empty() {
        let _ = writeln!(
            out,
            "<path class=\"reserved\" d=\"M{:.3},{bottom} L{steps} L{:.3},{bottom} Z\"/>",
            x(lane.reserved.first().map_or(0.0, |&(at, _)| at)),
            x(seconds)
        );
    }
    let line = path(&thinned(&lane.written), seconds, false, &x, &y);
    if !line.is_empty() {
        let _ = writeln!(out, "<path class=\"written\" d=\"M{line}\"/>");
    }
    let _ = writeln!(
        out,
        "<line class=\"planned\" x1=\"{MARGIN}\" x2=\"{}\" y1=\"{planned:.3}\" y2=\"{planned:.3}\"/>\n\
         <rect class=\"frame\" x=\"{MARGIN}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n\
         <text class=\"small\" x=\"{MARGIN}\" y=\"{}\">0 s</text>\n\
         <text class=\"small\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{seconds:.3} s</text></g>",
        MARGIN + WIDTH,
        bottom + 13.0,
        MARGIN + WIDTH,
        bottom + 13.0,
        planned = y(lane.planned),
    );
}

/// At most [`MOST_POINTS`], the last one among them.
fn thinned(points: &[(f64, u64)]) -> Vec<(f64, u64)> {
    let step = points.len().div_ceil(MOST_POINTS).max(1);
    let mut thinned: Vec<(f64, u64)> = points.iter().copied().step_by(step).collect();
    if let Some(last) = points.last()
        && thinned.last() != Some(last)
    {
        thinned.push(*last);
    }
    thinned
}

/// The points of a line, which goes on to the end; in steps, or straight from one to the next.
fn path(
    points: &[(f64, u64)],
    seconds: f64,
    in_steps: bool,
    x: &dyn Fn(f64) -> f64,
    y: &dyn Fn(u64) -> f64,
) -> String {
    let mut text = String::new();
    let mut before = None;
    let Some(&last) = points.last() else {
        return text;
    };
    for &(at, bytes) in points.iter().chain([&(seconds, last.1)]) {
        if let (true, Some(before)) = (in_steps, before) {
            let _ = write!(text, "{:.3},{:.3} ", x(at), y(before));
        }
        let _ = write!(text, "{:.3},{:.3} ", x(at), y(bytes));
        before = Some(bytes);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use roxmltree::Document;

    use super::*;

    proptest! {
        /// Whatever happened, lines stay within the frame, and the highest of what was reserved is as high
        /// as the plan's line where it was as planned.
        #[test]
        fn lines_stay_within_their_frames(
            lanes in prop::collection::vec(
                (any::<u64>(), prop::collection::vec((0.0..10.0f64, any::<u64>()), 0..3000), ".{0,40}"),
                0..5,
            ),
            seconds in 0.0..10.0f64,
        ) {
            let sorted = |mut points: Vec<(f64, u64)>| {
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                points
            };
            let lanes: Vec<Lane> = lanes
                .into_iter()
                .map(|(planned, points, name)| {
                    let points = sorted(points);
                    Lane { name, planned, reserved: points.clone(), written: points }
                })
                .collect();
            let count = lanes.len();
            let text = timeline(&Timeline { title: "a <model>".to_owned(), seconds, lanes });
            prop_assert!(text.len() < 400_000);
            let document = Document::parse(&text).unwrap();
            let drawn = document.descendants().filter(|node| node.attribute("class") == Some("lane"));
            prop_assert_eq!(drawn.clone().count(), count);
            for lane in drawn {
                let frame = lane.children().find(|node| node.attribute("class") == Some("frame")).unwrap();
                let number = |name| frame.attribute(name).unwrap().parse::<f64>().unwrap();
                let (top, bottom) = (number("y"), number("y") + number("height"));
                let paths = lane.children().filter(|node| node.has_tag_name("path"));
                for point in paths.flat_map(|path| path.attribute("d").unwrap().split(' ')) {
                    let point = point.trim_matches(|c: char| c.is_ascii_alphabetic());
                    let Some((x, y)) = point.split_once(',') else { continue };
                    let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                    prop_assert!((MARGIN..=MARGIN + WIDTH).contains(&x), "{}", x);
                    prop_assert!((top - 1e-3..=bottom + 1e-3).contains(&y), "{} of {}..{}", y, top, bottom);
                }
            }
        }
    }

    #[test]
    fn what_is_reserved_as_planned_touches_the_line_of_the_plan() {
        let lane = Lane {
            name: "sim:0".to_owned(),
            planned: 1000,
            reserved: vec![(0.5, 1000)],
            written: vec![(0.6, 10), (1.0, 900)],
        };
        let text = timeline(&Timeline {
            title: "model".to_owned(),
            seconds: 2.0,
            lanes: vec![lane],
        });
        let document = Document::parse(&text).unwrap();
        let of_class = |class| {
            let mut nodes = document.descendants();
            nodes
                .find(|node| node.attribute("class") == Some(class))
                .unwrap()
        };
        let planned = of_class("planned").attribute("y1").unwrap();
        let area = of_class("reserved").attribute("d").unwrap();
        // From a quarter of the width on.
        assert!(area.starts_with("M210.000,"), "{area}");
        assert!(area.contains(&format!("L210.000,{planned} ")), "{area}");
        assert!(text.contains("1000 B planned, 1000 B at most"), "{text}");
    }
}
