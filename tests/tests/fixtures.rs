//! The fixtures themselves: a loop device comes, serves and goes without a trace.

use std::path::Path;

use blksnap_tests::{LoopDevice, LoopOptions, run};

#[test]
fn a_loop_device_leaves_nothing_behind() {
    let mut device = LoopDevice::new(64 << 20).unwrap();
    let (node, image) = (device.path().to_owned(), device.image());
    device.mkfs("ext4").unwrap();
    let mountpoint = device.mount().unwrap();
    std::fs::write(mountpoint.join("file"), b"content").unwrap();
    drop(device);
    assert!(!image.exists() && !mountpoint.exists());
    assert!(
        !run("losetup", ["--list", "--noheadings", "--output", "BACK-FILE"])
            .unwrap()
            .contains(&*image.to_string_lossy()),
        "{} is still attached",
        node.display()
    );
}

#[test]
fn a_partitioned_device_has_its_nodes() {
    let device = LoopDevice::with_options(
        64 << 20,
        &LoopOptions {
            partitions: vec![
                ("1MiB".to_owned(), "21MiB".to_owned()),
                ("21MiB".to_owned(), "100%".to_owned()),
            ],
            ..LoopOptions::default()
        },
    )
    .unwrap();
    for number in [1, 2] {
        let node = device.partition(number);
        assert!(
            Path::new("/sys/class/block")
                .join(node.file_name().unwrap())
                .exists()
        );
        assert!(node.exists(), "{}", node.display());
    }
}
