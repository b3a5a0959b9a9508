//! Layout: what the programs are told about the running kernel.

use aya::EbpfLoader;

use super::btf::{BtfError, KernelBtf};

/// The frozen globals of the programs, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    values: [(&'static str, u32); 13],
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
        Ok(Self {
            values: [
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
