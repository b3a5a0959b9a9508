//! Telemetry: logging and metrics.
