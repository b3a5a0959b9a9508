//! Disk: block devices, their identity and geometry.
