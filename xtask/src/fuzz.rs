//! Fuzz: coverage-guided runs of the targets in the crate `fuzz`, with libFuzzer.
//!
//! The compiler's own pass puts in the coverage counters; that needs neither another toolchain nor the sources of
//! the library. What is built so has a target folder of its own, `target/fuzz/`, in which also lie:
//! `corpus/TARGET` (inputs found by runs on this machine), `crashes/TARGET` and `log/TARGET`.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::{env, thread};

use anyhow::{Context, Result, bail, ensure};

use crate::{process, toolchain, workspace};

/// Tells the fuzzer which target it is to run.
const VARIABLE: &str = "BLKSNAP_FUZZ_TARGET";

/// Counters on every edge and the operands of comparisons, as libFuzzer wants them.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// What one input may take: seconds, on a slow and busy machine, and memory of the process in MiB.
const LIMITS: [&str; 2] = ["-timeout=30", "-rss_limit_mb=1024"];

/// What to do with the targets.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Targets, which are the folders of fuzz/corpus; all without
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each target runs
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    seconds: u32,
    /// How many targets run at a time; as many as there are CPUs without
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Run the one target on this input only, and show what it says
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Make the input shorter, as long as it fails: for SECONDS
    #[arg(long, requires = "input")]
    shorten: bool,
    /// Afterwards add the inputs that reach more code to fuzz/corpus
    #[arg(long, conflicts_with = "input")]
    keep: bool,
}

/// Builds the fuzzer and does it.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let targets = targets(&arguments.targets)?;
    toolchain::set_up(None)?;
    ensure!(
        ["c++", "clang++", "g++"]
            .iter()
            .any(|name| process::find(name).is_some()),
        "a C++ compiler builds the fuzzer and is missing: `cargo xtask setup` installs one"
    );
    let fuzzer = build()?;
    let scratch = scratch()?;
    let run = Run {
        fuzzer,
        scratch: scratch.path().to_owned(),
    };
    if let Some(input) = &arguments.input {
        let [target] = targets.as_slice() else {
            bail!("--input is of one target: name it");
        };
        return run.once(target, input, arguments.shorten.then_some(arguments.seconds));
    }
    let failed = run.all(&targets, arguments)?;
    ensure!(
        failed.is_empty(),
        "fuzz: {} failed (see above)",
        failed.join(", ")
    );
    Ok(())
}

/// The names of `wanted`, checked, or of all targets.
fn targets(wanted: &[String]) -> Result<Vec<String>> {
    let corpus = kept("");
    let entries = fs::read_dir(&corpus).with_context(|| format!("reading {} failed", corpus.display()))?;
    let mut all: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    all.sort();
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!("there is no fuzz target {unknown}, only {}", all.join(", "));
    }
    Ok(if wanted.is_empty() { all } else { wanted.to_vec() })
}

/// The inputs that are kept for a target.
fn kept(target: &str) -> PathBuf {
    workspace::root().join("fuzz/corpus").join(target)
}

/// A folder of what fuzzing leaves on this machine.
fn folder(kind: &str, target: &str) -> Result<PathBuf> {
    let folder = workspace::target().join("fuzz").join(kind).join(target);
    fs::create_dir_all(&folder).with_context(|| format!("creating {} failed", folder.display()))?;
    Ok(folder)
}

/// Where targets put files of their own, in memory if that can be; gone afterwards even if they crash.
fn scratch() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() {
        memory.to_owned()
    } else {
        env::temp_dir()
    };
    tempfile::Builder::new()
        .prefix("blksnap-fuzz-")
        .tempdir_in(&place)
        .with_context(|| format!("creating a folder in {} failed", place.display()))
}

fn build() -> Result<PathBuf> {
    let host = workspace::host()?;
    let mut flags = vec!["-Cdebuginfo=1".to_owned()];
    flags.extend(COVERAGE.map(str::to_owned));
    let mut command = workspace::cargo();
    command
        // With a target named, build scripts and macros are compiled without the counters.
        .args([
            "build",
            "--message-format=json-render-diagnostics",
            "--profile=fuzz",
            "--target",
            &host,
        ])
        .args([
            "--package",
            "blksnap-fuzz",
            "--bin",
            "blksnap-fuzz",
            "--features",
            "libfuzzer",
        ])
        .arg("--target-dir")
        .arg(workspace::target().join("fuzz"))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env_remove("RUSTFLAGS");
    workspace::executable_of(&mut command, "blksnap-fuzz")
}

/// The fuzzer, and where its targets may put files.
struct Run {
    fuzzer: PathBuf,
    scratch: PathBuf,
}

impl Run {
    fn command(&self, target: &str) -> Command {
        let mut command = process::command(&self.fuzzer);
        command
            .env(VARIABLE, target)
            .env("TMPDIR", &self.scratch)
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .args(LIMITS);
        command
    }

    /// Runs one input with this terminal; with `shorten`, makes it shorter for that many seconds.
    fn once(&self, target: &str, input: &Path, shorten: Option<u32>) -> Result<()> {
        let mut command = self.command(target);
        if let Some(seconds) = shorten {
            let crashes = folder("crashes", target)?;
            command
                .args(["-minimize_crash=1", &format!("-max_total_time={seconds}")])
                .arg(prefix(&crashes));
        }
        process::run(command.arg(input))
    }

    /// Runs `targets`, several at a time, and gives the ones that failed.
    fn all(&self, targets: &[String], arguments: &Arguments) -> Result<Vec<String>> {
        let cpus = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let jobs = arguments.jobs.unwrap_or(cpus).clamp(1, targets.len().max(1));
        println!(
            "fuzz: {} targets, {} s each, {jobs} at a time",
            targets.len(),
            arguments.seconds
        );
        let queue: Mutex<VecDeque<&String>> = Mutex::new(targets.iter().collect());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let work = || -> Result<Vec<String>> {
            let mut failed = Vec::new();
            while let Some(target) = next() {
                if !self.target(target, arguments)? {
                    failed.push(target.clone());
                }
            }
            Ok(failed)
        };
        let outcomes: Vec<Result<Vec<String>>> = thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().expect("a worker does not panic"))
                .collect()
        });
        let mut failed = outcomes.into_iter().collect::<Result<Vec<_>>>()?.concat();
        failed.sort();
        Ok(failed)
    }

    /// Runs one target for its time; whether it stood it.
    fn target(&self, target: &str, arguments: &Arguments) -> Result<bool> {
        let (found, crashes) = (folder("corpus", target)?, folder("crashes", target)?);
        let log = folder("log", "")?.join(format!("{target}.log"));
        let output = File::create(&log).with_context(|| format!("creating {} failed", log.display()))?;
        let both = output.try_clone().context("sharing the log failed")?;
        let mut command = self.command(target);
        command
            .arg(format!("-max_total_time={}", arguments.seconds))
            .arg("-print_final_stats=1")
            .arg(prefix(&crashes))
            .args([&found, &kept(target)])
            .stdout(output)
            .stderr(both);
        let status = command
            .status()
            .with_context(|| format!("starting `{}` failed", process::line(&command)))?;
        let said = String::from_utf8_lossy(&fs::read(&log).context("reading the log failed")?).into_owned();
        if !status.success() {
            eprintln!("{}", failure(target, &said, &log));
            return Ok(false);
        }
        println!("fuzz: {target}: {}", Summary::of(&said)?);
        if arguments.keep {
            let mut merge = self.command(target);
            // By edges alone: how often each was taken would keep ten times as many.
            process::output(
                merge
                    .args(["-set_cover_merge=1", "-use_counters=0", "-use_cmp=0"])
                    .args([&kept(target), &found]),
            )?;
        }
        Ok(true)
    }
}

/// Where libFuzzer puts an input that fails.
fn prefix(crashes: &Path) -> String {
    format!("-artifact_prefix={}/", crashes.display())
}

/// What there is to say of a target that failed.
fn failure(target: &str, said: &str, log: &Path) -> String {
    let from = said.find("panicked at").or_else(|| said.find("ERROR: libFuzzer"));
    let lines: Vec<&str> = said
        .get(from.unwrap_or(0)..)
        .unwrap_or_default()
        .lines()
        .take(40)
        .collect();
    let input = said
        .lines()
        .find_map(|line| line.split_once("Test unit written to "))
        .map_or("FILE", |(_, file)| file.trim());
    format!(
        "fuzz: {target} FAILED, all of it in {}:\n    {}\nthe input, as base64: {}\nagain:   cargo xtask fuzz {target} --input \
         {input}\nshorter: cargo xtask fuzz {target} --input {input} --shorten\nonce it is mended: cp {input} \
         fuzz/corpus/{target}/",
        log.display(),
        lines.join("\n    "),
        said.lines()
            .find_map(|line| line.strip_prefix("Base64: "))
            .unwrap_or("(not said)"),
    )
}

/// The figures of a run that ended well.
#[derive(Debug, PartialEq, Eq)]
struct Summary {
    runs: u64,
    edges: u64,
    new_inputs: u64,
    memory_mib: u64,
}

impl Summary {
    fn of(said: &str) -> Result<Self> {
        let statistic = |name: &str| {
            said.lines()
                .find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name)?.strip_prefix(':'))
                .and_then(|number| number.trim().parse().ok())
                .with_context(|| format!("the fuzzer did not say {name}"))
        };
        let edges = said
            .lines()
            .rev()
            .find_map(|line| line.split_once(" cov: ")?.1.split(' ').next()?.parse().ok())
            .context("the fuzzer reached nothing: it has no coverage counters")?;
        Ok(Self {
            runs: statistic("number_of_executed_units")?,
            edges,
            new_inputs: statistic("new_units_added")?,
            memory_mib: statistic("peak_rss_mb")?,
        })
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            runs,
            edges,
            new_inputs,
            memory_mib,
        } = self;
        write!(
            f,
            "{runs} runs, {edges} edges reached, {new_inputs} new inputs, at most {memory_mib} MiB"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "#2\tINITED cov: 15 ft: 16 corp: 1/1b exec/s: 0 rss: 28Mb\n\
                        #8\tNEW    cov: 17 ft: 18 corp: 2/3b lim: 4 exec/s: 0 rss: 28Mb L: 2/2\n\
                        #90\tDONE   cov: 17 ft: 18 corp: 2/3b lim: 4 exec/s: 0 rss: 28Mb\n\
                        Done 90 runs in 1 second(s)\nstat::number_of_executed_units: 90\n\
                        stat::average_exec_per_sec:     0\nstat::new_units_added:          1\n\
                        stat::slowest_unit_time_sec:    0\nstat::peak_rss_mb:              28\n";

    #[test]
    fn figures_are_read_from_what_the_fuzzer_says() {
        let summary = Summary::of(SAID).unwrap();
        let wanted = Summary {
            runs: 90,
            edges: 17,
            new_inputs: 1,
            memory_mib: 28,
        };
        assert_eq!(summary, wanted);
        assert!(Summary::of("stat::number_of_executed_units: 90\n").is_err());
    }

    #[test]
    fn a_failure_tells_how_to_see_it_again() {
        let said = "#8\tNEW cov: 1\nthread '<unnamed>' panicked at x.rs:1:\nwrong\n\
                    artifact_prefix='./'; Test unit written to ./crash-00ff\nBase64: AAE=\n";
        let text = failure("state_file", said, Path::new("log"));
        for part in ["\n    wrong\n", "fuzz state_file --input ./crash-00ff\n", "AAE="] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("NEW cov"), "{text}");
    }

    #[test]
    fn unknown_targets_are_refused() {
        assert!(targets(&[]).unwrap().contains(&"ring_record".to_owned()));
        let error = targets(&["nothing".to_owned()]).unwrap_err().to_string();
        assert!(
            error.contains("nothing") && error.contains("ring_record"),
            "{error}"
        );
    }
}
