//! Absent: what is left of the module when the agent is built without the feature.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Left, UblkError};
use crate::filter::served::Served;

/// Whether devices can be made.
///
/// # Errors
/// Always: the agent is built without them.
pub fn available() -> Result<(), UblkError> {
    Err(UblkError::NotBuilt)
}

/// A device; there is none.
#[derive(Debug)]
pub struct Device(Infallible);

impl Device {
    /// Makes one, or finds it again.
    ///
    /// # Errors
    /// Always: the agent is built without them.
    pub fn open<E: From<UblkError>>(
        _served: Arc<Served>,
        _left: &Left,
        _note: impl FnOnce(&Left) -> Result<(), E>,
    ) -> Result<Self, E> {
        Err(UblkError::NotBuilt.into())
    }

    /// Ends one that nobody serves.
    ///
    /// # Errors
    /// Always: the agent is built without them.
    pub const fn give_up(_left: &Left) -> Result<(), UblkError> {
        Err(UblkError::NotBuilt)
    }

    /// Its block device.
    #[must_use]
    pub const fn node(&self) -> PathBuf {
        match self.0 {}
    }

    /// Whether nobody has it open.
    ///
    /// # Errors
    /// Somebody has.
    pub const fn check_unused(&self) -> Result<(), UblkError> {
        match self.0 {}
    }

    /// Ends it.
    ///
    /// # Errors
    /// It stays.
    pub const fn remove(&self) -> Result<(), UblkError> {
        match self.0 {}
    }

    /// Leaves it for the next agent.
    pub const fn leave(&self) {
        match self.0 {}
    }
}
