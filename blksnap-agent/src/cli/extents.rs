//! `cbt extents`: what changed, printed as it comes, however much it is.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Result, bail};

use super::size::human;
use super::{Context, Output, absolute};
use crate::cbt::{ChangedHead, ChangedLine, ChangedTotals, FullAnswer};
use crate::control::api;
use crate::control::client::with_query;
use crate::units::Extent;

/// Form of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Table,
    Document,
    Lines,
}

pub(super) async fn run(
    context: &Context,
    device: &Path,
    since: Option<&api::Base>,
    lines: bool,
) -> Result<()> {
    let base = since.map(|since| (since.generation.to_string(), since.number.to_string()));
    let device = absolute(device)?;
    let mut query = vec![("device", device.as_str()), ("lines", "true")];
    if let Some((generation, number)) = &base {
        query.extend([("generation", generation.as_str()), ("number", number.as_str())]);
    }
    let path = with_query("/v1/cbt/extents", &query);
    let form = match (lines, context.output) {
        (true, _) => Form::Lines,
        (false, Output::Json) => Form::Document,
        (false, _) => Form::Table,
    };
    let mut objects = context.client.get_lines::<ChangedLine>(&path).await?;
    let mut printer = Printer::new(BufWriter::new(std::io::stdout().lock()), form);
    while let Some(line) = objects.next().await? {
        printer.print(line)?;
    }
    printer.finish(&device)
}

/// Prints the lines of an answer.
struct Printer<W> {
    out: W,
    form: Form,
    head: Option<ChangedHead>,
    printed: ChangedTotals,
    /// Whether the answer has come to its end.
    whole: bool,
}

impl<W: Write> Printer<W> {
    const fn new(out: W, form: Form) -> Self {
        Self {
            out,
            form,
            head: None,
            printed: ChangedTotals { extents: 0, bytes: 0 },
            whole: false,
        }
    }

    fn print(&mut self, line: ChangedLine) -> Result<()> {
        if self.form == Form::Lines {
            serde_json::to_writer(&mut self.out, &line)?;
            writeln!(self.out)?;
        }
        match line {
            ChangedLine::Head(head) => self.begin(head),
            ChangedLine::Extent(extent) => self.extent(extent),
            ChangedLine::End { end } => self.end(end),
            ChangedLine::Full { full_needed } => self.full(&full_needed),
        }
    }

    fn begin(&mut self, head: ChangedHead) -> Result<()> {
        match self.form {
            Form::Lines => {}
            Form::Document => {
                let text = serde_json::to_string(&head)?;
                // The extents go into the same object.
                write!(self.out, "{},\"extents\":[", text.trim_end_matches('}'))?;
            }
            Form::Table => {
                let width = width(&head);
                writeln!(self.out, "{:>width$}  {:>width$}", "OFFSET", "LENGTH")?;
            }
        }
        self.head = Some(head);
        Ok(())
    }

    fn extent(&mut self, extent: Extent) -> Result<()> {
        let Extent { offset, length } = extent;
        match (self.form, &self.head) {
            (Form::Table, Some(head)) => {
                let width = width(head);
                writeln!(self.out, "{offset:>width$}  {length:>width$}")?;
            }
            (Form::Document, Some(_)) => {
                let before = if self.printed.extents == 0 { "\n" } else { ",\n" };
                write!(self.out, "{before}{{\"offset\":{offset},\"length\":{length}}}")?;
            }
            (Form::Lines, Some(_)) => {}
            (_, None) => bail!("an extent came before the head of the answer"),
        }
        self.printed.extents += 1;
        self.printed.bytes += length;
        Ok(())
    }

    fn end(&mut self, end: ChangedTotals) -> Result<()> {
        let Some(head) = self.head.as_ref().filter(|_| end == self.printed) else {
            bail!("the answer lacks some of its {} extents: ask again", end.extents);
        };
        match self.form {
            Form::Lines => {}
            Form::Document => writeln!(self.out, "\n]}}")?,
            Form::Table => writeln!(
                self.out,
                "{} extents, {}, up to {}:{}",
                end.extents,
                human(end.bytes),
                head.generation,
                head.number
            )?,
        }
        self.whole = true;
        Ok(())
    }

    /// A document that has begun can't say it: it stays without its end, and the command fails.
    fn full(&mut self, full: &FullAnswer) -> Result<()> {
        if self.head.is_some() {
            self.out.flush()?;
            bail!(
                "full copy needed ({}), what was printed is void: {}",
                full.reason,
                full.detail
            );
        }
        match self.form {
            Form::Lines => {}
            Form::Document => {
                let answer = ChangedLine::Full {
                    full_needed: full.clone(),
                };
                serde_json::to_writer_pretty(&mut self.out, &answer)?;
                writeln!(self.out)?;
            }
            Form::Table => writeln!(self.out, "full needed ({}): {}", full.reason, full.detail)?,
        }
        self.whole = true;
        Ok(())
    }

    fn finish(mut self, device: &str) -> Result<()> {
        self.out.flush()?;
        if !self.whole {
            bail!("list the changes of {device}: the answer broke off, what was printed is void: ask again");
        }
        Ok(())
    }
}

/// Digits of the largest number that can come.
fn width(head: &ChangedHead) -> usize {
    head.device_capacity.to_string().len().max("OFFSET".len())
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::cbt::ChangedAnswer;
    use crate::units::Generation;

    fn lines() -> Vec<ChangedLine> {
        vec![
            ChangedLine::Head(ChangedHead {
                generation: Generation::new(Uuid::nil()),
                number: 3,
                since: 1,
                block_size: 4096,
                device_capacity: 1 << 20,
            }),
            ChangedLine::Extent(Extent {
                offset: 0,
                length: 4096,
            }),
            ChangedLine::Extent(Extent {
                offset: 65_536,
                length: 8192,
            }),
            ChangedLine::End {
                end: ChangedTotals {
                    extents: 2,
                    bytes: 12_288,
                },
            },
        ]
    }

    fn printed(lines: Vec<ChangedLine>, form: Form) -> (String, Result<()>) {
        let mut out = Vec::new();
        let mut printer = Printer::new(&mut out, form);
        let done = lines
            .into_iter()
            .try_for_each(|line| printer.print(line))
            .and_then(|()| printer.finish("/dev/x"));
        (String::from_utf8(out).unwrap(), done)
    }

    #[test]
    fn every_form_has_every_extent() {
        let (table, done) = printed(lines(), Form::Table);
        assert!(done.is_ok());
        assert_eq!(
            table,
            " OFFSET   LENGTH\n      0     4096\n  65536     8192\n\
             2 extents, 12 KiB, up to 00000000-0000-0000-0000-000000000000:3\n"
        );
        let (document, done) = printed(lines(), Form::Document);
        assert!(done.is_ok());
        let answer: ChangedAnswer = serde_json::from_str(&document).unwrap();
        assert!(matches!(answer, ChangedAnswer::Changed { extents, since: 1, .. } if extents.len() == 2));
        let (text, done) = printed(lines(), Form::Lines);
        assert!(done.is_ok());
        let again: Vec<ChangedLine> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(again, lines());
    }

    #[test]
    fn an_answer_that_is_not_whole_fails() {
        let full = ChangedLine::Full {
            full_needed: FullAnswer {
                reason: "run_missed".to_owned(),
                detail: "x".to_owned(),
            },
        };
        for form in [Form::Table, Form::Document, Form::Lines] {
            let mut cut = lines();
            cut.pop();
            assert!(printed(cut, form).1.is_err());
            let mut lacking = lines();
            lacking.remove(1);
            assert!(printed(lacking, form).1.is_err());
            let mut void = lines();
            void[3] = full.clone();
            assert!(printed(void, form).1.is_err());
            let (text, done) = printed(vec![full.clone()], form);
            assert!(done.is_ok() && text.contains("run_missed"), "{text}");
        }
    }
}
