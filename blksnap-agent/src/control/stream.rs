//! Stream: the answer of work that takes long. One JSON object a line ([`Event`]): progress, then `done` or
//! `error`. When the client goes away, or the daemon stops, the work is cancelled.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::api::{Event, Progress};
use super::error::{ApiError, Code};

/// Shortest time between two lines of progress of the same phase.
const INTERVAL: Duration = Duration::from_millis(100);

/// Lines that wait for a client that reads slowly; further progress is left out, never the last line.
const QUEUE: usize = 16;

/// What work gets to say how far it is, and to hear that nobody waits for it any more. The answer ends when the
/// last clone is gone.
#[derive(Clone, Debug)]
pub struct Reporter {
    lines: mpsc::Sender<Bytes>,
    cancel: CancellationToken,
    last: Arc<Mutex<Option<(String, Instant)>>>,
}

impl Reporter {
    /// Says that `done` of `total` bytes of `phase` are done. Called as often as one likes: most calls cost a look
    /// at the clock.
    pub fn progress(&self, phase: &str, done: u64, total: u64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some((known, at)) = &*last
            && known == phase
            && now.duration_since(*at) < INTERVAL
            && done != total
        {
            return;
        }
        *last = Some((phase.to_owned(), now));
        drop(last);
        let progress = Progress {
            phase: phase.to_owned(),
            done,
            total,
        };
        // A full queue means that the client reads slowly: it misses a line.
        let _ = self.lines.try_send(line(&Event::<()>::Progress(progress)));
    }

    /// Calls `react` when the work is to stop, at once if it is already. Dropping the guard ends that. Must be
    /// called on a thread of the runtime, as work is.
    #[must_use]
    pub fn on_cancel(&self, react: impl FnOnce() + Send + 'static) -> OnCancel {
        let cancel = self.cancel.clone();
        OnCancel(tokio::spawn(async move {
            cancel.cancelled().await;
            react();
        }))
    }

    /// Ends when the work is to stop.
    #[must_use]
    pub const fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }
}

/// A reaction to the end of the client, see [`Reporter::on_cancel`].
#[derive(Debug)]
pub struct OnCancel(tokio::task::JoinHandle<()>);

impl Drop for OnCancel {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn line<T: Serialize>(event: &Event<T>) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_else(|error| {
        let body = ApiError::new(Code::Io, format!("write the answer: {error}"), "").body();
        serde_json::to_vec(&Event::<()>::Error(body)).unwrap_or_default()
    });
    line.push(b'\n');
    line.into()
}

/// Runs `work` on a thread of its own and answers with its lines. `stop` cancels it, and so does a client that
/// goes away.
pub fn respond<T, W>(stop: &CancellationToken, work: W) -> Response
where
    T: Serialize + Send + 'static,
    W: FnOnce(&Reporter) -> Result<T, ApiError> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    let cancel = stop.child_token();
    let reporter = Reporter {
        lines: sender.clone(),
        cancel: cancel.clone(),
        last: Arc::default(),
    };
    let running = tokio::task::spawn_blocking(move || work(&reporter));
    tokio::spawn(async move {
        let event = match running.await {
            Ok(Ok(result)) => Event::Done { result },
            Ok(Err(error)) => Event::Error(error.body()),
            Err(error) => Event::Error(
                ApiError::new(
                    Code::Io,
                    format!("run the request: {error}"),
                    "see the log of the daemon",
                )
                .body(),
            ),
        };
        // Nobody reads it when the client is gone.
        let _ = sender.send(line(&event)).await;
    });
    let body = futures_util::stream::unfold(
        (receiver, cancel.drop_guard()),
        |(mut receiver, guard)| async move {
            let line = receiver.recv().await?;
            Some((Ok::<_, Infallible>(line), (receiver, guard)))
        },
    );
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(body),
    )
        .into_response()
}
