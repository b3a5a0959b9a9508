//! Log: events with fields on standard error, as text for people and the journal, or one JSON object a line.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

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

/// Sends all events that `filter` lets through to standard error.
///
/// # Errors
/// The filter is no list of levels, or the log was set up before.
pub fn init(format: LogFormat, filter: &str) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(filter).map_err(|error| LogError::Filter {
        filter: filter.to_owned(),
        message: error.to_string(),
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // The journal has its own clock.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    match format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Text if journal => builder.without_time().with_ansi(false).try_init(),
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
    }
    .map_err(|error| LogError::Twice(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_filter_is_refused_in_one_line() {
        let error = init(LogFormat::Text, "a=b=c").unwrap_err().to_string();
        assert!(error.contains("a=b=c") && !error.contains('\n'), "{error}");
    }
}
