//! Archive: takes the folder `library` of the Rust sources out of an archive or a Debian package.
//!
//! Everything is unpacked by crates written in Rust: a fresh machine may have neither zstd nor xz.

use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::locate;

/// The name of the folder wanted.
const LIBRARY: &str = "library";

/// How far below the top of an archive the folder may be (the official one has it five levels deep).
const DEEPEST: usize = 8;

/// Where the header of a tar archive has its magic (POSIX.1-1988, ustar).
const TAR_MAGIC: std::ops::Range<usize> = 257..262;

/// Unpacks the library sources of a tar archive into `folder`, compressed with zstd, xz, gzip or not at all. The
/// first bytes decide, not the name.
pub(super) fn unpack_file(archive: &Path, folder: &Path) -> Result<()> {
    let mut file = File::open(archive).with_context(|| format!("opening {} failed", archive.display()))?;
    let mut start = Vec::new();
    file.by_ref()
        .take(512)
        .read_to_end(&mut start)
        .with_context(|| format!("reading {} failed", archive.display()))?;
    file.seek(SeekFrom::Start(0))?;
    let mut file = BufReader::new(file);
    match start.as_slice() {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => unpack(ruzstd::decoding::StreamingDecoder::new(file)?, folder),
        [0x1f, 0x8b, ..] => unpack(flate2::read::MultiGzDecoder::new(file), folder),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let mut plain = tempfile::tempfile_in(folder)?;
            lzma_rs::xz_decompress(&mut file, &mut plain).map_err(|error| anyhow::anyhow!("{error:?}"))?;
            plain.seek(SeekFrom::Start(0))?;
            unpack(plain, folder)
        }
        header if header.get(TAR_MAGIC) == Some(b"ustar") => unpack(file, folder),
        _ => bail!("it is no tar archive, plain or compressed with zstd, xz or gzip"),
    }
}

/// Unpacks the library sources of a Debian package into `folder`.
pub(super) fn unpack_package(package: &Path, folder: &Path) -> Result<()> {
    let mut command = Command::new("dpkg-deb");
    command.arg("--fsys-tarfile").arg(package).stdout(Stdio::piped());
    let mut child = command.spawn().context("starting dpkg-deb failed")?;
    let output = child.stdout.take().context("dpkg-deb has no output")?;
    let outcome = unpack(BufReader::new(output), folder);
    let status = child.wait().context("waiting for dpkg-deb failed")?;
    outcome?;
    ensure!(
        status.success(),
        "dpkg-deb could not read {}: {status}",
        package.display()
    );
    Ok(())
}

/// Unpacks every entry below a folder `library`, with its whole path.
fn unpack(mut reader: impl Read, folder: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(&mut reader);
    archive.set_preserve_mtime(false);
    for entry in archive.entries().context("reading the archive failed")? {
        let mut entry = entry.context("reading the archive failed")?;
        let path = entry
            .path()
            .context("the archive has an unreadable name")?
            .into_owned();
        if path
            .components()
            .take(DEEPEST)
            .any(|part| part == Component::Normal(LIBRARY.as_ref()))
        {
            entry
                .unpack_in(folder)
                .with_context(|| format!("unpacking {} failed", path.display()))?;
        }
    }
    // What follows the end mark must be read too, or the writer of a pipe is killed by a signal.
    std::io::copy(&mut reader, &mut std::io::sink()).context("reading the archive's end failed")?;
    Ok(())
}

/// The folder `library` nearest to the top of `folder`.
pub(super) fn find_library(folder: &Path) -> Result<PathBuf> {
    let mut level = vec![folder.to_owned()];
    for _ in 0..DEEPEST {
        let mut below = Vec::new();
        for parent in &level {
            for entry in
                fs::read_dir(parent).with_context(|| format!("reading {} failed", parent.display()))?
            {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    below.push(entry.path());
                }
            }
        }
        below.sort();
        if let Some(found) = below
            .iter()
            .find(|path| path.ends_with(LIBRARY) && locate::is_library(path))
        {
            return Ok(found.clone());
        }
        level = below;
    }
    bail!("it has no folder `{LIBRARY}` with the sources of core");
}

/// Checks that `library` belongs to `release`: the newest release in which something in core became stable must
/// have the same first two numbers.
pub(super) fn check_release(library: &Path, release: &str) -> Result<()> {
    let wanted = minor(release).with_context(|| format!("rustc has the odd release {release}"))?;
    let newest = newest_stable(&library.join("core/src"))?;
    match newest {
        // A nightly's own number is not in its sources yet.
        Some(newest) if newest == wanted || (release.contains('-') && newest <= wanted) => Ok(()),
        Some((major, minor)) => bail!("it has the sources of Rust {major}.{minor}, not of {release}"),
        None => bail!("it has sources of core that name no release"),
    }
}

/// The newest `since` of all attributes `stable` in the files below `folder`.
fn newest_stable(folder: &Path) -> Result<Option<(u32, u32)>> {
    let mut newest = None;
    for entry in fs::read_dir(folder).with_context(|| format!("reading {} failed", folder.display()))? {
        let path = entry?.path();
        let found = if path.is_dir() {
            newest_stable(&path)?
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text =
                fs::read_to_string(&path).with_context(|| format!("reading {} failed", path.display()))?;
            text.lines().filter_map(stable_since).max()
        } else {
            None
        };
        newest = newest.max(found);
    }
    Ok(newest)
}

/// The release of an attribute such as `#[stable(feature = "rust1", since = "1.0.0")]`.
fn stable_since(line: &str) -> Option<(u32, u32)> {
    let attribute = line.trim_start();
    if !attribute.starts_with("#[stable(") && !attribute.starts_with("#[rustc_const_stable(") {
        return None;
    }
    let (_, since) = attribute.split_once("since = \"")?;
    minor(since.split('"').next()?)
}

/// The first two numbers of a release.
fn minor(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn library(at: &Path, since: &str) {
        fs::create_dir_all(at.join("core/src")).unwrap();
        fs::write(at.join("Cargo.lock"), "").unwrap();
        fs::write(at.join("core/Cargo.toml"), "").unwrap();
        let text = format!(
            "#[stable(feature = \"rust1\", since = \"1.0.0\")]\n#[stable(feature = \"x\", since = \"{since}\")]\n#[deprecated(since = \"1.999.0\")]\n"
        );
        fs::write(at.join("core/src/lib.rs"), text).unwrap();
    }

    #[test]
    fn the_release_is_read_from_the_newest_stable_attribute() {
        let folder = tempfile::tempdir().unwrap();
        library(folder.path(), "1.95.0");
        check_release(folder.path(), "1.95.0").unwrap();
        check_release(folder.path(), "1.95.1").unwrap();
        check_release(folder.path(), "1.96.0-nightly").unwrap();
        let error = check_release(folder.path(), "1.96.0").unwrap_err();
        assert_eq!(
            error.to_string(),
            "it has the sources of Rust 1.95, not of 1.96.0"
        );
        check_release(folder.path(), "1.94.0").unwrap_err();
        check_release(folder.path(), "1.94.0-nightly").unwrap_err();
    }

    #[test]
    fn the_library_nearest_to_the_top_is_found() {
        let folder = tempfile::tempdir().unwrap();
        library(&folder.path().join("a/b/library"), "1.95.0");
        library(&folder.path().join("a/b/c/library"), "1.94.0");
        fs::create_dir_all(folder.path().join("a/library/empty")).unwrap();
        assert_eq!(
            find_library(folder.path()).unwrap(),
            folder.path().join("a/b/library")
        );
    }

    #[test]
    fn an_archive_without_library_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("other.tar");
        let mut builder = tar::Builder::new(File::create(&archive).unwrap());
        builder
            .append_path_with_name(
                file!().rsplit('/').next().map(|_| "Cargo.toml").unwrap(),
                "Cargo.toml",
            )
            .unwrap();
        builder.finish().unwrap();
        let into = tempfile::tempdir().unwrap();
        unpack_file(&archive, into.path()).unwrap();
        find_library(into.path()).unwrap_err();
    }

    #[test]
    fn garbage_and_short_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let into = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        for content in [
            &b"abc"[..],
            &[0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3, 4],
            &[7_u8; 2000],
            &[0x1f, 0x8b, 0, 0, 0, 0, 0],
        ] {
            fs::write(&file, content).unwrap();
            unpack_file(&file, into.path()).unwrap_err();
        }
    }
}
