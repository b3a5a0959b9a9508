//! The `blksnap-agent` binary.
fn main() {}
