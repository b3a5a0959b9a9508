//! Queue: the thread that takes requests from the driver and gives it the answers.
//!
//! It never waits for a disk: whoever carries out a request gives the answer to [`Answers`], which wakes it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use io_uring::{cqueue, opcode, types};
use libublk::ctrl::UblkCtrl;
use libublk::io::{BufDesc, BufDescList, UblkDev, UblkIOCtx, UblkQueue};
use libublk::{UblkError as LibError, UblkIORes, sys};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::SigSet;

use super::request::Request;

/// The only queue of a device.
pub(super) const QUEUE: u16 = 0;

/// Answers on their way to the queue.
#[derive(Debug)]
pub(super) struct Answers {
    ready: Mutex<Vec<(u16, i32)>>,
    wake: EventFd,
    leaving: AtomicBool,
}

impl Answers {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            ready: Mutex::default(),
            wake: EventFd::from_value_and_flags(0, flags)?,
            leaving: AtomicBool::new(false),
        })
    }

    /// The answer to the request `tag`: bytes moved, or an error number below 0.
    pub(super) fn give(&self, tag: u16, result: i32) {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let first = ready.is_empty();
        ready.push((tag, result));
        drop(ready);
        // The queue takes all at once.
        if first {
            self.wake();
        }
    }

    /// Ends the queue; requests that have no answer yet wait in the driver for the next agent.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // It fails only when it was done 2^64 times and nobody looked.
        let _ = self.wake.write(1);
    }

    fn take(&self, taken: &mut Vec<(u16, i32)>) {
        // Before the answers: one that comes in between wakes again.
        let _ = self.wake.read();
        taken.append(&mut self.ready.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// How the queue of a device ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The device was stopped.
    Stopped,
    /// It is left for the next agent.
    Left,
    /// It can't go on: requests wait until an agent takes the device over.
    Failed,
}

/// Takes requests and gives them to `carry_out` until the device is stopped or left. Tells `ready` once the driver has
/// what it needs to start the device, or why not.
pub(super) fn run(
    device: &UblkDev,
    answers: &Arc<Answers>,
    ready: &Sender<io::Result<()>>,
    carry_out: &dyn Fn(Request),
) -> End {
    // A signal would end a wait that libublk does not expect to end.
    let _ = SigSet::all().thread_block();
    // Memory that this thread needs must not wait for the device itself.
    UblkCtrl::init_queue_thread();
    let mut queue = match Queue::begin(device, answers, carry_out) {
        Ok(queue) => queue,
        Err(error) => {
            let _ = ready.send(Err(error));
            return End::Failed;
        }
    };
    let began = match (queue.turn(0), queue.refused) {
        (Ok(()), Some(errno)) => Err(LibError::OtherError(errno)),
        (began, _) => began,
    };
    let failed = began.is_err();
    let _ = ready.send(began.map_err(super::control::source_of));
    let end = if failed { End::Failed } else { queue.follow() };
    if end != End::Stopped {
        // Giving back the descriptor that commands in flight use would wait for their end, which is that of the ring.
        std::mem::forget(queue);
    }
    end
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    ) || error.raw_os_error() == Some(Errno::EBUSY as i32)
}

struct Queue<'a> {
    inner: UblkQueue<'a>,
    answers: Arc<Answers>,
    carry_out: &'a dyn Fn(Request),
    taken: Vec<(u16, i32)>,
    /// What the driver said to a command that it did not take.
    refused: Option<i32>,
}

impl<'a> Queue<'a> {
    fn begin(
        device: &'a UblkDev,
        answers: &Arc<Answers>,
        carry_out: &'a dyn Fn(Request),
    ) -> io::Result<Self> {
        let inner = UblkQueue::new(QUEUE, device)
            .and_then(|queue| queue.submit_fetch_commands_unified(BufDescList::Slices(None)))
            .map_err(super::control::source_of)?;
        let queue = Self {
            inner,
            answers: Arc::clone(answers),
            carry_out,
            taken: Vec::new(),
            refused: None,
        };
        queue.listen().map_err(super::control::source_of)?;
        Ok(queue)
    }

    /// Takes requests until the end.
    fn follow(&mut self) -> End {
        loop {
            match self.turn(1) {
                Ok(()) if self.answers.leaving.load(Ordering::Acquire) => return End::Left,
                Ok(()) => {}
                Err(LibError::QueueIsDown) => return End::Stopped,
                Err(LibError::IOError(error)) if is_transient(&error) => {}
                Err(error) => {
                    tracing::error!(
                        %error,
                        "the queue of a ublk device fails; its requests wait until the daemon starts again"
                    );
                    return End::Failed;
                }
            }
        }
    }

    /// Asks to be woken by the next answer.
    fn listen(&self) -> Result<(), LibError> {
        let events = u32::from(libc::POLLIN.unsigned_abs());
        let entry = opcode::PollAdd::new(types::Fd(self.answers.wake.as_fd().as_raw_fd()), events);
        let entry = entry.build().user_data(woken());
        self.inner.ublk_submit_sqe_sync(entry)
    }

    /// Submits what is queued, waits for `wait` events at least, and follows all that came.
    fn turn(&mut self, wait: usize) -> Result<(), LibError> {
        let Self {
            inner,
            answers,
            carry_out,
            taken,
            refused,
        } = self;
        let mut called = false;
        inner.flush_and_wake_io_tasks(
            |data, event, _| {
                if data == woken() {
                    called = true;
                } else if !answers.leaving.load(Ordering::Acquire) {
                    follow(inner, data, event, carry_out, refused);
                }
            },
            wait,
        )?;
        if called {
            answers.take(taken);
            for (tag, result) in taken.drain(..) {
                let answer = Ok(UblkIORes::Result(result));
                inner.complete_io_cmd_unified(tag, BufDesc::Slice(&[]), answer)?;
            }
            self.listen()?;
        }
        Ok(())
    }
}

/// Marks the event of [`Answers`].
fn woken() -> u64 {
    UblkIOCtx::build_user_data(0, 0, 1, true)
}

fn follow(
    queue: &UblkQueue<'_>,
    data: u64,
    event: &cqueue::Entry,
    carry_out: &dyn Fn(Request),
    refused: &mut Option<i32>,
) {
    let Ok(tag) = u16::try_from(UblkIOCtx::user_data_to_tag(data)) else {
        return;
    };
    match event.result() {
        // `UBLK_IO_RES_OK`
        0 => {
            let wanted = queue.get_iod(tag);
            let (flags, sectors) = (wanted.op_flags, wanted.nr_sectors);
            carry_out(Request::decode(tag, flags, sectors, wanted.start_sector));
        }
        // The device is being stopped.
        sys::UBLK_IO_RES_ABORT => {}
        errno => {
            tracing::error!(tag, error = %io::Error::from_raw_os_error(-errno), "the ublk driver refuses a command");
            *refused = Some(errno);
        }
    }
}
