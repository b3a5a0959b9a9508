//! Growth: an owner's files on the devices of its snapshot, and more of them while it is held.
//!
//! A directory on a snapshotted device grows by further files. Making one writes to the device, and these writes may
//! have to wait for old data to be stored. So it is made on a thread of its own, and nobody waits for it: storage that
//! runs out before it is there is an overflow.

use std::sync::Arc;

use super::files::{Files, NewFile};
use super::owner::{Command, Owner, State};
use super::{Member, SnapshotError};
use crate::filter::served::Served;
use crate::storage::{Own, Pool, StorageSpec};

/// Files are at least so many chunks.
const LEAST: u64 = 16;

impl Owner {
    /// Adds storage to a pool: where it is on a device of the snapshot, as a file that is allocated now.
    pub(super) fn give(&mut self, pool: &Pool, spec: &StorageSpec) -> Result<(), SnapshotError> {
        let StorageSpec::Own(own) = spec else {
            let spec = self.keep(spec)?;
            match &mut self.held {
                Some(held) => held.append(&spec)?,
                None => pool.append(&spec)?,
            }
            return Ok(());
        };
        if self.held.is_some() {
            self.check_member(own)?;
        }
        let files = self.files_of(own)?;
        let first = match own.limit {
            Some(limit) if !self.options.autogrow => limit,
            Some(limit) => limit.min(self.options.minimum),
            None => self.options.minimum,
        };
        let watched = self.watches.iter().any(|watch| watch.is_of(&own.device));
        let watch = own.directory && self.options.autogrow && self.held.is_none() && !watched;
        let made = files.make(own, self.at_least(own, first), watch)?;
        self.adopt(pool, &files, made)
    }

    /// Uses a file that was made.
    fn adopt(&mut self, pool: &Pool, files: &Files, mut made: NewFile) -> Result<(), SnapshotError> {
        self.watches.extend(made.watch.take());
        let added = match &mut self.held {
            Some(held) => held.append_file(&made),
            None => pool
                .append_own(made.spec.clone(), made.in_use.place())
                .map_err(Into::into),
        };
        match added {
            Ok(()) => self.files_in_use.push(made.in_use),
            Err(error) => {
                files.undo(&made);
                return Err(error);
            }
        }
        Ok(())
    }

    /// The size of a file, at least some chunks of its device, at most the limit.
    fn at_least(&self, own: &Own, bytes: u64) -> u64 {
        let chunk = |served: Arc<Served>| served.origin().layout().chunk_bytes();
        let chunk = self
            .files
            .as_ref()
            .and_then(|files| files.devices.served(&own.device))
            .map_or(0, chunk);
        bytes.max(LEAST * chunk).min(own.limit.unwrap_or(u64::MAX))
    }

    fn files_of(&self, own: &Own) -> Result<Files, SnapshotError> {
        self.files.clone().ok_or_else(|| SnapshotError::OwnDevice {
            path: own.path.clone(),
            device: own.device.clone(),
        })
    }

    /// Refuses storage on a served device that is not in the snapshot.
    pub(super) fn check_member(&self, own: &Own) -> Result<(), SnapshotError> {
        let is_it = |member: &Member| matches!(member, Member::Served(served) if served.name() == own.device);
        match self.info.devices.iter().any(is_it) {
            true => Ok(()),
            false => Err(SnapshotError::OwnDevice {
                path: own.path.clone(),
                device: own.device.clone(),
            }),
        }
    }

    /// Space runs low: makes another file, if there is a directory for it.
    pub(super) fn low(&mut self, requested: u64) {
        if !self.options.autogrow || self.growing || self.info.state != State::Taken {
            return;
        }
        let (Some(pool), Some(files)) = (&self.pool, self.files.clone()) else {
            return;
        };
        let usage = pool.usage();
        if usage.bytes.saturating_sub(usage.used) >= self.options.minimum.saturating_mul(2) {
            // An agent before has seen to it.
            return;
        }
        if self.held.as_ref().is_some_and(|held| held.own.is_some()) {
            // What it allocates now may have been a file's at the instant, and its own writes are held.
            tracing::warn!(
                snapshot = %self.info.id,
                used = usage.used,
                bytes = usage.bytes,
                "the difference storage on a device whose writes are held does not grow; append a place on another device before it is full"
            );
            return;
        }
        let specs = pool.specs();
        let owns = specs.iter().filter_map(|spec| match spec {
            StorageSpec::Own(own) if own.directory => Some(own),
            _ => None,
        });
        // The last one that has not reached its limit.
        let mut grows = None;
        for own in owns.clone() {
            let of_it = owns.clone().filter(|other| other.path == own.path);
            let files = of_it.filter_map(|other| other.file.as_ref());
            let has: u64 = files.map(|file| file.bytes).sum();
            let left = own.limit.unwrap_or(u64::MAX).saturating_sub(has);
            if left > 0 {
                grows = Some((own, left));
            }
        }
        let Some((own, left)) = grows else { return };
        let own = Own {
            file: None,
            ..own.clone()
        };
        let wanted = self.at_least(&own, requested.max(self.options.minimum)).min(left);
        let queue = self.queue.clone();
        let started = std::thread::Builder::new()
            .name("blksnap-grow".to_owned())
            .spawn(move || {
                let made = files.make(&own, wanted, false);
                if let Err(std::sync::mpsc::SendError(Command::Grown(Ok(made)))) =
                    queue.send(Command::Grown(made))
                {
                    // The snapshot is gone.
                    files.undo(&made);
                }
            });
        match started {
            Ok(_) => self.growing = true,
            Err(error) => tracing::error!(%error, "can't start the thread that lets storage grow"),
        }
    }

    /// What was asked for by [`Owner::low`] is there, or is not.
    pub(super) fn grown(&mut self, made: Result<NewFile, SnapshotError>) {
        self.growing = false;
        let (Some(pool), Some(files)) = (self.pool.clone(), self.files.clone()) else {
            return;
        };
        let id = self.info.id;
        match made.and_then(|made| {
            let (path, bytes) = match &made.spec.file {
                Some(file) => (file.path.clone(), file.bytes),
                None => (made.spec.path.clone(), 0),
            };
            self.adopt(&pool, &files, made).map(|()| (path, bytes))
        }) {
            Ok((path, bytes)) => {
                tracing::info!(snapshot = %id, file = %path.display(), bytes, "the storage has grown");
                // It may have been asked for more meanwhile.
                if let Some(requested) = self.asked.take() {
                    self.low(requested);
                }
            }
            Err(error) => tracing::warn!(snapshot = %id, %error, "the storage can't grow"),
        }
    }

    /// The snapshot is over: its files are used no more, and removed.
    pub(super) fn release_files(&mut self) {
        self.watches.clear();
        for file in self.files_in_use.drain(..) {
            file.end();
        }
        if let Some(files) = &self.files {
            files.release(self.growing);
        }
    }
}
