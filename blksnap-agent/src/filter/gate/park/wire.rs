//! Wire: what of the FUSE protocol (include/uapi/linux/fuse.h) a file system needs that is one file, whose reads are
//! requests.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes that a read of a request may need at most: the kernel's least (`FUSE_MIN_READ_BUFFER`).
pub(super) const BUFFER: usize = 8192;

/// `FUSE_KERNEL_VERSION`, and the minor version whose structs these are.
const VERSION: (u32, u32) = (7, 31);

/// `enum fuse_opcode`.
mod opcode {
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const INIT: u32 = 26;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
}

/// `struct fuse_in_header`.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct InHeader {
    len: u32,
    opcode: u32,
    unique: u64,
    nodeid: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    extensions: u32,
}

/// `struct fuse_read_in`.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct ReadIn {
    fh: u64,
    offset: u64,
    size: u32,
    read_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32,
}

/// `struct fuse_out_header`.
#[derive(Clone, Copy, Debug, Immutable, IntoBytes)]
#[repr(C)]
struct OutHeader {
    len: u32,
    error: i32,
    unique: u64,
}

/// `struct fuse_init_out`.
#[derive(Clone, Copy, Debug, Default, Immutable, IntoBytes)]
#[repr(C)]
struct InitOut {
    major: u32,
    minor: u32,
    /// 0: one page at a time.
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    unused: [u32; 8],
}

/// `struct fuse_attr_out` with its `struct fuse_attr`.
#[derive(Clone, Copy, Debug, Default, Immutable, IntoBytes)]
#[repr(C)]
struct AttrOut {
    /// Seconds for which it is true.
    valid: u64,
    valid_nanoseconds: u32,
    dummy: u32,
    ino: u64,
    size: u64,
    blocks: u64,
    times: [u64; 3],
    nanoseconds: [u32; 3],
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    blksize: u32,
    flags: u32,
}

/// `struct fuse_open_out`.
#[derive(Clone, Copy, Debug, Default, Immutable, IntoBytes)]
#[repr(C)]
struct OpenOut {
    fh: u64,
    open_flags: u32,
    padding: u32,
}

const _: () = {
    assert!(size_of::<InHeader>() == 40);
    assert!(size_of::<ReadIn>() == 40);
    assert!(size_of::<OutHeader>() == 16);
    assert!(size_of::<InitOut>() == 64);
    assert!(size_of::<AttrOut>() == 104);
    assert!(size_of::<OpenOut>() == 16);
};

/// What the kernel asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// A read that begins at this byte.
    Read {
        /// Number of the request.
        unique: u64,
        /// Its first byte.
        offset: u64,
    },
    /// Something else, and the answer to it.
    Answered(Vec<u8>),
    /// Nothing that has an answer.
    Told,
    /// It is no request.
    Damaged,
}

impl Message {
    /// Of the bytes of a request, to a file of `size` bytes.
    pub(super) fn of(bytes: &[u8], size: u64) -> Self {
        let Ok((header, rest)) = InHeader::read_from_prefix(bytes) else {
            return Self::Damaged;
        };
        let unique = header.unique;
        match header.opcode {
            opcode::READ => match ReadIn::read_from_prefix(rest) {
                Ok((read, _)) => Self::Read {
                    unique,
                    offset: read.offset,
                },
                Err(_) => Self::Answered(error(unique, libc::EINVAL)),
            },
            opcode::INIT => Self::Answered(answer(
                unique,
                &InitOut {
                    major: VERSION.0,
                    minor: VERSION.1,
                    max_write: 4096,
                    time_gran: 1,
                    ..InitOut::default()
                },
            )),
            opcode::GETATTR => Self::Answered(answer(
                unique,
                &AttrOut {
                    valid: u64::from(u32::MAX),
                    ino: 1,
                    size,
                    mode: libc::S_IFREG | 0o400,
                    nlink: 1,
                    blksize: 4096,
                    ..AttrOut::default()
                },
            )),
            opcode::OPEN => Self::Answered(answer(unique, &OpenOut::default())),
            opcode::FORGET | opcode::BATCH_FORGET | opcode::DESTROY => Self::Told,
            // An interrupt among them: the kernel sends no more of them then.
            _ => Self::Answered(error(unique, libc::ENOSYS)),
        }
    }
}

fn answer(unique: u64, body: &(impl IntoBytes + Immutable)) -> Vec<u8> {
    let body = body.as_bytes();
    let length = size_of::<OutHeader>() + body.len();
    let header = OutHeader {
        len: u32::try_from(length).unwrap_or(u32::MAX),
        error: 0,
        unique,
    };
    [header.as_bytes(), body].concat()
}

fn error(unique: u64, errno: i32) -> Vec<u8> {
    refusal(unique, errno).to_vec()
}

/// The answer that a request failed, 16 bytes.
pub(super) fn refusal(unique: u64, errno: i32) -> [u8; 16] {
    let header = OutHeader {
        len: 16,
        error: -errno,
        unique,
    };
    zerocopy::transmute!(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let header = InHeader {
            len: 0,
            opcode,
            unique: 77,
            nodeid: 1,
            uid: 0,
            gid: 0,
            pid: 5,
            extensions: 0,
        };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn a_read_is_known_by_its_offset() {
        let read = ReadIn {
            fh: 0,
            offset: 12 * 4096,
            size: 4096,
            read_flags: 0,
            lock_owner: 0,
            flags: 0,
            padding: 0,
        };
        let message = Message::of(&request(opcode::READ, read.as_bytes()), 1 << 20);
        assert_eq!(
            message,
            Message::Read {
                unique: 77,
                offset: 49152
            }
        );
        // One without what it wants is refused, not taken for another.
        let Message::Answered(bytes) = Message::of(&request(opcode::READ, &[0; 39]), 1 << 20) else {
            panic!("not refused");
        };
        assert_eq!(bytes, refusal(77, libc::EINVAL));
    }

    #[test]
    fn every_answer_says_its_length_and_its_request() {
        for (asked, length) in [
            (opcode::INIT, 80),
            (opcode::GETATTR, 120),
            (opcode::OPEN, 32),
            (25, 16),
            (36, 16),
        ] {
            let Message::Answered(bytes) = Message::of(&request(asked, &[0; 64]), 4096) else {
                panic!("{asked} is not answered");
            };
            assert_eq!(bytes.len(), length, "{asked}");
            assert_eq!(
                bytes[..4],
                u32::try_from(length).unwrap().to_ne_bytes(),
                "{asked}"
            );
            assert_eq!(bytes[8..16], 77_u64.to_ne_bytes(), "{asked}");
        }
        assert_eq!(Message::of(&request(opcode::FORGET, &[0; 8]), 0), Message::Told);
        assert_eq!(Message::of(&[1; 39], 0), Message::Damaged);
    }
}
