//! Daemon: the long-running process that owns trackers and snapshots.
