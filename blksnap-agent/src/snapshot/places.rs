//! Places: where the files of a snapshot's difference storage are, written down before they are made.
//!
//! Such a file has a name, so that the next agent finds it. An agent that is killed within a take, or while it destroys
//! a snapshot, leaves files of a snapshot that is written down no more: these notes lead the next agent to them. It
//! removes only what has the name of that snapshot.
//!
//! Files on served devices ([`crate::own`]) have notes of their own: they are removed when the devices answer again.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::own::Kept;
use crate::storage::StorageSpec;
use crate::units::SnapshotId;

/// What the names of notes end with.
const SUFFIX: &str = "storage";
/// And those of notes of files on served devices.
const OWN_SUFFIX: &str = "own";

fn path(root: &Path, id: SnapshotId) -> PathBuf {
    root.join(format!("{id}.{SUFFIX}"))
}

/// Whether this is one of the notes.
pub(super) fn is_note(path: &Path) -> bool {
    let suffixes = [SUFFIX, OWN_SUFFIX].map(OsStr::new);
    path.extension().is_some_and(|suffix| suffixes.contains(&suffix))
}

fn own_path(root: &Path, id: SnapshotId) -> PathBuf {
    root.join(format!("{id}.{OWN_SUFFIX}"))
}

/// Notes a file on a served device that is about to be made or used.
///
/// # Errors
/// It can't be noted.
pub(super) fn note_own(root: &Path, id: SnapshotId, kept: &Kept) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(root)?;
    let mut line = serde_json::to_vec(kept)?;
    line.push(b'\n');
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(own_path(root, id))?;
    file.write_all(&line)?;
    file.sync_data()
}

/// The files of a snapshot on served devices. A line that was not written to its end is of a file that was not made.
///
/// # Errors
/// The note can't be read.
pub(super) fn own_files(root: &Path, id: SnapshotId) -> io::Result<Vec<Kept>> {
    match fs::read_to_string(own_path(root, id)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => Ok(read?
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()),
    }
}

/// Those files are let go.
pub(super) fn forget_own(root: &Path, id: SnapshotId) {
    match fs::remove_file(own_path(root, id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(snapshot = %id, %error, "the note of its files stays");
        }
        _ => {}
    }
}

/// Snapshots of which there are notes of files on served devices.
pub(super) fn own_notes(root: &Path) -> Vec<SnapshotId> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some(OsStr::new(OWN_SUFFIX)))
        .filter_map(|path| path.file_stem()?.to_str()?.parse().ok())
        .collect()
}

/// Notes where `spec` is about to be, if a file of it outlives the agent.
///
/// # Errors
/// It can't be noted.
pub(super) fn note(root: &Path, id: SnapshotId, spec: &StorageSpec) -> io::Result<()> {
    let StorageSpec::Directory {
        path: directory,
        keep: Some(_),
        ..
    } = spec
    else {
        return Ok(());
    };
    DirBuilder::new().recursive(true).mode(0o700).create(root)?;
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path(root, id))?;
    file.write_all(&[directory.as_os_str().as_bytes(), b"\0"].concat())
}

/// The files are removed.
pub(super) fn forget(root: &Path, id: SnapshotId) {
    match fs::remove_file(path(root, id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(snapshot = %id, %error, "the note of its storage stays");
        }
        _ => {}
    }
}

/// Removes the files of snapshots that are not among those that are `written_down`.
pub(super) fn sweep(root: &Path, written_down: &BTreeSet<SnapshotId>) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let note = entry.path();
        let id = note.file_stem().and_then(OsStr::to_str);
        let Some(id) = id.and_then(|id| id.parse::<SnapshotId>().ok()) else {
            continue;
        };
        let is_mine = note.extension() == Some(OsStr::new(SUFFIX));
        if is_mine && !written_down.contains(&id) {
            clear(root, id);
        }
    }
}

/// Removes the files of a snapshot that were noted, and the note.
pub(super) fn clear(root: &Path, id: SnapshotId) {
    let removed = match fs::read(path(root, id)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        read => read.and_then(|bytes| {
            bytes
                .split(|byte| *byte == 0)
                .filter(|path| !path.is_empty())
                .try_for_each(|path| remove_files(Path::new(OsStr::from_bytes(path)), id))
        }),
    };
    match removed {
        Ok(()) => forget(root, id),
        Err(error) => tracing::warn!(snapshot = %id, %error, "files of a snapshot that is gone stay"),
    }
}

/// Removes the files in a directory that have the name of a snapshot.
fn remove_files(directory: &Path, id: SnapshotId) -> io::Result<()> {
    let start = format!("blksnap-{id}-");
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&start) && name.ends_with(".diff") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_snapshot_that_is_gone_are_removed_and_no_others() {
        let root = tempfile::tempdir().unwrap();
        let storage = tempfile::tempdir().unwrap();
        let [gone, held, foreign] = [(); 3].map(|()| SnapshotId::new(uuid::Uuid::new_v4()));
        let file = |id: SnapshotId, number: u32| storage.path().join(format!("blksnap-{id}-{number}.diff"));
        for id in [gone, held] {
            let spec = StorageSpec::Directory {
                path: storage.path().to_owned(),
                limit: None,
                keep: Some(id.to_string()),
            };
            note(root.path(), id, &spec).unwrap();
        }
        let files = [(gone, 0), (gone, 1), (held, 0), (foreign, 0)].map(|(id, number)| file(id, number));
        for file in &files {
            fs::write(file, b"").unwrap();
        }
        sweep(root.path(), &BTreeSet::from([held]));
        assert_eq!(files.map(|file| file.exists()), [false, false, true, true]);
        assert!(!path(root.path(), gone).exists() && path(root.path(), held).exists());
        forget(root.path(), held);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_on_served_devices_are_noted_for_themselves() {
        let root = tempfile::tempdir().unwrap();
        let id = SnapshotId::new(uuid::Uuid::new_v4());
        assert_eq!(
            (own_files(root.path(), id).unwrap(), own_notes(root.path())),
            (vec![], vec![])
        );
        let kept = [true, false].map(|created| Kept {
            path: format!("/mnt/a b/\n{created}.diff").into(),
            created,
            device: "web.img".to_owned(),
        });
        for kept in &kept {
            note_own(root.path(), id, kept).unwrap();
        }
        // One that was about to be written when the machine went down.
        let mut file = OpenOptions::new()
            .append(true)
            .open(own_path(root.path(), id))
            .unwrap();
        file.write_all(b"{\"path\":\"/mn").unwrap();
        assert_eq!(own_files(root.path(), id).unwrap(), kept);
        assert_eq!(own_notes(root.path()), [id]);
        assert!(is_note(&own_path(root.path(), id)));
        // They are not removed before their device answers.
        sweep(root.path(), &BTreeSet::new());
        assert_eq!(own_notes(root.path()), [id]);
        forget_own(root.path(), id);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
