//! Crashes: a file system that remembers what it was told, and everything that a power cut may leave of it.
//!
//! The model allows a disk more than any file system does. Of a file, what was written after its last `fsync` may be
//! there, be missing, end anywhere, or read as zeros or as something else. Of a name, every value that it had since the
//! last `fsync` of its directory may be the one that stays, whatever other names do. Only what was synced is sure.
//!
//! The writer runs once; then the power is cut after every operation, and the reader looks at every image that can
//! be left.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::place::{Files, remove, temporary_of};
use super::{Format, frame, parse, write_sections_to, write_to};

const FORMAT: Format = Format {
    name: "crash",
    version: 1,
};

/// What a file has, and what of it is sure.
#[derive(Clone, Debug, Default)]
struct Inode {
    /// Each write since the last sync; of more than that nothing is asked.
    unsynced: Vec<Vec<u8>>,
    synced: Vec<u8>,
}

impl Inode {
    /// Everything that a power cut may leave of it.
    fn left(&self) -> Vec<Vec<u8>> {
        let mut all = vec![self.synced.clone()];
        let mut whole = self.synced.clone();
        for bytes in &self.unsynced {
            // Torn in this write; those before are there, or were never stored.
            for cut in [1, bytes.len() / 2, bytes.len().saturating_sub(1), bytes.len()] {
                let cut = cut.min(bytes.len());
                all.push([&whole, &bytes[..cut]].concat());
                all.push([&vec![0; whole.len()][..], &bytes[..cut]].concat());
            }
            // The length is stored and the bytes are not.
            all.push([&whole[..], &vec![0; bytes.len()]].concat());
            all.push([&whole[..], &vec![0xa5; bytes.len()]].concat());
            whole.extend_from_slice(bytes);
        }
        all
    }
}

/// The values of a name since the last sync of the directory; the last one is what is seen.
type Name = Vec<Option<usize>>;

#[derive(Clone, Debug, Default)]
struct State {
    inodes: Vec<Inode>,
    names: BTreeMap<PathBuf, Name>,
    /// Operations so far.
    count: usize,
    /// What is to fail, counted from the beginning.
    failing: Option<usize>,
    /// Says that it synced, and did not.
    lies: Lies,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Lies {
    #[default]
    None,
    Files,
    Directories,
}

/// A file system in memory, with what it was after each operation.
#[derive(Clone, Default)]
struct Recorded {
    state: Rc<RefCell<State>>,
    history: Rc<RefCell<Vec<State>>>,
}

struct Handle {
    files: Recorded,
    inode: usize,
}

impl Recorded {
    fn of(image: &Image) -> Self {
        let files = Self::default();
        {
            let mut state = files.state.borrow_mut();
            for (path, content) in image {
                state.inodes.push(Inode {
                    unsynced: Vec::new(),
                    synced: content.clone(),
                });
                let inode = state.inodes.len() - 1;
                state.names.insert(path.clone(), vec![Some(inode)]);
            }
        }
        files.history.borrow_mut().push(files.state.borrow().clone());
        files
    }

    fn operation<T>(&self, act: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state.borrow_mut();
        state.count += 1;
        if state.failing == Some(state.count) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let result = act(&mut state);
        self.history.borrow_mut().push(state.clone());
        result
    }

    fn seen(&self, path: &Path) -> Option<usize> {
        self.state.borrow().names.get(path).and_then(|name| *name.last()?)
    }
}

impl State {
    fn set(&mut self, path: &Path, inode: Option<usize>) {
        self.names
            .entry(path.to_owned())
            .or_insert_with(|| vec![None])
            .push(inode);
    }

    /// Every image that a power cut now may leave.
    fn images(&self) -> BTreeSet<Image> {
        let mut images = BTreeSet::from([Image::new()]);
        for (path, name) in &self.names {
            let values: BTreeSet<_> = name.iter().copied().collect();
            let mut next = BTreeSet::new();
            for image in images {
                for value in &values {
                    match value {
                        None => {
                            next.insert(image.clone());
                        }
                        Some(inode) => next.extend(self.inodes[*inode].left().into_iter().map(|content| {
                            let mut image = image.clone();
                            image.insert(path.clone(), content);
                            image
                        })),
                    }
                }
            }
            images = next;
        }
        images
    }
}

/// Names and contents on a disk after a power cut.
type Image = BTreeMap<PathBuf, Vec<u8>>;

impl Files for Recorded {
    type File = Handle;

    fn remove(&self, path: &Path) -> io::Result<()> {
        let seen = self.seen(path);
        self.operation(|state| {
            seen.ok_or(io::ErrorKind::NotFound)?;
            state.set(path, None);
            Ok(())
        })
    }

    fn create(&self, path: &Path) -> io::Result<Handle> {
        let seen = self.seen(path);
        let inode = self.operation(|state| {
            if seen.is_some() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            state.inodes.push(Inode::default());
            let inode = state.inodes.len() - 1;
            state.set(path, Some(inode));
            Ok(inode)
        })?;
        Ok(Handle {
            files: self.clone(),
            inode,
        })
    }

    fn sync(&self, file: &Handle) -> io::Result<()> {
        self.operation(|state| {
            if state.lies != Lies::Files {
                let inode = &mut state.inodes[file.inode];
                let unsynced = std::mem::take(&mut inode.unsynced).concat();
                inode.synced.extend(unsynced);
            }
            Ok(())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let seen = self.seen(from);
        self.operation(|state| {
            let inode = seen.ok_or(io::ErrorKind::NotFound)?;
            state.set(to, Some(inode));
            state.set(from, None);
            Ok(())
        })
    }

    fn sync_directory(&self, _: &Path) -> io::Result<()> {
        self.operation(|state| {
            if state.lies != Lies::Directories {
                for name in state.names.values_mut() {
                    name.drain(..name.len() - 1);
                }
            }
            Ok(())
        })
    }
}

impl Write for Handle {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.files.operation(|state| {
            state.inodes[self.inode].unsynced.push(bytes.to_vec());
            Ok(bytes.len())
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    number: u64,
    text: String,
}

fn content(number: u64) -> Content {
    Content {
        number,
        text: "abc ".repeat(20 + usize::try_from(number).unwrap() * 7),
    }
}

/// Bytes of a section: long enough for several writes, and different everywhere from those of another number.
fn section(number: u64) -> Vec<u8> {
    (0..100_000_u64)
        .map(|at| {
            let mixed = (at + number * 1_000_003).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed.to_be_bytes()[0]
        })
        .collect()
}

/// The two forms of state file.
#[derive(Clone, Copy, Debug)]
enum Form {
    Json,
    Sections,
}

impl Form {
    fn write(self, files: &Recorded, number: u64) -> bool {
        let (path, content) = (path(), content(number));
        match self {
            Self::Json => write_to(files, &path, FORMAT, &content),
            Self::Sections => {
                write_sections_to(files, &path, FORMAT, &content, &[section(number).as_slice(), &[]])
            }
        }
        .is_ok()
    }

    /// The number of the document in an image; an error if it is refused.
    fn read(self, image: &Image) -> Result<Option<u64>, String> {
        let Some(bytes) = image.get(&path()) else {
            return Ok(None);
        };
        match self {
            Self::Json => {
                let read: Content = parse(bytes, &path(), FORMAT).map_err(|error| error.to_string())?;
                assert_eq!(read, content(read.number), "a mix was believed");
                Ok(Some(read.number))
            }
            Self::Sections => {
                let (read, sections): (Content, _) = frame::decode(&bytes[..], bytes.len() as u64, FORMAT)
                    .map_err(|error| error.to_string())?;
                assert_eq!(read, content(read.number), "a mix was believed");
                assert_eq!(sections, [section(read.number), Vec::new()], "a mix was believed");
                Ok(Some(read.number))
            }
        }
    }

    fn image(self, number: u64) -> Image {
        let files = Recorded::default();
        assert!(self.write(&files, number));
        let images = files.state.borrow().images();
        assert_eq!(images.len(), 1, "what was written is sure");
        images.into_iter().next().unwrap()
    }
}

fn path() -> PathBuf {
    PathBuf::from("/state/device.state")
}

/// What there may be before the writer begins: nothing, a document, and the remains of a writer before.
fn beginnings(form: Form) -> Vec<(Option<u64>, Image)> {
    let mut left = form.image(1);
    left.insert(temporary_of(&path()), b"{ half a docum".to_vec());
    vec![(None, Image::new()), (Some(1), form.image(1)), (Some(1), left)]
}

#[test]
fn a_cut_at_any_operation_leaves_the_old_or_the_new_document() {
    for form in [Form::Json, Form::Sections] {
        for (old, image) in beginnings(form) {
            let files = Recorded::of(&image);
            assert!(form.write(&files, 2));
            let history = files.history.borrow();
            assert!(history.len() > 6, "{form:?}: {}", history.len());
            let mut seen = BTreeSet::new();
            for (operations, state) in history.iter().enumerate() {
                for image in state.images() {
                    let read = form.read(&image);
                    let right = read == Ok(old) || read == Ok(Some(2));
                    assert!(
                        right,
                        "{form:?} after {operations} operations: {read:?} in {:?}",
                        image.keys()
                    );
                    seen.insert(read.unwrap());
                }
            }
            assert_eq!(seen, BTreeSet::from([old, Some(2)]));
            for image in history.last().unwrap().images() {
                assert_eq!(
                    form.read(&image),
                    Ok(Some(2)),
                    "it was lost after the writer was told"
                );
                assert_eq!(image.len(), 1, "something is left over");
            }
        }
    }
}

#[test]
fn an_error_at_any_operation_leaves_the_old_or_the_new_document() {
    for form in [Form::Json, Form::Sections] {
        for (old, image) in beginnings(form) {
            let mut failed = 0;
            for operation in 1.. {
                let files = Recorded::of(&image);
                files.state.borrow_mut().failing = Some(operation);
                let written = form.write(&files, 2);
                if files.state.borrow().count < operation {
                    assert!(written);
                    break;
                }
                failed += usize::from(!written);
                for state in files.history.borrow().iter() {
                    for image in state.images() {
                        let read = form.read(&image);
                        assert!(
                            read == Ok(old) || read == Ok(Some(2)),
                            "{form:?}, operation {operation}: {read:?}"
                        );
                    }
                }
                // The next writer is not in the way of what is left.
                files.state.borrow_mut().failing = None;
                assert!(form.write(&files, 3), "{form:?} after an error at {operation}");
                for image in files.state.borrow().images() {
                    assert_eq!(form.read(&image), Ok(Some(3)));
                }
            }
            assert!(failed >= 5, "{form:?}: only {failed} errors reached the caller");
        }
    }
}

#[test]
fn a_document_removed_does_not_come_back() {
    let files = Recorded::of(&Form::Json.image(1));
    remove(&files, &path()).unwrap();
    for image in files.state.borrow().images() {
        assert_eq!(image, Image::new());
    }
    remove(&files, &path()).unwrap();
    let files = Recorded::of(&Form::Json.image(1));
    files.state.borrow_mut().lies = Lies::Directories;
    remove(&files, &path()).unwrap();
    assert!(
        files
            .state
            .borrow()
            .images()
            .iter()
            .any(|image| !image.is_empty())
    );
}

/// Crash after crash: each writer begins with what the cut before left of another.
#[test]
fn a_chain_of_crashes_never_makes_a_mix() {
    let seed: u64 = rand_seed();
    println!("seed {seed}");
    let mut random = Random(seed);
    for form in [Form::Json, Form::Sections] {
        for _ in 0..20 {
            let mut image = Image::new();
            let mut current = None;
            for number in 1..8 {
                let files = Recorded::of(&image);
                assert!(form.write(&files, number));
                let history = files.history.borrow();
                let state = &history[random.below(history.len())];
                let images: Vec<Image> = state.images().into_iter().collect();
                image = images[random.below(images.len())].clone();
                let read = form.read(&image).unwrap();
                assert!(
                    read == current || read == Some(number),
                    "{form:?}, seed {seed}: {read:?}"
                );
                current = read;
            }
        }
    }
}

/// Does the checker see anything? Disks that say to have synced, and have not.
#[test]
fn a_disk_that_lies_is_found_out() {
    for form in [Form::Json, Form::Sections] {
        let all = |lies: Lies| {
            let files = Recorded::of(&form.image(1));
            files.state.borrow_mut().lies = lies;
            assert!(form.write(&files, 2));
            let images = files.state.borrow().images();
            // `read` panics at a mix that is believed.
            images.iter().map(|image| form.read(image)).collect::<Vec<_>>()
        };
        let read = all(Lies::Files);
        assert!(read.iter().any(Result::is_err), "{form:?}: nothing to refuse");
        assert!(read.contains(&Ok(Some(2))));
        let read = all(Lies::Directories);
        assert!(read.contains(&Ok(Some(1))), "{form:?}: the new name was sure");
        assert!(read.iter().all(Result::is_ok));
    }
}

fn rand_seed() -> u64 {
    std::env::var("BLKSNAP_SEED").map_or_else(
        |_| {
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |time| time.as_secs() ^ u64::from(time.subsec_nanos()) << 20)
        },
        |seed| seed.parse().unwrap(),
    )
}

/// Numbers by xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 |= u64::from(self.0 == 0);
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}
