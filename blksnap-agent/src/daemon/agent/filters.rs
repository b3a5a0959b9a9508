//! Filters: which one the devices of a snapshot get.

use std::sync::OnceLock;

use super::Agent;
use crate::control::error::{ApiError, Code};
use crate::disk::BlockDevice;
use crate::filter::dm;
use crate::filter::gate::{Availability, GateError, GateOptions, Preemption, Switch, Wish};
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

/// What the kernel takes of the gate's programs. What it has taken or refused once is not tried again.
#[derive(Debug, Default)]
pub(super) struct GateCheck {
    spin: OnceLock<()>,
    park: OnceLock<Result<(), GateError>>,
}

impl GateCheck {
    /// How gates would work here.
    fn find(&self, options: &GateOptions) -> Availability {
        let park = match self.park.get_or_init(|| Availability::check_park(options)) {
            Ok(()) => Ok(()),
            Err(GateError::Load(why)) => Err(GateError::Load(why.clone())),
            // What may be otherwise by now.
            Err(_) => Availability::check_park(options),
        };
        let programs = match self.spin.get() {
            Some(()) => Ok(()),
            None if park.is_ok() && options.technique == Wish::Auto => Ok(()),
            None => Availability::check(options).inspect(|()| {
                let _ = self.spin.set(());
            }),
        };
        let mut preemption = Preemption::now();
        if !preemption.can_spin() && options.preempt.as_ref().is_some_and(Switch::can) {
            // It will be as soon as there is a gate.
            preemption = Preemption::Full;
        }
        Availability {
            wish: options.technique,
            preemption,
            programs,
            park,
        }
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
        let gate = || self.gate_check.find(self.keeper.gates.options());
        match wish {
            FilterWish::Converge => Ok(Chosen::named(FilterKind::Converge)),
            FilterWish::Gate => match gate() {
                found if found.technique().is_some() => Ok(Chosen {
                    kind: FilterKind::Gate,
                    why: found.found(),
                }),
                found => {
                    let what = found.lacks().unwrap_or_default();
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
                let gate = gate();
                let (kind, why) = match (mapped, gate.lacks()) {
                    (Some(_), _) if refused.is_none() => (
                        FilterKind::Dm,
                        "the kernel can keep old data of devices of device-mapper".to_owned(),
                    ),
                    (Some(_), _) => (
                        FilterKind::Converge,
                        refused.map_or_else(String::new, |error| error.to_string()),
                    ),
                    (None, Some(what)) => (FilterKind::Converge, format!("no gate: {what}")),
                    (None, None) => (FilterKind::Gate, gate.found().unwrap_or_default()),
                };
                Ok(Chosen { kind, why: Some(why) })
            }
        }
    }
}
