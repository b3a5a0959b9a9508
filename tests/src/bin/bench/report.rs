//! Report: the figures as a table for people and as JSON for programs.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// A figure with its samples.
struct Figure {
    name: String,
    /// What it is compared with.
    aim: &'static str,
    command: String,
    samples: Vec<f64>,
}

impl Figure {
    fn median(&self) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        }
    }

    fn min(&self) -> f64 {
        self.samples.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn max(&self) -> f64 {
        self.samples.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }
}

/// All figures, in the order in which they were measured.
#[derive(Default)]
pub(crate) struct Report {
    figures: Vec<Figure>,
}

impl Report {
    /// Adds a figure.
    ///
    /// # Panics
    /// There are no samples.
    pub(crate) fn add(&mut self, name: &str, aim: &'static str, command: String, samples: Vec<f64>) {
        assert!(!samples.is_empty(), "{name} was not measured");
        self.figures.push(Figure {
            name: name.to_owned(),
            aim,
            command,
            samples,
        });
    }

    /// A line a figure.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "{:<28} {:>9} {:>9} {:>9}  {:<9} {}\n",
            "FIGURE", "MEDIAN", "MIN", "MAX", "AIM", "COMMAND"
        );
        for figure in &self.figures {
            // Writing to a string can't fail.
            let _ = writeln!(
                text,
                "{:<28} {:>9} {:>9} {:>9}  {:<9} {}",
                figure.name,
                short(figure.median()),
                short(figure.min()),
                short(figure.max()),
                figure.aim,
                figure.command
            );
        }
        text
    }

    /// The medians by name, and everything measured under `samples`.
    pub(crate) fn json(&self) -> Value {
        let mut object = Map::new();
        let mut samples = Map::new();
        for figure in &self.figures {
            object.insert(figure.name.clone(), json!(figure.median()));
            samples.insert(
                figure.name.clone(),
                json!({"samples": figure.samples, "command": figure.command, "aim": figure.aim}),
            );
        }
        object.insert("samples".to_owned(), samples.into());
        object.into()
    }
}

/// Three or four digits.
fn short(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        let mut report = Report::default();
        report.add("a", "<= 2", "x".to_owned(), vec![3.0, 1.0, 2.0]);
        report.add("b", "", "y".to_owned(), vec![4.0, 1.0]);
        let json = report.json();
        assert_eq!((json["a"].as_f64(), json["b"].as_f64()), (Some(2.0), Some(2.5)));
        let table = report.table();
        assert!(
            table.contains("2.000     1.000     3.000  <= 2      x"),
            "{table}"
        );
    }
}
