//! Lvm: what LVM says and does while a snapshot is held, and afterwards.

use anyhow::{Result, ensure};
use blksnap_agent::filter::dm::Condition;
use blksnap_tests::{LoopDevice, lab, read_device, run};

use crate::file_system;
use crate::scene::{Group, MIB, Scene, assert_restored, fill, lvm, ours, same, table};

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn lvm_goes_on() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(64 * MIB)?;
    let group = Group::new("dmlvm", disk.path())?;
    let node = group.thick("volume", 16)?;
    let other = group.thick("other", 4)?;
    let before = table(&node)?;
    let (snapshot, taken, bytes) = scene.take(&[&node], 32 * MIB)?;
    let lvs = lvm("lvs", &["--noheadings", "-o", "lv_name,lv_size", &group.name])?;
    ensure!(lvs.contains("volume") && lvs.contains("16.00m"), "{lvs}");
    lvm("vgck", &[&group.name])?;
    // Other volumes of the group are LVM's to change.
    lvm("lvextend", &["-L", "8M", &format!("{}/other", group.name)])?;
    ensure!(read_device(&other)?.len() as u64 == 8 * MIB);
    fill(&node, 0, 4 * MIB, 7)?;
    same(&taken.images[0], &bytes[0])?;
    scene.dm.release(snapshot)?;
    assert_restored(&scene, &[&node], &[before])?;
    lvm("vgck", &[&group.name])?;
    lvm("lvextend", &["-L", "24M", &format!("{}/volume", group.name)])?;
    let now = read_device(&node)?;
    ensure!(now.len() as u64 == 24 * MIB && now[..4 << 20].iter().all(|byte| *byte == 7));
    Ok(())
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn a_table_that_lvm_swaps_is_noticed() -> Result<()> {
    let scene = Scene::new()?;
    let disk = LoopDevice::new(64 * MIB)?;
    let group = Group::new("dmswap", disk.path())?;
    let node = group.thick("volume", 16)?;
    let (snapshot, taken, bytes) = scene.take(&[&node], 32 * MIB)?;
    let image = taken.images[0];
    same(&image, &bytes[0])?;
    lvm("lvextend", &["-L", "24M", &format!("{}/volume", group.name)])?;
    ensure!(scene.dm.check(snapshot, &image) == Condition::Swapped);
    let extended = table(&node)?;
    fill(&node, 0, 20 * MIB, 9)?;
    ensure!(
        scene
            .dm
            .take(
                crate::scene::snapshot(),
                &scene.origins(&[&node], MIB)?,
                &mut crate::scene::Witness::new(&[])?
            )
            .is_err()
    );
    scene.dm.release(snapshot)?;
    assert_restored(&scene, &[&node], &[extended])?;
    ensure!(read_device(&node)?[..20 << 20].iter().all(|byte| *byte == 9));
    ensure!(ours()?.is_empty());
    Ok(())
}

/// An array, stopped when dropped.
struct Array;

impl Drop for Array {
    fn drop(&mut self) {
        if let Err(error) = run("mdadm", ["--stop", "/dev/md77"]) {
            blksnap_tests::complain(format_args!("md77 stays: {error:#}"));
        }
    }
}

#[test]
#[ignore = "needs a kernel with device mapper: cargo xtask test --vm 6.12"]
fn ext4_on_lvm_on_md() -> Result<()> {
    lab::inside()?;
    for module in ["md_mod", "raid1"] {
        lab::load(module, &[]);
    }
    let disks = [LoopDevice::new(80 * MIB)?, LoopDevice::new(80 * MIB)?];
    let paths = disks.iter().map(|disk| disk.path().display().to_string());
    let fixed = [
        "--create",
        "/dev/md77",
        "--run",
        "--assume-clean",
        "--level=1",
        "--raid-devices=2",
        "--metadata=1.2",
    ];
    let words = fixed.map(str::to_owned).into_iter().chain(paths);
    run("mdadm", words)?;
    let _array = Array;
    let group = Group::new("dmmd", std::path::Path::new("/dev/md77"))?;
    file_system("ext4_on_lvm_on_md", &group.thick("volume", 64)?, "ext4")
}
