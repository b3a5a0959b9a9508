//! Table: what came of it, a line a device.

use std::fmt::Write as _;

/// The figures of one device between its two snapshots.
pub(crate) struct Row {
    pub(crate) device: String,
    pub(crate) kind: &'static str,
    /// Write operations that the programs saw.
    pub(crate) writes: u64,
    /// Blocks in which the two images differ.
    pub(crate) changed: u64,
    /// Blocks that the change map reports.
    pub(crate) reported: u64,
    /// Blocks that differ and are not reported.
    pub(crate) missed: u64,
    /// Bytes that the incremental backup copied.
    pub(crate) copied: u64,
    /// Bytes of the device.
    pub(crate) capacity: u64,
    /// Milliseconds that the file system was frozen.
    pub(crate) frozen_ms: f64,
}

/// The rows under their names.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<16} {:<5} {:>7} {:>14} {:>15} {:>7}  {:>19} {:>8}\n",
        "DEVICE", "FS", "WRITES", "BLOCKS WRITTEN", "BLOCKS REPORTED", "MISSED", "COPIED", "FROZEN"
    );
    for row in rows {
        let copied = format!("{} of {}", mib(row.copied), mib(row.capacity));
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "{:<16} {:<5} {:>7} {:>14} {:>15} {:>7}  {:>19} {:>5.0} ms",
            row.device, row.kind, row.writes, row.changed, row.reported, row.missed, copied, row.frozen_ms
        );
    }
    text
}

/// Bytes in MiB.
pub(crate) fn mib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 10.0 {
        format!("{mib:.1} MiB")
    } else {
        format!("{mib:.0} MiB")
    }
}
