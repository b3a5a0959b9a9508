//! Output: answers on their way to the client.
//!
//! Small answers stand one behind the other in a batch, so that many go out by one system call. Data that was read by
//! a worker stays in its buffer, data of a file in its pages. Everything goes out in the order in which it came here.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::Arc;

use super::stream::Stream;
use super::work::Place;
use crate::nbd::buffers::{Buffer, Buffers};
use crate::nbd::pipes::{Pipe, Pipes};

/// Bytes of a batch.
pub(super) const BATCH: usize = 256 << 10;
/// Most parts of one system call; the kernel takes 1024.
const PARTS: usize = 64;

/// What is left of a file behind the bytes in a pipe.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) file: Arc<File>,
    pub(super) offset: u64,
    pub(super) length: usize,
}

#[derive(Debug)]
enum Segment {
    /// Answers one behind the other.
    Batch { buffer: Buffer, sent: usize, end: usize },
    /// One answer: what precedes the data, and the data.
    Reply {
        head: Vec<u8>,
        body: Option<Buffer>,
        sent: usize,
        _place: Place,
    },
    /// Pages of a file.
    Pages { pipe: Pipe, filled: usize, rest: Rest },
}

impl Segment {
    /// Bytes to send.
    fn left(&self) -> usize {
        match self {
            Self::Batch { sent, end, .. } => end - sent,
            Self::Reply { head, body, sent, .. } => {
                head.len() + body.as_ref().map_or(0, |body| body.as_ref().len()) - sent
            }
            Self::Pages { filled, rest, .. } => filled + rest.length,
        }
    }
}

/// How far a flush came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushed {
    /// Everything was sent.
    All,
    /// The client must read first.
    Blocked,
}

/// Answers on their way.
#[derive(Debug)]
pub(super) struct Output {
    segments: VecDeque<Segment>,
    left: usize,
    /// All bytes ever sent: progress.
    sent: u64,
    pipes: Pipes,
}

impl Output {
    /// Nothing; pipes go back where they came from.
    pub(super) fn new(pipes: Pipes) -> Self {
        Self {
            segments: VecDeque::new(),
            left: 0,
            sent: 0,
            pipes,
        }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Bytes to send.
    pub(super) const fn left(&self) -> usize {
        self.left
    }

    /// Batches of small answers that wait.
    pub(super) fn batches(&self) -> usize {
        let batch = |segment: &&Segment| matches!(segment, Segment::Batch { .. });
        self.segments.iter().filter(batch).count()
    }

    /// Bytes sent since the start.
    pub(super) const fn sent(&self) -> u64 {
        self.sent
    }

    /// Room of `length` bytes, at most [`BATCH`], at the end of the batch. [`Output::commit`] makes its front an answer.
    pub(super) fn room(&mut self, length: usize, buffers: &Buffers) -> &mut [u8] {
        let fits = matches!(self.segments.back(), Some(Segment::Batch { end, .. }) if BATCH - end >= length);
        if !fits {
            self.segments.push_back(Segment::Batch {
                buffer: buffers.take(BATCH),
                sent: 0,
                end: 0,
            });
        }
        match self.segments.back_mut() {
            Some(Segment::Batch { buffer, end, .. }) => &mut buffer.as_mut_slice()[*end..][..length],
            _ => &mut [],
        }
    }

    /// Adds the first `length` bytes of the room that was given last.
    pub(super) fn commit(&mut self, length: usize) {
        if let Some(Segment::Batch { end, .. }) = self.segments.back_mut() {
            *end += length;
            self.left += length;
        }
    }

    /// Adds a small answer.
    pub(super) fn small(&mut self, bytes: &[u8], buffers: &Buffers) {
        for piece in bytes.chunks(BATCH) {
            self.room(piece.len(), buffers).copy_from_slice(piece);
            self.commit(piece.len());
        }
    }

    /// Adds an answer of a worker.
    pub(super) fn reply(&mut self, head: Vec<u8>, body: Option<Buffer>, place: Place) {
        let segment = Segment::Reply {
            head,
            body,
            sent: 0,
            _place: place,
        };
        self.left += segment.left();
        self.segments.push_back(segment);
    }

    /// Adds `filled` bytes in a pipe and what follows them in the file.
    pub(super) fn pages(&mut self, pipe: Pipe, filled: usize, rest: Rest) {
        self.left += filled + rest.length;
        self.segments.push_back(Segment::Pages { pipe, filled, rest });
    }

    /// Sends what the client takes now. `done` gets the places of answers that were sent whole.
    ///
    /// # Errors
    /// The client is gone, or a file failed whose data was announced already.
    pub(super) fn flush(&mut self, stream: &mut Stream, mut done: impl FnMut(&Place)) -> io::Result<Flushed> {
        loop {
            let outcome = match self.segments.front_mut() {
                None => stream.flush().map(|()| None),
                Some(Segment::Pages { pipe, filled, rest }) => {
                    send_pages(stream, pipe, filled, rest).map(Some)
                }
                Some(_) => self.send_parts(stream).map(Some),
            };
            let count = match outcome {
                Ok(Some(count)) => count,
                Ok(None) => return Ok(Flushed::All),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Flushed::Blocked),
                Err(error) => return Err(error),
            };
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.left -= count;
            self.sent += count as u64;
            self.advance(count, &mut done);
        }
    }

    /// Sends parts in memory from the front on, up to the next file.
    fn send_parts(&self, stream: &mut Stream) -> io::Result<usize> {
        let mut parts = [IoSlice::new(&[]); PARTS];
        let mut count = 0;
        let mut more = false;
        for segment in &self.segments {
            if count + 2 > PARTS {
                more = true;
                break;
            }
            match segment {
                Segment::Batch { buffer, sent, end } => {
                    parts[count] = IoSlice::new(&buffer.as_ref()[*sent..*end]);
                    count += 1;
                }
                Segment::Reply { head, body, sent, .. } => {
                    let body = body.as_ref().map_or(&[][..], Buffer::as_ref);
                    if *sent < head.len() {
                        parts[count] = IoSlice::new(&head[*sent..]);
                        count += 1;
                    }
                    parts[count] = IoSlice::new(&body[sent.saturating_sub(head.len())..]);
                    count += 1;
                }
                Segment::Pages { .. } => {
                    more = true;
                    break;
                }
            }
        }
        stream.send(&parts[..count], more)
    }

    /// Takes `count` sent bytes off the front.
    fn advance(&mut self, mut count: usize, done: &mut impl FnMut(&Place)) {
        while let Some(segment) = self.segments.front_mut() {
            match segment {
                // Already counted where they were sent.
                Segment::Pages { .. } => count = 0,
                Segment::Batch { sent, end, .. } => {
                    let taken = count.min(*end - *sent);
                    *sent += taken;
                    count -= taken;
                }
                Segment::Reply { head, body, sent, .. } => {
                    let all = head.len() + body.as_ref().map_or(0, |body| body.as_ref().len());
                    let taken = count.min(all - *sent);
                    *sent += taken;
                    count -= taken;
                }
            }
            if segment.left() > 0 {
                return;
            }
            match self.segments.pop_front() {
                Some(Segment::Reply { _place, .. }) => done(&_place),
                Some(Segment::Pages { pipe, .. }) => self.pipes.keep(pipe),
                _ => {}
            }
        }
    }
}

/// Moves pages to the client, and the next ones into the pipe when it is empty.
fn send_pages(stream: &Stream, pipe: &Pipe, filled: &mut usize, rest: &mut Rest) -> io::Result<usize> {
    if *filled == 0 {
        *filled = pipe.fill(&rest.file, rest.offset, rest.length)?;
        if *filled == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        rest.offset += *filled as u64;
        rest.length -= *filled;
    }
    let count = stream.splice_from(pipe.reader(), *filled, rest.length > 0)?;
    *filled -= count;
    Ok(count)
}
