//! `daemon`.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::args;
use crate::cbt::TrackingParams;
use crate::control::{CONTROL_SOCKET, NBD_SOCKET};
use crate::daemon::{self, Config};
use crate::seal::{Roots, SealConfig, StateDirectory};
use crate::telemetry::log;
use crate::tracker::{self, KeepConfig, TrackerConfig};

/// Directory of the devices' documents, in the runtime directory.
const DOCUMENTS: &str = "devices";

pub(super) fn run(options: args::Daemon, socket: &Path) -> Result<()> {
    let (runtime_dir, control_socket) = match options.runtime_dir {
        Some(directory) => {
            let socket = directory.join(CONTROL_SOCKET);
            (directory, socket)
        }
        None => (
            socket.parent().unwrap_or(Path::new(".")).to_owned(),
            socket.to_owned(),
        ),
    };
    let documents = std::path::absolute(runtime_dir.join(DOCUMENTS))?;
    if options.purge {
        return purge(&options.bpffs, &documents, &options.state_dir);
    }
    let default = TrackerConfig::default();
    let ring_bytes = match options.ring_bytes {
        // Too large for the field is too large for the kernel: the tracker says so.
        Some(bytes) => u32::try_from(bytes).unwrap_or(u32::MAX),
        None => default.ring_bytes,
    };
    let parameters = TrackingParams::new(
        options.tracking_block_minimum_shift,
        options.tracking_block_maximum_count,
        options.tracking_block_maximum_shift,
    )?;
    let seal = SealConfig {
        directory: std::path::absolute(options.state_dir)?,
        policy: options.seal,
        roots: Roots {
            sysfs: options.sysfs,
            proc: options.proc,
            boot: options.boot_id,
        },
    };
    log::init(options.log_format, &options.log)?;
    daemon::run(&Config {
        nbd_socket: std::path::absolute(runtime_dir.join(NBD_SOCKET))?,
        runtime_dir,
        control_socket,
        storage: std::path::absolute(options.storage)?,
        metrics_listen: options.metrics_listen,
        parameters,
        memory_limit: options.memory_limit,
        tracker: TrackerConfig {
            ring_bytes,
            btf: options.btf,
            keep: (!options.no_pins).then_some(KeepConfig {
                bpffs: options.bpffs,
                documents,
            }),
            doubt_interval: default.doubt_interval,
            self_test_interval: Duration::from_secs(options.self_test_interval),
        },
        seal,
        device_wait: Duration::from_secs(options.device_wait.into()),
    })?;
    Ok(())
}

/// Ends all tracking that goes on without a daemon, and removes what is kept of it.
fn purge(bpffs: &Path, documents: &Path, state: &Path) -> Result<()> {
    let mut any = tracker::purge(bpffs)?;
    any |= StateDirectory::new(state.to_owned()).purge()?;
    match std::fs::remove_dir_all(documents) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", documents.display()));
        }
        _ => {}
    }
    println!(
        "{}",
        if any {
            "tracking has ended, and what was kept of it is removed: the next backup of every device is a full one"
        } else {
            "nothing was kept"
        }
    );
    Ok(())
}
