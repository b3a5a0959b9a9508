//! Client: the other side of the handshake, for the kernel's client and for measurements.
//!
//! It connects, chooses an export and gives the socket in transmission away. It asks for simple replies, which is
//! what the kernel's client understands. Everything is checked that a server could send.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::address::Address;
use super::proto::limits::{MAX_PAYLOAD, MAX_STRING};
use super::proto::wire::{
    ClientFlags, GREETING_MAGIC, Greeting, HandshakeFlags, InfoBlockSize, InfoExport, InfoType, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, OptionHeader, OptionReplyHeader, OptionReplyType, OptionType, TransmissionFlags,
};

/// Longest reply to an option that is kept.
const LONGEST_REPLY: u32 = 64 << 10;
/// Most replies to one option.
const MOST_REPLIES: usize = 64;

/// The server can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no connection.
    #[error("connect to the nbd server {address}")]
    Connect {
        /// Where.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// The connection ended or stalled.
    #[error("open export \"{export}\" of {address}: the connection failed")]
    Io {
        /// Where.
        address: Address,
        /// The export.
        export: String,
        /// Why.
        source: io::Error,
    },
    /// The server refuses.
    #[error("open export \"{export}\" of {address}: {reason}")]
    Refused {
        /// Where.
        address: Address,
        /// The export.
        export: String,
        /// What the server says.
        reason: String,
    },
}

/// Why a handshake failed, before it is known of which export.
#[derive(Debug)]
enum Failure {
    Io(io::Error),
    Refused(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn broken(what: &str) -> Failure {
    Failure::Refused(format!("the server does not keep to the protocol: {what}"))
}

/// A socket of one of both kinds.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }
        }
    }

    fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection in transmission with simple replies.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    /// Size of the export in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Smallest block in bytes; 1 where the server says nothing.
    pub minimum_block: u32,
    /// Preferred block in bytes; 4096 where the server says nothing.
    pub preferred_block: u32,
}

impl Connection {
    /// Connects and chooses an export. Each step of it may take as long as `limit`.
    ///
    /// # Errors
    /// Nobody listens there, the server has no such export, or it does not keep to the protocol.
    pub fn open(address: &Address, export: &str, limit: Duration) -> Result<Self, ClientError> {
        let stream = Stream::connect(address).map_err(|source| ClientError::Connect {
            address: address.clone(),
            source,
        })?;
        let connect = || -> Result<Self, Failure> {
            stream.set_timeout(Some(limit))?;
            let connection = choose(stream, export)?;
            connection.stream.set_timeout(None)?;
            Ok(connection)
        };
        connect().map_err(|failure| match failure {
            Failure::Io(source) => ClientError::Io {
                address: address.clone(),
                export: export.to_owned(),
                source,
            },
            Failure::Refused(reason) => ClientError::Refused {
                address: address.clone(),
                export: export.to_owned(),
                reason,
            },
        })
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> Self {
        match connection.stream {
            Stream::Unix(stream) => stream.into(),
            Stream::Tcp(stream) => stream.into(),
        }
    }
}

fn receive<T: FromBytes + IntoBytes + Immutable + KnownLayout>(stream: &mut Stream) -> io::Result<T> {
    let mut value = T::new_zeroed();
    stream.read_exact(value.as_mut_bytes())?;
    Ok(value)
}

fn choose(mut stream: Stream, export: &str) -> Result<Connection, Failure> {
    if export.len() > MAX_STRING || export.contains('\0') {
        return Err(Failure::Refused(
            "a name has at most 4096 bytes and no NUL".to_owned(),
        ));
    }
    let greeting: Greeting = receive(&mut stream)?;
    if greeting.magic.get() != GREETING_MAGIC || greeting.option_magic.get() != OPTION_MAGIC {
        return Err(broken("this is no newstyle server"));
    }
    let offered = HandshakeFlags::from_bits_truncate(greeting.flags.get());
    if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
        return Err(broken("it does not offer fixed newstyle"));
    }
    let mut flags = ClientFlags::FIXED_NEWSTYLE;
    flags.set(
        ClientFlags::NO_ZEROES,
        offered.contains(HandshakeFlags::NO_ZEROES),
    );

    let name = export.as_bytes();
    let mut data = u32::try_from(name.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
        .to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&1_u16.to_be_bytes());
    data.extend_from_slice(&InfoType::BlockSize.number().to_be_bytes());
    let header = OptionHeader {
        magic: OPTION_MAGIC.into(),
        option: OptionType::Go.number().into(),
        length: u32::try_from(data.len()).unwrap_or(u32::MAX).into(),
    };
    let mut request = flags.bits().to_be_bytes().to_vec();
    request.extend_from_slice(header.as_bytes());
    request.extend_from_slice(&data);
    stream.write_all(&request)?;
    replies(stream)
}

/// Reads the replies to `NBD_OPT_GO`.
fn replies(mut stream: Stream) -> Result<Connection, Failure> {
    let mut export = None;
    let mut block_sizes = (1, 4096);
    for _ in 0..MOST_REPLIES {
        let header: OptionReplyHeader = receive(&mut stream)?;
        if header.magic.get() != OPTION_REPLY_MAGIC || header.option.get() != OptionType::Go.number() {
            return Err(broken("an answer to no question"));
        }
        if header.length.get() > LONGEST_REPLY {
            return Err(broken("an answer that is too long"));
        }
        let mut payload = vec![0; header.length.get() as usize];
        stream.read_exact(&mut payload)?;
        match OptionReplyType::from_number(header.reply.get()) {
            Some(OptionReplyType::Ack) => {
                let Some((size, flags)) = export else {
                    return Err(broken("an export without a size"));
                };
                let (minimum_block, preferred_block) = block_sizes;
                return Ok(Connection {
                    stream,
                    size,
                    flags,
                    minimum_block,
                    preferred_block,
                });
            }
            Some(OptionReplyType::Info) => {
                if let Ok(info) = InfoExport::read_from_bytes(&payload)
                    && info.kind.get() == InfoType::Export.number()
                {
                    export = Some((
                        info.size.get(),
                        TransmissionFlags::from_bits_retain(info.flags.get()),
                    ));
                } else if let Ok(info) = InfoBlockSize::read_from_bytes(&payload)
                    && info.kind.get() == InfoType::BlockSize.number()
                {
                    block_sizes = checked_sizes(info.minimum, info.preferred)?;
                }
            }
            Some(OptionReplyType::ErrTlsRequired) => {
                return Err(Failure::Refused("the server wants TLS".to_owned()));
            }
            _ if header.reply.get() >> 31 == 1 => {
                let message = String::from_utf8_lossy(&payload);
                let message = message.trim();
                return Err(Failure::Refused(if message.is_empty() {
                    format!("the server refuses it with error {:#x}", header.reply.get())
                } else {
                    message.to_owned()
                }));
            }
            _ => return Err(broken("an answer of an unknown kind")),
        }
    }
    Err(broken("too many answers"))
}

fn checked_sizes(minimum: U32, preferred: U32) -> Result<(u32, u32), Failure> {
    let (minimum, preferred) = (minimum.get(), preferred.get());
    if minimum.is_power_of_two()
        && preferred.is_power_of_two()
        && minimum <= preferred
        && preferred <= MAX_PAYLOAD
    {
        Ok((minimum, preferred))
    } else {
        Err(broken("block sizes that make no sense"))
    }
}
