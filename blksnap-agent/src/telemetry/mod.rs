//! Telemetry: what the daemon says about itself.
//!
//! - [`log`]: events as text or JSON on standard error.
//! - [`metrics`]: counters and gauges as OpenMetrics text. The text is made of a [`metrics::Sample`] that is
//!   taken when somebody asks, so that nothing is counted twice and no lock is held on the paths of data.

pub mod log;
pub mod metrics;
