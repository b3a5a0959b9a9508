//! Request: what the kernel wants of a device, as its descriptor says it.
//!
//! Numbers from `include/uapi/linux/ublk_cmd.h`.

/// `UBLK_IO_OP_*`, the low byte of `op_flags`.
const OP_READ: u32 = 0;
const OP_WRITE: u32 = 1;
const OP_FLUSH: u32 = 2;
const OP_DISCARD: u32 = 3;
const OP_WRITE_ZEROES: u32 = 5;
/// `UBLK_IO_F_FUA`.
const FUA: u32 = 1 << 13;
/// `UBLK_IO_F_NOUNMAP`.
const NO_UNMAP: u32 = 1 << 15;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Bytes go to the request.
    Read,
    /// Bytes come from the request; durable on return if `fua`.
    Write { fua: bool },
    /// What was written before becomes durable.
    Flush,
    /// The range is not needed any more.
    Discard { fua: bool },
    /// The range reads as zeroes; its room stays allocated if `keep`.
    Zero { keep: bool, fua: bool },
    /// Something that was not offered.
    Unknown,
}

/// A request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Which one, among those in flight.
    pub(super) tag: u16,
    pub(super) action: Action,
    /// First byte.
    pub(super) offset: u64,
    /// Bytes; 0 for a flush.
    pub(super) length: u64,
}

impl Request {
    /// Of a descriptor: `op_flags`, `nr_sectors` and `start_sector`.
    pub(super) fn decode(tag: u16, op_flags: u32, sectors: u32, start: u64) -> Self {
        let fua = op_flags & FUA != 0;
        let action = match op_flags & 0xff {
            OP_READ => Action::Read,
            OP_WRITE => Action::Write { fua },
            OP_FLUSH => Action::Flush,
            OP_DISCARD => Action::Discard { fua },
            OP_WRITE_ZEROES => Action::Zero {
                keep: op_flags & NO_UNMAP != 0,
                fua,
            },
            _ => Action::Unknown,
        };
        let flush = action == Action::Flush;
        Self {
            tag,
            action,
            // One that does not fit is behind the end of every disk.
            offset: if flush { 0 } else { start.saturating_mul(512) },
            length: if flush { 0 } else { u64::from(sectors) * 512 },
        }
    }

    /// Whether it may wait for old data to be kept, or for the disk to be durable.
    pub(super) fn may_wait(&self) -> bool {
        self.action != Action::Read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_says_what_is_wanted() {
        let of = |op_flags| Request::decode(7, op_flags, 8, 1 << 32);
        let write = of(OP_WRITE | FUA);
        assert_eq!(
            write,
            Request {
                tag: 7,
                action: Action::Write { fua: true },
                offset: 1 << 41,
                length: 4096,
            }
        );
        assert!(write.may_wait());
        assert!(!of(OP_READ).may_wait());
        assert_eq!(of(OP_READ).action, Action::Read);
        assert_eq!(of(OP_WRITE).action, Action::Write { fua: false });
        assert_eq!(of(OP_DISCARD).action, Action::Discard { fua: false });
        let zero = |keep, fua| Action::Zero { keep, fua };
        assert_eq!(of(OP_WRITE_ZEROES).action, zero(false, false));
        assert_eq!(of(OP_WRITE_ZEROES | NO_UNMAP | FUA).action, zero(true, true));
        // Hints on how to fail are none on what to do.
        assert_eq!(of(OP_WRITE | 0x700).action, Action::Write { fua: false });
        assert_eq!(of(4).action, Action::Unknown);
        assert_eq!(of(13).action, Action::Unknown);
    }

    #[test]
    fn a_flush_has_no_range() {
        let flush = Request::decode(0, OP_FLUSH, 8, 9);
        assert_eq!((flush.offset, flush.length), (0, 0));
        assert!(flush.may_wait());
    }

    #[test]
    fn a_range_that_can_not_be_is_behind_every_disk() {
        let request = Request::decode(0, OP_READ, u32::MAX, u64::MAX);
        assert_eq!(request.offset, u64::MAX);
        assert_eq!(request.length, u64::from(u32::MAX) * 512);
    }

    #[test]
    fn the_numbers_are_those_of_the_kernel() {
        use libublk::sys;
        assert_eq!(
            [OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_WRITE_ZEROES],
            [
                sys::UBLK_IO_OP_READ,
                sys::UBLK_IO_OP_WRITE,
                sys::UBLK_IO_OP_FLUSH,
                sys::UBLK_IO_OP_DISCARD,
                sys::UBLK_IO_OP_WRITE_ZEROES
            ]
        );
        assert_eq!([FUA, NO_UNMAP], [sys::UBLK_IO_F_FUA, sys::UBLK_IO_F_NOUNMAP]);
    }
}
