//! Backend: what a device is connected to, as text that the kernel keeps with it.
//!
//! `/sys/block/nbdN/backend` (Linux 5.14) is the only record of our devices: it lives exactly as long as the
//! connection of the device does, and whoever reads it can make the connections anew. A reconnection must bring the
//! same text, so it holds nothing that may change.
//!
//! ```text
//! blksnap connections=4 timeout=30 dead-timeout=60 server=/run/blksnap/nbd.sock export=6fb1c7f0…/sdb1
//! ```
//! Blanks and what is no plain ASCII are percent-encoded.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::nbd::address::Address;

const MARK: &str = "blksnap";

/// Longest text; sysfs shows no more than a page.
const LONGEST: usize = 2048;

/// What a device is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Number of connections.
    pub connections: u32,
    /// A request without an answer for so long ends its connection; whole seconds.
    pub timeout: Duration,
    /// Requests wait so long for a new connection before they fail; whole seconds.
    pub dead_timeout: Duration,
    /// The server.
    pub server: Address,
    /// Name of the export.
    pub export: String,
}

/// A text that is none of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a device of blksnap")]
pub struct NotOurs;

impl Backend {
    /// Whether the kernel can show the whole text.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.to_string().len() <= LONGEST
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{MARK} connections={} timeout={} dead-timeout={} server={} export={}",
            self.connections,
            self.timeout.as_secs(),
            self.dead_timeout.as_secs(),
            encode(&self.server.to_string()),
            encode(&self.export)
        )
    }
}

impl FromStr for Backend {
    type Err = NotOurs;

    fn from_str(text: &str) -> Result<Self, NotOurs> {
        let mut words = text.split_ascii_whitespace();
        if words.next() != Some(MARK) {
            return Err(NotOurs);
        }
        let fields: BTreeMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
        let get = |name: &str| fields.get(name).copied().ok_or(NotOurs);
        let number = |name: &str| get(name)?.parse::<u32>().map_err(|_| NotOurs);
        let seconds = |name: &str| number(name).map(|count| Duration::from_secs(count.into()));
        Ok(Self {
            connections: number("connections")?,
            timeout: seconds("timeout")?,
            dead_timeout: seconds("dead-timeout")?,
            server: decode(get("server")?)?.parse().map_err(|_| NotOurs)?,
            export: decode(get("export")?)?,
        })
    }
}

fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_graphic() && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

fn decode(text: &str) -> Result<String, NotOurs> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        if *byte == b'%' {
            let (digits, after) = after.split_at_checked(2).ok_or(NotOurs)?;
            let digits = std::str::from_utf8(digits).map_err(|_| NotOurs)?;
            bytes.push(u8::from_str_radix(digits, 16).map_err(|_| NotOurs)?);
            rest = after;
        } else {
            bytes.push(*byte);
            rest = after;
        }
    }
    String::from_utf8(bytes).map_err(|_| NotOurs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn backend(server: &str, export: &str) -> Backend {
        Backend {
            connections: 4,
            timeout: Duration::from_secs(30),
            dead_timeout: Duration::from_secs(60),
            server: server.parse().unwrap(),
            export: export.to_owned(),
        }
    }

    #[test]
    fn the_text_is_for_people_too() {
        assert_eq!(
            backend("/run/my dir/nbd.sock", "id/sdb1").to_string(),
            "blksnap connections=4 timeout=30 dead-timeout=60 server=/run/my%20dir/nbd.sock export=id/sdb1"
        );
    }

    #[test]
    fn other_texts_are_not_ours() {
        for text in [
            "",
            "blksnap",
            "nbd-client",
            "blksnap connections=x timeout=1 dead-timeout=1 server=/s export=a",
            "blksnap connections=1 timeout=1 dead-timeout=1 server=/s",
            "blksnap connections=1 timeout=1 dead-timeout=1 server=/s export=%F",
            "blksnap connections=1 timeout=1 dead-timeout=1 server=/s export=%FF",
        ] {
            assert_eq!(text.parse::<Backend>(), Err(NotOurs), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_name_comes_back(export in "\\PC{0,40}") {
            let before = backend("/run/blksnap/nbd.sock", &export);
            prop_assert_eq!(before.to_string().parse::<Backend>(), Ok(before));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,80}") {
            let _ = text.parse::<Backend>();
            let _ = format!("blksnap {text}").parse::<Backend>();
        }
    }
}
