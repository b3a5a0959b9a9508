//! Tests of the copier: both methods against a plain copy.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::engine::FileSink;

/// A file read as a device with logical blocks of 512 bytes.
#[derive(Debug)]
struct FileSource {
    file: File,
    length: u64,
}

impl FileSource {
    fn new(content: &[u8]) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        Self {
            file,
            length: content.len() as u64,
        }
    }
}

impl Source for FileSource {
    fn name(&self) -> &str {
        "source"
    }

    fn aligned(&self, extent: Extent) -> Extent {
        let offset = extent.offset / 512 * 512;
        let end = extent.end().next_multiple_of(512).min(self.length);
        Extent {
            offset,
            length: end.saturating_sub(offset),
        }
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()> {
        self.file
            .read_exact_at(&mut buffer.as_mut_slice()[..length], offset)
    }

    fn raw(&self, offset: u64) -> Option<(BorrowedFd<'_>, u64)> {
        Some((self.file.as_fd(), offset))
    }
}

fn sink(content: &[u8]) -> (Arc<File>, FileSink) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    let file = Arc::new(file);
    let sink = FileSink::existing(Arc::clone(&file), "sink".into(), content.len() as u64).unwrap();
    (file, sink)
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

const METHODS: [Method; 2] = [Method::Auto, Method::Threads(THREADS)];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_extents_and_nothing_else_are_copied(
        values in proptest::collection::vec((0_u8..4, 1_usize..200), 1..40),
        extents in proptest::collection::vec((0_u64..3000, 1_u64..5000), 0..6),
    ) {
        let mut data = Vec::new();
        for (value, count) in values {
            data.resize(data.len() + count * 4096, if value == 3 { 0 } else { value });
        }
        let source = FileSource::new(&data);
        let old = vec![0xaa; data.len()];
        // Ascending and apart, some past the end.
        let mut position = 0;
        let extents: Vec<Extent> = extents.into_iter().map(|(gap, length)| {
            let extent = Extent { offset: (position + gap) * 512, length: length * 512 };
            position += gap + length;
            extent
        }).filter(|extent| extent.offset < data.len() as u64).collect();
        let mut expected = old.clone();
        for extent in &extents {
            let end = usize::try_from(extent.end()).unwrap().min(data.len());
            let start = usize::try_from(extent.offset).unwrap();
            expected[start..end].copy_from_slice(&data[start..end]);
        }
        for method in METHODS {
            let (file, sink) = sink(&old);
            let told = AtomicU64::new(0);
            let job = Job { source: &source, sink: &sink, extents: &extents };
            let bytes = Copier::new(method)
                .copy(&[job], &CancelToken::new(), &|count| { told.fetch_add(count, Ordering::Relaxed); })
                .unwrap();
            prop_assert!(content(&file) == expected, "{method:?}");
            prop_assert_eq!(told.into_inner(), bytes);
        }
    }
}

#[test]
fn zeroes_stay_holes() {
    let mut data = vec![0; 16 << 20];
    data[5 << 20..6 << 20].fill(1);
    let source = FileSource::new(&data);
    for method in METHODS {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(16 << 20).unwrap();
        let sink = FileSink::fresh(Arc::clone(&file), "sink".into(), 16 << 20).unwrap();
        let extents = [Extent {
            offset: 0,
            length: 16 << 20,
        }];
        let job = Job {
            source: &source,
            sink: &sink,
            extents: &extents,
        };
        Copier::new(method)
            .copy(&[job], &CancelToken::new(), &|_| {})
            .unwrap();
        file.sync_all().unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, 1 << 20, "{method:?}");
        assert!(content(&file) == data);
    }
}

#[test]
fn failures_name_the_place() {
    let source = FileSource::new(&vec![1; 4 << 20]);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let extents = [Extent {
        offset: 4096,
        length: 2 << 20,
    }];
    for method in METHODS {
        let sink = FileSink::existing(Arc::new(full.try_clone().unwrap()), "image".into(), 4 << 20).unwrap();
        let job = Job {
            source: &source,
            sink: &sink,
            extents: &extents,
        };
        let error = Copier::new(method)
            .copy(&[job], &CancelToken::new(), &|_| {})
            .unwrap_err();
        assert!(error.is_no_space(), "{error}");
        let text = error.to_string();
        assert!(
            text.starts_with("can't write ") && text.contains(" of image: "),
            "{text}"
        );

        source.file.set_len(1 << 20).unwrap();
        let (_file, sink) = super::tests::sink(&vec![0; 4 << 20]);
        let job = Job {
            source: &source,
            sink: &sink,
            extents: &extents,
        };
        let error = Copier::new(method)
            .copy(&[job], &CancelToken::new(), &|_| {})
            .unwrap_err();
        assert!(matches!(error, CopyError::Read { .. }), "{error}");
        source.file.set_len(4 << 20).unwrap();
        source.file.write_all_at(&vec![1; 4 << 20], 0).unwrap();
    }
}

#[test]
fn cancelling_ends_it() {
    let source = FileSource::new(&vec![1; 32 << 20]);
    let extents = [Extent {
        offset: 0,
        length: 32 << 20,
    }];
    for method in METHODS {
        let (_file, sink) = sink(&vec![0; 32 << 20]);
        let job = Job {
            source: &source,
            sink: &sink,
            extents: &extents,
        };
        let cancel = CancelToken::new();
        let error = Copier::new(method)
            .copy(&[job], &cancel, &|_| cancel.cancel())
            .unwrap_err();
        assert!(matches!(error, CopyError::Cancelled), "{error}");
        let late = CancelToken::new().until(std::time::Instant::now());
        let error = Copier::new(method).copy(&[job], &late, &|_| {}).unwrap_err();
        assert!(matches!(error, CopyError::Late), "{error}");
    }
}

#[test]
fn a_short_sink_is_refused() {
    let source = FileSource::new(&vec![1; 8192]);
    let (_file, sink) = sink(&[0; 4096]);
    let extents = [Extent {
        offset: 0,
        length: 8192,
    }];
    let job = Job {
        source: &source,
        sink: &sink,
        extents: &extents,
    };
    let error = Copier::new(Method::Auto)
        .copy(&[job], &CancelToken::new(), &|_| {})
        .unwrap_err();
    assert!(matches!(error, CopyError::TooShort { .. }), "{error}");
}
