//! Change map: which blocks changed since when. Part of the core.
