//! Difference storage: where copies of old data are kept.
