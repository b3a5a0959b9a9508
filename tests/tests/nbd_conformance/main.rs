//! Conformance: what the NBD specification demands of a server, asked of the real one over its socket.
//!
//! The client is [`blksnap_tests::nbd`], written from the specification and checking the form of every reply. The
//! tests here are named in the table of `docs/nbd.md`; [`table`] checks that every test the table names exists.

mod exports;
mod handshake;
mod table;
mod transmission;
