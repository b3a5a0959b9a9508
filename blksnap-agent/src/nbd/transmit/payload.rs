//! Payload: the data of a write on its way in.
//!
//! For a worker it is received into the buffer that the export gets. For a file in memory it goes straight to its
//! place: what came along with the header is written, the rest is moved from socket to file by a pipe.

use std::io;
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;

use super::work::Place;
use super::{Transmission, TransmitError};
use crate::nbd::buffers::{Buffer, Buffers};
use crate::nbd::counters::add;
use crate::nbd::export::ExportError;
use crate::nbd::proto::{Command, ErrorCode, Request, Ticket};

/// Shorter rests are received and written: two system calls as well, and no pages to move.
const WORTH_A_PIPE: usize = 32 << 10;

/// A write whose data is coming.
#[derive(Debug)]
pub(super) enum Collecting {
    /// For a worker.
    Buffered {
        request: Request,
        buffer: Buffer,
        filled: usize,
        place: Place,
    },
    /// Straight to the file.
    Direct {
        ticket: Ticket,
        /// Where the next byte goes.
        offset: u64,
        length: u32,
        fua: bool,
    },
}

/// What came of an attempt to go on.
enum Came {
    /// Some bytes.
    Some,
    /// None now.
    Nothing,
    /// None ever.
    End,
}

impl Collecting {
    pub(super) fn buffered(request: Request, place: Place, buffers: &Buffers) -> Self {
        Self::Buffered {
            buffer: buffers.take(request.command.payload() as usize),
            request,
            filled: 0,
            place,
        }
    }

    pub(super) const fn direct(request: &Request) -> Self {
        let (offset, length, fua) = match request.command {
            Command::Write { offset, length, fua } => (offset, length, fua),
            _ => (0, 0, false),
        };
        Self::Direct {
            ticket: request.ticket,
            offset,
            length,
            fua,
        }
    }
}

impl Transmission {
    /// Whether the data of writes goes straight to the file.
    pub(super) fn writes_directly(&self) -> bool {
        self.direct
            .as_ref()
            .is_some_and(super::direct::Direct::takes_writes)
    }

    /// Goes on with the payload; false if the client must send more first.
    pub(super) fn collect(&mut self) -> Result<bool, TransmitError> {
        let Some(collecting) = self.collecting.take() else {
            return Ok(true);
        };
        match collecting {
            Collecting::Buffered {
                request,
                mut buffer,
                mut filled,
                place,
            } => {
                let came = self.collect_buffered(&mut buffer, &mut filled)?;
                if self.requests.payload_left() == 0 {
                    self.finish_buffered(request, buffer, place);
                } else if matches!(came, Came::End) {
                    self.left = true;
                    self.release(place);
                } else {
                    self.collecting = Some(Collecting::Buffered {
                        request,
                        buffer,
                        filled,
                        place,
                    });
                    return Ok(false);
                }
            }
            Collecting::Direct {
                ticket,
                mut offset,
                length,
                fua,
            } => match self.collect_direct(&mut offset) {
                Ok(_) if self.requests.payload_left() == 0 => self.finish_direct(ticket, length, fua),
                Ok(Came::End) => self.left = true,
                Ok(_) => {
                    self.collecting = Some(Collecting::Direct {
                        ticket,
                        offset,
                        length,
                        fua,
                    });
                    return Ok(false);
                }
                Err(Failure::Client(error)) => return Err(error.into()),
                Err(Failure::Export(error, message)) => {
                    // The rest is dropped as it comes.
                    self.requests.skip_payload();
                    self.refuse(ticket, error, &message);
                }
            },
        }
        Ok(true)
    }

    fn collect_buffered(&mut self, buffer: &mut Buffer, filled: &mut usize) -> Result<Came, TransmitError> {
        let into = buffer.as_mut_slice();
        let ready = self.input.rest();
        let taken = ready.len().min(self.requests.payload_left());
        into[*filled..][..taken].copy_from_slice(&ready[..taken]);
        self.input.start += taken;
        *filled += taken;
        self.requests.payload_received(taken);
        while self.requests.payload_left() > 0 {
            match self.stream.receive(&mut into[*filled..]) {
                Ok(0) => return Ok(Came::End),
                Ok(count) => {
                    self.clock.received();
                    *filled += count;
                    self.requests.payload_received(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Came::Nothing),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Came::Some)
    }

    fn finish_buffered(&mut self, request: Request, buffer: Buffer, place: Place) {
        match self.export_now() {
            Ok(export) => self.give(request, Bytes::from_owner(buffer), place, export),
            Err(message) => {
                self.release(place);
                self.refuse(request.ticket, ErrorCode::Shutdown, message);
            }
        }
    }

    /// Moves what came of the payload to the file.
    fn collect_direct(&mut self, offset: &mut u64) -> Result<Came, Failure> {
        let export = self.export_now().map_err(Failure::gone)?;
        let file = export
            .file()
            .ok_or_else(|| Failure::gone("the export has no file"))?;
        let begin = *offset;
        let failed = |source: io::Error| {
            let error = ExportError::Io {
                name: export.name().to_owned(),
                action: "write",
                offset: begin,
                source,
            };
            Failure::Export(error.code(), error.to_string())
        };
        let ready = self.input.rest();
        let taken = ready.len().min(self.requests.payload_left());
        if taken > 0 {
            file.write_all_at(&ready[..taken], *offset).map_err(failed)?;
            self.input.start += taken;
            *offset += taken as u64;
            self.requests.payload_received(taken);
        }
        let mut pipe = None;
        let mut came = Came::Some;
        while self.requests.payload_left() > 0 {
            let left = self.requests.payload_left();
            let count = if left >= WORTH_A_PIPE {
                let pipe = match &pipe {
                    Some(pipe) => pipe,
                    None => pipe.insert(self.output.pipe().map_err(Failure::Client)?),
                };
                match self
                    .stream
                    .splice_to(pipe.writer(), left.min(super::pipe::CAPACITY))
                {
                    Ok(count) => {
                        pipe.drain(file, *offset, count).map_err(|error| {
                            self.requests.payload_received(count);
                            failed(error)
                        })?;
                        Ok(count)
                    }
                    Err(error) => Err(error),
                }
            } else {
                let most = left.min(self.input.bytes.len());
                let received = self.stream.receive(&mut self.input.bytes[..most]);
                if let Ok(count) = received {
                    file.write_all_at(&self.input.bytes[..count], *offset)
                        .map_err(|error| {
                            self.requests.payload_received(count);
                            failed(error)
                        })?;
                }
                received
            };
            match count {
                Ok(0) => {
                    came = Came::End;
                    break;
                }
                Ok(count) => {
                    self.clock.received();
                    *offset += count as u64;
                    self.requests.payload_received(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    came = Came::Nothing;
                    break;
                }
                Err(error) => return Err(Failure::Client(error)),
            }
        }
        // A pipe that failed is not empty: it is not kept.
        if let Some(pipe) = pipe {
            self.output.keep(pipe);
        }
        Ok(came)
    }

    fn finish_direct(&mut self, ticket: Ticket, length: u32, fua: bool) {
        // A file in memory is as durable as it will ever be; the export is asked all the same.
        let durable = match (fua, self.export_now()) {
            (true, Ok(export)) => export.flush().map_err(|error| (error.code(), error.to_string())),
            (true, Err(message)) => Err((ErrorCode::Shutdown, message.to_owned())),
            (false, _) => Ok(()),
        };
        match durable {
            Ok(()) => {
                add(&self.shared.counters.bytes_written, length.into());
                self.succeed(ticket);
            }
            Err((error, message)) => self.refuse(ticket, error, &message),
        }
    }
}

/// A payload that can't go on.
enum Failure {
    /// The connection.
    Client(io::Error),
    /// The export, with what to answer.
    Export(ErrorCode, String),
}

impl Failure {
    fn gone(message: &str) -> Self {
        Self::Export(ErrorCode::Shutdown, message.to_owned())
    }
}
