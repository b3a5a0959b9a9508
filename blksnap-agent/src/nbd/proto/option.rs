//! Option: the data of handshake options, parsed, and the replies to options.

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use super::limits::{MAX_QUERIES, MAX_STRING};
use super::wire::{InfoType, OPTION_REPLY_MAGIC, OptionReplyHeader, OptionReplyType, OptionType};

/// Why an option is answered with an error: the reply's type and a sentence for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// An error type.
    pub reply: OptionReplyType,
    /// What is wrong, for display.
    pub message: &'static str,
}

impl Refusal {
    /// `NBD_REP_ERR_INVALID` with this message.
    #[must_use]
    pub const fn invalid(message: &'static str) -> Self {
        Self {
            reply: OptionReplyType::ErrInvalid,
            message,
        }
    }

    /// `NBD_REP_ERR_TOO_BIG` with this message.
    #[must_use]
    pub const fn too_big(message: &'static str) -> Self {
        Self {
            reply: OptionReplyType::ErrTooBig,
            message,
        }
    }

    /// `NBD_REP_ERR_UNKNOWN`: no such export.
    #[must_use]
    pub const fn unknown_export() -> Self {
        Self {
            reply: OptionReplyType::ErrUnknown,
            message: "no export has this name",
        }
    }

    /// `NBD_REP_ERR_UNSUP` with this message.
    #[must_use]
    pub const fn unsupported(message: &'static str) -> Self {
        Self {
            reply: OptionReplyType::ErrUnsupported,
            message,
        }
    }
}

/// Checks a string of the protocol ("Conventions"): UTF-8, no NUL, not too long.
///
/// # Errors
/// The refusal to answer with.
pub fn string(bytes: &[u8]) -> Result<&str, Refusal> {
    if bytes.len() > MAX_STRING {
        return Err(Refusal::too_big("a string is at most 4096 bytes"));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(Refusal::invalid("a string is UTF-8 without NUL")),
    }
}

/// Takes a big-endian 32-bit number off the front of `data`.
fn take_number(data: &mut &[u8]) -> Option<u32> {
    let (number, rest) = U32::read_from_prefix(data).ok()?;
    *data = rest;
    Some(number.get())
}

/// Takes a length and as many bytes off the front of `data`.
fn take_counted<'a>(data: &mut &'a [u8]) -> Option<&'a [u8]> {
    let mut rest = *data;
    let length = usize::try_from(take_number(&mut rest)?).ok()?;
    let (bytes, rest) = rest.split_at_checked(length)?;
    *data = rest;
    Some(bytes)
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Name of the export; empty for the default one.
    pub name: &'a str,
    /// Whether `NBD_INFO_NAME` was asked for.
    pub wants_name: bool,
    /// Whether `NBD_INFO_DESCRIPTION` was asked for.
    pub wants_description: bool,
    /// Whether `NBD_INFO_BLOCK_SIZE` was asked for.
    pub wants_block_size: bool,
}

impl<'a> InfoRequest<'a> {
    /// Parses the option's data. Unknown kinds of information are ignored, as are repeated ones.
    ///
    /// # Errors
    /// The refusal to answer with: lengths that contradict each other, a name that is no string.
    pub fn parse(mut data: &'a [u8]) -> Result<Self, Refusal> {
        const LENGTHS: Refusal = Refusal::invalid("the lengths in this option contradict each other");
        let name = take_counted(&mut data).ok_or(LENGTHS)?;
        let (count, kinds) = data.split_first_chunk::<2>().ok_or(LENGTHS)?;
        if kinds.len() != usize::from(u16::from_be_bytes(*count)) * 2 {
            return Err(LENGTHS);
        }
        let wants = |kind: InfoType| {
            kinds
                .chunks_exact(2)
                .any(|number| number == kind.number().to_be_bytes())
        };
        Ok(Self {
            name: string(name)?,
            wants_name: wants(InfoType::Name),
            wants_description: wants(InfoType::Description),
            wants_block_size: wants(InfoType::BlockSize),
        })
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// Name of the export; empty for the default one.
    pub name: &'a str,
    /// Queries, in the client's order.
    pub queries: Vec<&'a str>,
}

impl<'a> ContextRequest<'a> {
    /// Parses the option's data.
    ///
    /// # Errors
    /// The refusal to answer with: lengths that contradict each other, a name or query that is no string, too many
    /// queries.
    pub fn parse(mut data: &'a [u8]) -> Result<Self, Refusal> {
        const LENGTHS: Refusal = Refusal::invalid("the lengths in this option contradict each other");
        let name = take_counted(&mut data).ok_or(LENGTHS)?;
        let count = take_number(&mut data).ok_or(LENGTHS)?;
        let mut queries = Vec::new();
        for taken in 0..count {
            if taken == MAX_QUERIES {
                return Err(Refusal::too_big("at most 128 queries fit in one option"));
            }
            let query = take_counted(&mut data).ok_or(LENGTHS)?;
            queries.push(string(query)?);
        }
        if !data.is_empty() {
            return Err(LENGTHS);
        }
        Ok(Self {
            name: string(name)?,
            queries,
        })
    }
}

/// Appends a reply to the option numbered `option`; `parts` together are its data.
///
/// # Panics
/// The data is longer than 2^32 bytes, which no caller can make from bounded strings.
pub fn write_reply(out: &mut Vec<u8>, option: u32, reply: OptionReplyType, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let header = OptionReplyHeader {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        reply: reply.number().into(),
        length: u32::try_from(length).expect("option replies are short").into(),
    };
    out.extend_from_slice(header.as_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Appends `NBD_REP_ACK`.
pub fn write_ack(out: &mut Vec<u8>, option: OptionType) {
    write_reply(out, option.number(), OptionReplyType::Ack, &[]);
}

/// Appends an error reply with its message.
pub fn write_refusal(out: &mut Vec<u8>, option: u32, refusal: Refusal) {
    write_reply(out, option, refusal.reply, &[refusal.message.as_bytes()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &[u8], kinds: &[u16]) -> Vec<u8> {
        let mut data = Vec::new();
        data.extend_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
        data.extend_from_slice(name);
        data.extend_from_slice(&u16::try_from(kinds.len()).unwrap().to_be_bytes());
        for kind in kinds {
            data.extend_from_slice(&kind.to_be_bytes());
        }
        data
    }

    #[test]
    fn info_requests_are_parsed() {
        let data = info(b"disk", &[1, 3, 3, 0x7777]);
        let request = InfoRequest::parse(&data).unwrap();
        assert_eq!(request.name, "disk");
        assert!(request.wants_name && request.wants_block_size && !request.wants_description);
    }

    #[test]
    fn every_cut_or_grown_info_request_is_invalid() {
        let data = info(b"disk", &[1, 3]);
        for length in 0..data.len() {
            let refusal = InfoRequest::parse(&data[..length]).unwrap_err();
            assert_eq!(refusal.reply, OptionReplyType::ErrInvalid, "{length}");
        }
        let mut grown = data;
        grown.push(0);
        assert_eq!(
            InfoRequest::parse(&grown).unwrap_err().reply,
            OptionReplyType::ErrInvalid
        );
    }

    #[test]
    fn strings_are_checked() {
        assert_eq!(string(b"").unwrap(), "");
        assert_eq!(string("\u{e9}t\u{e9}".as_bytes()).unwrap(), "\u{e9}t\u{e9}");
        assert_eq!(string(b"a\0b").unwrap_err().reply, OptionReplyType::ErrInvalid);
        assert_eq!(string(&[0xff]).unwrap_err().reply, OptionReplyType::ErrInvalid);
        assert!(string(&[b'a'; MAX_STRING]).is_ok());
        assert_eq!(
            string(&[b'a'; MAX_STRING + 1]).unwrap_err().reply,
            OptionReplyType::ErrTooBig
        );
    }

    #[test]
    fn context_requests_are_parsed_and_bounded() {
        let mut data = Vec::new();
        data.extend_from_slice(&[0, 0, 0, 1, b'd', 0, 0, 0, 2]);
        data.extend_from_slice(&[0, 0, 0, 5]);
        data.extend_from_slice(b"base:");
        data.extend_from_slice(&[0, 0, 0, 0]);
        let request = ContextRequest::parse(&data).unwrap();
        assert_eq!(request.name, "d");
        assert_eq!(request.queries, ["base:", ""]);
        for length in 0..data.len() {
            let refusal = ContextRequest::parse(&data[..length]).unwrap_err();
            assert_eq!(refusal.reply, OptionReplyType::ErrInvalid, "{length}");
        }

        let mut many = vec![0, 0, 0, 0];
        many.extend_from_slice(&(MAX_QUERIES + 1).to_be_bytes());
        many.resize(many.len() + 4 * (MAX_QUERIES as usize + 1), 0);
        assert_eq!(
            ContextRequest::parse(&many).unwrap_err().reply,
            OptionReplyType::ErrTooBig
        );

        let huge = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(
            ContextRequest::parse(&huge).unwrap_err().reply,
            OptionReplyType::ErrInvalid
        );
    }
}
