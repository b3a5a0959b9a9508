//! Take: several served devices, one instant.

use std::sync::Arc;

use super::changes::ChangesError;
use super::device::{Served, ServedImage};
use crate::cbt::Taken;
use crate::engine::cow::{ArmError, Store};

/// A device of a snapshot that is taken.
#[derive(Debug)]
pub struct Member {
    /// The device.
    pub served: Arc<Served>,
    /// Where its old data is kept.
    pub store: Arc<Store>,
}

/// A device that was taken.
#[derive(Debug)]
pub struct TakenMember {
    /// Its image.
    pub image: ServedImage,
    /// What the change map says of the take.
    pub taken: Taken,
}

/// A take failed; nothing of it is left but closed periods, which harm nobody.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// Copy on write can't begin.
    #[error("can't hold {device}: {source}")]
    Arm {
        /// The device.
        device: String,
        /// Why.
        source: ArmError,
    },
    /// A change map can't be closed.
    #[error("can't close the period of {device}: {source}")]
    Changes {
        /// The device.
        device: String,
        /// Why.
        source: ChangesError,
    },
}

/// Takes all members at one instant, and gives them in the same order.
///
/// # Errors
/// One of them fails: then none is taken.
pub fn take(members: &[Member]) -> Result<Vec<TakenMember>, TakeError> {
    // One order everywhere: two takes of the same devices wait for each other, not both forever.
    let mut order: Vec<&Member> = members.iter().collect();
    order.sort_by_key(|member| Arc::as_ptr(member.served.origin()).addr());
    let paused: Vec<_> = order
        .iter()
        .map(|member| member.served.origin().pause())
        .collect();
    let mut taken = Vec::with_capacity(members.len());
    let mut failure = None;
    for (member, paused) in order.iter().zip(&paused) {
        let device = || member.served.path().display().to_string();
        let outcome = member
            .served
            .changes()
            .take()
            .map_err(|source| TakeError::Changes {
                device: device(),
                source,
            })
            .and_then(|closed| {
                let image = paused
                    .arm(Arc::clone(&member.store))
                    .map_err(|source| TakeError::Arm {
                        device: device(),
                        source,
                    })?;
                Ok(TakenMember {
                    image: member.served.image(image),
                    taken: closed,
                })
            });
        match outcome {
            Ok(member) => taken.push(member),
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    if let Some(error) = failure {
        drop(paused);
        for done in &taken {
            done.image.served().origin().release(done.image.image().key());
        }
        return Err(error);
    }
    drop(paused);
    taken.sort_by_key(|done| {
        members
            .iter()
            .position(|member| Arc::ptr_eq(&member.served, done.image.served()))
    });
    // The marks of the closed period are still there until this succeeds.
    for done in &taken {
        if let Err(error) = done.image.served().changes().save_in_boot() {
            tracing::warn!(%error, "the change map can't be saved; its marks are kept");
        }
    }
    Ok(taken)
}
