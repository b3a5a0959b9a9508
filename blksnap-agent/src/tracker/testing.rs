//! Testing: a loop device for tests that need the inside of the tracker; others use the fixtures of the test crate.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::process::Command;

use crate::disk::BlockDevice;
use crate::sys::AlignedBuffer;

/// A loop device of a test's own, detached when dropped.
#[derive(Debug)]
pub(super) struct TestLoop {
    pub(super) node: PathBuf,
    _directory: tempfile::TempDir,
}

impl TestLoop {
    pub(super) fn new(bytes: u64) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("blksnap-unit-")
            .tempdir()
            .unwrap();
        let image = directory.path().join("disk.img");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&image)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Self {
            node: PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()),
            _directory: directory,
        }
    }

    pub(super) fn device(&self) -> BlockDevice {
        BlockDevice::open(&self.node).unwrap()
    }

    pub(super) fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.node)
            .unwrap()
    }

    /// Writes `length` bytes of `byte` past the page cache.
    pub(super) fn write(&self, offset: u64, length: usize, byte: u8) {
        let mut buffer = AlignedBuffer::zeroed(length);
        buffer.as_mut_slice().fill(byte);
        self.open().write_all_at(buffer.as_slice(), offset).unwrap();
    }
}

impl Drop for TestLoop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.node).status();
        assert!(
            detached.is_ok_and(|status| status.success()) || std::thread::panicking(),
            "{} stays",
            self.node.display()
        );
    }
}
