//! Tests of the file export: contexts, and writes of every kind against a model.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use proptest::prelude::*;

use super::super::proto::ErrorCode;
use super::*;

fn status(extents: &[(u64, u32)]) -> Vec<StatusExtent> {
    extents
        .iter()
        .map(|&(length, flags)| StatusExtent { length, flags })
        .collect()
}

fn sparse(size: u64, data: &[(u64, u64)]) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    for &(offset, length) in data {
        file.write_all_at(&vec![7; usize::try_from(length).unwrap()], offset)
            .unwrap();
    }
    Arc::new(file)
}

#[test]
fn holes_are_told_by_the_file_system() {
    let block = 64 << 10;
    let file = sparse(10 * block, &[(2 * block, block), (5 * block, 2 * block)]);
    let export = FileExport::new("image", file, 10 * block);
    let allocation = ContextName::base_allocation();
    let all = export
        .block_status(&allocation, 0, 10 * block, usize::MAX)
        .unwrap();
    assert_eq!(
        all,
        status(&[
            (2 * block, 3),
            (block, 0),
            (2 * block, 3),
            (2 * block, 0),
            (3 * block, 3)
        ])
    );
    let inside = export
        .block_status(&allocation, 5 * block + 512, block, usize::MAX)
        .unwrap();
    assert_eq!(inside, status(&[(block, 0)]));
    let one = export.block_status(&allocation, 0, 10 * block, 1).unwrap();
    assert_eq!(one, status(&[(2 * block, 3)]));
}

#[test]
fn a_short_file_is_an_error_not_zeroes() {
    let export = FileExport::new("image", sparse(4096, &[]), 8192);
    let mut buffer = [1; 4096];
    export.read_at(&mut buffer, 0).unwrap();
    assert_eq!(buffer, [0; 4096]);
    let error = export.read_at(&mut buffer, 2048).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Io);
    assert_eq!(error.to_string(), "export \"image\": read at 2048");
    let allocation = ContextName::base_allocation();
    let error = export.block_status(&allocation, 0, 8192, 9).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Io, "missing bytes are no hole");
    assert!(export.block_status(&allocation, 0, 4096, 9).is_ok());
}

#[test]
fn only_known_contexts_are_answered() {
    let export = FileExport::new("image", sparse(4096, &[]), 4096);
    assert_eq!(export.contexts(), [ContextName::base_allocation()]);
    let last = ContextName::dirty_bitmap_last();
    let error = export.block_status(&last, 0, 4096, 1).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Invalid);
    let export = export.with_dirty(Vec::new());
    assert_eq!(export.contexts().len(), 2);
    assert_eq!(
        export.block_status(&last, 0, 4096, 1).unwrap(),
        status(&[(4096, 0)])
    );
}

#[test]
fn errors_map_to_those_of_the_protocol() {
    let export = FileExport::new("image", sparse(0, &[]), 0);
    for (errno, code) in [
        (Errno::EIO, ErrorCode::Io),
        (Errno::EINVAL, ErrorCode::Io),
        (Errno::EROFS, ErrorCode::NotPermitted),
        (Errno::EDQUOT, ErrorCode::NoSpace),
        (Errno::EFBIG, ErrorCode::NoSpace),
        (Errno::ENOMEM, ErrorCode::NoMemory),
    ] {
        assert_eq!(export.failed("read", 0, errno.into()).code(), code, "{errno}");
    }
    assert_eq!(ExportError::Removed("a".into()).code(), ErrorCode::Shutdown);
    let corrupted = ExportError::Corrupted {
        name: "a".into(),
        reason: "no space".into(),
    };
    assert_eq!(corrupted.code(), ErrorCode::Io);
}

/// What a client may do to a writable export.
#[derive(Clone, Debug)]
enum Change {
    Write {
        offset: u64,
        length: usize,
        value: u8,
        fua: bool,
    },
    Zero {
        offset: u64,
        length: u64,
        options: ZeroOptions,
    },
    Trim {
        offset: u64,
        length: u64,
        fua: bool,
    },
    Flush,
}

const MODEL: u64 = 3 << 20;

fn change() -> impl Strategy<Value = Change> {
    let range = || {
        let place = prop_oneof![0..MODEL, (0..MODEL / 4096).prop_map(|block| block * 4096)];
        let length = prop_oneof![0..MODEL / 4, (0..64_u64).prop_map(|blocks| blocks * 4096)];
        (place, length).prop_map(|(offset, length)| (offset, length.min(MODEL - offset)))
    };
    let options = (any::<bool>(), any::<bool>(), any::<bool>())
        .prop_map(|(no_hole, fast, fua)| ZeroOptions { no_hole, fast, fua });
    prop_oneof![
        4 => (range(), any::<u8>(), any::<bool>()).prop_map(|((offset, length), value, fua)| Change::Write {
            offset,
            length: usize::try_from(length).unwrap(),
            value,
            fua,
        }),
        3 => (range(), options).prop_map(|((offset, length), options)| Change::Zero { offset, length, options }),
        2 => (range(), any::<bool>()).prop_map(|((offset, length), fua)| Change::Trim { offset, length, fua }),
        1 => Just(Change::Flush),
    ]
}

/// Carries the changes out on a file and on plain memory; after a trim the content is what the file says.
fn compare(file: File, changes: &[Change]) {
    file.set_len(MODEL).unwrap();
    let file = Arc::new(file);
    let export = FileExport::new("x", Arc::clone(&file), MODEL).writable();
    let mut model = vec![0_u8; usize::try_from(MODEL).unwrap()];
    let range = |offset: u64, length: u64| {
        usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap()
    };
    for change in changes {
        match change.clone() {
            Change::Write {
                offset,
                length,
                value,
                fua,
            } => {
                export
                    .write_at(Bytes::from(vec![value; length]), offset, fua)
                    .unwrap();
                model[range(offset, length as u64)].fill(value);
            }
            Change::Zero {
                offset,
                length,
                options,
            } => match export.write_zeroes(offset, length, options) {
                Ok(()) => model[range(offset, length)].fill(0),
                Err(error) => {
                    assert!(options.fast, "{error}");
                    assert_eq!(error.code(), ErrorCode::NotSupported, "{error}");
                }
            },
            Change::Trim { offset, length, fua } => {
                export.trim(offset, length, fua).unwrap();
                let range = range(offset, length);
                let mut now = vec![0; range.len()];
                export.read_at(&mut now, offset).unwrap();
                for (old, new) in model[range].iter_mut().zip(now) {
                    assert!(
                        new == 0 || new == *old,
                        "a trim leaves bytes alone or clears them"
                    );
                    *old = new;
                }
            }
            Change::Flush => export.flush().unwrap(),
        }
        let mut now = vec![0; model.len()];
        export.read_at(&mut now, 0).unwrap();
        assert!(now == model, "differs after {change:?}");
    }
    assert_eq!(file.metadata().unwrap().len(), MODEL, "the size stays");
    // What is said to be zero is zero.
    let mut position = 0;
    for extent in export
        .block_status(&ContextName::base_allocation(), 0, MODEL, usize::MAX)
        .unwrap()
    {
        if extent.flags & AllocationState::ZERO.bits() != 0 {
            assert!(
                model[range(position, extent.length)]
                    .iter()
                    .all(|byte| *byte == 0)
            );
        }
        position += extent.length;
    }
    assert_eq!(position, MODEL);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Oracle: plain memory. Once where the temporary directory is, once on tmpfs, which has no zero ranges.
    #[test]
    fn writes_zeroes_and_trims_do_what_plain_memory_does(changes in prop::collection::vec(change(), 1..12)) {
        compare(tempfile::tempfile().unwrap(), &changes);
        compare(tempfile::tempfile_in("/dev/shm").unwrap(), &changes);
    }
}

#[test]
fn zeroes_that_stay_allocated_are_no_hole_and_slow_ones_are_refused_at_once() {
    // tmpfs can punch holes but not zero ranges.
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(MODEL).unwrap();
    let export = FileExport::new("x", Arc::new(file), MODEL).writable();
    let data = Bytes::from(vec![7; 1 << 20]);
    export.write_at(data, 0, false).unwrap();
    let zero = |no_hole, fast| {
        let options = ZeroOptions {
            no_hole,
            fast,
            fua: false,
        };
        export.write_zeroes(0, 1 << 20, options)
    };
    let status = || {
        export
            .block_status(&ContextName::base_allocation(), 0, 1 << 20, 9)
            .unwrap()
    };
    let error = zero(true, true).unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotSupported);
    let mut byte = [0];
    export.read_at(&mut byte, 4096).unwrap();
    assert_eq!(byte, [7], "nothing was changed");
    zero(true, false).unwrap();
    assert_eq!(
        status(),
        [StatusExtent {
            length: 1 << 20,
            flags: 0
        }],
        "allocated"
    );
    zero(false, true).unwrap();
    assert_eq!(
        status(),
        [StatusExtent {
            length: 1 << 20,
            flags: 3
        }],
        "a hole"
    );
}

#[test]
fn a_read_only_export_changes_nothing() {
    let export = FileExport::new("x", Arc::new(tempfile::tempfile().unwrap()), 4096);
    assert!(export.read_only());
    for error in [
        export.write_at(Bytes::from_static(b"x"), 0, false).unwrap_err(),
        export.trim(0, 4096, false).unwrap_err(),
        export.write_zeroes(0, 4096, ZeroOptions::default()).unwrap_err(),
    ] {
        assert_eq!(error.code(), ErrorCode::NotPermitted);
    }
    export.flush().unwrap();
}

#[test]
fn files_are_opened_with_their_size_and_other_things_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![3; 5000]).unwrap();
    let export = FileExport::open("x", &path, false).unwrap();
    assert_eq!((export.size(), export.read_only()), (5000, true));
    let export = FileExport::open("x", &path, true).unwrap();
    assert!(!export.read_only());
    export.write_at(Bytes::from_static(b"end"), 4997, true).unwrap();
    assert_eq!(&std::fs::read(&path).unwrap()[4997..], b"end");
    for (path, writable) in [(directory.path(), false), (Path::new("/dev/null"), true)] {
        let refused = FileExport::open("x", path, writable);
        assert!(matches!(refused, Err(DiskError::NotDisk { .. })), "{refused:?}");
    }
    let missing = FileExport::open("x", &directory.path().join("none"), false).unwrap_err();
    assert!(matches!(missing, DiskError::Open { .. }));
}
