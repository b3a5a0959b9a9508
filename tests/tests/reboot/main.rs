//! Reboot: a change map goes on after a reboot where nothing was missed, and nowhere else.

mod machine;

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use machine::{BLOCK, MIB, Machine};

/// Longest wait for what happens soon. A bound against hanging for ever, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// The next generation began, for this reason, and a backup is right.
fn began_anew(machine: &Machine, before: &str, reason: &str) -> Result<()> {
    let (generation, why) = machine.generation()?;
    ensure!(
        why == reason,
        "{why} instead of {reason}: {}",
        machine.daemon.log()
    );
    ensure!(machine.backup()? == "full");
    let (after, _) = machine.generation()?;
    ensure!(after != before, "generation {generation} goes on");
    machine.write(3 * BLOCK, 4096)?;
    ensure!(machine.backup()? == "incremental");
    Ok(())
}

#[test]
fn a_proven_map_goes_on_again_and_again() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    for round in 1..4 {
        machine.write(round * BLOCK, 4096)?;
        machine.stop()?;
        machine.seal()?;
        machine.off()?;
        machine.on()?;
        ensure!(machine.files("seal")?.is_empty(), "the seal could be used again");
        ensure!(machine.generation()?.0 == generation, "{}", machine.daemon.log());
        machine.write((round + 100) * BLOCK, 4096)?;
        if round != 2 {
            ensure!(machine.backup()? == "incremental");
        }
    }
    ensure!(machine.backup()? == "incremental");
    Ok(())
}

#[test]
fn what_the_disk_counted_before_is_doubt() -> Result<()> {
    for (writes, sectors, discards) in [(1, 8, 0), (0, 0, 1)] {
        let mut machine = Machine::new()?;
        let (generation, _) = machine.generation()?;
        machine.stop()?;
        machine.off()?;
        machine.count(writes, sectors, discards)?;
        machine.on()?;
        began_anew(&machine, &generation, "continuity_unproven")?;
    }
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.stop()?;
    machine.off()?;
    machine.tell("inflight", "0 1")?;
    machine.on()?;
    began_anew(&machine, &generation, "continuity_unproven")
}

#[test]
fn a_damaged_seal_is_refused() -> Result<()> {
    for case in ["flip", "cut", "empty"] {
        let mut machine = Machine::new()?;
        let (generation, _) = machine.generation()?;
        machine.stop()?;
        let seal = machine.seal()?;
        let mut bytes = fs::read(&seal)?;
        let middle = bytes.len() / 2;
        match case {
            "flip" => bytes[middle] ^= 0x20,
            "cut" => bytes.truncate(middle),
            _ => bytes.clear(),
        }
        fs::write(&seal, bytes)?;
        machine.off()?;
        machine.on()?;
        began_anew(&machine, &generation, "state_damaged")?;
    }
    Ok(())
}

#[test]
fn a_seal_of_another_version_is_not_understood() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.stop()?;
    let seal = machine.seal()?;
    let mut bytes = fs::read(&seal)?;
    // The version of the container, and the checksum of the head.
    bytes[8] += 1;
    let sum = bytes[..60].iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    });
    bytes[60..64].copy_from_slice(&(!sum).to_le_bytes());
    fs::write(&seal, bytes)?;
    machine.off()?;
    machine.on()?;
    began_anew(&machine, &generation, "state_version")
}

#[test]
fn a_damaged_record_is_known_from_its_seal() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.write(9 * BLOCK, 4096)?;
    machine.stop()?;
    let record = machine.files("device")?.pop().context("no record")?;
    fs::write(record, "{")?;
    machine.off()?;
    machine.on()?;
    ensure!(machine.generation()?.0 == generation, "{}", machine.daemon.log());
    ensure!(machine.backup()? == "incremental");
    Ok(())
}

#[test]
fn another_capacity_is_another_map() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.stop()?;
    machine.grow(80 * MIB)?;
    machine.off()?;
    machine.on()?;
    let (_, reason) = machine.generation()?;
    ensure!(reason == "resized", "{reason}");
    fs::remove_file(machine.daemon.scratch().join("image"))?;
    ensure!(machine.backup()? == "full");
    ensure!(machine.generation()?.0 != generation);
    Ok(())
}

#[test]
fn a_crash_leaves_nothing_to_go_on_with() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.write(5 * BLOCK, 4096)?;
    machine.daemon.kill()?;
    machine.off()?;
    machine.on()?;
    began_anew(&machine, &generation, "continuity_unproven")?;
    // A seal is used once: after a proven start and a crash there is none.
    machine.reboot()?;
    let (generation, _) = machine.generation()?;
    ensure!(machine.backup()? == "incremental");
    machine.daemon.kill()?;
    machine.off()?;
    machine.on()?;
    began_anew(&machine, &generation, "continuity_unproven")
}

#[test]
fn other_content_is_seen_although_nothing_was_counted() -> Result<()> {
    // The first and the last bytes, and a block that changed last.
    for offset in [4096, 64 * MIB - 4096, 37 * MIB] {
        let mut machine = Machine::new()?;
        let (generation, _) = machine.generation()?;
        machine.write(37 * MIB, 4096)?;
        machine.stop()?;
        machine.off()?;
        machine.change(offset)?;
        machine.on()?;
        began_anew(&machine, &generation, "continuity_unproven")?;
    }
    Ok(())
}

#[test]
fn a_start_in_the_same_boot_proves_nothing() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.stop()?;
    machine.off()?;
    machine.same_boot()?;
    machine.on()?;
    began_anew(&machine, &generation, "continuity_unproven")
}

#[test]
fn a_boot_in_which_the_daemon_could_not_start_is_a_gap() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.stop()?;
    machine.off()?;
    machine.more = ["--btf", "/nonexistent"].map(Into::into).to_vec();
    ensure!(machine.on().is_err());
    // Where no fingerprint looks.
    machine.change(20 * MIB)?;
    machine.off()?;
    machine.more.clear();
    machine.on()?;
    began_anew(&machine, &generation, "continuity_unproven")
}

#[test]
fn tracking_that_went_on_in_the_kernel_needs_no_proof() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.stop()?;
    machine.seal()?;
    machine.write(7 * BLOCK, 4096)?;
    machine.count(1, 8, 0)?;
    machine.on()?;
    // Sealed or not: what the kernel saw is there, and the seal is not any more.
    ensure!(machine.files("seal")?.is_empty());
    ensure!(machine.files("device")?.len() == 1);
    ensure!(machine.generation()?.0 == generation);
    ensure!(machine.backup()? == "incremental");
    Ok(())
}

#[test]
fn another_disk_is_not_taken_for_the_one_that_was_tracked() -> Result<()> {
    let mut machine = Machine::new()?;
    machine.stop()?;
    machine.off()?;
    machine.tell("serial", "serial-2")?;
    machine.on()?;
    ensure!(machine.status()?.is_none(), "another disk is tracked by itself");
    ensure!(machine.daemon.log().contains("is not there"));
    machine.daemon.run(["attach", &machine.node()])?;
    let (_, reason) = machine.generation()?;
    ensure!(reason == "device_replaced", "{reason}");
    ensure!(
        machine.files("device")?.len() == 1,
        "the old record is in the way"
    );
    Ok(())
}

#[test]
fn a_disk_that_nothing_identifies_is_tracked_anew() -> Result<()> {
    let mut machine = Machine::untracked("stop")?;
    machine.tell("serial", "")?;
    machine.daemon.run(["attach", &machine.node()])?;
    let (generation, _) = machine.generation()?;
    machine.reboot()?;
    began_anew(&machine, &generation, "continuity_unproven")
}

#[test]
fn a_disk_that_comes_late_is_tracked_then() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    machine.write(2 * BLOCK, 4096)?;
    machine.stop()?;
    machine.off()?;
    machine.unplug()?;
    machine.on()?;
    ensure!(machine.status()?.is_none());
    machine.plug("serial-1")?;
    let started = Instant::now();
    while machine.status()?.is_none() {
        ensure!(started.elapsed() < PATIENCE, "{}", machine.daemon.log());
        sleep(Duration::from_millis(50));
    }
    ensure!(machine.generation()?.0 == generation);
    ensure!(machine.backup()? == "incremental");

    // The start waits for it.
    machine.stop()?;
    machine.off()?;
    machine.unplug()?;
    machine.more = ["--device-wait", "60"].map(Into::into).to_vec();
    let plugged = machine.plug_later(Duration::from_millis(500))?;
    machine.on()?;
    plugged.join().unwrap()?;
    ensure!(machine.generation()?.0 == generation);
    Ok(())
}

#[test]
fn a_disk_is_known_under_another_name() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    let before = machine.node();
    machine.write(2 * BLOCK, 4096)?;
    machine.stop()?;
    machine.off()?;
    // The old one stays, and is another disk.
    machine.rename()?;
    machine.on()?;
    ensure!(machine.node() != before || machine.status()?.is_some());
    ensure!(machine.generation()?.0 == generation, "{}", machine.daemon.log());
    ensure!(machine.files("device")?.len() == 1);
    ensure!(machine.backup()? == "incremental");
    Ok(())
}

#[test]
fn what_may_still_be_written_is_not_sealed() -> Result<()> {
    let mut machine = Machine::new()?;
    let (generation, _) = machine.generation()?;
    // This test has it open for writing.
    let writer = fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(machine.disk.path())?;
    machine.stop()?;
    let log = machine.daemon.log();
    ensure!(log.contains("open for writing"), "{log}");
    ensure!(machine.files("seal")?.is_empty());
    drop(writer);
    machine.off()?;
    machine.on()?;
    began_anew(&machine, &generation, "continuity_unproven")?;

    machine.disk.mkfs("ext4")?;
    machine.disk.mount()?;
    machine.stop()?;
    let log = machine.daemon.log();
    ensure!(log.contains("is in use"), "{log}");
    ensure!(machine.files("seal")?.is_empty());
    machine.disk.unmount()?;

    // A reader is no harm.
    machine.on()?;
    let reader = fs::File::open(machine.disk.path())?;
    machine.stop()?;
    machine.seal()?;
    drop(reader);
    Ok(())
}

#[test]
fn only_a_stopping_system_is_sealed_unless_told() -> Result<()> {
    for policy in ["shutdown", "never"] {
        let mut machine = Machine::untracked(policy)?;
        machine.daemon.run(["attach", &machine.node()])?;
        machine.stop()?;
        ensure!(machine.files("seal")?.is_empty(), "{policy}");
        ensure!(machine.files("device")?.len() == 1, "{policy}");
    }
    Ok(())
}

#[test]
fn what_is_detached_or_purged_does_not_come_back() -> Result<()> {
    let mut machine = Machine::new()?;
    machine.daemon.run(["detach", &machine.node()])?;
    ensure!(machine.files("device")?.is_empty());
    machine.reboot()?;
    ensure!(machine.status()?.is_none());

    machine.daemon.run(["attach", &machine.node()])?;
    machine.stop()?;
    machine.seal()?;
    let daemon = &machine.daemon;
    daemon.run([
        "daemon".as_ref(),
        "--purge".as_ref(),
        "--bpffs".as_ref(),
        daemon.bpffs().as_os_str(),
        "--runtime-dir".as_ref(),
        daemon.runtime_dir().as_os_str(),
        "--state-dir".as_ref(),
        daemon.state_dir().as_os_str(),
    ])?;
    ensure!(machine.files("seal")?.is_empty() && machine.files("device")?.is_empty());
    machine.on()?;
    ensure!(machine.status()?.is_none());
    Ok(())
}

#[test]
fn a_state_directory_has_one_daemon() -> Result<()> {
    let machine = Machine::new()?;
    let scratch = machine.daemon.scratch();
    let state = machine.daemon.state_dir();
    let answer = machine.daemon.try_run([
        "daemon".as_ref(),
        "--no-pins".as_ref(),
        "--runtime-dir".as_ref(),
        scratch.join("run2").as_os_str(),
        "--storage".as_ref(),
        scratch.join("storage2").as_os_str(),
        "--state-dir".as_ref(),
        state.as_os_str(),
    ])?;
    ensure!(
        answer.code != 0 && answer.stderr.contains("another --state-dir"),
        "{answer:?}"
    );
    Ok(())
}
