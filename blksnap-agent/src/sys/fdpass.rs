//! Descriptors over a unix socket (`SCM_RIGHTS`).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// Most descriptors in one message; the kernel allows 253 (`SCM_MAX_FD`).
pub const MAX_DESCRIPTORS: usize = 64;

/// Sends `data`, which must not be empty, with copies of `descriptors`, at most [`MAX_DESCRIPTORS`].
///
/// # Errors
/// The peer is gone, or too many descriptors.
pub fn send(socket: &UnixStream, data: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let sent = sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(data)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent == data.len() {
        Ok(())
    } else {
        Err(Errno::EMSGSIZE)
    }
}

/// Receives up to `data.len()` bytes and the descriptors that came with them; 0 bytes is the end.
///
/// # Errors
/// The socket fails.
pub fn receive(socket: &UnixStream, data: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(data)];
    let message = recvmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing else knows them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn descriptors_arrive_with_their_bytes() {
        let (one, other) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        send(&one, b"ab", &[null.as_fd(), null.as_fd()]).unwrap();
        send(&one, b"c", &[]).unwrap();
        let mut data = [0; 8];
        let (count, descriptors) = receive(&other, &mut data).unwrap();
        assert_eq!((&data[..count], descriptors.len()), (&b"ab"[..], 2));
        for descriptor in descriptors {
            let inode = |file: &File| file.metadata().unwrap().ino();
            assert_eq!(inode(&descriptor.into()), inode(&null));
        }
        drop(one);
        let (count, descriptors) = receive(&other, &mut data).unwrap();
        assert_eq!((&data[..count], descriptors.len()), (&b"c"[..], 0));
        assert_eq!(receive(&other, &mut data).unwrap().0, 0);
    }
}
