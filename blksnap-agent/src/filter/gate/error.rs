//! Error: why a gate can't stand.

use std::io;
use std::path::PathBuf;

use crate::engine::cow::ArmError;
use crate::tracker::BtfError;

/// A gate failed.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The kernel lacks a type that the programs read.
    #[error("can't find out how this kernel lays out its structs: {0}")]
    Btf(#[from] BtfError),
    /// The kernel refuses the programs.
    #[error(
        "can't load the programs that hold writes: {0}; `blksnap-agent doctor` says which filters work here"
    )]
    Load(String),
    /// A map can't be changed.
    #[error("can't {action} gate {gate}: {reason}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// The gate.
        gate: u32,
        /// Why.
        reason: String,
    },
    /// No gate is free.
    #[error("can't hold writes of {device}: {limit} {what} have a gate already; end a snapshot first", device = device.display())]
    Full {
        /// The device.
        device: PathBuf,
        /// How many.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
    /// The device says no.
    #[error("can't {action} {device}: {reason}", device = device.display())]
    Device {
        /// What was tried.
        action: &'static str,
        /// The device.
        device: PathBuf,
        /// Why.
        reason: String,
    },
    /// Old data can't be read past the page cache.
    #[error("can't read {device} past its own page cache: {reason}", device = device.display())]
    Source {
        /// The device.
        device: PathBuf,
        /// Why.
        reason: String,
    },
    /// Copy on write can't begin.
    #[error("can't hold {device}: {source}", device = device.display())]
    Arm {
        /// The device.
        device: PathBuf,
        /// Why.
        source: ArmError,
    },
    /// Writes that began before the instant did not end.
    #[error("can't take {device}: writes of before the take are still under way; try again when it is less busy, or freeze its file system", device = device.display())]
    Busy {
        /// The device.
        device: PathBuf,
    },
    /// A write came by at the instant.
    #[error("can't take {device}: {reason}, at the very instant; try again when it is less busy", device = device.display())]
    Broken {
        /// The device.
        device: PathBuf,
        /// What happened.
        reason: String,
    },
    /// A thread can't be started, or not with its priority.
    #[error("can't {0}: {1}")]
    Thread(&'static str, io::Error),
    /// Writes can't sleep.
    #[error("can't {action} for writes that wait: {source}; `--gate-technique spin` needs none of this")]
    Place {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel never calls the function that the sleeping programs are attached to.
    #[error(
        "can't see any read or write of {seen}: this kernel calls should_fail_bio nowhere, or in a copy of it"
    )]
    NoHits {
        /// What was read.
        seen: String,
    },
    /// The closing of change maps, by the caller.
    #[error("{0}")]
    Close(String),
}
