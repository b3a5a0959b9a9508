//! State files: any text is refused or is a document, and a document with a changed byte is not believed.
//!
//! The first byte of an input says how the rest is meant. As a text it is read as it is; if it is accepted, the
//! oracle must find format, version and sum right by itself, and writing what was read must give it again. As a
//! content it is written and read back, and then once more with the byte changed that the end of the input names.

use std::fs;
use std::path::Path;

use blksnap_agent::statefile::{self, Format, StateFileError};
use serde_json::Value;

use crate::checksum::crc32c;

const FORMAT: Format = Format {
    name: "fuzz",
    version: 7,
};

/// Deepest content that is written: below what the reader follows, as all of ours is.
const DEEPEST: usize = 100;

/// Runs one input.
///
/// # Panics
/// When a document is believed that should not be, or the other way round.
pub fn run(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder for state files");
    let path = folder.path().join("state.json");
    match data.split_first() {
        Some((0, text)) => any_text(&path, text),
        Some((1, rest)) if rest.len() > 3 => {
            let (change, content) = rest.split_at(3);
            if let Ok(content) = serde_json::from_slice(content) {
                document(
                    &path,
                    &content,
                    usize::from(change[0]) << 8 | usize::from(change[1]),
                    change[2],
                );
            }
        }
        _ => {}
    }
}

fn read(path: &Path) -> Result<Value, StateFileError> {
    let read = statefile::read(path, FORMAT);
    read.map(|content| content.expect("the file is there"))
}

fn any_text(path: &Path, text: &[u8]) {
    fs::write(path, text).expect("room for a file");
    let content = match read(path) {
        Ok(content) => content,
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "{error:?}");
            return;
        }
    };
    let document: Value = serde_json::from_slice(text).expect("accepted, but no JSON");
    assert_eq!(document["format"], FORMAT.name);
    assert_eq!(document["version"], FORMAT.version);
    assert_eq!(document["content"], content);
    assert_eq!(document["checksum"], checksum(&content));
    assert_eq!(document.as_object().map(serde_json::Map::len), Some(4));
    if is_plain(&content, DEEPEST) {
        statefile::write(path, FORMAT, &content).expect("room for a file");
        assert_eq!(read(path).expect("what was written"), content);
    }
}

fn document(path: &Path, content: &Value, at: usize, change: u8) {
    if !is_plain(content, DEEPEST) {
        return;
    }
    statefile::write(path, FORMAT, content).expect("room for a file");
    assert_eq!(&read(path).expect("what was written"), content);
    let mut text = fs::read(path).expect("the file is there");
    let written: Value = serde_json::from_slice(&text).expect("a document");
    assert_eq!(written["checksum"], checksum(content));

    let at = at % text.len();
    text[at] ^= change;
    fs::write(path, &text).expect("room for a file");
    if let Ok(content_now) = read(path) {
        assert_eq!(
            &content_now, content,
            "byte {at} changed by {change:#x} was believed"
        );
    }
    fs::write(path, &text[..at]).expect("room for a file");
    // Cut before the closing brace it is no document; behind it only the line's end is missing.
    assert!(
        read(path).is_err() || at + 1 == text.len(),
        "cut at {at} was believed"
    );
}

/// Whether a content is one that the agent writes: no fractions, not too deep.
fn is_plain(content: &Value, deep: usize) -> bool {
    deep > 0
        && match content {
            Value::Number(number) => !number.is_f64(),
            Value::Array(list) => list.iter().all(|member| is_plain(member, deep - 1)),
            Value::Object(map) => map.values().all(|member| is_plain(member, deep - 1)),
            Value::Null | Value::Bool(_) | Value::String(_) => true,
        }
}

/// The oracle's sum.
fn checksum(content: &Value) -> String {
    format!("crc32c:{:08x}", crc32c(content.to_string().as_bytes()))
}
