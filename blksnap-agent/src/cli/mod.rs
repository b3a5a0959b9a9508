//! Command line: a client of the daemon, and the daemon itself.
