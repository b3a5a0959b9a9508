//! Matrix: test binaries, built here, run on several kernels.
//!
//! Every binary has a guest of its own on every kernel, so that one that loses its guest takes no other along. What a
//! guest has is the same for all: two virtio disks, an NVMe disk, one with two controllers; a test finds them by
//! `blksnap_tests::lab`. What a test prints is read as libtest's events.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::kernels::{self, Kernel};
use super::machine::{Bus, Content, Disk, End, Machine, quote};
use super::results::{Outcome, Results, Tests, read_events, read_times};
use crate::workspace::{self, Profile};

/// The tests of the lab, by the beginning of their name.
const LAB: &str = "lab_";
/// Tests for this machine that are worth their time on other kernels.
const OTHERS: [&str; 2] = ["oracle", "tracker"];

/// What `short` stands for: the oldest kernel and the newest one, preempted at any place.
const SHORT: &str = "6.1,7.2+full";
/// What runs on them: test binaries, and the tests of each that end soon, by their whole names; all without.
const SHORT_TESTS: [(&str, &[&str]); 3] = [
    (
        "lab_tracking",
        &[
            "below::md_raid1",
            "mapper::dm_linear",
            "misses::writers_that_preempt_each_other",
            "nvme",
        ],
    ),
    ("oracle", &["ext4", "writes_through_a_disk_and_its_partitions"]),
    ("tracker", &[]),
];
/// What `long` stands for, with all tests.
const LONG: &str = "6.1,6.12,7.2,7.2+full,fei";

/// The writes that a test of raw devices makes in a guest, see `tests/tests/oracle`.
const ORACLE_WRITES: (&str, &str) = ("BLKSNAP_ORACLE_WRITES", "4000");

/// Variables that a guest's tests have from here.
const PASSED_ON: [&str; 8] = [
    "BLKSNAP_SEED",
    "RUST_LOG",
    "BLKSNAP_GATE_AGENT_KILLS",
    "BLKSNAP_GATE_KILLS",
    "BLKSNAP_GATE_SECONDS",
    "BLKSNAP_GATE_TAKES",
    "BLKSNAP_GATE_TECHNIQUE",
    "BLKSNAP_DM_KILLS",
];

/// Where the results are kept beside the code, relative to the workspace.
pub(crate) const KEPT: &str = "tests/lab/results.json";

/// What is to run.
pub(crate) struct Wanted<'a> {
    /// Kernels with commas between, or `short` or `long`.
    pub(crate) kernels: &'a str,
    /// Names of test binaries; what is none is a part of the names of tests.
    pub(crate) names: &'a [String],
    /// Where the results go.
    pub(crate) out: Option<&'a Path>,
    /// Whether they are kept beside the code.
    pub(crate) keep: bool,
    /// Of one guest.
    pub(crate) timeout: Duration,
}

/// A test binary.
struct Binary {
    name: String,
    file: PathBuf,
}

/// Builds the tests, runs them on every kernel, and prints what came of them. Fails if a test failed, was lost, or says
/// that it lacks what it had when the results were kept.
pub(crate) fn run(wanted: &Wanted<'_>) -> Result<()> {
    let is_short = wanted.kernels == "short";
    let names = match wanted.kernels {
        "short" => SHORT,
        "long" => LONG,
        names => names,
    };
    super::check()?;
    // A kernel that can't be had is to be known before the time is spent.
    let kernels = names
        .split(',')
        .map(|name| kernels::find(name.trim(), false))
        .collect::<Result<Vec<Kernel>>>()?;
    let quick: Vec<String> = SHORT_TESTS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let tests = if is_short && wanted.names.is_empty() {
        quick.as_slice()
    } else {
        wanted.names
    };
    let (chosen, filters) = choose(&binaries()?, tests)?;
    let agent = workspace::build_agent(Profile::Development)?;
    let built = build(&chosen)?;
    let logs = workspace::target().join("lab/log");
    fs::create_dir_all(&logs).with_context(|| format!("creating {} failed", logs.display()))?;
    let kept = workspace::root().join(KEPT);
    let before = Results::read(&kept)?;
    let out = wanted
        .out
        .map_or_else(|| workspace::target().join("lab/results.json"), Path::to_owned);
    let mut results = Results::default();
    for kernel in &kernels {
        for binary in &built {
            let log = logs.join(format!("{}-{}.log", binary.name, kernel.name.replace('/', "_")));
            let of_short = SHORT_TESTS.iter().find(|(name, _)| *name == binary.name);
            let exactly = of_short.map_or(&[][..], |(_, tests)| tests);
            let guest = Guest {
                kernel,
                binary,
                agent: &agent,
                filters: &filters,
                // Who names tests gets them.
                exactly: if is_short && wanted.names.is_empty() {
                    exactly
                } else {
                    &[]
                },
                timeout: wanted.timeout,
                log: &log,
            };
            let (release, tests) = guest.run()?;
            let on = results.0.entry(kernel.name.clone()).or_default();
            if !release.is_empty() {
                on.release = release;
            }
            on.binaries.insert(binary.name.clone(), tests);
            // At once: a run may be ended at any time.
            results.write(&out)?;
            if wanted.keep {
                let mut all = before.clone();
                all.merge(&results, is_short || !filters.is_empty());
                all.write(&kept)?;
            }
        }
    }
    print!("{}", table(&results));
    println!(
        "lab: results in {}, what was said in {}",
        out.display(),
        logs.display()
    );
    judge(&results, &before)
}

/// What is wrong with the results.
fn judge(results: &Results, before: &Results) -> Result<()> {
    let bad = results
        .each()
        .filter(|(.., outcome)| matches!(outcome, Outcome::Failed(_) | Outcome::Lost(_)))
        .count();
    let gone = results.gone_since(before);
    ensure!(
        gone.is_empty(),
        "these passed when the results were kept, and now the kernel lacks something: {}",
        gone.join("; ")
    );
    ensure!(bad == 0, "{bad} tests failed (see above)");
    Ok(())
}

/// The names of the test binaries that there are.
fn binaries() -> Result<Vec<String>> {
    let folder = workspace::root().join("tests/tests");
    let entries = fs::read_dir(&folder).with_context(|| format!("reading {} failed", folder.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            Some(
                Path::new(&entry.ok()?.file_name())
                    .file_stem()?
                    .to_str()?
                    .to_owned(),
            )
        })
        .collect();
    names.sort();
    Ok(names)
}

/// Which binaries run, and the parts of names that their tests are to have.
fn choose(all: &[String], wanted: &[String]) -> Result<(Vec<String>, Vec<String>)> {
    let (mut chosen, filters): (Vec<String>, Vec<String>) =
        wanted.iter().cloned().partition(|name| all.contains(name));
    if let Some(unknown) = filters.iter().find(|name| name.starts_with(LAB)) {
        bail!("there is no test binary {unknown}");
    }
    if chosen.is_empty() {
        let by_default = |name: &&String| name.starts_with(LAB) || OTHERS.contains(&name.as_str());
        chosen = all.iter().filter(by_default).cloned().collect();
    }
    Ok((chosen, filters))
}

fn build(names: &[String]) -> Result<Vec<Binary>> {
    let mut command = workspace::cargo();
    command.args([
        "test",
        "--no-run",
        "--message-format=json-render-diagnostics",
        "--package",
        "blksnap-tests",
    ]);
    for name in names {
        command.args(["--test", name]);
    }
    let files = workspace::executables_of(&mut command, names)?;
    Ok(names
        .iter()
        .zip(files)
        .map(|(name, file)| Binary {
            name: name.clone(),
            file,
        })
        .collect())
}

/// One binary on one kernel.
struct Guest<'a> {
    kernel: &'a Kernel,
    binary: &'a Binary,
    agent: &'a Path,
    filters: &'a [String],
    /// Tests by their whole names, in place of `filters`.
    exactly: &'a [&'a str],
    timeout: Duration,
    log: &'a Path,
}

impl Guest<'_> {
    /// Runs it; what `uname -r` said, and the outcomes.
    fn run(&self) -> Result<(String, Tests)> {
        let (kernel, binary) = (&self.kernel.name, &self.binary.name);
        let started = Instant::now();
        let file =
            || fs::File::create(self.log).with_context(|| format!("creating {} failed", self.log.display()));
        // What is said is in the log at once, for who waits.
        let (mut out, mut err) = (Tee(Vec::new(), file()?), Vec::new());
        let outcome = self
            .machine()
            .run(&self.command(), &mut out, &mut err)
            .with_context(|| format!("running {binary} on {kernel} failed"))?;
        let said = String::from_utf8_lossy(&out.0);
        let complained = String::from_utf8_lossy(&err);
        let lost = match outcome.end {
            End::Exited(code) => format!("the test binary ended with {code} meanwhile"),
            End::TimedOut | End::Cut => format!("it did not end in {} s", self.timeout.as_secs()),
            End::Died => format!(
                "the guest died: {}",
                outcome
                    .complaints
                    .first()
                    .or(outcome.tail.last())
                    .cloned()
                    .unwrap_or_default()
            ),
        };
        let log = format!(
            "{said}\n--- standard error\n{complained}\n--- console: {:?}\n{}\n--- complaints of the kernel\n{}\n",
            outcome.end,
            outcome.tail.join("\n"),
            outcome.complaints.join("\n"),
        );
        fs::write(self.log, log).with_context(|| format!("writing {} failed", self.log.display()))?;
        let mut tests = read_events(&said, &lost);
        for name in self.exactly {
            let never = || Outcome::Lost("it never began, or there is no such test".to_owned());
            tests.entry((*name).to_owned()).or_insert_with(never);
        }
        let began = said.contains("{ \"type\": \"suite\"");
        if !began {
            bail!(
                "{binary} did not begin on {kernel} ({:?}): {}",
                outcome.end,
                complained
                    .lines()
                    .chain(outcome.tail.iter().map(String::as_str))
                    .last()
                    .unwrap_or_default()
            );
        }
        let count = |wanted: fn(&Outcome) -> bool| tests.values().filter(|outcome| wanted(outcome)).count();
        println!(
            "lab: {kernel}: {binary}: {} passed, {} not on this kernel, {} failed, {} complaints of the kernel, {} s",
            count(|outcome| matches!(outcome, Outcome::Passed)),
            count(|outcome| matches!(outcome, Outcome::Absent(_))),
            count(|outcome| matches!(outcome, Outcome::Failed(_) | Outcome::Lost(_))),
            outcome.complaints.len(),
            started.elapsed().as_secs()
        );
        for (name, seconds) in read_times(&said) {
            println!("lab: {kernel}: {binary}: {seconds:6.1} s: {name}");
        }
        for (name, _) in tests
            .iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Lost(_)))
        {
            println!("lab: {kernel}: {binary}: {name} was lost");
        }
        let release = said.lines().find_map(|line| line.strip_prefix("release "));
        Ok((release.unwrap_or_default().to_owned(), tests))
    }

    fn machine(&self) -> Machine {
        let scratch = |bus, mib: u64| Disk {
            bus,
            content: Content::Scratch(mib << 20),
        };
        let is_lab = self.binary.name.starts_with(LAB);
        let mut environment = vec![
            ("BLKSNAP_AGENT".to_owned(), self.agent.display().to_string()),
            (ORACLE_WRITES.0.to_owned(), ORACLE_WRITES.1.to_owned()),
            // What prints libtest's events is not stable yet.
            ("RUSTC_BOOTSTRAP".to_owned(), "1".to_owned()),
        ];
        for name in PASSED_ON {
            if let Ok(value) = std::env::var(name) {
                environment.push((name.to_owned(), value));
            }
        }
        Machine {
            kernel: self.kernel.clone(),
            cpus: self.kernel.cpus.unwrap_or(2),
            memory_mib: self.kernel.memory_mib.unwrap_or(2048),
            disks: vec![
                scratch(Bus::Virtio, if is_lab { 1024 } else { 4096 }),
                scratch(Bus::Virtio, 1024),
                scratch(Bus::Nvme, 64),
                scratch(Bus::NvmeMultipath, 64),
            ],
            shares: Vec::new(),
            // Of drivers that are built in somewhere.
            append: vec!["scsi_debug.dev_size_mb=64 null_blk.nr_devices=0".to_owned()],
            modules: vec!["loop".to_owned()],
            environment,
            timeout: self.timeout,
            console: false,
        }
    }

    fn command(&self) -> String {
        let mut command = "echo release $(uname -r); ".to_owned();
        let is_lab = self.binary.name.starts_with(LAB);
        if !is_lab {
            // Their files are to be on a file system with all of fallocate, as elsewhere; the root is in memory.
            // Not on /tmp: the tests themselves may be there.
            command += "mkdir -p /run/files && mkfs.ext4 -q /dev/vda && mount /dev/vda /run/files || exit; \
                        export TMPDIR=/run/files; ";
        }
        command += "exec ";
        command += &quote(&self.binary.file.display().to_string());
        command += " -Z unstable-options --format json --report-time --show-output";
        if is_lab {
            // They share the guest's disks.
            command += " --include-ignored --test-threads 1";
        }
        let words: Vec<&str> = if self.exactly.is_empty() {
            self.filters.iter().map(String::as_str).collect()
        } else {
            command += " --exact";
            self.exactly.to_vec()
        };
        for word in words {
            command += " ";
            command += &quote(word);
        }
        command
    }
}

/// Keeps what is written, and writes it to a file.
struct Tee(Vec<u8>, fs::File);

impl io::Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        self.1.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}

/// All outcomes as a table: a line for each test, a column for each kernel; then what there is to say.
fn table(results: &Results) -> String {
    let mut text = String::new();
    let mut remarks = String::new();
    let kernels: Vec<&str> = results.0.keys().map(String::as_str).collect();
    for (binary, names) in results.rows() {
        let width = names
            .iter()
            .map(|name| name.len())
            .max()
            .unwrap_or(0)
            .max(binary.len());
        let _ = write!(text, "\n{binary:width$}");
        for kernel in &kernels {
            let _ = write!(text, "  {kernel:>9}");
        }
        text.push('\n');
        for name in names {
            let _ = write!(text, "{name:width$}");
            for kernel in &kernels {
                let (word, remark) = match results.get(kernel, binary, name) {
                    None => ("-", None),
                    Some(Outcome::Passed) => ("passed", None),
                    Some(Outcome::Absent(why)) => ("absent", Some(why)),
                    Some(Outcome::Failed(why)) => ("FAILED", Some(why)),
                    Some(Outcome::Lost(why)) => ("LOST", Some(why)),
                };
                let _ = write!(text, "  {word:>9}");
                if let Some(remark) = remark {
                    let _ = writeln!(remarks, "{kernel}: {binary}: {name}: {word}: {remark}");
                }
            }
            text.push('\n');
        }
    }
    format!("{text}\n{remarks}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::results::OnKernel;

    #[test]
    fn the_labs_tests_and_some_others_run_by_default() {
        let all = ["backup", "lab_a", "lab_b", "oracle"].map(str::to_owned);
        let (chosen, filters) = choose(&all, &[]).unwrap();
        assert_eq!(chosen, ["lab_a", "lab_b", "oracle"]);
        assert!(filters.is_empty());
        let (chosen, filters) = choose(&all, &["lab_b".to_owned(), "dm_".to_owned()]).unwrap();
        assert_eq!(
            (chosen, filters),
            (vec!["lab_b".to_owned()], vec!["dm_".to_owned()])
        );
        choose(&all, &["lab_c".to_owned()]).unwrap_err();
    }

    #[test]
    fn a_table_has_a_line_for_each_test_and_says_why() {
        let tests = |outcome| [("a_test".to_owned(), outcome)].into();
        let on = |outcome| OnKernel {
            release: String::new(),
            binaries: [("lab_x".to_owned(), tests(outcome))].into(),
        };
        let results = Results(
            [
                ("6.1".to_owned(), on(Outcome::Passed)),
                ("7.2".to_owned(), on(Outcome::Absent("no md".to_owned()))),
            ]
            .into(),
        );
        let text = table(&results);
        assert!(text.contains("a_test     passed     absent"), "{text}");
        assert!(text.contains("7.2: lab_x: a_test: absent: no md"), "{text}");
        judge(&results, &Results::default()).unwrap();
        let failed = Results([("6.1".to_owned(), on(Outcome::Failed("x".to_owned())))].into());
        judge(&failed, &Results::default()).unwrap_err();
    }
}
