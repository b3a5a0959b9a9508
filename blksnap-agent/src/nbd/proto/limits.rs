//! Limits: what a client may ask for at most. Each bounds memory or work that an outsider can cause.

/// Largest payload of a request or reply in bytes. The specification's default: a client that was told nothing
/// may send as much ("Size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Longest string in bytes: export names, descriptions, queries, messages ("Conventions").
pub const MAX_STRING: usize = 4096;

/// Most bytes of option data that are kept; longer data is skipped and answered with `NBD_REP_ERR_TOO_BIG`.
pub const MAX_OPTION_DATA: u32 = 64 << 10;

/// Most options in one handshake, so that it ends.
pub const MAX_OPTIONS: u32 = 1024;

/// Most queries in one option about metadata contexts.
pub const MAX_QUERIES: u32 = 128;

/// Most metadata contexts selected at once.
pub const MAX_CONTEXTS: usize = 16;

/// Most extents in one status chunk; the specification allows 2^20, fewer are always allowed. A small largest payload
/// makes it fewer ([`super::Session::most_extents`]).
pub const MAX_EXTENTS: usize = 1 << 16;

/// Longest error message in bytes: what the specification recommends for every string. It also is below the smallest
/// largest payload that an export can advertise.
pub const MAX_MESSAGE: usize = 256;
