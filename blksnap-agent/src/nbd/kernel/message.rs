//! Message: netlink messages as bytes.
//!
//! ```text
//!  nlmsghdr: length u32, type u16, flags u16, sequence u32, port u32
//!  genlmsghdr: command u8, version u8, 0 u16
//!  nlattr: length u16 (header and value), type u16; value; zeroes up to a multiple of 4
//! ```
//! Numbers have the byte order of the machine (include/uapi/linux/netlink.h, include/uapi/linux/genetlink.h). What
//! comes from the socket is checked as outside data, though the kernel wrote it.

use std::ffi::CStr;

/// A message can't be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// It ends in the middle of a header or a value.
    #[error("a netlink message is cut off")]
    Cut,
    /// A value has another length than its type.
    #[error("netlink attribute {0} has the wrong length")]
    Length(u16),
    /// Something that must be there is not.
    #[error("a netlink message lacks attribute {0}")]
    Missing(u16),
}

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct genlmsghdr`.
const GENERIC: usize = 4;
/// Bytes of `struct nlattr`.
const ATTRIBUTE: usize = 4;
/// Everything is padded to a multiple of this (`NLMSG_ALIGNTO`, `NLA_ALIGNTO`).
const ALIGN: usize = 4;

/// Type of a message with an error or an acknowledgement.
#[doc(alias = "NLMSG_ERROR")]
pub(super) const ERROR: u16 = 2;
/// Type of the last message of several.
#[doc(alias = "NLMSG_DONE")]
pub(super) const DONE: u16 = 3;
/// Flag of a request.
#[doc(alias = "NLM_F_REQUEST")]
pub(super) const REQUEST: u16 = 1;
/// Flag that asks for an acknowledgement.
#[doc(alias = "NLM_F_ACK")]
pub(super) const ACK: u16 = 4;
/// Flag of an attribute that holds attributes.
#[doc(alias = "NLA_F_NESTED")]
const NESTED: u16 = 1 << 15;
/// The bits of an attribute's type that are the type.
#[doc(alias = "NLA_TYPE_MASK")]
const TYPE: u16 = !(3 << 14);

/// A generic netlink request under construction.
#[derive(Clone, Debug)]
pub(super) struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    /// A request to the family with this number.
    pub(super) fn new(family: u16, command: u8, version: u8, sequence: u32) -> Self {
        let mut bytes = vec![0; HEADER + GENERIC];
        bytes[4..6].copy_from_slice(&family.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(REQUEST | ACK).to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes[HEADER] = command;
        bytes[HEADER + 1] = version;
        Self { bytes }
    }

    /// Appends an attribute.
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let at = self.open(kind);
        self.bytes.extend_from_slice(value);
        self.close(at);
        self
    }

    /// Appends a number of 32 bits.
    pub(super) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Appends a number of 64 bits.
    pub(super) fn u64(&mut self, kind: u16, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Appends a string with its end.
    pub(super) fn string(&mut self, kind: u16, value: &CStr) -> &mut Self {
        self.bytes(kind, value.to_bytes_with_nul())
    }

    /// Appends an attribute of attributes.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let at = self.open(kind | NESTED);
        fill(self);
        self.close(at);
        self
    }

    fn open(&mut self, kind: u16) -> usize {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        at
    }

    /// Writes the length of the attribute at `at`, which does not count the padding behind it.
    fn close(&mut self, at: usize) {
        let length = u16::try_from(self.bytes.len() - at).expect("attributes here are far below 64 KiB");
        self.bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
    }

    /// The finished message.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).expect("messages here are far below 4 GiB");
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

/// A message that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    /// Type: a family's number, [`ERROR`] or [`DONE`].
    pub(super) kind: u16,
    /// As in the request.
    pub(super) sequence: u32,
    /// What follows the header.
    pub(super) payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The errno of a message of type [`ERROR`]; 0 is an acknowledgement.
    pub(super) fn errno(&self) -> Result<i32, MessageError> {
        // The kernel sends it negative.
        let (number, _) = take::<4>(self.payload)?;
        Ok(i32::from_ne_bytes(number).saturating_neg())
    }

    /// Command and attributes of a message of a family.
    pub(super) fn generic(&self) -> Result<(u8, Attributes<'a>), MessageError> {
        let (header, rest) = take::<GENERIC>(self.payload)?;
        Ok((header[0], Attributes(rest)))
    }
}

fn take<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), MessageError> {
    bytes
        .split_first_chunk::<N>()
        .map(|(head, rest)| (*head, rest))
        .ok_or(MessageError::Cut)
}

/// The messages of one read from the socket.
pub(super) fn messages(mut bytes: &[u8]) -> Result<Vec<Message<'_>>, MessageError> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (header, _) = take::<HEADER>(bytes)?;
        let number =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let length = number(0) as usize;
        if length < HEADER || length > bytes.len() {
            return Err(MessageError::Cut);
        }
        found.push(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            sequence: number(8),
            payload: &bytes[HEADER..length],
        });
        bytes = &bytes[length.next_multiple_of(ALIGN).min(bytes.len())..];
    }
    Ok(found)
}

/// Attributes of a message or of an attribute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes<'a>(&'a [u8]);

/// An attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attribute<'a> {
    pub(super) kind: u16,
    value: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// All of them.
    pub(super) fn list(self) -> Result<Vec<Attribute<'a>>, MessageError> {
        let mut bytes = self.0;
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (header, _) = take::<ATTRIBUTE>(bytes)?;
            let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
            if length < ATTRIBUTE || length > bytes.len() {
                return Err(MessageError::Cut);
            }
            found.push(Attribute {
                kind: u16::from_ne_bytes([header[2], header[3]]) & TYPE,
                value: &bytes[ATTRIBUTE..length],
            });
            bytes = &bytes[length.next_multiple_of(ALIGN).min(bytes.len())..];
        }
        Ok(found)
    }

    /// The first of this type.
    pub(super) fn find(self, kind: u16) -> Result<Attribute<'a>, MessageError> {
        self.list()?
            .into_iter()
            .find(|attribute| attribute.kind == kind)
            .ok_or(MessageError::Missing(kind))
    }
}

impl<'a> Attribute<'a> {
    fn fixed<const N: usize>(&self) -> Result<[u8; N], MessageError> {
        self.value.try_into().map_err(|_| MessageError::Length(self.kind))
    }

    pub(super) fn u8(&self) -> Result<u8, MessageError> {
        self.fixed::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&self) -> Result<u16, MessageError> {
        self.fixed().map(u16::from_ne_bytes)
    }

    pub(super) fn u32(&self) -> Result<u32, MessageError> {
        self.fixed().map(u32::from_ne_bytes)
    }

    /// The attributes inside.
    pub(super) const fn nested(&self) -> Attributes<'a> {
        Attributes(self.value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_kernel_reads_it() {
        let mut builder = Builder::new(0x1b, 1, 1, 7);
        builder.u32(1, 3).nest(7, |sockets| {
            sockets.nest(1, |socket| {
                socket.u32(1, 9);
            });
        });
        builder.string(10, c"abc");
        // As on x86-64 and aarch64.
        if cfg!(target_endian = "little") {
            assert_eq!(
                builder.finish(),
                [
                    52, 0, 0, 0, 0x1b, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, // nlmsghdr
                    1, 1, 0, 0, // genlmsghdr
                    8, 0, 1, 0, 3, 0, 0, 0, // NBD_ATTR_INDEX
                    16, 0, 7, 0x80, // NBD_ATTR_SOCKETS, nested
                    12, 0, 1, 0x80, // NBD_SOCK_ITEM, nested
                    8, 0, 1, 0, 9, 0, 0, 0, // NBD_SOCK_FD
                    8, 0, 10, 0, b'a', b'b', b'c', 0, // NBD_ATTR_BACKEND_IDENTIFIER
                ]
            );
        }
    }

    #[test]
    fn what_was_built_is_read_back() {
        let mut builder = Builder::new(0x1b, 5, 1, 1);
        builder.bytes(2, &[7]).u64(3, u64::MAX);
        let bytes = builder.finish();
        let twice = [bytes.clone(), bytes].concat();
        let found = messages(&twice).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].kind, found[1].sequence), (0x1b, 1));
        let (command, attributes) = found[1].generic().unwrap();
        assert_eq!(command, 5);
        assert_eq!(attributes.find(2).unwrap().u8(), Ok(7));
        assert_eq!(attributes.find(2).unwrap().u32(), Err(MessageError::Length(2)));
        assert_eq!(attributes.find(9), Err(MessageError::Missing(9)));
    }

    #[test]
    fn errors_come_negative_and_acknowledgements_are_zero() {
        let error = |number: i32| {
            let mut bytes = vec![0; HEADER];
            bytes[0..4].copy_from_slice(&20_u32.to_ne_bytes());
            bytes[4..6].copy_from_slice(&ERROR.to_ne_bytes());
            bytes.extend_from_slice(&number.to_ne_bytes());
            bytes
        };
        for (sent, errno) in [(0, 0), (-16, 16), (i32::MIN, i32::MAX)] {
            assert_eq!(messages(&error(sent)).unwrap()[0].errno(), Ok(errno));
        }
    }

    proptest! {
        #[test]
        fn nothing_that_comes_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(found) = messages(&bytes) {
                for message in found {
                    let _ = message.errno();
                    if let Ok((_, attributes)) = message.generic() {
                        for attribute in attributes.list().unwrap_or_default() {
                            let _ = attribute.nested().list();
                        }
                    }
                }
            }
        }

        #[test]
        fn a_message_that_is_cut_is_refused(cut in 1_usize..48) {
            let mut builder = Builder::new(0x1b, 1, 1, 7);
            builder.u64(2, 1).u64(3, 2).u32(4, 5);
            let bytes = builder.finish();
            let length = bytes.len();
            prop_assert_eq!(messages(&bytes[..length - cut.min(length - 1)]), Err(MessageError::Cut));
        }
    }
}
