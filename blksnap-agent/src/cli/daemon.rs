//! `daemon`.

use std::path::Path;

use anyhow::Result;

use super::args;
use crate::cbt::TrackingParams;
use crate::control::{CONTROL_SOCKET, NBD_SOCKET};
use crate::daemon::{self, Config};
use crate::telemetry::log;
use crate::tracker::TrackerConfig;

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
    log::init(options.log_format, &options.log)?;
    daemon::run(&Config {
        nbd_socket: std::path::absolute(runtime_dir.join(NBD_SOCKET))?,
        runtime_dir,
        control_socket,
        storage: std::path::absolute(options.storage)?,
        metrics_listen: options.metrics_listen,
        parameters,
        tracker: TrackerConfig {
            ring_bytes,
            btf: options.btf,
        },
    })?;
    Ok(())
}
