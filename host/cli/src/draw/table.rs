//! Plain-text tables.

use std::fmt;

use tightfit::text::printable;

/// A table of text. The first column is aligned left, the others right.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Returns a table with these column heads.
    pub fn new<const N: usize>(heads: [&str; N]) -> Table {
        Table {
            rows: vec![heads.iter().map(|&head| head.to_owned()).collect()],
        }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(
            cells
                .iter()
                .map(|cell| printable(cell).into_owned())
                .collect(),
        );
    }
}

impl Table {
    /// Leaves out columns, by their heads and in this order, until its lines are at most `width`
    /// characters long.
    pub fn within(mut self, width: usize, expendable: &[&str]) -> Table {
        for head in expendable {
            if self.widths().iter().map(|width| width + 2).sum::<usize>() <= width + 2 {
                break;
            }
            let heads = self.rows.first().into_iter().flatten();
            let Some(column) = heads.into_iter().position(|known| known == head) else {
                continue;
            };
            for row in &mut self.rows {
                row.remove(column);
            }
        }
        self
    }

    /// Characters of the widest cell of each column.
    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        (0..columns).map(width).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                match column {
                    0 => line += &format!("{cell:<width$}"),
                    _ => line += &format!("  {cell:>width$}"),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(["device", "bytes"]);
        table.row(["sim:0".to_owned(), "5.4 GiB".to_owned()]);
        table.row(["cpu".to_owned(), "0 B".to_owned()]);
        assert_eq!(
            table.to_string(),
            "device    bytes\nsim:0   5.4 GiB\ncpu         0 B\n"
        );
    }

    #[test]
    fn columns_are_left_out_where_there_is_no_room() {
        let mut table = Table::new(["device", "tensors", "bytes"]);
        table.row(["sim:0".to_owned(), "12".to_owned(), "5.4 GiB".to_owned()]);
        let within = |width| {
            table
                .clone()
                .within(width, &["tensors", "none", "bytes"])
                .to_string()
        };
        assert_eq!(within(24), table.to_string());
        assert_eq!(within(23), "device    bytes\nsim:0   5.4 GiB\n");
        assert_eq!(within(15), within(23));
        assert_eq!(within(14), "device\nsim:0\n");
        assert_eq!(within(0), within(14));
    }
}
