//! Bcache: a device whose writes its kernel does not tell of.
//!
//! A bcache device without a cache attached sends bios down as they are. Up to some version after 6.1 it changed their
//! device and submitted them again: `block_bio_queue` fires once for a bio (`BIO_TRACE_COMPLETION`), so it does not
//! fire for the backing device. Newer ones send a clone (`detached_dev_do_request` in drivers/md/bcache/request.c), as
//! the lab shows for 6.12. A cache can be detached at any time, so on an older kernel each bcache device counts.

use std::fs;
use std::path::Path;

use super::mounts;
use super::presence::SYSFS;
use crate::units::DeviceId;

/// First version on which the backing device's own events are known to come.
const TOLD_SINCE: (u32, u32) = (6, 12);

/// The bcache device that stands on `device` and whose writes are not told of there, by its name.
#[must_use]
pub fn unseen_above(device: DeviceId) -> Option<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let name = |id| name(Path::new(SYSFS), id);
    let above = mounts::stack_above(device).into_iter().filter_map(name);
    judge(&release, &name(device)?, above)
}

/// A bcache device itself, and its partitions, are told of.
fn judge(release: &str, own: &str, mut above: impl Iterator<Item = String>) -> Option<String> {
    let told = version(release).is_some_and(|version| version >= TOLD_SINCE);
    if told || own.starts_with("bcache") {
        return None;
    }
    above.find(|name| name.starts_with("bcache"))
}

/// Major and minor number of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn name(sysfs: &Path, id: DeviceId) -> Option<String> {
    let directory = sysfs.join(id.to_string()).canonicalize().ok()?;
    Some(directory.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_on_kernels_that_do_not_tell() {
        let above = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let found = |release, names: &[&str]| judge(release, names[0], above(names).into_iter());
        assert_eq!(
            found("6.1.0-56-amd64", &["vdb", "bcache0"]).as_deref(),
            Some("bcache0")
        );
        assert_eq!(found("6.1.0-56-amd64", &["vdb", "dm-0"]), None);
        assert_eq!(found("6.12.107+deb13-amd64", &["vdb", "bcache0"]), None);
        assert_eq!(found("6.1.0-56-amd64", &["bcache0", "bcache0p1"]), None);
        assert_eq!(found("7.2", &["vdb", "bcache0"]), None);
        // A kernel that does not say what it is is not trusted.
        assert_eq!(found("", &["vdb", "bcache0"]).as_deref(), Some("bcache0"));
    }
}
