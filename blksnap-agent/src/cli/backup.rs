//! `backup`.

use std::fmt::Write as _;

use anyhow::Result;

use super::args;
use super::progress::Display;
use super::size::{duration, human};
use super::{Context, absolute, snapshot};
use crate::control::api::{self, BackupKind, BackupResult};

pub(super) async fn run(context: &Context, options: &args::Backup) -> Result<()> {
    let request = api::Backup {
        device: absolute(&options.device)?,
        target: absolute(&options.target)?,
        incremental: options.incremental,
        snapshot: options.snapshot,
        limits: snapshot::limits(&options.limits)?,
    };
    let mut display = Display::new(context.output);
    let result = context
        .client
        .run("/v1/backups", &request, |progress| display.show(progress))
        .await;
    display.end();
    context.print(&result?, text)
}

fn text(result: &BackupResult) -> String {
    let mut text = String::new();
    let kind = match &result.kind {
        BackupKind::Full { message, .. } => {
            if let Some(message) = message {
                // Writing to a string can't fail, here and below.
                let _ = writeln!(text, "full backup instead of an incremental one: {message}");
            }
            "full"
        }
        BackupKind::Incremental { .. } => "incremental",
    };
    let _ = writeln!(
        text,
        "{}: {kind} backup to {}, {} copied of {} in {} ({}/s)",
        result.device,
        result.target,
        human(result.copied_bytes),
        human(result.size),
        duration(result.seconds),
        human(rate(result.copied_bytes, result.seconds)),
    );
    let _ = writeln!(
        text,
        "{}, frozen {}, {} rounds, base {}:{}",
        result.consistency.label(),
        duration(result.frozen_seconds),
        result.rounds,
        result.taken.generation,
        result.taken.number,
    );
    text
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float becomes the nearest integer in range; this one is shown to people"
)]
fn rate(bytes: u64, seconds: f64) -> u64 {
    if seconds > 0.0 {
        (bytes as f64 / seconds) as u64
    } else {
        bytes
    }
}
