//! API error: what a request that fails is answered with: a stable code, one line that says what was tried on
//! what, and the remedy.

use std::fmt;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use nix::errno::Errno;

use super::api::ErrorBody;

/// Kinds of errors. The text form is stable, the HTTP status follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request itself is wrong.
    InvalidRequest,
    /// No such route, or not with this method.
    UnknownRequest,
    /// There is no such file or device (`ENOENT`, `ENODEV`).
    NoDevice,
    /// The path is no block device (`ENOTBLK`).
    NotBlockDevice,
    /// The device can't be tracked, or not in this way.
    Unsupported,
    /// Already attached, already in this snapshot, already taken (`EALREADY`).
    Already,
    /// In use by something else (`EBUSY`).
    Busy,
    /// The device is not attached (`ENOENT` of the original's detach).
    NotAttached,
    /// No such snapshot (`ESRCH`).
    UnknownSnapshot,
    /// The snapshot is not taken, so that it has no image.
    NotTaken,
    /// No take has been made since the attach, so that there is no map to read.
    NoTake,
    /// A range outside of the device or the map.
    OutOfRange,
    /// Tracking in such blocks would take more memory than it may.
    MemoryLimit,
    /// The storage or the target is full (`ENOSPC`).
    NoSpace,
    /// The device is written faster than it is copied.
    NotConverging,
    /// The change map or an image is not trustworthy.
    Corrupted,
    /// The hook failed.
    Hook,
    /// The client went away or the daemon stops.
    Cancelled,
    /// The kernel or the machine lacks something.
    System,
    /// Reading or writing failed.
    Io,
}

impl Code {
    /// The text form.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::UnknownRequest => "unknown_request",
            Self::NoDevice => "no_device",
            Self::NotBlockDevice => "not_block_device",
            Self::Unsupported => "unsupported",
            Self::Already => "already",
            Self::Busy => "busy",
            Self::NotAttached => "not_attached",
            Self::UnknownSnapshot => "unknown_snapshot",
            Self::NotTaken => "not_taken",
            Self::NoTake => "no_take",
            Self::OutOfRange => "out_of_range",
            Self::MemoryLimit => "memory_limit",
            Self::NoSpace => "no_space",
            Self::NotConverging => "not_converging",
            Self::Corrupted => "corrupted",
            Self::Hook => "hook",
            Self::Cancelled => "cancelled",
            Self::System => "system",
            Self::Io => "io",
        }
    }

    /// What a program that knows the errors of the kernel's filter interface expects.
    #[must_use]
    pub const fn errno(self) -> Option<Errno> {
        Some(match self {
            Self::InvalidRequest | Self::OutOfRange | Self::NotTaken => Errno::EINVAL,
            Self::UnknownRequest => Errno::ENOTTY,
            Self::NoDevice => Errno::ENODEV,
            Self::NotBlockDevice => Errno::ENOTBLK,
            Self::Unsupported | Self::System => Errno::EOPNOTSUPP,
            Self::Already => Errno::EALREADY,
            Self::Busy => Errno::EBUSY,
            Self::NotAttached | Self::NoTake => Errno::ENOENT,
            Self::UnknownSnapshot => Errno::ESRCH,
            Self::MemoryLimit => Errno::ENOMEM,
            Self::NoSpace => Errno::ENOSPC,
            Self::NotConverging => Errno::ETIMEDOUT,
            Self::Corrupted | Self::Io => Errno::EIO,
            Self::Cancelled => Errno::EINTR,
            Self::Hook => return None,
        })
    }

    const fn status(self) -> StatusCode {
        match self {
            Self::InvalidRequest
            | Self::NotBlockDevice
            | Self::OutOfRange
            | Self::MemoryLimit
            | Self::Unsupported => StatusCode::BAD_REQUEST,
            Self::UnknownRequest | Self::NoDevice | Self::NotAttached | Self::UnknownSnapshot => {
                StatusCode::NOT_FOUND
            }
            Self::Already | Self::Busy | Self::NotTaken | Self::NoTake | Self::Corrupted => {
                StatusCode::CONFLICT
            }
            Self::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            Self::NotConverging | Self::Hook | Self::Cancelled | Self::System | Self::Io => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        }
    }
}

/// A request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    code: Code,
    message: String,
    remedy: String,
}

impl ApiError {
    /// An error of kind `code`: `message` says what was tried on what and what went wrong, `remedy` what to do.
    pub fn new(code: Code, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            code,
            message: one_line(&message.into()),
            remedy: one_line(&remedy.into()),
        }
    }

    /// An error of kind `code` about `action`, made of what went wrong there. A text of the form
    /// `what went wrong; what to do` is taken apart.
    pub fn of(code: Code, action: impl fmt::Display, error: &dyn std::error::Error) -> Self {
        let text = chain(error);
        let (wrong, remedy) = text.rsplit_once("; ").unwrap_or((&text, ""));
        Self::new(code, format!("{action}: {wrong}"), remedy)
    }

    /// Its kind.
    #[must_use]
    pub const fn code(&self) -> Code {
        self.code
    }

    /// The form that leaves the process.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            code: self.code.label().to_owned(),
            message: self.message.clone(),
            remedy: self.remedy.clone(),
            errno: self.code.errno().map_or(0, |errno| errno as i32),
        }
    }
}

/// The text of an error and of its sources, each said once.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = error.source();
    }
    text
}

/// Whatever an error text contains, it stays on one line.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.remedy.is_empty() {
            write!(f, ": {}", self.remedy)?;
        }
        Ok(())
    }
}

impl std::error::Error for ErrorBody {}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.body().fmt(f)
    }
}

impl std::error::Error for ApiError {}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.code.status(), Json(self.body())).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_attach_and_detach_are_those_of_the_filter_interface() {
        for (code, errno) in [
            (Code::Already, libc::EALREADY),
            (Code::Busy, libc::EBUSY),
            (Code::NotAttached, libc::ENOENT),
            (Code::UnknownSnapshot, libc::ESRCH),
            (Code::UnknownRequest, libc::ENOTTY),
            (Code::NoSpace, libc::ENOSPC),
            (Code::Hook, 0),
        ] {
            assert_eq!(ApiError::new(code, "m", "r").body().errno, errno, "{code:?}");
        }
        // Bodies of older daemons have none.
        let body: ErrorBody = serde_json::from_str(r#"{"code":"io","message":"m","remedy":""}"#).unwrap();
        assert_eq!(body.errno, 0);
    }

    #[test]
    fn errors_are_one_line() {
        let error = ApiError::new(
            Code::Io,
            "attach /dev/x:\n  the verifier said\n\tno",
            "see\nthe log",
        );
        assert_eq!(
            error.to_string(),
            "attach /dev/x: the verifier said no: see the log"
        );
        assert_eq!(ApiError::new(Code::Io, "m", "").to_string(), "m");
    }

    #[test]
    fn causes_are_said_once_and_the_remedy_is_taken_apart() {
        #[derive(Debug, thiserror::Error)]
        #[error("open it: {source}; look at `x`")]
        struct Outer {
            source: std::io::Error,
        }
        #[derive(Debug, thiserror::Error)]
        #[error("read it")]
        struct Silent(#[source] std::io::Error);

        let cause = || std::io::Error::other("no; really not");
        let error = ApiError::of(Code::Io, "attach /dev/x", &Outer { source: cause() });
        assert_eq!(error.body().message, "attach /dev/x: open it: no; really not");
        assert_eq!(error.body().remedy, "look at `x`");
        assert_eq!(chain(&Silent(cause())), "read it: no; really not");
    }
}
