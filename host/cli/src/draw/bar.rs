//! Bars of text.

use tightfit::report::{Content, Fill};
use tightfit::text::printable;
use tightfit::types::Bytes;

use super::paint::{self, Text};

/// How bars are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarStyle {
    /// Columns that a line may take.
    pub width: usize,
    /// Unicode's block characters instead of ASCII.
    pub unicode: bool,
}

impl Default for BarStyle {
    /// What any reader can show.
    fn default() -> BarStyle {
        BarStyle {
            width: 60,
            unicode: false,
        }
    }
}

/// A frame, and a cell for every kind of content and some to tell shares apart.
const LEAST_WIDTH: usize = 30;

/// One device as a bar with its legend.
pub fn bar(name: &str, capacity: u64, fill: &Fill, style: BarStyle) -> Text {
    let width = style.width.max(LEAST_WIDTH);
    let parts: Vec<(Content, u64)> = fill
        .parts()
        .into_iter()
        .filter(|&(_, bytes)| bytes > 0)
        .collect();
    let bytes: Vec<u64> = parts.iter().map(|&(_, bytes)| bytes).collect();
    let mut text = Text::default();
    text.paint(paint::HEAD, printable(name));
    text.push(format!("  {}\n[", Bytes(capacity)));
    let cells = cells(&bytes, width - 2);
    for (&(content, _), cells) in parts.iter().zip(cells) {
        let mark = symbol(content, style.unicode);
        let cells: String = std::iter::repeat_n(mark, cells).collect();
        text.paint(paint::style(content), cells);
    }
    text.push("]\n");
    let mut column = 0;
    for (content, bytes) in parts {
        let mark = symbol(content, style.unicode);
        let entry = format!(" {} {}", content.name(), Bytes(bytes));
        let length = 1 + entry.chars().count();
        match column {
            0 => text.push("  "),
            _ if 4 + column + length > width => {
                text.push("\n  ");
                column = 0;
            }
            _ => {
                text.push("  ");
                column += 2;
            }
        }
        column += length;
        text.paint(paint::style(content), mark);
        text.push(entry);
    }
    if column > 0 {
        text.push("\n");
    }
    text
}

fn symbol(content: Content, unicode: bool) -> char {
    let (block, ascii) = match content {
        Content::Embeddings => ('▚', 'E'),
        Content::Linear => ('█', '#'),
        Content::Experts => ('▓', 'X'),
        Content::Other => ('▌', 'n'),
        Content::OutputHead => ('▞', 'H'),
        Content::Scales => ('▒', 's'),
        Content::Padding => ('▏', 'p'),
        Content::Headroom => ('░', '+'),
        Content::InUse => ('╳', '!'),
        Content::Free => ('·', '.'),
    };
    if unicode { block } else { ascii }
}

/// Divides `width` cells in proportion, each value at least one cell. All values are positive and
/// there are at most `width`; no values take no cells.
fn cells(values: &[u64], width: usize) -> Vec<usize> {
    let total: u128 = values.iter().map(|&value| u128::from(value)).sum();
    if total == 0 {
        return vec![0; values.len()];
    }
    let exact = |value: u64| u128::from(value) * width as u128;
    let mut cells: Vec<usize> = values
        .iter()
        .map(|&value| ((exact(value) / total) as usize).max(1))
        .collect();
    // How much too little a value has, in cells times `total`.
    let lack = |value: u64, cells: usize| exact(value) as i128 - (cells as u128 * total) as i128;
    loop {
        let sum: usize = cells.iter().sum();
        let places = (0..values.len()).rev();
        let changed = match sum.cmp(&width) {
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Less => places
                .max_by_key(|&i| lack(values[i], cells[i]))
                .map(|i| (i, cells[i] + 1)),
            std::cmp::Ordering::Greater => places
                .filter(|&i| cells[i] > 1)
                .min_by_key(|&i| lack(values[i], cells[i]))
                .map(|i| (i, cells[i] - 1)),
        };
        match changed {
            Some((i, count)) => cells[i] = count,
            None => return cells,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_bar_has_its_width_and_names_what_is_there() {
        let fill = Fill {
            embeddings: 1,
            linear: 30 << 20,
            scales: 5 << 20,
            headroom: 10 << 20,
            free: (19 << 20) - 1,
            ..Fill::default()
        };
        let text = bar("sim:0", 64 << 20, &fill, BarStyle::default());
        assert_eq!(
            text.to_string(),
            "sim:0  64.00 MiB\n\
             [E###########################ssss+++++++++.................]\n\
             \x20 E embeddings 1 B  # linear layers 30.00 MiB\n\
             \x20 s scales 5.000 MiB  + headroom 10.00 MiB  . free 19.00 MiB\n"
        );
        let blocks = bar(
            "a\x1b[2Jb",
            64 << 20,
            &fill,
            BarStyle {
                width: 1,
                unicode: true,
            },
        );
        let blocks = blocks.to_string();
        assert!(blocks.starts_with("a\\u{1b}[2Jb  "), "{blocks}");
        let line = blocks.lines().nth(1).unwrap();
        assert_eq!(line.chars().count(), LEAST_WIDTH);
        assert!(line.starts_with("[▚█"), "{line}");
    }

    #[test]
    fn cells_and_marks_have_the_color_of_their_content() {
        let fill = Fill {
            linear: 1,
            free: 1,
            ..Fill::default()
        };
        let style = BarStyle {
            width: 30,
            unicode: false,
        };
        let text = bar("x\x1b[2J", 2, &fill, style);
        let (blue, dim, plain) = ("\x1b[38;5;25m", "\x1b[2m", "\x1b[0m");
        assert_eq!(
            text.ansi(),
            format!(
                "\x1b[1mx\\u{{1b}}[2J{plain}  2 B\n\
                 [{blue}{cells}{plain}{dim}{free}{plain}]\n\
                 \x20 {blue}#{plain} linear layers 1 B\n\
                 \x20 {dim}.{plain} free 1 B\n",
                cells = "#".repeat(14),
                free = ".".repeat(14),
            )
        );
    }

    #[test]
    fn a_device_without_memory_has_an_empty_bar() {
        let text = bar("sim:0", 0, &Fill::default(), BarStyle::default());
        assert_eq!(text.to_string(), "sim:0  0 B\n[]\n");
    }

    proptest! {
        #[test]
        fn cells_fill_the_width_and_differ_from_the_share_only_for_the_least_cell(
            values in prop::collection::vec(prop_oneof![1u64..100, 1u64..u64::MAX], 1..10),
            width in 28usize..200,
        ) {
            let cells = cells(&values, width);
            prop_assert_eq!(cells.iter().sum::<usize>(), width);
            let total: u128 = values.iter().map(|&v| u128::from(v)).sum();
            for (&value, &cells) in values.iter().zip(&cells) {
                prop_assert!(cells >= 1);
                let share = (u128::from(value) * width as u128) as f64 / total as f64;
                prop_assert!(cells as f64 <= (share + 1.0).max(1.0) + 1e-9, "{cells} for {share}");
                prop_assert!(cells as f64 >= share - values.len() as f64, "{cells} for {share}");
            }
        }
    }
}
