//! Results: what came of each test on each kernel, as a file.
//!
//! The form is made for being kept beside the code: sorted, without times, so that a run that finds the same makes the
//! same file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// How a test says that the kernel lacks what it is about: an error that begins so, then the reason.
pub(crate) const ABSENT: &str = "not on this kernel: ";

/// What is in a reason that depends on how tasks interleave: the same kernel may pass the next time.
const BY_CHANCE: &str = "`run_missed`";

/// What came of a test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// It ran, and found nothing wrong.
    Passed,
    /// The kernel lacks what it is about, and what that is.
    Absent(String),
    /// It ran, and failed: the last lines of what it said.
    Failed(String),
    /// It began and never ended: what became of the guest.
    Lost(String),
}

/// Tests of a binary by name.
pub(crate) type Tests = BTreeMap<String, Outcome>;

/// What came of everything on a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OnKernel {
    /// What `uname -r` said.
    pub(crate) release: String,
    /// By test binary.
    pub(crate) binaries: BTreeMap<String, Tests>,
}

/// What came of everything, by the name of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Results(pub(crate) BTreeMap<String, OnKernel>);

impl Results {
    /// Reads a file of results; one that is not there has none.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        match fs::read(path) {
            Ok(text) => {
                serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("reading {} failed", path.display())),
        }
    }

    /// Writes them.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("creating {} failed", parent.display()))?;
        }
        let text = serde_json::to_string_pretty(self).context("writing results failed")?;
        fs::write(path, text + "\n").with_context(|| format!("writing {} failed", path.display()))
    }

    /// Takes over `newer`: whole binaries, or with `partly` single tests.
    pub(crate) fn merge(&mut self, newer: &Self, partly: bool) {
        for (kernel, on) in &newer.0 {
            let mine = self.0.entry(kernel.clone()).or_default();
            mine.release.clone_from(&on.release);
            for (binary, tests) in &on.binaries {
                let kept = mine.binaries.entry(binary.clone()).or_default();
                if !partly {
                    kept.clear();
                }
                kept.extend(
                    tests
                        .iter()
                        .map(|(name, outcome)| (name.clone(), outcome.clone())),
                );
            }
        }
    }

    /// Tests that passed in `before` and now say that the kernel lacks something: kernel, binary, name.
    pub(crate) fn gone_since(&self, before: &Self) -> Vec<String> {
        self.each()
            .filter(|(kernel, binary, name, outcome)| {
                let known = before.get(kernel, binary, name);
                matches!(outcome, Outcome::Absent(why) if !why.contains(BY_CHANCE))
                    && known == Some(&Outcome::Passed)
            })
            .map(|(kernel, binary, name, _)| format!("{kernel}: {binary}: {name}"))
            .collect()
    }

    /// What came of one test.
    pub(crate) fn get(&self, kernel: &str, binary: &str, name: &str) -> Option<&Outcome> {
        self.0.get(kernel)?.binaries.get(binary)?.get(name)
    }

    /// Everything: kernel, binary, name, outcome.
    pub(crate) fn each(&self) -> impl Iterator<Item = (&str, &str, &str, &Outcome)> {
        self.0.iter().flat_map(|(kernel, on)| {
            on.binaries.iter().flat_map(move |(binary, tests)| {
                tests
                    .iter()
                    .map(move |(name, outcome)| (kernel.as_str(), binary.as_str(), name.as_str(), outcome))
            })
        })
    }

    /// The tests of all kernels, by binary.
    pub(crate) fn rows(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut rows: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (_, binary, name, _) in self.each() {
            let names = rows.entry(binary).or_default();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        for names in rows.values_mut() {
            names.sort_unstable();
        }
        rows
    }
}

/// The events of tests that a test binary said with `--format json`. A line may begin with what a child of the test
/// printed.
fn events(said: &str) -> impl Iterator<Item = serde_json::Value> {
    said.lines().filter_map(|line| {
        let at = line.find("{ \"type\": \"test\"")?;
        serde_json::from_str(line.get(at..)?).ok()
    })
}

/// How long each test took, in seconds, where that was said (`--report-time`).
pub(crate) fn read_times(said: &str) -> Vec<(String, f64)> {
    events(said)
        .filter_map(|event| Some((event["name"].as_str()?.to_owned(), event["exec_time"].as_f64()?)))
        .collect()
}

/// The outcomes of the tests. `lost` is what became of those that began and did not end.
pub(crate) fn read_events(said: &str, lost: &str) -> Tests {
    let mut tests = Tests::new();
    for event in events(said) {
        let text = |field: &str| event.get(field).and_then(serde_json::Value::as_str);
        let (Some(name), Some(what)) = (text("name"), text("event")) else {
            continue;
        };
        let outcome = match what {
            "started" => Outcome::Lost(lost.to_owned()),
            "ok" => Outcome::Passed,
            "failed" => failure(text("stdout").or_else(|| text("message")).unwrap_or_default()),
            // Left out by its mark, or a word that says that it takes long.
            _ => continue,
        };
        tests.insert(name.to_owned(), outcome);
    }
    tests
}

/// What a test that failed said.
fn failure(said: &str) -> Outcome {
    let reason = said
        .lines()
        .find_map(|line| line.strip_prefix("Error: ")?.strip_prefix(ABSENT));
    if let Some(reason) = reason {
        return Outcome::Absent(reason.trim().to_owned());
    }
    let lines: Vec<&str> = said.lines().collect();
    let from = lines
        .iter()
        .position(|line| line.starts_with("Error: ") || line.contains("panicked at"))
        .unwrap_or_else(|| lines.len().saturating_sub(12));
    let lines: Vec<&str> = lines
        .get(from..)
        .unwrap_or_default()
        .iter()
        .copied()
        .take_while(|line| !line.starts_with("stack backtrace") && !line.starts_with("Stack backtrace"))
        .take(12)
        .collect();
    Outcome::Failed(lines.join("\n").trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = r#"
{ "type": "suite", "event": "started", "test_count": 4 }
{ "type": "test", "event": "started", "name": "a" }
noise of a child{ "type": "test", "name": "a", "event": "ok", "exec_time": 0.1 }
{ "type": "test", "event": "started", "name": "b" }
{ "type": "test", "name": "b", "event": "failed", "stdout": "x: 1\nError: not on this kernel: it has no dm-crypt\n" }
{ "type": "test", "event": "started", "name": "c" }
{ "type": "test", "name": "c", "event": "failed", "stdout": "noise\nError: byte 5 changed\n\nCaused by:\n    y\n" }
{ "type": "test", "event": "started", "name": "d" }
{ "type": "test", "event": "started", "name": "e" }
{ "type": "test", "event": "timeout", "name": "e" }
{ "type": "test", "name": "f", "event": "ignored" }
"#;

    fn results(outcome: Outcome) -> Results {
        let tests = [("a".to_owned(), outcome)].into();
        let on = OnKernel {
            release: "6.1".to_owned(),
            binaries: [("x".to_owned(), tests)].into(),
        };
        Results([("k".to_owned(), on)].into())
    }

    #[test]
    fn every_test_that_began_has_an_outcome() {
        let tests = read_events(SAID, "the guest died");
        assert_eq!(tests.get("a"), Some(&Outcome::Passed));
        assert_eq!(
            tests.get("b"),
            Some(&Outcome::Absent("it has no dm-crypt".to_owned()))
        );
        assert_eq!(
            tests.get("c"),
            Some(&Outcome::Failed(
                "Error: byte 5 changed\n\nCaused by:\n    y".to_owned()
            ))
        );
        for name in ["d", "e"] {
            assert_eq!(tests.get(name), Some(&Outcome::Lost("the guest died".to_owned())));
        }
        assert_eq!(tests.len(), 5);
        assert_eq!(read_times(SAID), [("a".to_owned(), 0.1)]);
    }

    #[test]
    fn what_passed_may_not_become_absent_unseen() {
        let (passed, absent) = (
            results(Outcome::Passed),
            results(Outcome::Absent("no dm".to_owned())),
        );
        assert_eq!(absent.gone_since(&passed), ["k: x: a"]);
        assert!(passed.gone_since(&absent).is_empty());
        assert!(absent.gone_since(&Results::default()).is_empty());
        let by_chance = results(Outcome::Absent("skipped (`run_missed`)".to_owned()));
        assert!(by_chance.gone_since(&passed).is_empty());
    }

    #[test]
    fn a_file_of_results_is_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/results.json");
        assert_eq!(Results::read(&path).unwrap(), Results::default());
        let mut all = results(Outcome::Passed);
        all.merge(&results(Outcome::Failed("why".to_owned())), true);
        all.write(&path).unwrap();
        let read = Results::read(&path).unwrap();
        assert_eq!(read, all);
        assert_eq!(read.get("k", "x", "a"), Some(&Outcome::Failed("why".to_owned())));
        fs::write(&path, "{").unwrap();
        Results::read(&path).unwrap_err();
    }
}
