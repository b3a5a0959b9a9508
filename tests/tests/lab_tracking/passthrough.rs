//! Passthrough: commands past the block layer that write. They end the generation, since nobody can say what they
//! changed.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::cbt::ResetReason;
use blksnap_tests::{lab, read_device, run};

use crate::subject;

/// The controllers of the NVMe disk `name`.
pub(crate) fn controllers(name: &OsStr) -> Result<Vec<String>> {
    let subsystem = Path::new("/sys/block").join(name).join("device");
    let mut names: Vec<String> = fs::read_dir(&subsystem)
        .with_context(|| format!("read {}", subsystem.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            name.strip_prefix("nvme")
                .is_some_and(|rest| rest.parse::<u32>().is_ok())
        })
        .collect();
    names.sort();
    Ok(names)
}

/// The disk of the kernel's SCSI driver for tests.
pub(crate) fn scsi_disk() -> Result<PathBuf> {
    lab::inside()?;
    lab::load("sd_mod", &[]);
    lab::load("sg", &[]);
    lab::load("scsi_debug", &["dev_size_mb=64", "lbpu=1", "lbpws=1", "delay=0"]);
    let driver = Path::new("/sys/bus/pseudo/drivers/scsi_debug");
    if !driver.exists() {
        return lab::absent("scsi_debug");
    }
    for _ in 0..100 {
        for entry in fs::read_dir("/sys/block")? {
            let name = entry?.file_name();
            let model = fs::read_to_string(Path::new("/sys/block").join(&name).join("device/model"));
            let node = Path::new("/dev").join(&name);
            if model.is_ok_and(|model| model.trim() == "scsi_debug") && node.exists() {
                return Ok(node);
            }
        }
        thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("scsi_debug made no disk")
}

/// `write` writes past the block layer, and the generation ends for that reason.
fn ends_the_generation(
    node: &Path,
    read: impl FnOnce() -> Result<()>,
    write: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let subject = subject(&[node])?;
    let device = subject.devices().next().context("it is tracked")?;
    let before = read_device(node)?;
    read()?;
    ensure!(
        device.check_doubt().is_none(),
        "a command that reads is no reason for doubt"
    );
    write()?;
    ensure!(
        read_device(node)? != before,
        "the command changed nothing: it shows nothing"
    );
    let doubt = device.check_doubt();
    ensure!(doubt == Some(ResetReason::PassthroughWrite), "{doubt:?}");
    let (taken, _) = device.take()?;
    ensure!(taken.reset == Some(ResetReason::PassthroughWrite), "{taken:?}");
    Ok(())
}

/// An NVMe read or write of 4 KiB at byte 8192, as a command.
fn nvme_command(node: &Path, opcode: &str, direction: &str, file: &Path) -> Result<()> {
    let sector = fs::read_to_string(
        Path::new("/sys/block")
            .join(node.file_name().context("a name")?)
            .join("queue/logical_block_size"),
    )?;
    let sector: u64 = sector.trim().parse()?;
    run(
        "nvme",
        [
            "io-passthru".to_owned(),
            node.display().to_string(),
            format!("--opcode={opcode}"),
            "--namespace-id=1".to_owned(),
            format!("--cdw10={}", 8192 / sector),
            format!("--cdw12={}", 4096 / sector - 1),
            "--data-len=4096".to_owned(),
            direction.to_owned(),
            format!("--input-file={}", file.display()),
        ],
    )
    .map(drop)
}

fn nvme_passthrough(node: &Path) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    let bytes: Vec<u8> = (0..4096).map(|_| rand::random::<u8>() | 1).collect();
    fs::write(file.path(), bytes)?;
    ends_the_generation(
        node,
        || nvme_command(node, "2", "--read", &file.path().with_extension("read")),
        || nvme_command(node, "1", "--write", file.path()),
    )
}

#[test]
#[ignore = "needs an NVMe disk: cargo xtask test --vm 6.12"]
fn nvme_io_passthru() -> Result<()> {
    nvme_passthrough(&lab::nvme(false)?)
}

#[test]
#[ignore = "needs an NVMe disk with two controllers: cargo xtask test --vm 6.12"]
fn nvme_multipath_io_passthru() -> Result<()> {
    nvme_passthrough(&lab::nvme(true)?)
}

#[test]
#[ignore = "needs a SCSI disk: cargo xtask test --vm 6.12"]
fn sg_dd() -> Result<()> {
    let node = scsi_disk()?;
    let disk = node.display();
    let one = |from: String, to: String, flags: &str| {
        run(
            "sg_dd",
            [
                from,
                to,
                "bs=512".to_owned(),
                "count=8".to_owned(),
                flags.to_owned(),
            ],
        )
        .map(drop)
    };
    ends_the_generation(
        &node,
        || one(format!("if={disk}"), "of=/dev/null".to_owned(), "iflag=sgio"),
        || one("if=/dev/urandom".to_owned(), format!("of={disk}"), "oflag=sgio"),
    )
}
