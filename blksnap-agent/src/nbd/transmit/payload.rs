//! Payload: the data of a write on its way in.
//!
//! For a worker it is received into the buffer that the export gets.
//!
//! For a file in memory it goes straight to its place. What came along with the header is written, the rest is moved
//! from the socket to a pipe, which is cheap, and from there to the file, which is a copy: long parts of it are left
//! to workers, while the next ones come. The request is answered when its last part is done ([`Parts`]).

use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::work::{Pending, Place};
use super::{Transmission, TransmitError};
use crate::nbd::buffers::Buffer;
use crate::nbd::counters::{Counters, add};
use crate::nbd::export::{Export, ExportError};
use crate::nbd::pipes::{CAPACITY, Pipe};
use crate::nbd::proto::{Command, ErrorCode, Request};
use crate::nbd::registry::Entry;

/// Shorter rests are received and written: two system calls as well, and no pages to move.
const WORTH_A_PIPE: usize = 32 << 10;

/// Shorter parts are not worth a thread's wake.
const WORTH_A_WORKER: usize = 128 << 10;

/// A write whose data is coming.
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
        parts: Arc<Parts>,
        /// Where the next byte goes.
        offset: u64,
    },
}

/// A write in parts. Whoever drops it last answers the request.
pub(super) struct Parts {
    entry: Arc<Entry>,
    counters: Arc<Counters>,
    length: u32,
    fua: bool,
    failed: Mutex<Option<(ErrorCode, String)>>,
    /// Taken by the last one.
    pending: Option<Pending>,
}

impl Parts {
    /// The export, if it was not removed meanwhile.
    fn export(&self) -> Option<Arc<dyn Export>> {
        let export = self.entry.export();
        if export.is_none() {
            self.fail(ErrorCode::Shutdown, "the export was removed".to_owned());
        }
        export
    }

    fn fail(&self, error: ErrorCode, message: String) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.get_or_insert((error, message));
    }

    fn fail_with(&self, export: &dyn Export, offset: u64, source: io::Error) {
        let error = ExportError::Io {
            name: export.name().to_owned(),
            action: "write",
            offset,
            source,
        };
        self.fail(error.code(), error.to_string());
    }

    /// Writes `bytes` at `offset`.
    fn write(&self, bytes: &[u8], offset: u64) {
        if let Some(export) = self.export()
            && let Some(file) = export.file()
            && let Err(error) = file.write_all_at(bytes, offset)
        {
            self.fail_with(&*export, offset, error);
        }
    }

    /// Writes the `filled` bytes in `pipe` at `offset`. Gives the pipe back if it is empty then.
    fn drain(&self, pipe: Pipe, filled: usize, offset: u64) -> Option<Pipe> {
        let export = self.export()?;
        let file = export.file()?;
        match pipe.drain(file, offset, filled) {
            Ok(()) => Some(pipe),
            Err(error) => {
                self.fail_with(&*export, offset, error);
                None
            }
        }
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        let failed = self
            .failed
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // A file in memory is as durable as it will ever be; the export is asked all the same.
        let failed = failed.or_else(|| match self.entry.export() {
            Some(export) if self.fua => {
                let error = export.flush().err()?;
                Some((error.code(), error.to_string()))
            }
            _ => None,
        });
        match failed {
            Some((error, message)) => pending.fail(error, &message),
            None => {
                add(&self.counters.bytes_written, self.length.into());
                pending.succeed();
            }
        }
    }
}

/// What came of an attempt to go on.
enum Came {
    /// All of it.
    All,
    /// Nothing more now.
    Nothing,
    /// Nothing more ever.
    End,
}

impl Transmission {
    /// Begins to take the data of a write.
    pub(super) fn collecting(&self, request: Request, place: Place) -> Collecting {
        let direct = self
            .direct
            .as_ref()
            .is_some_and(super::direct::Direct::takes_writes);
        match request.command {
            Command::Write { offset, length, fua } if direct => Collecting::Direct {
                parts: Arc::new(Parts {
                    entry: Arc::clone(&self.entry),
                    counters: Arc::clone(&self.shared.counters),
                    length,
                    fua,
                    failed: Mutex::default(),
                    pending: Some(Pending::of_parts(request.ticket, place, Arc::clone(&self.queue))),
                }),
                offset,
            },
            _ => Collecting::Buffered {
                buffer: self.shared.buffers.take(request.command.payload() as usize),
                request,
                filled: 0,
                place,
            },
        }
    }

    /// Goes on with the payload; false if the client must send more first.
    pub(super) fn collect(&mut self) -> Result<bool, TransmitError> {
        let Some(mut collecting) = self.collecting.take() else {
            return Ok(true);
        };
        let came = match &mut collecting {
            Collecting::Buffered { buffer, filled, .. } => self.collect_buffered(buffer, filled)?,
            Collecting::Direct { parts, offset } => {
                let parts = Arc::clone(parts);
                self.collect_direct(&parts, offset)?
            }
        };
        match (came, collecting) {
            (Came::Nothing, collecting) => {
                self.collecting = Some(collecting);
                return Ok(false);
            }
            (
                Came::All,
                Collecting::Buffered {
                    request,
                    buffer,
                    place,
                    ..
                },
            ) => match self.export_now() {
                Ok(export) => self.give(request, Bytes::from_owner(buffer), place, export),
                Err(message) => {
                    self.release(place);
                    self.refuse(request.ticket, ErrorCode::Shutdown, message);
                }
            },
            // Whatever is still to be done holds its parts.
            (Came::All, Collecting::Direct { .. }) => {}
            (Came::End, Collecting::Buffered { place, .. }) => {
                self.left = true;
                self.release(place);
            }
            (Came::End, Collecting::Direct { parts, .. }) => {
                self.left = true;
                parts.fail(ErrorCode::Io, "the client left in the middle of it".to_owned());
            }
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
        Ok(Came::All)
    }

    /// Moves what came of the payload to the file.
    fn collect_direct(&mut self, parts: &Arc<Parts>, offset: &mut u64) -> Result<Came, TransmitError> {
        let ready = self.input.rest();
        let taken = ready.len().min(self.requests.payload_left());
        if taken > 0 {
            parts.write(&ready[..taken], *offset);
            self.input.start += taken;
            *offset += taken as u64;
            self.requests.payload_received(taken);
        }
        // A pipe, and how much is in it.
        let mut part: Option<(Pipe, usize)> = None;
        let came = loop {
            let left = self.requests.payload_left();
            if left == 0 {
                break Came::All;
            }
            if part.is_none() && left >= WORTH_A_PIPE {
                // Where no descriptor is left it goes without.
                part = self.shared.pipes.take().ok().map(|pipe| (pipe, 0));
            }
            let received = if let Some((pipe, filled)) = &mut part {
                let received = self.stream.splice_to(pipe.writer(), left.min(CAPACITY));
                if let Ok(count) = received {
                    *filled += count;
                }
                received
            } else {
                let most = left.min(self.input.bytes.len());
                let received = self.stream.receive(&mut self.input.bytes[..most]);
                if let Ok(count) = received {
                    parts.write(&self.input.bytes[..count], *offset);
                    *offset += count as u64;
                }
                received
            };
            match received {
                Ok(0) => break Came::End,
                Ok(count) => {
                    self.clock.received();
                    self.requests.payload_received(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match part.take() {
                    // Nothing came, or the pipe is full: an empty one will tell.
                    Some((pipe, filled)) if filled > 0 => self.finish_part(parts, pipe, filled, offset),
                    Some((pipe, _)) => {
                        self.shared.pipes.keep(pipe);
                        break Came::Nothing;
                    }
                    None => break Came::Nothing,
                },
                Err(error) => return Err(error.into()),
            }
        };
        match part {
            Some((pipe, 0)) => self.shared.pipes.keep(pipe),
            Some((pipe, filled)) => self.finish_part(parts, pipe, filled, offset),
            None => {}
        }
        Ok(came)
    }

    /// Has the bytes in the pipe written.
    fn finish_part(&self, parts: &Arc<Parts>, pipe: Pipe, filled: usize, offset: &mut u64) {
        let begin = *offset;
        *offset += filled as u64;
        let pipes = self.shared.pipes.clone();
        let parts = Arc::clone(parts);
        let work = move || {
            if let Some(pipe) = parts.drain(pipe, filled, begin) {
                pipes.keep(pipe);
            }
        };
        if filled >= WORTH_A_WORKER {
            self.shared.workers.run(work);
        } else {
            work();
        }
    }
}
