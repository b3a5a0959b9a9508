//! Issue: nanoseconds of the program that looks for passthrough commands, for each ordinary request of a driver that
//! works on requests.

use std::process::Command;

use anyhow::{Context as _, Result};
use blksnap_tests::{Daemon, LoopDevice};

use crate::programs::{ISSUE, Measuring, Runs, program_of};
use crate::{Bench, REPEATS};

/// What the writer does: no two requests can be merged.
const JOB: &str = "--rw=randwrite --bs=4k --direct=1 --ioengine=psync --time_based --runtime=2";

pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let disk = LoopDevice::new(256 << 20)?;
    let daemon = Daemon::start()?;
    let program = program_of(daemon.pid().context("the daemon runs")?, ISSUE)?;
    daemon.run(["attach".as_ref(), disk.path().as_os_str()])?;
    let write = || {
        let mut command = Command::new("fio");
        command
            .args(["--name=writer", "--allow_file_create=0"])
            .arg(format!("--filename={}", disk.path().display()))
            .args(JOB.split_whitespace());
        bench.interrupt.output(&mut command)
    };
    // The file behind the device gets its blocks.
    write()?;
    let measuring = Measuring::start()?;
    let samples = (1..=REPEATS)
        .map(|round| {
            bench.step(&format!("track: track_issue_ns, {round} of {REPEATS}"))?;
            let before = Runs::of(program)?;
            write()?;
            Runs::of(program)?.mean_since(before)
        })
        .collect::<Result<Vec<f64>>>()?;
    drop(measuring);
    let job = format!("fio {JOB}, on a loop device");
    bench.report.add("track_issue_ns", "<= 30", job, samples);
    Ok(())
}
