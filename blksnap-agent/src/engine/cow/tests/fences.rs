//! Fences: storage on the origin itself, and others who write there.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::disk::MemoryDisk;
use crate::units::Extent;

const SIZE: u64 = 16 * 32768;
/// Difference storage: two chunks in the middle.
const OWN: Extent = Extent {
    offset: 6 * 32768,
    length: 2 * 32768,
};

fn write(origin: &Origin, offset: u64, data: &[u8]) {
    let _admitted = origin.admit(offset, data.len() as u64);
    origin.disk().write_at(data, offset).unwrap();
}

struct Scene {
    origin: Arc<Origin>,
    fence: Arc<Fence>,
    covered: Arc<AtomicU64>,
}

fn scene() -> Scene {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new("origin".to_owned(), SIZE, SIZE));
    disk.write_at(&vec![1; usize::try_from(SIZE).unwrap()], 0)
        .unwrap();
    let origin = Arc::new(Origin::new(Arc::clone(&disk), ChunkLayout::new(SIZE, 15, 9)));
    let covered = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&covered);
    let before = Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    Scene {
        origin,
        fence: Fence::new("own".to_owned(), disk, before),
        covered,
    }
}

/// A snapshot that stores behind the fence.
fn held(scene: &Scene, ranges: &[Extent], free: Option<SnapshotKey>) -> (Image, Arc<Told>) {
    let (mut space, _) = Space::new(0);
    for range in ranges {
        space.append(Region::dense(range.offset, range.length));
    }
    let storage = Arc::new(Plain {
        space: Mutex::new(space),
        disks: ranges.iter().map(|_| Arc::clone(&scene.fence) as _).collect(),
    });
    let told = Arc::new(Told::default());
    let options = StoreOptions {
        promise: Promise::AgentCrash,
        queue: 4,
        buffers: 2,
        journal: None,
        excluded: Vec::new(),
        free,
        broken: Arc::clone(&told) as _,
    };
    let store = Arc::new(Store::new(SnapshotKey(100), storage as _, options));
    let image = scene.origin.pause().arm(store).unwrap();
    assert!(scene.fence.used_by(&scene.origin, image.key()));
    (image, told)
}

#[test]
fn who_writes_where_storage_is_breaks_it_and_is_not_overwritten() {
    let scene = scene();
    let Scene {
        origin,
        fence,
        covered,
    } = &scene;
    let ranges = origin.claim(SnapshotKey(7), fence, &[OWN]);
    assert_eq!((ranges.as_slice(), origin.counters().stored), (&[OWN][..], 1));
    let (image, told) = held(&scene, &ranges, None);
    // Old data goes to the origin itself, and the image shows it.
    write(origin, 0, &[2; 4096]);
    let mut old = [0; 4096];
    image.read_at(&mut old, 0).unwrap();
    assert_eq!((old, told.errors().len()), ([1; 4096], 0));
    assert!(
        covered.load(Ordering::SeqCst) > 0,
        "the lease covers storage, too"
    );
    // Storage is written all the time by another thread, while somebody else takes a sector of it.
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            while fence.write_at(&[9; 8192], OWN.offset).is_ok() {
                std::thread::yield_now();
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        write(origin, OWN.offset + 512, &[3; 512]);
        let mut found = [0; 512];
        for _ in 0..200 {
            origin.disk().read_at(&mut found, OWN.offset + 512).unwrap();
            assert_eq!(found, [3; 512]);
        }
        busy.join().unwrap();
    });
    assert_eq!(told.errors().len(), 1);
    assert!(
        told.errors()[0].1.contains("was written to"),
        "{:?}",
        told.errors()
    );
    assert!(fence.is_down() && image.read_at(&mut old, 0).is_err());
    assert!(!fence.used_by(origin, SnapshotKey(1)), "nobody begins to use it");
    // The device goes on, also there.
    write(origin, OWN.offset, &[4; 4096]);
    origin.release(image.key());
    origin.give_back(SnapshotKey(7));
    assert_eq!(origin.counters().stored, 0);
}

#[test]
fn storage_that_nobody_uses_yet_is_guarded_and_given_back() {
    let Scene { origin, fence, .. } = scene();
    let _ = origin.claim(SnapshotKey(7), &fence, &[OWN]);
    write(&origin, OWN.end(), &[2; 512]);
    assert!(!fence.is_down());
    origin.give_back(SnapshotKey(7));
    assert!(fence.is_down() && fence.write_at(&[1; 512], OWN.offset).is_err());
    let again = scene();
    let _ = again.origin.claim(SnapshotKey(8), &again.fence, &[OWN]);
    write(&again.origin, OWN.end() - 512, &[2; 1024]);
    assert!(again.fence.is_down());
}

#[test]
fn storage_grows_into_what_was_free_at_the_instant() {
    let scene = scene();
    let Scene { origin, fence, .. } = &scene;
    let watch = SnapshotKey(50);
    origin.watch(watch);
    // Written before it is known what is free, between that and the instant, and after it.
    let at = |chunk: u64| Extent {
        offset: chunk * 32768,
        length: 32768,
    };
    write(origin, at(10).offset, &[2; 4096]);
    let free = Extent {
        offset: at(10).offset,
        length: 4 * 32768,
    };
    origin.watch_within(watch, &[free]);
    write(origin, at(11).offset, &[2; 4096]);
    let ranges = origin.claim(SnapshotKey(7), fence, &[OWN]);
    let (image, told) = held(&scene, &ranges, Some(watch));
    let untouched = |chunk: u64, from: u64| Extent {
        offset: at(chunk).offset + from,
        length: 32768 - from,
    };
    assert_eq!(
        origin.free_of(image.key()),
        [
            untouched(10, 4096),
            Extent {
                offset: untouched(11, 4096).offset,
                length: 3 * 32768 - 4096,
            },
        ]
    );
    let all = Extent {
        offset: 0,
        length: SIZE,
    };
    let other = Fence::new("more".to_owned(), Arc::clone(origin.disk()), Arc::new(|| {}));
    let more = origin.claim(SnapshotKey(8), &other, &[all]);
    // What was free is not preserved, and what is preserved is not needed.
    write(origin, at(1).offset, &[5; 4096]);
    assert_eq!(more, origin.free_of(image.key()));
    let last = Fence::new("last".to_owned(), Arc::clone(origin.disk()), Arc::new(|| {}));
    assert_eq!(
        origin.claim(SnapshotKey(9), &last, &[at(1)]),
        [Extent {
            offset: at(1).offset,
            length: 4096,
        }]
    );
    assert!(told.errors().is_empty());
}
