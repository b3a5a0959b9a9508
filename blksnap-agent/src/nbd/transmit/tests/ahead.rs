//! Tests of reading ahead: it is done where it helps, left where it does not, and no byte differs for it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::nbd::export::PrefetchBy;
use crate::sys::cached;

const KIB: usize = 1 << 10;

/// The byte at an offset.
fn byte(offset: u64) -> u8 {
    (offset ^ (offset >> 9) ^ (offset >> 20)).to_le_bytes()[0]
}

fn bytes(offset: usize, length: usize) -> Vec<u8> {
    (offset..offset + length)
        .map(|offset| byte(offset as u64))
        .collect()
}

/// An export without a file, which remembers what it was asked.
struct Image {
    size: u64,
    by: PrefetchBy,
    /// From here on it can't be read.
    broken: u64,
    reads: Mutex<Vec<(u64, usize)>>,
    hints: Mutex<Vec<(u64, u64)>>,
    read: AtomicU64,
}

impl Image {
    fn new(size: usize, by: PrefetchBy) -> Self {
        Self {
            size: size as u64,
            by,
            broken: u64::MAX,
            reads: Mutex::default(),
            hints: Mutex::default(),
            read: AtomicU64::new(0),
        }
    }

    /// How many reads had this length.
    fn reads_of(&self, length: usize) -> usize {
        let reads = self.reads.lock().unwrap();
        reads.iter().filter(|read| read.1 == length).count()
    }
}

impl Export for Image {
    fn name(&self) -> &str {
        NAME
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn prefetch_by(&self) -> PrefetchBy {
        self.by
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ExportError> {
        self.reads.lock().unwrap().push((offset, buffer.len()));
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        for (at, place) in (offset..).zip(&mut *buffer) {
            *place = byte(at);
        }
        if offset + buffer.len() as u64 > self.broken {
            return Err(ExportError::Corrupted {
                name: NAME.into(),
                reason: "a test".into(),
            });
        }
        Ok(())
    }
    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.hints.lock().unwrap().push((offset, length));
        Ok(())
    }
    fn block_status(
        &self,
        context: &ContextName,
        _: u64,
        _: u64,
        _: usize,
    ) -> Result<Vec<StatusExtent>, ExportError> {
        Err(ExportError::NoContext {
            name: NAME.into(),
            context: context.as_str().into(),
        })
    }
}

fn serve(image: Image) -> (Arc<Image>, Fixture) {
    let image = Arc::new(image);
    let export: Arc<dyn Export> = Arc::clone(&image) as Arc<dyn Export>;
    (image, Fixture::new(export, &ServerLimits::default()))
}

#[test]
fn reads_in_order_find_what_was_read_ahead() {
    // Short ones are answered by the connection, others by workers; the last length fits no piece.
    for length in [16 * KIB, 64 * KIB, 50_001] {
        let size = 16 << 20;
        let (image, fixture) = serve(Image::new(size, PrefetchBy::Keeping));
        let mut client = fixture.connect();
        let mut offset = 0;
        while offset + length <= size {
            assert!(
                client.read(offset, length).unwrap() == bytes(offset, length),
                "at {offset}"
            );
            offset += length;
        }
        let alone = image.reads_of(length);
        assert!(
            alone < 10,
            "{alone} of {} reads were not read ahead",
            size / length
        );
        let read = image.read.load(Ordering::Relaxed);
        assert!(
            read <= (size + (1 << 20)) as u64,
            "{read} bytes were read for {size}"
        );
    }
}

#[test]
fn connections_that_share_the_work_are_seen_together() {
    let (length, size) = (64 * KIB, 16 << 20);
    let (image, fixture) = serve(Image::new(size, PrefetchBy::Keeping));
    let mut clients: Vec<Client> = (0..4).map(|_| fixture.connect()).collect();
    for (index, offset) in (0..size).step_by(length).enumerate() {
        let data = clients[index % 4].read(offset, length).unwrap();
        assert!(data == bytes(offset, length), "at {offset}");
    }
    let alone = image.reads_of(length);
    assert!(alone < 10, "{alone} reads were not read ahead");
}

#[test]
fn reads_at_random_cause_no_others() {
    for by in [PrefetchBy::Keeping, PrefetchBy::Hint] {
        let mut random = random();
        let (image, fixture) = serve(Image::new(1 << 44, by));
        let mut client = fixture.connect();
        for _ in 0..300 {
            let offset = usize::try_from(random.next_u64() % ((1 << 44) - 4096)).unwrap();
            assert!(client.read(offset, 4096).unwrap() == bytes(offset, 4096));
        }
        assert_eq!(image.reads.lock().unwrap().len(), 300);
        assert_eq!(image.hints.lock().unwrap().len(), 0);
    }
}

#[test]
fn reads_of_every_order_are_right() {
    let mut random = random();
    let size = 8 << 20;
    let (_, fixture) = serve(Image::new(size, PrefetchBy::Keeping));
    let mut clients = [fixture.connect(), fixture.connect()];
    let mut offset = 0;
    for round in 0..1500 {
        if random.next_u32().is_multiple_of(20) {
            offset = random.next_u32() as usize % size;
        }
        let most = [700, 40 * KIB, 300 * KIB, 2 << 20][random.next_u32() as usize % 4];
        let length = (random.next_u32() as usize % most).min(size - offset);
        let data = clients[round % 2].read(offset, length).unwrap();
        assert!(data == bytes(offset, length), "{length} at {offset}");
        offset = (offset + length) % size;
    }
}

#[test]
fn what_can_not_be_read_ahead_fails_where_it_is_asked_for() {
    let (length, broken) = (16 * KIB, 5_000_000);
    let mut image = Image::new(16 << 20, PrefetchBy::Keeping);
    image.broken = broken;
    let (_, fixture) = serve(image);
    let mut client = fixture.connect();
    for offset in (0..6 << 20).step_by(length) {
        let read = client.read(offset, length);
        if (offset + length) as u64 <= broken {
            assert!(read.unwrap() == bytes(offset, length), "at {offset}");
        } else {
            assert_eq!(read, Err(5), "at {offset}");
        }
    }
}

#[test]
fn a_removed_export_is_let_go_with_what_was_read_ahead() {
    let (image, fixture) = serve(Image::new(16 << 20, PrefetchBy::Keeping));
    let mut client = fixture.connect();
    for offset in (0..1 << 20).step_by(16 * KIB) {
        client.read(offset, 16 * KIB).unwrap();
    }
    let watch = Arc::downgrade(&image);
    drop(image);
    assert!(fixture.exports.remove(NAME));
    while watch.upgrade().is_some() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(client.read(1 << 20, 16 * KIB), Err(108));
}

#[test]
fn nothing_is_kept_when_the_last_client_has_left_or_after_many_other_reads() {
    let (image, fixture) = serve(Image::new(1 << 44, PrefetchBy::Keeping));
    let prepare = || {
        let mut client = fixture.connect();
        for offset in (0..1 << 20).step_by(16 * KIB) {
            client.read(offset, 16 * KIB).unwrap();
        }
        client
    };
    let again = |client: &mut Client| {
        let before = image.reads_of(8 * KIB);
        client.read(1 << 20, 8 * KIB).unwrap();
        image.reads_of(8 * KIB) > before
    };
    let mut client = prepare();
    assert!(!again(&mut client), "it was read ahead");
    drop(client);
    while fixture.exports.clients(NAME) > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(again(&mut fixture.connect()), "it was kept");

    let mut client = prepare();
    let mut random = random();
    for _ in 0..17_000 {
        let offset = (1 << 43) + usize::try_from(random.next_u64() % (1 << 43)).unwrap();
        client.read(offset, 1).unwrap();
    }
    assert!(again(&mut client), "it was kept");
}

#[test]
fn an_export_with_a_cache_gets_hints() {
    let (image, fixture) = serve(Image::new(64 << 20, PrefetchBy::Hint));
    let mut client = fixture.connect();
    let length = 64 * KIB;
    for offset in (0..32 << 20).step_by(length) {
        client.read(offset, length).unwrap();
    }
    let hints = image.hints.lock().unwrap();
    assert!(hints.len() > 3, "{hints:?}");
    assert!(
        hints.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0),
        "{hints:?}"
    );
    assert!(hints.iter().any(|(_, length)| *length > 2 << 20), "{hints:?}");
    assert_eq!(image.reads_of(length), (32 << 20) / length);
}

#[test]
fn the_pages_of_a_file_are_there_before_they_are_asked_for() {
    let size = 64 << 20;
    let file = tempfile::tempfile_in("/var/tmp").unwrap();
    file.write_all_at(&vec![3; size], 0).unwrap();
    file.sync_all().unwrap();
    let drop_pages = || {
        use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    };
    drop_pages();
    let far = 14 << 20;
    if cached::is_memory(&file) || cached::is_cached(&file, far, 4096) != Some(false) {
        println!("no disk under /var/tmp, or a kernel that can't tell what is cached");
        return;
    }
    let served = Arc::new(file.try_clone().unwrap());
    let fixture = Fixture::new(
        Arc::new(FileExport::new(NAME, served, size as u64)),
        &ServerLimits::default(),
    );
    let mut client = fixture.connect();
    // The kernel's own reading ahead does not reach as far.
    for offset in (0..8 << 20).step_by(16 * KIB) {
        assert_eq!(client.read(offset, 16 * KIB).unwrap()[7], 3);
    }
    // A hint that came while another one was carried out is made up for by the next read in sequence.
    let mut next = (8 << 20..12 << 20).step_by(16 * KIB);
    while cached::is_cached(&file, far, 4096) != Some(true) {
        let offset = next.next().expect("nothing was read ahead");
        client.read(offset, 16 * KIB).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
}
