//! Tracker: the eBPF programs and what they record.
