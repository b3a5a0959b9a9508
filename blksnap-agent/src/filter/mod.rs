//! Filter: how the old data of a device survives while a snapshot is held.
