//! Check: a request against what was agreed ("Size constraints", "Command flags", "Error values").
//!
//! Which error answers which mistake follows the specification: what reaches beyond the end is `NBD_ENOSPC` for writes
//! and zeroes and `NBD_EINVAL` for the rest, writes to a read-only export are `NBD_EPERM`, a read beyond the largest
//! payload is `NBD_EOVERFLOW` where replies are chunks, all else `NBD_EINVAL`.

use super::context::ContextSet;
use super::request::{Command, Header, Refusal};
use super::session::{Framing, Session};
use super::wire::{CommandFlags, CommandType, ErrorCode, TransmissionFlags};

impl Session {
    /// The command of a request, or the error to answer.
    pub(super) fn check(&self, header: &Header) -> Result<Command, Refusal> {
        let Header {
            flags,
            offset,
            length,
            ..
        } = *header;
        let kind = header
            .kind
            .ok_or((ErrorCode::Invalid, "the command is unknown"))?;
        let fua = flags.contains(CommandFlags::FUA);
        match kind {
            CommandType::Read => {
                self.allow(header, CommandFlags::DONT_FRAGMENT)?;
                self.in_range(offset, length, ErrorCode::Invalid)?;
                Ok(Command::Read {
                    offset,
                    length: self.transferred(length).ok_or((
                        if self.framing.has_chunks() {
                            ErrorCode::Overflow
                        } else {
                            ErrorCode::Invalid
                        },
                        "the request is longer than the largest payload",
                    ))?,
                    dont_fragment: flags.contains(CommandFlags::DONT_FRAGMENT),
                })
            }
            CommandType::Write => {
                self.writable()?;
                self.allow(header, CommandFlags::PAYLOAD_LEN)?;
                self.in_range(offset, length, ErrorCode::NoSpace)?;
                Ok(Command::Write {
                    offset,
                    length: self.transferred(length).ok_or((
                        ErrorCode::Invalid,
                        "the request is longer than the largest payload",
                    ))?,
                    fua,
                })
            }
            CommandType::Flush => {
                self.allow(header, CommandFlags::empty())?;
                if offset != 0 || length != 0 {
                    return Err((ErrorCode::Invalid, "a flush has no offset and no length"));
                }
                Ok(Command::Flush)
            }
            CommandType::Trim => {
                self.writable()?;
                self.allow(header, CommandFlags::empty())?;
                self.in_range(offset, length, ErrorCode::Invalid)?;
                Ok(Command::Trim { offset, length, fua })
            }
            CommandType::Cache => {
                self.allow(header, CommandFlags::empty())?;
                self.in_range(offset, length, ErrorCode::Invalid)?;
                Ok(Command::Cache { offset, length })
            }
            CommandType::WriteZeroes => {
                self.writable()?;
                self.allow(header, CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO)?;
                self.in_range(offset, length, ErrorCode::NoSpace)?;
                Ok(Command::WriteZeroes {
                    offset,
                    length,
                    fua,
                    no_hole: flags.contains(CommandFlags::NO_HOLE),
                    fast: flags.contains(CommandFlags::FAST_ZERO),
                })
            }
            CommandType::BlockStatus => {
                if header.payload > 0 {
                    return Err((ErrorCode::Invalid, "the list of contexts has no valid length"));
                }
                self.status(header, length, ContextSet::first(self.contexts.len()))
            }
            CommandType::Resize => Err((ErrorCode::Invalid, "the size can't be changed")),
            CommandType::Disconnect => Err((ErrorCode::Invalid, "a disconnect request has no reply")),
        }
    }

    /// The command of a status request over `length` bytes.
    pub(super) fn status(
        &self,
        header: &Header,
        length: u64,
        contexts: ContextSet,
    ) -> Result<Command, Refusal> {
        if self.contexts.is_empty() {
            return Err((ErrorCode::Invalid, "no metadata context was selected"));
        }
        self.allow(header, CommandFlags::REQ_ONE | CommandFlags::PAYLOAD_LEN)?;
        self.in_range(header.offset, length, ErrorCode::Invalid)?;
        if length == 0 {
            return Err((ErrorCode::Invalid, "a status request of no bytes has no answer"));
        }
        Ok(Command::BlockStatus {
            offset: header.offset,
            length,
            one: header.flags.contains(CommandFlags::REQ_ONE),
            contexts,
        })
    }

    /// A length that can be transferred at once.
    fn transferred(&self, length: u64) -> Option<u32> {
        u32::try_from(length)
            .ok()
            .filter(|length| *length <= self.block_sizes.maximum())
    }

    fn writable(&self) -> Result<(), Refusal> {
        if self.flags.contains(TransmissionFlags::READ_ONLY) {
            Err((ErrorCode::NotPermitted, "the export is read-only"))
        } else {
            Ok(())
        }
    }

    /// Checks that a request has no other flags than those of its command, as far as they were offered. FUA may come
    /// with every command once it was offered ("Command flags").
    fn allow(&self, header: &Header, of_command: CommandFlags) -> Result<(), Refusal> {
        let offered = self.flags;
        let mut allowed = of_command;
        allowed.set(CommandFlags::FUA, offered.contains(TransmissionFlags::SEND_FUA));
        if !offered.contains(TransmissionFlags::SEND_DF) {
            allowed.remove(CommandFlags::DONT_FRAGMENT);
        }
        if !offered.contains(TransmissionFlags::SEND_FAST_ZERO) {
            allowed.remove(CommandFlags::FAST_ZERO);
        }
        if self.framing != Framing::Extended {
            allowed.remove(CommandFlags::PAYLOAD_LEN);
        }
        if allowed.contains(header.flags) {
            Ok(())
        } else {
            Err((
                ErrorCode::Invalid,
                "the request carries a flag that was not offered for it",
            ))
        }
    }

    /// Checks that a request keeps the smallest block and lies inside the export.
    fn in_range(&self, offset: u64, length: u64, beyond: ErrorCode) -> Result<(), Refusal> {
        let minimum = u64::from(self.block_sizes.minimum());
        if !offset.is_multiple_of(minimum) || !length.is_multiple_of(minimum) {
            return Err((
                ErrorCode::Invalid,
                "the request is not aligned to the smallest block",
            ));
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err((beyond, "the request reaches beyond the end of the export")),
        }
    }
}
