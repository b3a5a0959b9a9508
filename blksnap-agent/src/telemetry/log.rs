//! Log: events with fields on standard error, as text for people and the journal, or one JSON object a line.
//!
//! Nobody who has something to say waits for whoever reads it: lines are written by a thread of their own. The log may be a
//! file on the very file system that is frozen for a take, and a line that the taking thread wrote there itself would wait
//! until that is thawed, which is for the same thread to do.

use std::io::{IsTerminal, Write};

use tracing::Dispatch;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The log can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is wrong.
    #[error(
        "read the log filter \"{filter}\": {message}: use a level such as info or debug, or module=level,..."
    )]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        message: String,
    },
    /// It was set up before.
    #[error("set up the log: {0}")]
    Twice(String),
}

/// A log that was set up. Dropped, it waits a moment for what was not written yet, and says how many lines were lost.
#[derive(Debug)]
#[must_use = "what is not written yet is lost"]
pub struct Log {
    writer: Option<WorkerGuard>,
    lost: ErrorCounter,
}

impl Drop for Log {
    fn drop(&mut self) {
        // The lines go out before it is said how many did not.
        drop(self.writer.take());
        let lines = self.lost.dropped_lines();
        if lines > 0 {
            // Nowhere to say that standard error is closed.
            let _ = writeln!(
                std::io::stderr(),
                "{lines} lines of the log were lost: it was not written for too long"
            );
        }
    }
}

/// Sends all events that `filter` lets through to standard error.
///
/// # Errors
/// The filter is no list of levels, or the log was set up before.
pub fn init(format: LogFormat, filter: &str) -> Result<Log, LogError> {
    let (dispatch, log) = to(std::io::stderr(), format, filter)?;
    dispatch
        .try_init()
        .map_err(|error| LogError::Twice(error.to_string()))?;
    Ok(log)
}

fn to(
    writer: impl Write + IsTerminal + Send + 'static,
    format: LogFormat,
    filter: &str,
) -> Result<(Dispatch, Log), LogError> {
    let filter = EnvFilter::try_new(filter).map_err(|error| LogError::Filter {
        filter: filter.to_owned(),
        message: error.to_string(),
    })?;
    let is_terminal = writer.is_terminal();
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .thread_name("blksnap-log")
        .finish(writer);
    let lost = writer.error_counter();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer);
    // The journal has its own clock.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let dispatch = match format {
        LogFormat::Json => builder.json().flatten_event(true).finish().into(),
        LogFormat::Text if journal => builder.without_time().with_ansi(false).finish().into(),
        LogFormat::Text => builder.with_ansi(is_terminal).finish().into(),
    };
    Ok((
        dispatch,
        Log {
            writer: Some(guard),
            lost,
        },
    ))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_wrong_filter_is_refused_in_one_line() {
        let error = init(LogFormat::Text, "a=b=c").unwrap_err().to_string();
        assert!(error.contains("a=b=c") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn nobody_waits_for_the_reader_of_the_log() {
        const LINES: usize = 20_000;
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (done, said) = mpsc::channel();
        let speaker = std::thread::spawn(move || {
            let (dispatch, log) = to(std::fs::File::from(writer), LogFormat::Json, "info").unwrap();
            tracing::dispatcher::with_default(&dispatch, || {
                for line in 0..LINES {
                    tracing::info!(line, "much more than a pipe has room for");
                }
            });
            done.send(log.lost.dropped_lines()).unwrap();
            // Until all is read.
            drop(dispatch);
            log
        });
        let lost = said.recv_timeout(Duration::from_secs(60));
        assert_eq!(lost, Ok(0), "it waits for somebody who reads");
        let mut lines = BufReader::new(std::fs::File::from(reader)).lines();
        for line in 0..LINES {
            let read: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            assert_eq!(read["line"], line);
        }
        drop(speaker.join().unwrap());
    }
}
