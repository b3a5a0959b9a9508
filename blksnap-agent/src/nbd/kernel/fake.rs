//! Fake kernel: the peer of the netlink tests. It reads requests as drivers/block/nbd.c does and keeps devices.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;

use super::genetlink::Channel;

/// Number of the family; the kernel's changes from boot to boot.
const NBD: u16 = 0x1d;

/// A device as the kernel was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FakeDevice {
    pub(super) connected: bool,
    pub(super) size: u64,
    pub(super) block_size: u64,
    pub(super) timeout: u64,
    pub(super) dead_timeout: u64,
    pub(super) server_flags: u64,
    pub(super) backend: String,
    pub(super) sockets: Vec<u32>,
    dead: usize,
}

#[derive(Debug, Default)]
struct State {
    without_nbd: bool,
    devices: BTreeMap<u32, FakeDevice>,
    answers: VecDeque<Vec<u8>>,
}

/// The kernel's side; clones are the same kernel.
#[derive(Clone, Debug, Default)]
pub(super) struct FakeKernel(Arc<Mutex<State>>);

/// Attributes by type, read without the code under test.
fn attributes(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut found = Vec::new();
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        let kind = u16::from_ne_bytes([bytes[2], bytes[3]]) & 0x3fff;
        found.push((kind, bytes[4..length].to_vec()));
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    found
}

fn value<const N: usize>(attributes: &[(u16, Vec<u8>)], kind: u16) -> Option<[u8; N]> {
    let (_, value) = attributes.iter().find(|(known, _)| *known == kind)?;
    value.as_slice().try_into().ok()
}

fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend_from_slice(&u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

impl State {
    fn message(&mut self, kind: u16, sequence: u32, payload: &[u8]) {
        let mut bytes = u32::try_from(16 + payload.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(payload);
        self.answers.push_back(bytes);
    }

    /// An error, with the message that it is about, as the kernel sends it; an acknowledgement without errno.
    fn end(&mut self, sequence: u32, outcome: Result<(), Errno>) {
        let errno = outcome.err().map_or(0, |errno| -(errno as i32));
        let mut payload = errno.to_ne_bytes().to_vec();
        payload.extend_from_slice(&[0; 16]);
        self.message(2, sequence, &payload);
    }

    fn sockets(attributes: &[(u16, Vec<u8>)]) -> Vec<u32> {
        let Some((_, list)) = attributes.iter().find(|(kind, _)| *kind == 7) else {
            return Vec::new();
        };
        self::attributes(list)
            .iter()
            .map(|(_, item)| u32::from_ne_bytes(value(&self::attributes(item), 1).unwrap()))
            .collect()
    }

    fn backend(attributes: &[(u16, Vec<u8>)]) -> String {
        let (_, bytes) = attributes.iter().find(|(kind, _)| *kind == 10).unwrap();
        String::from_utf8(bytes.strip_suffix(&[0]).unwrap().to_vec()).unwrap()
    }

    fn nbd(&mut self, command: u8, sequence: u32, asked: &[(u16, Vec<u8>)]) -> Result<(), Errno> {
        let index = value(asked, 1).map(u32::from_ne_bytes);
        let number = |kind| value(asked, kind).map_or(0, u64::from_ne_bytes);
        match command {
            1 => {
                let free =
                    (0..).find(|index| !self.devices.get(index).is_some_and(|device| device.connected));
                let index = index.or(free).unwrap();
                // 16 minor numbers for each, of 20 bits.
                if index > 0xffff {
                    return Err(Errno::EINVAL);
                }
                if self.devices.get(&index).is_some_and(|device| device.connected) {
                    return Err(Errno::EBUSY);
                }
                let sockets = Self::sockets(asked);
                if number(2) == 0 || sockets.is_empty() || (sockets.len() > 1 && number(5) & 256 == 0) {
                    return Err(Errno::EINVAL);
                }
                self.devices.insert(
                    index,
                    FakeDevice {
                        connected: true,
                        size: number(2),
                        block_size: number(3),
                        timeout: number(4),
                        server_flags: number(5),
                        dead_timeout: number(8),
                        backend: Self::backend(asked),
                        sockets,
                        dead: 0,
                    },
                );
                let mut payload = vec![1, 1, 0, 0];
                put(&mut payload, 1, &index.to_ne_bytes());
                self.message(NBD, sequence, &payload);
                Ok(())
            }
            2 => {
                let device = self
                    .devices
                    .get_mut(&index.ok_or(Errno::EINVAL)?)
                    .ok_or(Errno::EINVAL)?;
                *device = FakeDevice::default();
                Ok(())
            }
            3 => {
                let device = self
                    .devices
                    .get_mut(&index.ok_or(Errno::EINVAL)?)
                    .ok_or(Errno::EINVAL)?;
                if !device.connected || device.backend != Self::backend(asked) {
                    return Err(Errno::EINVAL);
                }
                for socket in Self::sockets(asked) {
                    let Some(place) = device.dead.checked_sub(1) else {
                        break;
                    };
                    device.sockets[place] = socket;
                    device.dead = place;
                }
                Ok(())
            }
            5 => {
                let mut list = Vec::new();
                for (index, device) in &self.devices {
                    let mut item = Vec::new();
                    put(&mut item, 1, &index.to_ne_bytes());
                    put(&mut item, 2, &[u8::from(device.connected)]);
                    put(&mut list, 1 | 0x8000, &item);
                }
                let mut payload = vec![5, 1, 0, 0];
                put(&mut payload, 9 | 0x8000, &list);
                self.message(NBD, sequence, &payload);
                Ok(())
            }
            _ => Err(Errno::EOPNOTSUPP),
        }
    }
}

impl FakeKernel {
    /// A kernel whose nbd is not loaded.
    pub(super) fn without_nbd() -> Self {
        let kernel = Self::default();
        kernel.state().without_nbd = true;
        kernel
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn device(&self, index: u32) -> Option<FakeDevice> {
        self.state().devices.get(&index).cloned()
    }

    /// The server of a device died.
    pub(super) fn kill_links(&self, index: u32) {
        let mut state = self.state();
        let device = state.devices.get_mut(&index).unwrap();
        device.dead = device.sockets.len();
    }
}

impl Channel for FakeKernel {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        let length = usize::try_from(u32::from_ne_bytes(message[0..4].try_into().unwrap())).unwrap();
        assert_eq!(length, message.len());
        let family = u16::from_ne_bytes([message[4], message[5]]);
        assert_eq!(
            u16::from_ne_bytes([message[6], message[7]]),
            5,
            "a request that wants an answer"
        );
        let sequence = u32::from_ne_bytes(message[8..12].try_into().unwrap());
        let (command, version) = (message[16], message[17]);
        assert_eq!(version, 1);
        let asked = attributes(&message[20..]);
        let outcome = match (family, command) {
            (16, 3) if state.without_nbd => Err(Errno::ENOENT),
            (16, 3) => {
                assert_eq!(asked, [(2, b"nbd\0".to_vec())]);
                let mut payload = vec![1, 2, 0, 0];
                put(&mut payload, 2, b"nbd\0");
                put(&mut payload, 1, &NBD.to_ne_bytes());
                state.message(16, sequence, &payload);
                Ok(())
            }
            (NBD, command) => state.nbd(command, sequence, &asked),
            _ => Err(Errno::ENOENT),
        };
        state.end(sequence, outcome);
        Ok(())
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        self.state()
            .answers
            .pop_front()
            .ok_or_else(|| io::ErrorKind::TimedOut.into())
    }
}
