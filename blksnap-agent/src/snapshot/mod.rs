//! Snapshot: several devices, one instant.
