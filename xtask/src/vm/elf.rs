//! Elf: the kernel proper in a bzImage.
//!
//! QEMU starts an ELF kernel directly (PVH); that saves the guest its own decompressor, 2 s under software emulation.
//! Where things are in a bzImage: Documentation/arch/x86/boot.rst, fields `setup_sects`, `payload_offset` and
//! `payload_length`.

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// How an ELF file begins.
const MAGIC: &[u8] = b"\x7fELF";

/// The note by which a kernel says that it can be started so, before the address: length of the name and of the address,
/// `XEN_ELFNOTE_PHYS32_ENTRY`, name (include/xen/interface/elfnote.h).
fn pvh_notes() -> [Vec<u8>; 2] {
    [4_u32, 8].map(|length| {
        let numbers = [4, length, 18].map(u32::to_le_bytes);
        [numbers.as_flattened(), b"Xen\0"].concat()
    })
}

/// The segments of notes of an ELF file of 64 bits (type 4), one after the other.
fn notes(elf: &[u8]) -> Vec<u8> {
    let number = |at: usize, length: usize| -> Option<usize> {
        let bytes = elf.get(at..at.checked_add(length)?)?;
        let number = bytes
            .iter()
            .rev()
            .fold(0_u64, |number, byte| (number << 8) | u64::from(*byte));
        usize::try_from(number).ok()
    };
    let segment = |index: usize| {
        let header = number(0x20, 8)?.checked_add(number(0x36, 2)?.checked_mul(index)?)?;
        let start = number(header.checked_add(8)?, 8)?;
        let length = number(header.checked_add(32)?, 8)?;
        (number(header, 4)? == 4).then(|| elf.get(start..start.checked_add(length)?))?
    };
    (0..number(0x38, 2).unwrap_or(0))
        .filter_map(segment)
        .flatten()
        .copied()
        .collect()
}

/// Writes the ELF kernel of `image` to `to`.
pub(crate) fn extract(image: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("reading {} failed", image.display()))?;
    let elf = if bytes.starts_with(MAGIC) {
        bytes
    } else {
        let payload = payload(&bytes).with_context(|| format!("{} is no bzImage", image.display()))?;
        decompress(payload).with_context(|| format!("decompressing {} failed", image.display()))?
    };
    ensure!(elf.starts_with(MAGIC), "{} has no ELF kernel", image.display());
    let notes = notes(&elf);
    ensure!(
        pvh_notes()
            .iter()
            .any(|note| notes.windows(note.len()).any(|bytes| bytes == note)),
        "the kernel in {} has no entry for PVH",
        image.display()
    );
    fs::write(to, elf).with_context(|| format!("writing {} failed", to.display()))
}

/// The compressed kernel. The last four bytes are its length, uncompressed, which gzip writes itself.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    ensure_magic(image)?;
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + number(0x248)?;
    let length = number(0x24c)?;
    image.get(start..start.checked_add(length)?)
}

/// The header's own mark, `HdrS` at 0x202.
fn ensure_magic(image: &[u8]) -> Option<()> {
    (image.get(0x202..0x206)? == b"HdrS").then_some(())
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    let without_length = payload.get(..payload.len().saturating_sub(4)).unwrap_or_default();
    match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            ruzstd::decoding::StreamingDecoder::new(without_length)?.read_to_end(&mut plain)?;
        }
        [0x1f, 0x8b, ..] => {
            flate2::read::GzDecoder::new(payload).read_to_end(&mut plain)?;
        }
        // With a filter for x86, which only the program has.
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => plain = through("xz", without_length)?,
        [0x02, 0x21, 0x4c, 0x18, ..] => plain = through("lz4", without_length)?,
        _ => bail!("it is compressed in a way that is not known here"),
    }
    Ok(plain)
}

/// What `program -dc` makes of `bytes`.
fn through(program: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut child = process::command(program)
        .arg("-dcq")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program} failed"))?;
    let mut input = child.stdin.take().context("no pipe")?;
    let output = std::thread::scope(|scope| {
        let writer = scope.spawn(move || input.write_all(bytes));
        let output = child.wait_with_output();
        // A program that saw the end of its data may leave before it has read what follows.
        let _ = writer.join();
        output
    })?;
    ensure!(output.status.success(), "{program} ended with {}", output.status);
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A bzImage with `payload`.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend(payload);
        image
    }

    /// An ELF file of one segment, with `notes`.
    fn elf(notes: &[u8]) -> Vec<u8> {
        let mut elf = vec![0; 0x40 + 56];
        elf[..4].copy_from_slice(MAGIC);
        elf[0x20] = 0x40;
        elf[0x36] = 56;
        elf[0x38] = 1;
        elf[0x40] = 4;
        elf[0x40 + 8] = 0x40 + 56;
        elf[0x40 + 32] = u8::try_from(notes.len()).unwrap();
        elf.extend(notes);
        elf
    }

    #[test]
    fn the_kernel_comes_out_of_the_image() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let kernel = elf(&[&pvh_notes()[0], b"0000".as_slice()].concat());
        gzip.write_all(&kernel).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("image"), folder.path().join("elf"));
        fs::write(&from, image(&gzip.finish().unwrap())).unwrap();
        extract(&from, &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), kernel);
        // What is an ELF file is taken as it is.
        extract(&to, &from).unwrap();
        assert_eq!(fs::read(&from).unwrap(), kernel);
        fs::write(&to, elf(b"another note")).unwrap();
        extract(&to, &from).unwrap_err();
    }

    #[test]
    fn garbage_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("image"), folder.path().join("elf"));
        for bytes in [&b"x"[..], &[0; 2000], &image(b"unknown"), &image(b"")] {
            fs::write(&from, bytes).unwrap();
            extract(&from, &to).unwrap_err();
        }
    }
}
