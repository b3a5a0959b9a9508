//! Compare: two images byte by byte.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// The blocks of `block_size` bytes in which two files of the same length differ, by number.
pub(crate) fn differing_blocks(first: &Path, second: &Path, block_size: u64) -> Result<Vec<u64>> {
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let (mut one, mut other) = (open(first)?, open(second)?);
    let lengths = (one.metadata()?.len(), other.metadata()?.len());
    ensure!(
        lengths.0 == lengths.1,
        "{} has {} bytes, {} has {}",
        first.display(),
        lengths.0,
        second.display(),
        lengths.1
    );
    let size = usize::try_from(block_size)?;
    let (mut left, mut right) = (vec![0; size], vec![0; size]);
    let mut differing = Vec::new();
    for block in 0..lengths.0.div_ceil(block_size) {
        let length = usize::try_from((lengths.0 - block * block_size).min(block_size))?;
        one.read_exact(&mut left[..length])?;
        other.read_exact(&mut right[..length])?;
        if left[..length] != right[..length] {
            differing.push(block);
        }
    }
    Ok(differing)
}

/// Makes sure that two files are the same, byte for byte.
pub(crate) fn same(what: &str, first: &Path, second: &Path) -> Result<()> {
    let differing = differing_blocks(first, second, 4096)?;
    ensure!(
        differing.is_empty(),
        "{what}: {} and {} differ in {} blocks of 4 KiB, the first at byte {}",
        first.display(),
        second.display(),
        differing.len(),
        differing[0] * 4096
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_differ_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (directory.path().join("a"), directory.path().join("b"));
        let mut content = vec![7; 10_000];
        std::fs::write(&first, &content).unwrap();
        std::fs::write(&second, &content).unwrap();
        same("copies", &first, &second).unwrap();
        content[4096] = 8;
        content[9_999] = 8;
        std::fs::write(&second, &content).unwrap();
        assert_eq!(differing_blocks(&first, &second, 4096).unwrap(), [1, 2]);
        let error = same("copies", &first, &second).unwrap_err().to_string();
        assert!(
            error.ends_with("in 2 blocks of 4 KiB, the first at byte 4096"),
            "{error}"
        );
        std::fs::write(&second, &content[1..]).unwrap();
        assert!(same("copies", &first, &second).is_err());
    }
}
