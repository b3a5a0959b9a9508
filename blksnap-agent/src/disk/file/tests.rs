//! Tests of the file disk on regular files; on block devices they are in the `tests` crate.

use super::*;
use crate::disk::testing::conforms;

const SIZE: u64 = 1 << 20;

fn sparse(directory: &str) -> FileDisk {
    let file = tempfile::tempfile_in(directory).unwrap();
    file.set_len(SIZE).unwrap();
    FileDisk::new("x", Arc::new(file), SIZE)
}

#[test]
fn it_is_a_disk() {
    for _ in 0..10 {
        conforms(&sparse("/var/tmp"), rand::random(), 100);
        // tmpfs punches holes and knows no zero ranges.
        conforms(&sparse("/dev/shm"), rand::random(), 100);
    }
}

#[test]
fn a_file_that_is_too_short_is_an_error_and_no_zeroes() {
    let disk = sparse("/var/tmp");
    disk.file.set_len(4096).unwrap();
    let mut buffer = [0; 1024];
    disk.read_at(&mut buffer, 3072).unwrap();
    assert!(disk.read_at(&mut buffer, 3584).is_err());
    assert!(disk.allocation(0, 8192, 9).is_err());
}

#[test]
fn a_flush_that_failed_fails_for_good() {
    // A pipe can't be synced, and says so: EINVAL.
    let (end, _other) = nix::unistd::pipe().unwrap();
    let disk = FileDisk::new("x", Arc::new(File::from(end)), 0);
    let errno = || disk.flush().unwrap_err().raw_os_error();
    assert_eq!((errno(), errno()), (Some(libc::EINVAL), Some(libc::EIO)));
}

#[test]
fn a_file_is_claimed_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, [0; 4096]).unwrap();
    let first = FileDisk::open(&path, true).unwrap();
    first.claim().unwrap();
    first.claim().unwrap();
    for writable in [false, true] {
        let error = FileDisk::open(&path, writable)
            .unwrap()
            .claim()
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(&format!(
                "{} is in use: another program has locked it",
                path.display()
            )),
            "{error}"
        );
    }
    drop(first);
    // Readers share it with each other, not with a writer.
    let reader = FileDisk::open(&path, false).unwrap();
    reader.claim().unwrap();
    FileDisk::open(&path, false).unwrap().claim().unwrap();
    assert!(FileDisk::open(&path, true).unwrap().claim().is_err());
}

#[test]
fn what_is_no_disk_is_refused_with_the_remedy() {
    let text = |path: &str| FileDisk::open(Path::new(path), false).unwrap_err().to_string();
    assert!(text("/no/such").starts_with("can't open /no/such: "));
    for path in ["/dev/null", "/dev"] {
        assert_eq!(
            text(path),
            format!(
                "{path} is neither a regular file nor a block device: give an image file, a disk or a partition"
            )
        );
    }
}
