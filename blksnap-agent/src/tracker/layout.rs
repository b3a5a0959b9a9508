//! Layout: what the programs are told about the running kernel.

use aya::EbpfLoader;

use super::btf::{BtfError, KernelBtf};

/// Of which drivers the programs can read commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownCommands {
    /// SCSI: where the CDB is in `struct scsi_cmnd`.
    pub scsi: bool,
    /// NVMe: where the command is in `struct nvme_request`.
    pub nvme: bool,
}

/// The frozen globals of the programs, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    values: [(&'static str, u32); 23],
    commands: KnownCommands,
}

impl Layout {
    /// Looks everything up.
    ///
    /// # Errors
    /// The kernel has no such struct or member: it is too old, or newer than what is known.
    pub fn of(btf: &KernelBtf) -> Result<Self, BtfError> {
        let queue_bio = btf.tracepoint_parameter("block_bio_queue", "bio")?;
        if queue_bio != 0 {
            // Up to 5.10 the queue came first and a bio named its disk in another way.
            return Err(BtfError::Missing(
                "tracepoint block_bio_queue with the bio as first argument".into(),
            ));
        }
        if btf.tracepoint_parameter("block_rq_complete", "request")? != 0 {
            return Err(BtfError::Missing(
                "tracepoint block_rq_complete with the request as first argument".into(),
            ));
        }
        if btf.tracepoint_parameter("block_rq_issue", "request")? != 0 {
            return Err(BtfError::Missing(
                "tracepoint block_rq_issue with the request as first argument".into(),
            ));
        }
        // The driver's part of a request is behind it (`blk_mq_rq_to_pdu`).
        let behind = btf.struct_size("request")?;
        let scsi = driver_offset(btf, "scsi_mod", "scsi_cmnd", "cmnd");
        let nvme = driver_offset(btf, "nvme_core", "nvme_request", "cmd");
        Ok(Self {
            commands: KnownCommands {
                scsi: scsi.is_some(),
                nvme: nvme.is_some(),
            },
            values: [
                ("REQUEST_FLAGS", btf.member_offset("request", &["cmd_flags"])?),
                ("REQUEST_BYTES", btf.member_offset("request", &["__data_len"])?),
                ("REQUEST_QUEUE", btf.member_offset("request", &["q"])?),
                ("QUEUE_DISK", btf.member_offset("request_queue", &["disk"])?),
                ("DISK_GENHD_FLAGS", btf.member_offset("gendisk", &["flags"])?),
                ("HIDDEN_FLAG", btf.enumerator("GENHD_FL_HIDDEN")?),
                ("OP_DRV_IN", btf.enumerator("REQ_OP_DRV_IN")?),
                ("OP_DRV_OUT", btf.enumerator("REQ_OP_DRV_OUT")?),
                ("SCSI_CDB", behind + scsi.unwrap_or_default()),
                ("NVME_COMMAND", behind + nvme.unwrap_or_default()),
                ("BIO_BDEV", btf.member_offset("bio", &["bi_bdev"])?),
                ("BIO_NEXT", btf.member_offset("bio", &["bi_next"])?),
                ("BIO_PRIVATE", btf.member_offset("bio", &["bi_private"])?),
                ("REQUEST_BIO", btf.member_offset("request", &["bio"])?),
                ("BIO_OPF", btf.member_offset("bio", &["bi_opf"])?),
                ("BIO_FLAGS", btf.member_offset("bio", &["bi_flags"])?),
                ("BIO_SECTOR", btf.member_offset("bio", &["bi_iter", "bi_sector"])?),
                ("BIO_SIZE", btf.member_offset("bio", &["bi_iter", "bi_size"])?),
                ("BDEV_DISK", btf.member_offset("block_device", &["bd_disk"])?),
                ("BDEV_DEV", btf.member_offset("block_device", &["bd_dev"])?),
                ("DISK_PART0", btf.member_offset("gendisk", &["part0"])?),
                ("TRACE_COMPLETION_BIT", btf.enumerator("BIO_TRACE_COMPLETION")?),
                (
                    "COMPLETE_BIO_ARG",
                    btf.tracepoint_parameter("block_bio_complete", "bio")?,
                ),
            ],
        })
    }

    /// Of which drivers the programs can read commands.
    #[must_use]
    pub fn commands(&self) -> KnownCommands {
        self.commands
    }

    /// Hands the values to the loader.
    pub fn apply<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        for (name, value) in &self.values {
            loader.override_global(name, value, true);
        }
    }

    /// The value of a global, for tests that break it on purpose.
    #[cfg(test)]
    pub(crate) fn set(&mut self, name: &str, value: u32) {
        for entry in &mut self.values {
            if entry.0 == name {
                entry.1 = value;
            }
        }
    }
}

/// Offset of a member of a driver's struct, if the driver is built in or loaded.
fn driver_offset(btf: &KernelBtf, module: &str, name: &str, member: &str) -> Option<u32> {
    btf.member_offset(name, &[member])
        .or_else(|missing| {
            btf.with_module(module)
                .ok_or(missing)?
                .member_offset(name, &[member])
        })
        .ok()
}
