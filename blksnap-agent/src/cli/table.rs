//! Table: rows under a header, columns aligned: words left, numbers right.

use std::fmt::Write as _;

/// Side on which a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// A table that grows by rows.
#[derive(Debug)]
pub(super) struct Table<const N: usize> {
    columns: [Align; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(columns: [(&str, Align); N]) -> Self {
        Self {
            columns: columns.map(|(_, align)| align),
            rows: vec![columns.map(|(name, _)| name.to_owned())],
        }
    }

    pub(super) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| {
            if cell.is_empty() {
                "-".to_owned()
            } else {
                // A path may contain anything; a row stays a row.
                cell.replace(char::is_control, "?")
            }
        }));
    }

    /// The lines, without blanks at their ends.
    pub(super) fn text(&self) -> String {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), align) in row.iter().zip(widths).zip(self.columns) {
                // Writing to a string can't fail.
                let _ = match align {
                    Align::Left => write!(line, "{cell:<width$}  "),
                    Align::Right => write!(line, "{cell:>width$}  "),
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new([
            ("DEVICE", Align::Left),
            ("SIZE", Align::Right),
            ("MOUNTED", Align::Left),
        ]);
        table.row(["/dev/sda".to_owned(), "1 GiB".to_owned(), String::new()]);
        table.row([
            "/dev/mapper/grün".to_owned(),
            "64 KiB".to_owned(),
            "/a\nb".to_owned(),
        ]);
        assert_eq!(
            table.text(),
            "DEVICE              SIZE  MOUNTED\n\
             /dev/sda           1 GiB  -\n\
             /dev/mapper/grün  64 KiB  /a?b\n"
        );
    }
}
