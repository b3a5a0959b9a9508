//! Backup: raw image files of devices, full or only what changed.
