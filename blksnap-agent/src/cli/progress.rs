//! Progress: a bar with rate and time left on a terminal, plain lines otherwise.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Output;
use super::size::human;
use crate::control::api::Progress;

/// Time before the first plain line: short work says nothing but its result.
const FIRST_LINE: Duration = Duration::from_secs(2);

/// Time between plain lines.
const NEXT_LINE: Duration = Duration::from_secs(5);

/// Shows how far work is, on standard error.
#[derive(Debug)]
pub(super) enum Display {
    Bar { bar: ProgressBar, phase: String },
    Lines { next: Instant, began: Instant },
    Nothing,
}

impl Display {
    pub(super) fn new(output: Output) -> Self {
        let now = Instant::now();
        if output == Output::Json {
            Self::Nothing
        } else if std::io::stderr().is_terminal() {
            Self::Bar {
                bar: ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()),
                phase: String::new(),
            }
        } else {
            Self::Lines {
                next: now + FIRST_LINE,
                began: now,
            }
        }
    }

    pub(super) fn show(&mut self, progress: &Progress) {
        match self {
            Self::Nothing => {}
            Self::Bar { bar, phase } => {
                if *phase != progress.phase {
                    bar.set_style(style(progress.total != 0));
                    bar.set_message(progress.phase.clone());
                    bar.set_position(0);
                    bar.reset_eta();
                    phase.clone_from(&progress.phase);
                }
                bar.set_length(progress.total);
                bar.set_position(progress.done);
            }
            Self::Lines { next, began } => {
                let now = Instant::now();
                if now < *next {
                    return;
                }
                *next = now + NEXT_LINE;
                let _ = writeln!(std::io::stderr(), "{}", line(progress, now - *began));
            }
        }
    }

    /// Takes the bar away, so that the result or the error has the line.
    pub(super) fn end(&self) {
        if let Self::Bar { bar, .. } = self {
            bar.finish_and_clear();
        }
    }
}

fn style(measured: bool) -> ProgressStyle {
    let template = if measured {
        "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left"
    } else {
        "{spinner} {msg}"
    };
    ProgressStyle::with_template(template).map_or_else(
        |_| ProgressStyle::default_bar(),
        |style| style.progress_chars("=> "),
    )
}

fn line(progress: &Progress, since: Duration) -> String {
    let Progress { phase, done, total } = progress;
    let seconds = since.as_secs();
    if *total == 0 {
        return format!("{phase}: {seconds} s");
    }
    let percent = u128::from(*done) * 100 / u128::from(*total);
    format!(
        "{phase}: {percent} % ({} of {}), {seconds} s",
        human(*done),
        human(*total)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_how_far_it_is() {
        let mut progress = Progress {
            phase: "copy".to_owned(),
            done: 3 << 20,
            total: 8 << 20,
        };
        assert_eq!(
            line(&progress, Duration::from_secs(7)),
            "copy: 37 % (3 MiB of 8 MiB), 7 s"
        );
        progress.total = 0;
        assert_eq!(line(&progress, Duration::from_secs(7)), "copy: 7 s");
    }
}
