//! Links: names of kernel devices that say what they show.
//!
//! - `disk/by-blksnap/<snapshot>/<device>`, for an export `<snapshot>/<device>`
//! - `blksnap-image_<major>:<minor>`, with the number of the device that the snapshot was taken of; of several
//!   snapshots of one device, the last one connected has it
//!
//! They are made as udev makes its own: relative, replaced in one step, with bytes that a path should not have
//! written as `\xNN`. What a link points to is the only record of whose it is.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use crate::units::DeviceId;

const BY_BLKSNAP: &str = "disk/by-blksnap";
const IMAGE: &str = "blksnap-image_";

/// The directory of device nodes, `/dev` but in tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Links {
    root: PathBuf,
}

impl Default for Links {
    fn default() -> Self {
        Self::under("/dev")
    }
}

impl Links {
    /// Links below `root`, where the nodes are.
    pub fn under(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Makes the links of the node `node` (`nbd0`), which shows `export`, an image of the device `origin`.
    ///
    /// # Errors
    /// A directory or a link can't be made.
    pub fn make(&self, node: &str, export: &str, origin: Option<DeviceId>) -> io::Result<Vec<PathBuf>> {
        let mut names = vec![PathBuf::from(BY_BLKSNAP).join(escaped(export))];
        names.extend(origin.map(|origin| PathBuf::from(format!("{IMAGE}{origin}"))));
        let mut made = Vec::new();
        for name in names {
            let path = self.root.join(&name);
            let up = name.components().count().saturating_sub(1);
            let mut target: PathBuf = std::iter::repeat_n(Component::ParentDir, up).collect();
            target.push(node);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut temporary = path.clone().into_os_string();
            temporary.push(format!(".{}", std::process::id()));
            match fs::remove_file(&temporary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            symlink(&target, &temporary)?;
            fs::rename(&temporary, &path)?;
            made.push(path);
        }
        made.sort();
        Ok(made)
    }

    /// All links to the node `node`.
    ///
    /// # Errors
    /// A directory can't be read.
    pub fn of(&self, node: &str) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for path in entries(&self.root)? {
            let ours = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(IMAGE.as_bytes()));
            if ours && points_to(&path, node) {
                found.push(path);
            }
        }
        let mut folders = vec![self.root.join(BY_BLKSNAP)];
        while let Some(folder) = folders.pop() {
            for path in entries(&folder)? {
                if path.is_symlink() {
                    if points_to(&path, node) {
                        found.push(path);
                    }
                } else if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Removes all links to the node `node`, and folders that are empty then.
    ///
    /// # Errors
    /// A link can't be removed.
    pub fn remove(&self, node: &str) -> io::Result<()> {
        let top = self.root.join(BY_BLKSNAP);
        for path in self.of(node)? {
            fs::remove_file(&path)?;
            let folders = path
                .ancestors()
                .skip(1)
                .take_while(|folder| folder.starts_with(&top));
            for folder in folders {
                if fs::remove_dir(folder).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn points_to(path: &Path, node: &str) -> bool {
    fs::read_link(path).is_ok_and(|target| target.file_name().is_some_and(|name| name == node))
}

/// A name as the path of a link: what is before the first slash is a folder.
fn escaped(export: &str) -> PathBuf {
    let part = |text: &str| {
        let mut name = String::with_capacity(text.len());
        for (index, byte) in text.bytes().enumerate() {
            let plain =
                byte.is_ascii_alphanumeric() || b"#+-:=@_!".contains(&byte) || (byte == b'.' && index > 0);
            if plain {
                name.push(char::from(byte));
            } else {
                name.push_str(&format!("\\x{byte:02x}"));
            }
        }
        if name.is_empty() { "_".to_owned() } else { name }
    };
    match export.split_once('/') {
        Some((folder, name)) => PathBuf::from(part(folder)).join(part(name)),
        None => part(export).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> DeviceId {
        text.parse().unwrap()
    }

    #[test]
    fn links_lead_to_the_node_and_go_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::write(root.join("nbd0"), "zero").unwrap();
        fs::write(root.join("nbd1"), "one").unwrap();
        let links = Links::under(root);
        let made = links.make("nbd0", "id/sdb1", Some(id("8:17"))).unwrap();
        assert_eq!(
            made,
            [
                root.join("blksnap-image_8:17"),
                root.join("disk/by-blksnap/id/sdb1")
            ]
        );
        for path in &made {
            assert_eq!(fs::read_to_string(path).unwrap(), "zero");
            assert!(fs::read_link(path).unwrap().is_relative());
        }
        // Another snapshot of the same device takes the image's name over.
        links.make("nbd1", "other/sdb1", Some(id("8:17"))).unwrap();
        assert_eq!(fs::read_to_string(&made[0]).unwrap(), "one");
        assert_eq!(links.of("nbd0").unwrap(), made[1..]);
        links.remove("nbd0").unwrap();
        assert!(!root.join("disk/by-blksnap/id").exists());
        assert!(root.join("disk/by-blksnap/other/sdb1").exists());
        links.remove("nbd1").unwrap();
        assert!(!root.join("disk/by-blksnap").exists());
        assert_eq!(
            fs::read_dir(root).unwrap().count(),
            3,
            "the nodes and the folder of others stay"
        );
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        for (export, path) in [
            ("a/b/c", "a/b\\x2fc"),
            ("../../etc/passwd", "\\x2e./\\x2e.\\x2fetc\\x2fpasswd"),
            ("..", "\\x2e."),
            ("/", "_/_"),
            ("", "_"),
            ("a b", "a\\x20b"),
            ("id/cciss!c0d0", "id/cciss!c0d0"),
            ("id/sda.1", "id/sda.1"),
        ] {
            assert_eq!(escaped(export), Path::new(path), "{export:?}");
        }
    }

    #[test]
    fn nothing_there_is_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let links = Links::under(directory.path());
        assert!(links.of("nbd0").unwrap().is_empty());
        links.remove("nbd0").unwrap();
    }
}
