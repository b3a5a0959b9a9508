//! Direct: data of a file, without a worker.
//!
//! | file | read | write |
//! |---|---|---|
//! | in memory (tmpfs, memfd) | here: short ones by pread(2), long ones as pages | here, long ones as pages |
//! | elsewhere, in the page cache | here: short ones by preadv2(2) with `RWF_NOWAIT`, long ones as pages | by a worker |
//! | elsewhere | by a worker | by a worker |
//!
//! What is done here never waits for a disk, so that a request behind it does not wait either.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::Transmission;
use super::output::Rest;
use crate::nbd::ahead::Kept;
use crate::nbd::counters::add;
use crate::nbd::export::{Export, ExportError};
use crate::nbd::pipes::CAPACITY;
use crate::nbd::proto::reply::{self, MAX_READ_PREFIX};
use crate::nbd::proto::{Command, Ticket};
use crate::sys::cached;

/// Reads up to this length are copied into the batch; longer ones go as pages.
const SHORT: usize = 32 << 10;

/// What is known of an export's file.
#[derive(Clone, Debug)]
pub(super) struct Direct {
    memory: bool,
    /// Pages can go to the client without a copy.
    pages: bool,
    writable: bool,
}

impl Direct {
    /// What can be done with this export's file; `None` if it has none.
    pub(super) fn of(export: &dyn Export, plain: bool) -> Option<Self> {
        let file = export.file()?;
        let kind = file.metadata().ok()?.file_type();
        let memory = kind.is_file() && cached::is_memory(file);
        Some(Self {
            memory,
            pages: plain && kind.is_file(),
            writable: !export.read_only(),
        })
    }

    pub(super) const fn is_memory(&self) -> bool {
        self.memory
    }

    /// Whether writes go straight to the file.
    pub(super) const fn takes_writes(&self) -> bool {
        self.memory && self.pages && self.writable
    }
}

/// What came of an attempt to read here.
enum Outcome {
    /// The answer is on its way.
    Answered,
    /// A worker must do it.
    NotHere,
    /// It can't be done.
    Failed(io::Error),
}

impl Transmission {
    /// Answers a read, if that can be done without waiting.
    pub(super) fn read_directly(&mut self, ticket: Ticket, offset: u64, length: u32) -> bool {
        if length == 0 {
            self.succeed(ticket);
            return true;
        }
        let Some(direct) = self.direct.clone() else {
            return self.keeps && self.copy_kept(ticket, offset, length);
        };
        let Some(export) = self.entry.export() else {
            return false;
        };
        let Some(file) = export.file() else { return false };
        let outcome = if length as usize <= SHORT {
            self.copy(&direct, file, ticket, offset, length)
        } else if direct.pages
            && (direct.memory || cached::is_cached(file, offset, length.into()) == Some(true))
        {
            self.send_pages(file, ticket, offset, length)
        } else {
            Outcome::NotHere
        };
        match outcome {
            Outcome::Answered => {
                add(&self.shared.counters.bytes_read, length.into());
                true
            }
            Outcome::NotHere => false,
            Outcome::Failed(source) => {
                let error = ExportError::Io {
                    name: export.name().to_owned(),
                    action: "read",
                    offset,
                    source,
                };
                self.refuse(ticket, error.code(), &error.to_string());
                true
            }
        }
    }

    /// Reads into the batch.
    fn copy(&mut self, direct: &Direct, file: &File, ticket: Ticket, offset: u64, length: u32) -> Outcome {
        self.scratch.clear();
        reply::read_prefix(&mut self.scratch, ticket, offset, length);
        let prefix = self.scratch.len();
        let room = self
            .output
            .room(MAX_READ_PREFIX + length as usize, &self.shared.buffers);
        room[..prefix].copy_from_slice(&self.scratch);
        let data = &mut room[prefix..][..length as usize];
        if direct.memory {
            if let Err(error) = file.read_exact_at(data, offset) {
                return Outcome::Failed(error);
            }
        } else {
            match cached::read_now(file, data, offset) {
                Ok(count) if count == data.len() => {}
                // Not all of it is cached, or the file system can't tell, or it failed: the worker will see.
                _ => return Outcome::NotHere,
            }
        }
        self.output.commit(prefix + length as usize);
        Outcome::Answered
    }

    /// Answers with what was read ahead, if all of it is here and short.
    fn copy_kept(&mut self, ticket: Ticket, offset: u64, length: u32) -> bool {
        if length as usize > SHORT {
            return false;
        }
        let Some(kept) = self.entry.ahead().kept(offset, length.into(), true) else {
            return false;
        };
        self.scratch.clear();
        reply::read_prefix(&mut self.scratch, ticket, offset, length);
        let prefix = self.scratch.len();
        let room = self
            .output
            .room(MAX_READ_PREFIX + length as usize, &self.shared.buffers);
        room[..prefix].copy_from_slice(&self.scratch);
        if !kept.copy(&mut room[prefix..][..length as usize]) {
            return false;
        }
        self.output.commit(prefix + length as usize);
        add(&self.shared.counters.bytes_read, length.into());
        true
    }

    /// What was read ahead of a request for a worker.
    pub(super) fn kept(&self, command: &Command) -> Option<Kept> {
        match command {
            Command::Read { offset, length, .. } if self.keeps => {
                self.entry.ahead().kept(*offset, (*length).into(), false)
            }
            _ => None,
        }
    }

    /// Answers with the file's own pages.
    fn send_pages(&mut self, file: &Arc<File>, ticket: Ticket, offset: u64, length: u32) -> Outcome {
        let Ok(pipe) = self.shared.pipes.take() else {
            return Outcome::NotHere;
        };
        let length = length as usize;
        let filled = match pipe.fill(file, offset, length.min(CAPACITY)) {
            Ok(0) => return Outcome::Failed(io::ErrorKind::UnexpectedEof.into()),
            Ok(filled) => filled,
            Err(error) => return Outcome::Failed(error),
        };
        // What is announced must follow: behind the end of the file nothing does.
        let end = offset + length as u64;
        if filled < length && file.metadata().is_ok_and(|metadata| metadata.len() < end) {
            return Outcome::Failed(io::ErrorKind::UnexpectedEof.into());
        }
        self.scratch.clear();
        reply::read_prefix(
            &mut self.scratch,
            ticket,
            offset,
            u32::try_from(length).unwrap_or(u32::MAX),
        );
        self.output.small(&self.scratch, &self.shared.buffers);
        let rest = Rest {
            file: Arc::clone(file),
            offset: offset + filled as u64,
            length: length - filled,
        };
        self.output.pages(pipe, filled, rest);
        Outcome::Answered
    }
}
