//! Filters: which one the devices of a snapshot get.

use std::sync::OnceLock;

use super::Agent;
use crate::control::error::{ApiError, Code};
use crate::disk::BlockDevice;
use crate::filter::dm;
use crate::filter::gate::{Availability, GateOptions, Preemption, Switch};
use crate::snapshot::{FilterKind, FilterWish};

/// A filter, and why it was chosen if nobody named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) kind: FilterKind,
    pub(super) why: Option<String>,
}

impl Chosen {
    const fn named(kind: FilterKind) -> Self {
        Self { kind, why: None }
    }
}

/// Whether the kernel takes the gate's programs. What it has taken once it takes again.
#[derive(Debug, Default)]
pub(super) struct GateCheck(OnceLock<()>);

impl GateCheck {
    /// What keeps gates from working here; the remedy is behind the semicolon.
    fn lacks(&self, options: &GateOptions) -> Option<String> {
        let programs = match self.0.get() {
            Some(()) => Ok(()),
            None => Availability::check(options),
        };
        if programs.is_ok() {
            let _ = self.0.set(());
        }
        let mut preemption = Preemption::now();
        if !preemption.can_spin() && options.preempt.as_ref().is_some_and(Switch::can) {
            // It will be as soon as there is a gate.
            preemption = Preemption::Full;
        }
        Availability { preemption, programs }.lacks()
    }
}

impl Agent {
    /// The filter for all `devices`, none of which is served.
    pub(super) fn choose(
        &self,
        wish: FilterWish,
        devices: &[BlockDevice],
        action: &str,
    ) -> Result<Chosen, ApiError> {
        let lacks = || self.gate_check.lacks(self.keeper.gates.options());
        match wish {
            FilterWish::Converge => Ok(Chosen::named(FilterKind::Converge)),
            FilterWish::Gate => match lacks() {
                None => Ok(Chosen::named(FilterKind::Gate)),
                Some(what) => {
                    let (found, remedy) = what.split_once("; ").unwrap_or((&what, "choose another filter"));
                    let message = format!("{action}: writes can't be held by a gate: {found}");
                    Err(ApiError::new(Code::Unsupported, message, remedy))
                }
            },
            FilterWish::Dm => {
                for device in devices {
                    dm::availability(device).map_err(|error| {
                        let message = format!("{action}: {error}");
                        ApiError::new(Code::Unsupported, message, "choose another filter")
                    })?;
                }
                Ok(Chosen::named(FilterKind::Dm))
            }
            FilterWish::Auto => {
                let mapped = devices.iter().find(|device| device.disk_name.starts_with("dm-"));
                let refused = devices.iter().find_map(|device| dm::availability(device).err());
                let (kind, why) = match (mapped, lacks()) {
                    (Some(_), _) if refused.is_none() => (
                        FilterKind::Dm,
                        "the kernel can keep old data of devices of device-mapper".to_owned(),
                    ),
                    (Some(_), _) => (
                        FilterKind::Converge,
                        refused.map_or_else(String::new, |error| error.to_string()),
                    ),
                    (None, Some(what)) => (FilterKind::Converge, format!("no gate: {what}")),
                    (None, None) => (
                        FilterKind::Gate,
                        format!("this kernel can hold writes, preemption is {}", Preemption::now()),
                    ),
                };
                Ok(Chosen { kind, why: Some(why) })
            }
        }
    }
}
