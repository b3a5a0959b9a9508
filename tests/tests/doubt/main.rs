//! Doubt: everything that can make a change map incomplete ends its generation, with a reason that shows.
//!
//! [`told`] lets a daemon find it, and looks at every place where the reason must be: `status`, the answers about
//! changes, the metrics, the log. [`found`] has what can be made only by hand and in order, against the tracker.

mod found;
mod told;
