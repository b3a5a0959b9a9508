//! Support: docs/kernel-support.md, made from the results of the lab that are kept beside the code.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::vm::matrix::KEPT;
use crate::vm::results::{Outcome, Results};
use crate::workspace;

/// The page, relative to the workspace.
const PAGE: &str = "docs/kernel-support.md";

/// Writes the page, or with `check` compares it.
pub(crate) fn run(check: bool) -> Result<()> {
    let results = Results::read(&workspace::root().join(KEPT))?;
    let wanted = page(&results);
    let path = workspace::root().join(PAGE);
    if check {
        let found = fs::read_to_string(&path).unwrap_or_default();
        ensure!(
            found == wanted,
            "{PAGE} is not what {KEPT} says: cargo xtask kernel-support"
        );
        return Ok(());
    }
    fs::write(&path, wanted).with_context(|| format!("writing {} failed", path.display()))
}

/// The text of the page.
fn page(results: &Results) -> String {
    let mut text = "# Kernels\n\n\
                    What the tests of the lab found on each kernel ([lab.md](lab.md)). `cargo xtask kernel-support` makes this \
                    page from\n`tests/lab/results.json`, which `cargo xtask test --vm KERNELS --keep` writes; lint compares the \
                    two.\n\n\
                    *yes*: the test ran there and found nothing wrong. A number: the kernel lacks what the test is about, \
                    see below the table.\n*-*: it did not run there.\n\n\
                    | kernel | release |\n|---|---|\n"
        .to_owned();
    for (kernel, on) in &results.0 {
        let _ = writeln!(text, "| {kernel} | {} |", on.release);
    }
    let kernels: Vec<&str> = results.0.keys().map(String::as_str).collect();
    for (binary, names) in results.rows() {
        let mut reasons: Vec<String> = Vec::new();
        let _ = write!(text, "\n## {binary}\n\n| test |");
        for kernel in &kernels {
            let _ = write!(text, " {kernel} |");
        }
        let _ = writeln!(text, "\n|---|{}", "---|".repeat(kernels.len()));
        for name in names {
            let title = name.rsplit("::").next().unwrap_or(name).replace('_', " ");
            let _ = write!(text, "| {title} |");
            for kernel in &kernels {
                let (word, why) = match results.get(kernel, binary, name) {
                    None => ("-", None),
                    Some(Outcome::Passed) => ("yes", None),
                    Some(Outcome::Absent(why)) => ("", Some(why)),
                    Some(Outcome::Failed(why) | Outcome::Lost(why)) => ("**fails** ", Some(why)),
                };
                let _ = write!(text, " {word}");
                if let Some(why) = why {
                    let why = why.split_whitespace().collect::<Vec<_>>().join(" ");
                    let known = reasons.iter().position(|known| *known == why);
                    let number = known.unwrap_or_else(|| {
                        reasons.push(why);
                        reasons.len() - 1
                    });
                    let _ = write!(text, "{}", number + 1);
                }
                text.push_str(" |");
            }
            text.push('\n');
        }
        if !reasons.is_empty() {
            text.push('\n');
        }
        for (number, reason) in (1..).zip(reasons) {
            let _ = writeln!(text, "{number}. {reason}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::results::OnKernel;

    #[test]
    fn a_page_says_what_passed_and_why_the_rest_did_not() {
        let on = |outcome| OnKernel {
            release: "6.1.0".to_owned(),
            binaries: [("lab_x".to_owned(), [("a::dm_crypt".to_owned(), outcome)].into())].into(),
        };
        let results = Results(
            [
                ("6.1".to_owned(), on(Outcome::Passed)),
                ("7.2".to_owned(), on(Outcome::Absent("no dm".to_owned()))),
                ("fei".to_owned(), OnKernel::default()),
            ]
            .into(),
        );
        let text = page(&results);
        assert!(text.contains("| 6.1 | 6.1.0 |"), "{text}");
        assert!(
            text.contains("| dm crypt | yes | 1 | - |\n\n1. no dm\n"),
            "{text}"
        );
    }
}
