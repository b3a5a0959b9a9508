//! Counters of disks that the test makes.

use super::*;
use crate::disk::identity::tests::{FakeSysfs, device, stat};

const SDA: &str = "pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda";
const SDB: &str = "pci0000:00/0000:00:1f.2/ata2/host1/target1:0:0/1:0:0:0/block/sdb";

/// A `stat` with writes, sectors, discards and discarded sectors.
fn written(writes: u64, sectors: u64, discards: u64, discarded: u64) -> String {
    let mut fields = [7; 17];
    (fields[4], fields[6], fields[11], fields[13]) = (writes, sectors, discards, discarded);
    stat(fields)
}

fn machine() -> FakeSysfs {
    let sysfs = FakeSysfs::new();
    sysfs.add(device(8, 0), SDA, &[]);
    for (minor, name) in [(1, "sda1"), (2, "sda2")] {
        let number = minor.to_string();
        sysfs.add(
            device(8, minor),
            &format!("{SDA}/{name}"),
            &[("partition", &number), ("start", "64")],
        );
    }
    sysfs.add(device(8, 16), SDB, &[]);
    sysfs
}

fn counters(sysfs: &FakeSysfs, major: u32, minor: u32) -> Vec<WriteCounters> {
    let grounds = grounds(sysfs.path(), device(major, minor)).unwrap();
    grounds.iter().map(|ground| ground.counters().unwrap()).collect()
}

fn names(sysfs: &FakeSysfs, major: u32, minor: u32) -> Vec<String> {
    let grounds = grounds(sysfs.path(), device(major, minor)).unwrap();
    grounds.into_iter().map(|ground| ground.name).collect()
}

#[test]
fn every_kind_of_write_counts() {
    let sysfs = machine();
    assert!(counters(&sysfs, 8, 16)[0].is_zero());
    for (text, want) in [
        (
            written(1, 8, 0, 0),
            WriteCounters {
                writes: 1,
                sectors: 8,
                ..WriteCounters::default()
            },
        ),
        (
            written(0, 0, 2, 64),
            WriteCounters {
                discards: 2,
                discarded: 64,
                ..WriteCounters::default()
            },
        ),
        (written(0, 0, 0, 0), WriteCounters::default()),
    ] {
        sysfs.set(SDB, &[("stat", &text)]);
        assert_eq!(counters(&sysfs, 8, 16), [want]);
        assert_eq!(want.is_zero(), want == WriteCounters::default());
    }
    sysfs.set(SDB, &[("inflight", "       5        1\n")]);
    assert_eq!(counters(&sysfs, 8, 16)[0].in_flight, 1);
    assert!(!counters(&sysfs, 8, 16)[0].is_zero());
}

#[test]
fn a_partition_counts_its_own_and_what_went_past_all() {
    let sysfs = machine();
    let (first, second) = (format!("{SDA}/sda1"), format!("{SDA}/sda2"));
    // The other one is in use: the disk has the sum.
    sysfs.set(&second, &[("stat", &written(10, 80, 1, 8))]);
    sysfs.set(SDA, &[("stat", &written(10, 80, 1, 8)), ("inflight", "0 3")]);
    assert!(counters(&sysfs, 8, 1)[0].is_zero());
    assert_eq!(counters(&sysfs, 8, 2)[0].writes, 10);
    assert_eq!(counters(&sysfs, 8, 0)[0].sectors, 80);
    // Through the disk's node.
    sysfs.set(SDA, &[("stat", &written(11, 88, 1, 8))]);
    let past = counters(&sysfs, 8, 1)[0];
    assert_eq!((past.writes, past.sectors, past.discards), (1, 8, 0));
    // Its own.
    sysfs.set(&first, &[("stat", &written(1, 8, 0, 0))]);
    assert_eq!(counters(&sysfs, 8, 1)[0].writes, 1);
    assert_eq!(counters(&sysfs, 8, 2)[0].writes, 10);
    // A table that was read anew: the partitions begin at 0, the disk does not.
    for place in [&first, &second] {
        sysfs.set(place, &[("stat", &written(0, 0, 0, 0))]);
    }
    assert_eq!(counters(&sysfs, 8, 1)[0].writes, 11);
    sysfs.set(&first, &[("inflight", "0 1")]);
    assert_eq!(counters(&sysfs, 8, 1)[0].in_flight, 1);
}

#[test]
fn a_stack_is_judged_by_the_disks_below() {
    let sysfs = machine();
    sysfs.add(device(253, 0), "virtual/block/dm-0", &[]);
    sysfs.stack("virtual/block/dm-0", &format!("{SDA}/sda1"));
    sysfs.stack("virtual/block/dm-0", SDB);
    sysfs.add(device(253, 1), "virtual/block/dm-1", &[]);
    sysfs.stack("virtual/block/dm-1", "virtual/block/dm-0");
    sysfs.stack("virtual/block/dm-1", SDB);
    assert_eq!(names(&sysfs, 253, 1), ["sda1", "sdb"]);
    sysfs.set(SDB, &[("stat", &written(0, 0, 1, 8))]);
    let all = counters(&sysfs, 253, 1);
    assert!(all[0].is_zero() && all[1].discards == 1);
    // A partition of an array.
    sysfs.add(device(9, 0), "virtual/block/md0", &[]);
    sysfs.stack("virtual/block/md0", SDB);
    sysfs.add(
        device(259, 0),
        "virtual/block/md0/md0p1",
        &[("partition", "1"), ("start", "64")],
    );
    assert_eq!(names(&sysfs, 259, 0), ["sdb"]);
    // One that stands on itself ends.
    sysfs.add(device(253, 2), "virtual/block/dm-2", &[]);
    sysfs.stack("virtual/block/dm-2", "virtual/block/dm-2");
    let error = grounds(sysfs.path(), device(253, 2)).unwrap_err();
    assert_eq!(error, Unprovable::Virtual("dm-2".to_owned()));
}

#[test]
fn what_comes_and_goes_proves_nothing() {
    let sysfs = machine();
    for (minor, place) in [
        (7, "virtual/block/loop0"),
        (8, "virtual/block/zram0"),
        (9, "virtual/block/nbd0"),
    ] {
        sysfs.add(device(7, minor), place, &[]);
        let error = grounds(sysfs.path(), device(7, minor)).unwrap_err();
        assert!(matches!(error, Unprovable::Virtual(_)), "{error}");
    }
    sysfs.add(device(253, 0), "virtual/block/dm-0", &[]);
    sysfs.stack("virtual/block/dm-0", SDB);
    sysfs.stack("virtual/block/dm-0", "virtual/block/loop0");
    assert!(grounds(sysfs.path(), device(253, 0)).is_err());
    // Many paths to one disk, made by the driver.
    sysfs.add(device(259, 9), "virtual/nvme-subsystem/nvme-subsys0/nvme0n1", &[]);
    assert_eq!(names(&sysfs, 259, 9), ["nvme0n1"]);

    sysfs.add(
        device(8, 32),
        "pci0000:00/usb1/1-2/1-2:1.0/host6/target6:0:0/6:0:0:0/block/sdc",
        &[],
    );
    sysfs.add(device(11, 0), "pci0000:00/ata3/block/sr0", &[("removable", "1")]);
    for (major, minor) in [(8, 32), (11, 0)] {
        let error = grounds(sysfs.path(), device(major, minor)).unwrap_err();
        assert!(matches!(error, Unprovable::Removable(_)), "{error}");
    }
    sysfs.set(SDB, &[("queue/iostats", "0\n")]);
    let error = grounds(sysfs.path(), device(8, 16)).unwrap_err();
    assert_eq!(error, Unprovable::NotCounting("sdb".to_owned()));
}

#[test]
fn what_is_not_told_is_not_zero() {
    let sysfs = machine();
    assert!(grounds(sysfs.path(), device(8, 99)).is_err());
    let ground = grounds(sysfs.path(), device(8, 16)).unwrap();
    // As kernels before 4.18 have it, without discards.
    for text in ["", "0 0 0 0 0 0 0 0 0 0 0", "0 0 0 0 0 0 0 0 0 0 0 x 0 0 0 0 0"] {
        sysfs.set(SDB, &[("stat", text)]);
        let error = ground[0].counters().unwrap_err();
        assert!(matches!(error, Unprovable::Unreadable { .. }), "{error}");
    }
    sysfs.set(SDB, &[("stat", &written(0, 0, 0, 0)), ("inflight", "0")]);
    assert!(ground[0].counters().is_err());
    std::fs::remove_file(sysfs.path().join("devices").join(SDB).join("queue/iostats")).unwrap();
    assert!(grounds(sysfs.path(), device(8, 16)).is_err());
}
