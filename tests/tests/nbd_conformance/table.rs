//! Table: every test that `docs/nbd.md` names exists.
//!
//! A test is named as `place::name`; what a place is stands in a table of the page, too.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

const PAGE: &str = "docs/nbd.md";

/// The cells of the table under a heading.
fn cells(page: &str, heading: &str) -> Result<Vec<Vec<String>>> {
    let (_, section) = page
        .split_once(heading)
        .with_context(|| format!("{PAGE} has no heading {heading:?}"))?;
    let section = section
        .split_once("\n## ")
        .map_or(section, |(section, _)| section);
    let rows: Vec<Vec<String>> = section
        .lines()
        .filter(|line| {
            line.starts_with("| ") && !line.starts_with("| section") && !line.starts_with("| place")
        })
        .map(|line| {
            line.trim_matches('|')
                .split(" | ")
                .map(|cell| cell.trim().to_owned())
                .collect()
        })
        .collect();
    ensure!(!rows.is_empty(), "{heading:?} has no table");
    Ok(rows)
}

/// What stands in backticks.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// Names of the tests in a file or in the files of a folder: a function behind an attribute or in `proptest!`.
fn tests_in(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let files = if path.is_dir() {
        let entries = std::fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
        entries.into_iter().map(|entry| entry.path()).collect()
    } else {
        vec![path.to_owned()]
    };
    for file in files {
        let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let mut attribute = false;
        for line in text.lines().map(str::trim) {
            if line == "#[test]" || line.starts_with("#[tokio::test") {
                attribute = true;
            } else if let Some((_, rest)) = line.split_once("fn ")
                && attribute
            {
                names.extend(rest.split_once('(').map(|(name, _)| name.to_owned()));
                attribute = false;
            }
        }
    }
    Ok(names)
}

#[test]
fn every_test_that_the_page_names_exists() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(root.join(PAGE))?;
    let mut places = BTreeMap::new();
    for row in cells(&page, "\n### Where the tests are\n")? {
        let place = quoted(&row[0]).next().context("a place in backticks")?;
        let path = quoted(&row[1]).next().context("a path in backticks")?;
        places.insert(place.to_owned(), tests_in(&root.join(path))?);
    }
    let rows = cells(&page, "\n## The specification's demands on a server\n")?;
    let (mut named, mut missing) = (0, Vec::new());
    for row in rows.iter().filter(|row| row.len() == 3) {
        let mut of_row = 0;
        for test in quoted(&row[2]) {
            let (place, name) = test
                .split_once("::")
                .with_context(|| format!("`{test}` is no place::name"))?;
            let known = places
                .get(place)
                .with_context(|| format!("`{test}`: no place {place}"))?;
            if !known.iter().any(|known| known == name) {
                missing.push(test.to_owned());
            }
            of_row += 1;
        }
        ensure!(of_row > 0, "no test for {row:?}");
        named += of_row;
    }
    ensure!(missing.is_empty(), "tests that do not exist: {missing:?}");
    ensure!(named > 100, "only {named} tests are named");
    Ok(())
}
