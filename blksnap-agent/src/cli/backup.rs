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
        "{}: {kind} backup to {}: {} copied in {} ({}/s), an image of {}",
        result.device,
        result.target,
        human(result.copied_bytes),
        duration(result.seconds),
        human(rate(result.copied_bytes, result.seconds)),
        human(result.size),
    );
    let rounds = match result.rounds {
        0 => String::new(),
        1 => ", written meanwhile and copied again in 1 round".to_owned(),
        rounds => format!(", written meanwhile and copied again in {rounds} rounds"),
    };
    let _ = writeln!(
        text,
        "{}{rounds}, base {}:{}",
        snapshot::consistency(result.consistency, result.frozen_seconds),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{Base, Consistency};
    use crate::units::Generation;

    #[test]
    fn a_backup_is_told_in_two_lines() {
        let base = Base {
            generation: Generation::new(uuid::Uuid::nil()),
            number: 4,
        };
        let mut result = BackupResult {
            device: "/dev/sdb1".to_owned(),
            target: "/srv/sdb1.img".to_owned(),
            kind: BackupKind::Incremental { base },
            size: 1 << 30,
            copied_bytes: 64 << 20,
            rounds: 0,
            consistency: Consistency::FileSystem,
            frozen_seconds: 0.012,
            seconds: 0.5,
            taken: base,
        };
        assert_eq!(
            text(&result),
            "/dev/sdb1: incremental backup to /srv/sdb1.img: 64 MiB copied in 500.0 ms (128 MiB/s), an image of 1 GiB\n\
             file system consistent, frozen 12.0 ms, base 00000000-0000-0000-0000-000000000000:4\n"
        );
        result.kind = BackupKind::Full {
            reason: Some("wrapped".to_owned()),
            message: Some("the period numbers ran out".to_owned()),
        };
        result.consistency = Consistency::Crash;
        let text = text(&result);
        assert!(text.starts_with("full backup instead of an incremental one: the period numbers ran out\n"));
        assert!(
            text.contains("\ncrash consistent, nothing was frozen, base"),
            "{text}"
        );
    }
}
