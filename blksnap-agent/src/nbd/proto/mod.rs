//! Protocol: the server's side of NBD without any input or output.
//!
//! Bytes go in, bytes and decisions come out: no socket, no file, no clock, no runtime, so that each rule of the
//! specification is a unit test and any input can be tried in any split. The caller owns the connection.
//!
//! A session is a [`Handshake`] until it says [`Step::Enter`]; then [`Requests`] turns bytes into requests that are
//! already checked against the export, and [`reply`] builds the answers.
//!
//! | file | role |
//! |---|---|
//! | [`wire`] | structs as on the wire |
//! | [`numbers`] | flags and enumerations |
//! | [`limits`] | what a client may ask for at most |
//! | [`option`] | data of options, parsed; replies to options |
//! | [`catalog`] | what the handshake must know of the exports |
//! | [`context`] | names of metadata contexts and queries for them |
//! | [`handshake`] | greeting to transmission; `answer`: what options are answered with |
//! | [`session`] | what was agreed |
//! | [`request`] | commands, and their headers |
//! | `check` | a request against what was agreed |
//! | [`transmission`] | bytes to requests |
//! | [`reply`] | replies |

mod answer;
pub mod catalog;
mod check;
pub mod context;
pub mod handshake;
pub mod limits;
pub mod numbers;
pub mod option;
pub mod reply;
pub mod request;
pub mod session;
pub mod transmission;
pub mod wire;

#[cfg(test)]
mod tests;

pub use catalog::{BlockSizeError, BlockSizes, Catalog, ExportFacts, Found, Listed};
pub use context::{ContextName, ContextSet, SelectedContext};
pub use handshake::{Established, Handshake, HandshakeError, Step, Tls};
pub use reply::{StatusExtent, Ticket};
pub use request::{Command, Event, Refused, Request};
pub use session::{Framing, Session};
pub use transmission::{Requests, TransmissionError};
pub use wire::ErrorCode;
