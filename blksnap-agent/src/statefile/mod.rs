//! State file: a document that survives a crash or is known to be damaged.
//!
//! There are two forms. [`write()`] makes a small JSON document, `{"format", "version", "checksum", "content"}`,
//! whose checksum is CRC-32C over the compact JSON of the content. [`write_sections`] makes a binary one, a header
//! and sections of up to 1 GiB, with a checksum of each part and of the whole ([`frame`]). A file edited by hand,
//! cut short or mixed up by a bad disk is refused instead of believed.
//!
//! # Crash consistency
//! A new version is written to a temporary file beside, synced, and renamed over the old one; then the directory is
//! synced. After a crash at any point the name leads to the whole old or the whole new document, and once
//! [`write()`] has returned, to the new one.

#[cfg(test)]
mod crash;
pub mod frame;
mod place;

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use frame::{FrameError, Section};
use place::{Files, System, Unsynced};

/// Longest state file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What a kind of state file is called, and its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Name of the kind, as in the file.
    pub name: &'static str,
    /// The version that this program reads and writes.
    pub version: u32,
}

/// A state file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// It can't be read or written.
    #[error("can't {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or its directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It was written by a program that knows more, or is of another kind.
    #[error("{path} is {found}, but {} version {} is needed", format.name, format.version)]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says it is.
        found: String,
        /// What is needed.
        format: Format,
    },
}

impl StateFileError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    fn damaged(path: &Path, why: &str) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            // It may quote the file: an error is one line.
            why: why.replace(char::is_control, " "),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    version: u32,
    checksum: String,
    content: Value,
}

/// Writes `content` to `path`, replacing what is there as a whole. The file is only for its owner.
///
/// # Errors
/// The directory can't be written or synced. Then the old document is still there, or the new one as a whole.
pub fn write<T: Serialize>(path: &Path, format: Format, content: &T) -> Result<(), StateFileError> {
    write_to(&System, path, format, content)
}

fn write_to<F: Files, T: Serialize>(
    files: &F,
    path: &Path,
    format: Format,
    content: &T,
) -> Result<(), StateFileError> {
    let invalid = |source: serde_json::Error| StateFileError::io("write", path)(source.into());
    let content = serde_json::to_value(content).map_err(invalid)?;
    let document = Document {
        format: format.name.to_owned(),
        version: format.version,
        checksum: checksum(&content),
        content,
    };
    let mut text = serde_json::to_vec_pretty(&document).map_err(invalid)?;
    text.push(b'\n');
    place::place(files, path, |file| file.write_all(&text))
}

/// Writes a header and sections to `path`, replacing what is there as a whole. The file is only for its owner. A
/// section may have up to [`frame::MAX_SECTION`] bytes; long runs of one byte take little space.
///
/// # Errors
/// As [`write()`], or something is longer than a frame can hold.
pub fn write_sections<H: Serialize, S: Section>(
    path: &Path,
    format: Format,
    header: &H,
    sections: &[S],
) -> Result<(), StateFileError> {
    write_sections_to(&System, path, format, header, sections)
}

/// As [`write_sections`], but only in the page cache when it returns: the file is replaced as a whole for whoever reads
/// it in this boot. After a power cut it may be the old one, the new one, or damaged.
///
/// # Errors
/// As [`write_sections`].
pub fn write_sections_in_boot<H: Serialize, S: Section>(
    path: &Path,
    format: Format,
    header: &H,
    sections: &[S],
) -> Result<(), StateFileError> {
    write_sections_to(&Unsynced(System), path, format, header, sections)
}

fn write_sections_to<F: Files, H: Serialize, S: Section>(
    files: &F,
    path: &Path,
    format: Format,
    header: &H,
    sections: &[S],
) -> Result<(), StateFileError> {
    place::place(files, path, |file| {
        let mut out = BufWriter::with_capacity(1 << 16, file);
        frame::encode(&mut out, format, header, sections)?;
        out.flush()
    })
}

/// Makes a change of names in the directory of `path` permanent.
///
/// # Errors
/// The directory can't be opened or synced.
pub fn sync_directory_of(path: &Path) -> Result<(), StateFileError> {
    place::sync_parent(&System, path)
}

/// Reads the document at `path`; `None` if there is no file.
///
/// # Errors
/// The file can't be read, is damaged, or is of another format or version.
pub fn read<T: DeserializeOwned>(path: &Path, format: Format) -> Result<Option<T>, StateFileError> {
    let Some((file, _)) = open(path)? else {
        return Ok(None);
    };
    let mut text = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(StateFileError::io("read", path))?;
    parse(&text, path, format).map(Some)
}

/// The content of a document that was read from `path`.
fn parse<T: DeserializeOwned>(text: &[u8], path: &Path, format: Format) -> Result<T, StateFileError> {
    let damaged = |why: String| StateFileError::damaged(path, &why);
    if text.len() as u64 > MAX_BYTES {
        return Err(damaged(format!("longer than {MAX_BYTES} bytes")));
    }
    let document: Document = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
    if document.format != format.name || document.version != format.version {
        return Err(StateFileError::Version {
            path: path.to_owned(),
            found: format!("{:?} version {}", document.format, document.version),
            format,
        });
    }
    let sum = checksum(&document.content);
    if sum != document.checksum {
        return Err(damaged(format!(
            "its checksum is {sum}, not {}",
            document.checksum
        )));
    }
    serde_json::from_value(document.content).map_err(|error| damaged(error.to_string()))
}

/// Reads the header and the sections at `path`; `None` if there is no file.
///
/// # Errors
/// The file can't be read, is damaged, or is of another format or version.
#[expect(clippy::type_complexity, reason = "what was given to write_sections")]
pub fn read_sections<H: DeserializeOwned>(
    path: &Path,
    format: Format,
) -> Result<Option<(H, Vec<Vec<u8>>)>, StateFileError> {
    let Some((file, length)) = open(path)? else {
        return Ok(None);
    };
    frame::decode(BufReader::with_capacity(1 << 16, file), length, format)
        .map(Some)
        .map_err(|error| match error {
            FrameError::Io(source) => StateFileError::io("read", path)(source),
            FrameError::Damaged(why) => StateFileError::damaged(path, &why),
            FrameError::Version(found) => StateFileError::Version {
                path: path.to_owned(),
                found,
                format,
            },
        })
}

/// Opens a state file and tells its length; `None` if there is none.
fn open(path: &Path) -> Result<Option<(File, u64)>, StateFileError> {
    let file = OpenOptions::new()
        .read(true)
        // A pipe in its place must not stop us.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StateFileError::io("open", path)(error)),
    };
    let metadata = file.metadata().map_err(StateFileError::io("read", path))?;
    if metadata.is_file() {
        return Ok(Some((file, metadata.len())));
    }
    Err(StateFileError::damaged(path, "not a regular file"))
}

/// Removes the document at `path`, if there is one, for good.
///
/// # Errors
/// It can't be removed, or the directory not synced.
pub fn remove(path: &Path) -> Result<(), StateFileError> {
    place::remove(&System, path)
}

fn checksum(content: &Value) -> String {
    // Numbers and strings have one compact form, and members keep the order in which they were parsed or sorted.
    format!("crc32c:{:08x}", crc32c::crc32c(content.to_string().as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const FORMAT: Format = Format {
        name: "test",
        version: 3,
    };

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Content {
        zeta: u64,
        alpha: String,
        none: Option<u8>,
    }

    fn content() -> Content {
        Content {
            zeta: u64::MAX,
            alpha: "\u{e9}\"\\\n".to_owned(),
            none: None,
        }
    }

    #[test]
    fn crc_of_the_check_string() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c::crc32c(b""), 0);
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        assert!(read::<Content>(&path, FORMAT).unwrap().is_none());
        fs::write(place::temporary_of(&path), "left by a crash").unwrap();
        for _ in 0..2 {
            write(&path, FORMAT, &content()).unwrap();
            assert_eq!(read::<Content>(&path, FORMAT).unwrap(), Some(content()));
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn every_changed_or_missing_byte_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        write(&path, FORMAT, &content()).unwrap();
        let right = fs::read(&path).unwrap();
        for i in 0..right.len() - 1 {
            fs::write(&path, &right[..i]).unwrap();
            assert!(read::<Content>(&path, FORMAT).is_err(), "cut at {i}");
            for flip in [1, 2, 0x10, 0x20] {
                let mut wrong = right.clone();
                wrong[i] ^= flip;
                fs::write(&path, &wrong).unwrap();
                // White space between the parts carries nothing.
                let same = read::<Content>(&path, FORMAT).is_ok_and(|read| read == Some(content()));
                let blank = right[i].is_ascii_whitespace() && wrong[i].is_ascii_whitespace();
                assert_eq!(same, blank, "byte {i} flipped by {flip:#x}");
            }
        }
    }

    #[test]
    fn other_formats_and_versions_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        for other in [
            Format { version: 4, ..FORMAT },
            Format {
                name: "else",
                ..FORMAT
            },
        ] {
            write(&path, other, &content()).unwrap();
            let error = read::<Content>(&path, FORMAT).unwrap_err();
            assert!(matches!(error, StateFileError::Version { .. }), "{error}");
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(read::<Content>(&path, FORMAT).is_err());
        assert!(write(&path, FORMAT, &content()).is_err());
        assert!(!place::temporary_of(&path).exists());
        fs::write(directory.path().join("long"), vec![b' '; 1 << 21]).unwrap();
        assert!(read::<Content>(&directory.path().join("long"), FORMAT).is_err());
    }
}
