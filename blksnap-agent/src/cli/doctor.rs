//! `doctor`.

use std::process::ExitCode;

use anyhow::Result;

use super::{Output, args, print};
use crate::control::api::{CheckState, DoctorReport};
use crate::daemon::doctor;
use crate::tracker::{Tracker, TrackerConfig};

pub(super) fn run(options: &args::Doctor, output: Output) -> Result<ExitCode> {
    let config = TrackerConfig {
        btf: options.btf.clone(),
        ..TrackerConfig::default()
    };
    let load = || {
        Tracker::load(&config)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    let report = doctor::examine(&options.btf, &load);
    print(output, &report, text)?;
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn text(report: &DoctorReport) -> String {
    let width = report
        .checks
        .iter()
        .map(|check| check.name.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let mark = match check.state {
            CheckState::Ok => "ok  ",
            CheckState::Warning => "warn",
            CheckState::Failed => "FAIL",
        };
        text.push_str(&format!("{mark}  {:<width$}  {}\n", check.name, check.found));
        if !check.remedy.is_empty() {
            text.push_str(&format!(
                "{:width$}    -> {}\n",
                "",
                check.remedy,
                width = width + 4
            ));
        }
    }
    text.push_str(if report.ok {
        "\nThis machine can track and snapshot its devices.\n"
    } else {
        "\nThis machine can't track its devices yet: see the lines marked FAIL.\n"
    });
    text
}
