//! Engine: moves bytes as the core decided.
