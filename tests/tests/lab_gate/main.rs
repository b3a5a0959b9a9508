//! The gate on kernels that can hold writes: every byte of an image is compared, under load, and what can't be kept is
//! said.

mod agent;
mod kills;
mod lost;
mod own;
mod park;
mod root;
mod scene;
mod takes;

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, ensure};
use blksnap_agent::filter::gate::{GateOptions, Preemption, Priority, Reading, Wish};
use blksnap_common::gate::{COPIES, broken};
use blksnap_tests::lab;

use scene::{Load, MIB, Scene, partition};

/// In an emulated guest time runs in jerks: bounds that only a real machine keeps are wide here.
pub(crate) fn options() -> GateOptions {
    GateOptions {
        deadline: Duration::from_secs(10),
        silence: Duration::from_secs(8),
        ..GateOptions::default()
    }
}

/// One writer after the other: each first write waits, each second one does not.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn the_first_write_of_a_unit_waits_and_no_other() -> Result<()> {
    let scene = Scene::new(&partition(32 * MIB)?, options())?;
    ensure!(matches!(scene.gate().reading(), Reading::WholeDisk(_)));
    let image = scene.take()?;
    let load = Load::new(&scene);
    for _ in 0..2 {
        for block in 0..16 {
            load.write(block * 8192, 4096)?;
        }
    }
    let state = scene.gate().state();
    ensure!(state.broken == 0, "{state:?}");
    ensure!(state.held == 16 && state.requests >= 16, "{state:?}");
    ensure!(scene.gate().passed()? >= 16, "{} passed", scene.gate().passed()?);
    scene.compare(&image)?;
    scene.release(&image);
    let held = scene.gate().state().held;
    load.write(20 * 8192, 4096)?;
    ensure!(
        scene.gate().state().held == held,
        "a write waited with no snapshot held"
    );
    Ok(())
}

pub(crate) fn exact_under_load(scene: &Scene, threads: usize, time: Duration) -> Result<()> {
    let image = scene.take()?;
    let load = Load::new(scene);
    let written = load.run(threads, time)?;
    scene.compare(&image)?;
    let state = scene.gate().state();
    println!("{threads} writers, {written} writes: {state:?}");
    println!(
        "mean hold {} us, longest {} us",
        state.held_nanoseconds / state.held.max(1) / 1000,
        state.longest / 1000
    );
    ensure!(state.broken == 0, "{state:?}");
    ensure!(written > 0 && state.held > 0, "{written} writes: {state:?}");
    scene.release(&image);
    Ok(())
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn an_image_of_a_partition_is_exact() -> Result<()> {
    let scene = Scene::new(&partition(32 * MIB)?, options())?;
    exact_under_load(&scene, 4, Duration::from_secs(8))
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn an_image_of_a_whole_disk_is_exact() -> Result<()> {
    let disk = lab::virtio(1)?;
    let scene = Scene::new(&disk, options())?;
    ensure!(matches!(scene.gate().reading(), Reading::Alias(_)));
    exact_under_load(&scene, 4, Duration::from_secs(8))?;
    let alias = std::path::PathBuf::from(format!("{}255", disk.display()));
    ensure!(alias.exists());
    drop(scene);
    ensure!(!alias.exists(), "{} is left", alias.display());
    Ok(())
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn preserving_without_priority_and_batches() -> Result<()> {
    let options = GateOptions {
        priority: Priority::Usual,
        batches: false,
        ..options()
    };
    let scene = Scene::new(&partition(32 * MIB)?, options)?;
    exact_under_load(&scene, 4, Duration::from_secs(8))
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn real_time_priority_and_many_writers() -> Result<()> {
    let options = GateOptions {
        priority: Priority::Fixed(50),
        ..options()
    };
    let scene = Scene::new(&partition(64 * MIB)?, options)?;
    exact_under_load(&scene, COPIES - 2, Duration::from_secs(10))
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn many_writers_wait_at_once() -> Result<()> {
    let scene = Scene::new(&partition(64 * MIB)?, options())?;
    exact_under_load(&scene, COPIES - 2, Duration::from_secs(10))?;
    let state = scene.gate().state();
    ensure!(state.copies > 1, "only one writer waited on a CPU: {state:?}");
    Ok(())
}

#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn two_snapshots_share_a_gate() -> Result<()> {
    let scene = Scene::new(&partition(32 * MIB)?, options())?;
    let first = scene.take()?;
    let load = Load::new(&scene);
    load.run(2, Duration::from_secs(3))?;
    let between = scene.read_device()?;
    let second = scene.take()?;
    load.run(2, Duration::from_secs(3))?;
    scene.compare(&first)?;
    scene.compare_to(&second, &between)?;
    ensure!(scene.gate().state().broken == 0);
    scene.release(&first);
    load.run(2, Duration::from_secs(2))?;
    scene.compare_to(&second, &between)
}

/// More writers on a CPU than copies: one gets past, the auditor sees it, and the snapshot says so.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn a_writer_that_gets_past_breaks_the_snapshot() -> Result<()> {
    let options = GateOptions {
        copies: 1,
        ..options()
    };
    let scene = Scene::new(&partition(32 * MIB)?, options)?;
    let image = scene.take()?;
    Load::new(&scene).run(12, Duration::from_secs(5))?;
    let state = scene.gate().state();
    ensure!(
        state.broken & broken::BYPASSED != 0 && state.bypassed > 0,
        "{state:?}"
    );
    let error = scene.compare(&image).err().map(|error| format!("{error:#}"));
    ensure!(
        error
            .as_ref()
            .is_some_and(|error| error.contains("broken") || error.contains("no longer held")),
        "{error:?}"
    );
    ensure!(scene.told().load(Ordering::Acquire) == 1);
    Ok(())
}

/// Writers go on with no error when nobody serves them in time.
#[test]
#[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
fn a_deadline_that_passes_breaks_the_snapshot() -> Result<()> {
    let options = GateOptions {
        deadline: Duration::from_millis(2),
        ..GateOptions::default()
    };
    let scene = Scene::new(&partition(32 * MIB)?, options)?;
    // Old data can't be kept while this is held.
    let image = scene.take_slowly(Duration::from_millis(300))?;
    let load = Load::new(&scene);
    load.run(2, Duration::from_secs(2))?;
    let state = scene.gate().state();
    ensure!(state.broken & broken::DEADLINE != 0, "{state:?}");
    ensure!(scene.compare(&image).is_err(), "a lost image was read");
    ensure!(scene.told().load(Ordering::Acquire) == 1);
    // The next one is whole.
    scene.release(&image);
    Ok(())
}

/// A kernel that does not preempt: writers keep every processor from who would let them go on, until the deadline. They
/// go on then without an error, and the snapshot says that it is lost.
#[test]
#[ignore = "needs a choice of preemption: cargo xtask test --vm 6.12"]
fn without_preemption_the_deadline_passes() -> Result<()> {
    lab::inside()?;
    let preempts = |how| std::fs::write("/sys/kernel/debug/sched/preempt", how);
    if preempts("voluntary").is_err() {
        return lab::absent("a choice of preemption with voluntary");
    }
    ensure!(!Preemption::now().can_spin(), "{}", Preemption::now());
    let options = GateOptions {
        silence: Duration::from_secs(8),
        technique: Wish::Spin,
        ..GateOptions::default()
    };
    let ended = Scene::without_preemption(&partition(32 * MIB)?, options).and_then(|scene| {
        let image = scene.take()?;
        let written = Load::new(&scene).run(8, Duration::from_secs(4))?;
        let state = scene.gate().state();
        println!("{written} writes: {state:?}");
        ensure!(state.broken & broken::DEADLINE != 0, "{state:?}");
        ensure!(written > 100, "writes do not go on: {written}");
        ensure!(scene.compare(&image).is_err(), "a lost image was read");
        ensure!(scene.told().load(Ordering::Acquire) == 1);
        Ok(())
    });
    preempts("full")?;
    ended
}
