//! Storage spec: where difference storage is to be, as people and programs say it.
//!
//! | text | what it is |
//! |---|---|
//! | `/dir` | a directory; an unnamed file in it grows as far as its file system has space |
//! | `/dir,limit=10G` | the same, up to 10 GiB |
//! | `/dir,keep=NAME` | a file that is found again after the agent was started anew |
//! | `/file` | a file as it is: its bytes are used, and nothing more |
//! | `/file,limit=10G` | a file that grows up to 10 GiB; it is made if it is not there |
//! | `/dev/sdx` | a whole block device |
//! | `/dev/sdx:2048+8192:20480+64` | ranges of a block device: first sector and number of sectors, of 512 bytes |
//! | `memory:1G` | at most 1 GiB of memory |

use std::fmt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::{Extent, SECTOR_BYTES, UnitError, parse_bytes};

/// Difference storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum StorageSpec {
    /// A sparse file in a directory, growing.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Most bytes; `None` for what the file system has free, less a reserve.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u64>,
        /// Part of the file's name, `blksnap-KEEP-N.diff`; `None` for a file without a name, gone with the agent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<String>,
    },
    /// A regular file.
    File {
        /// The file.
        path: PathBuf,
        /// Up to where it grows, in bytes; `None` for the bytes that it has, and no others.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<u64>,
    },
    /// A block device.
    Device {
        /// The node.
        path: PathBuf,
        /// Ranges in bytes; none for all of it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ranges: Vec<Extent>,
    },
    /// Memory.
    Memory {
        /// Most bytes.
        limit: u64,
    },
    /// A file on a file system of a device that is snapshotted, used by its sectors on that device. No text says it: the agent finds
    /// out where a file or directory is.
    Own(Own),
}

/// Difference storage on a file system of a served device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Own {
    /// Name under which the device is served, or the node of one whose writes are held in the kernel.
    pub device: String,
    /// Where the file system begins on the device, in bytes.
    pub start: u64,
    /// The file or directory that was given.
    pub path: PathBuf,
    /// It is a directory: files are made in it.
    pub directory: bool,
    /// Most bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// The file, once it is allocated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<OwnFile>,
}

/// A file of [`Own`] storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnFile {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes that it has of its file system.
    pub bytes: u64,
    /// What of them is used, on the device.
    pub ranges: Vec<Extent>,
}

/// Text that says no difference storage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A limit that is no size.
    #[error("the limit of difference storage: {0}")]
    Size(#[from] UnitError),
    /// A limit of nothing.
    #[error("a limit of 0 bytes leaves no difference storage; leave it out, or give a size")]
    Zero,
    /// An option that this kind of storage lacks.
    #[error("{path} is {kind}, for which there is no {option}")]
    Option {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// The option.
        option: &'static str,
    },
    /// Ranges of something that is no device.
    #[error("{0} is not a block device: ranges are those of a device such as /dev/sdb1")]
    Ranges(PathBuf),
    /// A range that is none.
    #[error("{0} is no range of sectors: give FIRST+COUNT, as in 2048+8192")]
    Range(String),
    /// Nothing at all.
    #[error("give difference storage: a directory, a file, a block device, or memory:SIZE")]
    Missing,
}

impl FromStr for StorageSpec {
    type Err = SpecError;

    /// Looks at what the path leads to: a directory, a device or a file.
    fn from_str(text: &str) -> Result<Self, SpecError> {
        if let Some(size) = text.strip_prefix("memory:") {
            let limit = not_zero(parse_bytes(size)?)?;
            return Ok(Self::Memory { limit });
        }
        let (rest, limit, keep) = options(text)?;
        let (rest, ranges) = ranges_of(rest)?;
        if rest.is_empty() {
            return Err(SpecError::Missing);
        }
        let path = std::path::absolute(Path::new(rest)).unwrap_or_else(|_| rest.into());
        let found = path.metadata().ok();
        let refuse = |kind, option, given: bool| match given {
            true => Err(SpecError::Option {
                path: path.clone(),
                kind,
                option,
            }),
            false => Ok(()),
        };
        if found
            .as_ref()
            .is_some_and(|found| found.file_type().is_block_device())
        {
            refuse("a block device", "limit: give ranges", limit.is_some())?;
            refuse("a block device", "name to keep", keep.is_some())?;
            return Ok(Self::Device { path, ranges });
        }
        if !ranges.is_empty() {
            return Err(SpecError::Ranges(path));
        }
        if found.is_some_and(|found| found.is_dir()) {
            return Ok(Self::Directory { path, limit, keep });
        }
        refuse("a file", "name to keep: it has one", keep.is_some())?;
        Ok(Self::File { path, limit })
    }
}

/// Options at the end: a path may have commas.
fn options(text: &str) -> Result<(&str, Option<u64>, Option<String>), SpecError> {
    let (mut rest, mut limit, mut keep) = (text, None, None);
    while let Some((before, last)) = rest.rsplit_once(',') {
        if let Some(size) = last.strip_prefix("limit=") {
            limit = Some(not_zero(parse_bytes(size)?)?);
        } else if let Some(name) = last.strip_prefix("keep=") {
            keep = Some(name.to_owned());
        } else {
            break;
        }
        rest = before;
    }
    Ok((rest, limit, keep))
}

/// Ranges at the end, which look like no part of a path.
fn ranges_of(text: &str) -> Result<(&str, Vec<Extent>), SpecError> {
    let (mut rest, mut ranges) = (text, Vec::new());
    while let Some((before, last)) = rest.rsplit_once(':') {
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let Some((first, count)) = last
            .split_once('+')
            .filter(|(first, count)| digits(first) && digits(count))
        else {
            break;
        };
        let bytes = |sectors: &str| sectors.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES);
        let range = bytes(first)
            .zip(bytes(count))
            .filter(|(offset, length)| *length > 0 && offset.checked_add(*length).is_some());
        let (offset, length) = range.ok_or_else(|| SpecError::Range(last.to_owned()))?;
        ranges.push(Extent { offset, length });
        rest = before;
    }
    ranges.reverse();
    Ok((rest, ranges))
}

fn not_zero(limit: u64) -> Result<u64, SpecError> {
    (limit > 0).then_some(limit).ok_or(SpecError::Zero)
}

impl fmt::Display for StorageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limited = |f: &mut fmt::Formatter<'_>, limit: &Option<u64>| match limit {
            Some(limit) => write!(f, ",limit={limit}"),
            None => Ok(()),
        };
        match self {
            Self::Directory { path, limit, keep } => {
                write!(f, "{}", path.display())?;
                limited(f, limit)?;
                keep.iter().try_for_each(|name| write!(f, ",keep={name}"))
            }
            Self::File { path, limit } => {
                write!(f, "{}", path.display())?;
                limited(f, limit)
            }
            Self::Device { path, ranges } => {
                write!(f, "{}", path.display())?;
                ranges.iter().try_for_each(|range| {
                    write!(
                        f,
                        ":{}+{}",
                        range.offset / SECTOR_BYTES,
                        range.length / SECTOR_BYTES
                    )
                })
            }
            Self::Memory { limit } => write!(f, "memory:{limit}"),
            Self::Own(own) => {
                let path = own.file.as_ref().map_or(&own.path, |file| &file.path);
                write!(f, "{} (sectors of {})", path.display(), own.device)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_says_what_it_is_and_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let odd = directory.path().join("a,b:1");
        std::fs::create_dir(&odd).unwrap();
        let file = directory.path().join("new");
        for (text, spec) in [
            ("memory:1M".to_owned(), StorageSpec::Memory { limit: 1 << 20 }),
            (
                format!("{},limit=10G,keep=a-b", odd.display()),
                StorageSpec::Directory {
                    path: odd.clone(),
                    limit: Some(10 << 30),
                    keep: Some("a-b".to_owned()),
                },
            ),
            (
                format!("{},limit=7", file.display()),
                StorageSpec::File {
                    path: file.clone(),
                    limit: Some(7),
                },
            ),
        ] {
            assert_eq!(text.parse(), Ok(spec.clone()), "{text}");
            assert_eq!(spec.to_string().parse(), Ok(spec.clone()), "{text}");
            let json = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<StorageSpec>(&json).unwrap(), spec);
        }
        let device = StorageSpec::Device {
            path: "/dev/sdz".into(),
            ranges: vec![Extent {
                offset: 512,
                length: 1024,
            }],
        };
        assert_eq!(device.to_string(), "/dev/sdz:1+2");
        assert_eq!(
            ranges_of("/dev/by:00:1+2:30+40"),
            Ok((
                "/dev/by:00",
                vec![
                    Extent {
                        offset: 512,
                        length: 1024
                    },
                    Extent {
                        offset: 15360,
                        length: 20480
                    }
                ]
            ))
        );
    }

    #[test]
    fn a_file_on_a_served_device_is_written_down_with_its_sectors() {
        let own = StorageSpec::Own(Own {
            device: "web.img".to_owned(),
            start: 1 << 20,
            path: "/srv/web".into(),
            directory: true,
            limit: None,
            file: Some(OwnFile {
                path: "/srv/web/a.diff".into(),
                bytes: 8192,
                ranges: vec![Extent {
                    offset: 1 << 21,
                    length: 4096,
                }],
            }),
        });
        let json = serde_json::to_string(&own).unwrap();
        assert!(
            json.starts_with(r#"{"kind":"own","device":"web.img","start":1048576,"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<StorageSpec>(&json).unwrap(), own);
        assert_eq!(own.to_string(), "/srv/web/a.diff (sectors of web.img)");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let wrong = |text: &str| text.parse::<StorageSpec>().unwrap_err().to_string();
        assert!(wrong("").starts_with("give difference storage"));
        assert!(wrong("memory:").contains("is no size"));
        assert!(wrong("memory:0").starts_with("a limit of 0 bytes"));
        assert!(wrong("/tmp,limit=x").contains("\"x\" is no size"));
        assert!(wrong("/tmp:1+2").starts_with("/tmp is not a block device"));
        assert!(wrong("/no/such,keep=a").contains("is a file, for which there is no name to keep"));
        assert!(wrong("/tmp:18446744073709551615+1").contains("is no range of sectors"));
        assert!(serde_json::from_str::<StorageSpec>(r#"{"kind":"memory","limit":1,"x":2}"#).is_err());
    }
}
