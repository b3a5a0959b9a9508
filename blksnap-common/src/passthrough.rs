//! Passthrough: whether a command that goes to a disk past the block layer's reads and writes may change its data.
//! Pure, and small enough for the verifier.
//!
//! Such commands come from `SG_IO`, bsg, the NVMe ioctls and io_uring passthrough, MMC ioctls, and the drivers
//! themselves. The kernel knows them as `REQ_OP_DRV_OUT` (data to the device) and `REQ_OP_DRV_IN` (everything
//! else, also without data). Data to the device always counts, but for a few commands that clusters send all the
//! time and that are about locks and paths. The rest is told by the command: NVMe has write zeroes, format and
//! sanitize without data, SCSI has FORMAT UNIT and SANITIZE, and both have harmless ones that drivers and monitors
//! send every few seconds. Without data and unknown counts. Command numbers are those of SPC, SBC, ACS and the
//! NVMe base and NVM command set specifications.

/// Bytes of a command that [`may_change`] looks at.
pub const COMMAND_BYTES: usize = 16;

/// What kind of commands a disk takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Commands {
    /// None that are known here.
    Unknown = 0,
    /// SCSI: the command is a CDB.
    Scsi = 1,
    /// The I/O queues of an NVMe namespace: the first byte of the command is its opcode.
    Nvme = 2,
    /// The admin queue of an NVMe controller.
    NvmeAdmin = 3,
}

/// The request's direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `REQ_OP_DRV_IN`: data from the device, or none.
    In,
    /// `REQ_OP_DRV_OUT`: data to the device.
    Out,
}

/// What is known of a SCSI or NVMe operation code.
mod class {
    /// Changes no data that a reader of the disk sees, whatever its direction.
    pub(super) const HARMLESS: u8 = 1;
    /// Changes data, also if it is sent with a buffer to read into.
    pub(super) const CHANGES: u8 = 2;
}

/// `ATA PASS-THROUGH (12)` and `(16)`: an ATA command in a CDB.
const ATA_12: u8 = 0xa1;
const ATA_16: u8 = 0x85;
/// `SEND DIAGNOSTIC`.
const SEND_DIAGNOSTIC: u8 = 0x1d;

/// Classes of SCSI operation codes; 0 for those that are not known.
pub static SCSI: [u8; 256] = {
    let mut table = [0; 256];
    // Test unit ready, request sense, seek, inquiry, reserve, release, mode sense, start stop unit, receive
    // diagnostic, prevent removal, seek, verify, pre-fetch, synchronize cache, log select, log sense, reserve,
    // release, mode sense, persistent reserve in and out; then 16 and 12 byte forms and the maintenance commands.
    table = fill(
        table,
        &[
            0x00, 0x03, 0x0b, 0x12, 0x16, 0x17, 0x1a, 0x1b, 0x1c, 0x1e, 0x2b, 0x2f, 0x34, 0x35, 0x4c, 0x4d,
            0x56, 0x57, 0x5a, 0x5e, 0x5f, 0x8f, 0x90, 0x91, 0x95, 0x9e, 0xa0, 0xa2, 0xa3, 0xa4, 0xaf,
        ],
        class::HARMLESS,
    );
    // Reads: 6, 10, 12, 16 bytes, capacity, defect data, buffer, long.
    table = fill(
        table,
        &[0x08, 0x25, 0x28, 0x37, 0x3c, 0x3e, 0x88, 0xa8, 0xb7],
        class::HARMLESS,
    );
    // Format unit, reassign blocks, write 6, 10, 12, 16 and with verify, write long, write same, unmap, sanitize,
    // compare and write, write atomic, extended copy, zone commands.
    fill(
        table,
        &[
            0x04, 0x07, 0x0a, 0x2a, 0x2e, 0x3f, 0x41, 0x42, 0x48, 0x83, 0x89, 0x8a, 0x8e, 0x93, 0x94, 0x9c,
            0xaa, 0xae,
        ],
        class::CHANGES,
    )
};

/// Classes of ATA commands in a CDB without data; 0 for those that are not known.
pub static ATA: [u8; 256] = fill(
    [0; 256],
    // Nop, recalibrate, read native max, read log, verify, seek, diagnostic, parameters, old and new power
    // management, SMART, flush, identify, eject, set features, freeze lock, read native max.
    &[
        0x00, 0x10, 0x27, 0x2f, 0x40, 0x41, 0x42, 0x47, 0x70, 0x90, 0x91, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99,
        0xb0, 0xe0, 0xe1, 0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xea, 0xec, 0xed, 0xef, 0xf5, 0xf8,
    ],
    class::HARMLESS,
);

/// Classes of opcodes on the I/O queues of an NVMe namespace.
pub static NVME: [u8; 256] = fill(
    fill(
        [0; 256],
        // Flush, read, compare, verify, reservations (register, report, acquire, release), management and zone
        // receive.
        &[0x00, 0x02, 0x05, 0x0c, 0x0d, 0x0e, 0x11, 0x12, 0x15, 0x7a],
        class::HARMLESS,
    ),
    // Write, write uncorrectable, write zeroes, dataset management, copy, zone send and append.
    &[0x01, 0x04, 0x08, 0x09, 0x19, 0x79, 0x7d],
    class::CHANGES,
);

/// Classes of admin opcodes of NVMe.
pub static NVME_ADMIN: [u8; 256] = fill(
    fill(
        [0; 256],
        // Queues, log page, identify, abort, features, events, firmware, self test, keep alive, directives,
        // doorbell buffer, fabrics, security receive, LBA status.
        &[
            0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x0c, 0x10, 0x11, 0x14, 0x18, 0x19, 0x1a,
            0x1e, 0x7c, 0x7f, 0x82, 0x86,
        ],
        class::HARMLESS,
    ),
    // Namespace management and attachment, format, security send, sanitize.
    &[0x0d, 0x15, 0x80, 0x81, 0x84],
    class::CHANGES,
);

const fn fill(mut table: [u8; 256], codes: &[u8], class: u8) -> [u8; 256] {
    let mut i = 0;
    while i < codes.len() {
        table[codes[i] as usize] = class;
        i += 1;
    }
    table
}

/// Whether a command of `bytes` bytes of data may change what is on the disk. `commands` is the number of a
/// [`Commands`]; for [`Commands::Unknown`], `command` is not looked at.
#[inline(always)]
#[must_use]
pub fn may_change(commands: u32, direction: Direction, bytes: u32, command: &[u8; COMMAND_BYTES]) -> bool {
    let opcode = command[0] as usize;
    let class = if commands == Commands::Scsi as u32 {
        scsi_class(command, bytes)
    } else if commands == Commands::Nvme as u32 {
        NVME[opcode]
    } else if commands == Commands::NvmeAdmin as u32 {
        NVME_ADMIN[opcode]
    } else {
        0
    };
    match class {
        class::HARMLESS => false,
        class::CHANGES => true,
        // Of what is not known, only what brings data back is taken for reading.
        _ => matches!(direction, Direction::Out) || bytes == 0,
    }
}

/// The class of a CDB with `bytes` bytes of data.
#[inline(always)]
fn scsi_class(cdb: &[u8; COMMAND_BYTES], bytes: u32) -> u8 {
    match cdb[0] {
        // The SMART and the log commands of ATA can carry others inside when they carry data.
        ATA_12 if bytes == 0 => ATA[cdb[9] as usize],
        ATA_16 if bytes == 0 => ATA[cdb[14] as usize],
        // With DEVOFFL or UNITOFFL the test may write to the medium.
        SEND_DIAGNOSTIC if cdb[1] & 3 == 0 => class::HARMLESS,
        opcode => SCSI[opcode as usize],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(bytes: &[u8]) -> [u8; COMMAND_BYTES] {
        let mut command = [0; COMMAND_BYTES];
        command[..bytes.len()].copy_from_slice(bytes);
        command
    }

    fn changes(commands: Commands, direction: Direction, bytes: u32, cdb: &[u8]) -> bool {
        may_change(commands as u32, direction, bytes, &command(cdb))
    }

    #[test]
    fn without_knowledge_of_the_commands_only_data_from_the_device_is_harmless() {
        for opcode in 0..=255 {
            let unknown = |direction, bytes| changes(Commands::Unknown, direction, bytes, &[opcode]);
            assert!(unknown(Direction::Out, 512));
            assert!(unknown(Direction::Out, 0));
            assert!(unknown(Direction::In, 0));
            assert!(!unknown(Direction::In, 512));
        }
    }

    #[test]
    fn scsi_writes_and_erases_count_in_every_direction() {
        for opcode in [0x04, 0x0a, 0x2a, 0x41, 0x42, 0x48, 0x89, 0x8a, 0x93, 0xaa] {
            for (direction, bytes) in [(Direction::Out, 512), (Direction::In, 0), (Direction::In, 512)] {
                assert!(
                    changes(Commands::Scsi, direction, bytes, &[opcode]),
                    "{opcode:#x} {bytes}"
                );
            }
        }
        // Mode select can change block size and capacity; vendor commands may do anything.
        assert!(changes(Commands::Scsi, Direction::Out, 24, &[0x55]));
        assert!(changes(Commands::Scsi, Direction::In, 0, &[0xc1]));
        assert!(!changes(Commands::Scsi, Direction::In, 64, &[0xc1]));
    }

    #[test]
    fn what_drivers_and_monitors_send_all_the_time_does_not_count() {
        // Test unit ready, start stop, synchronize cache, inquiry.
        for opcode in [0x00, 0x1b, 0x35, 0x91, 0x12, 0x25, 0x28, 0x88, 0xa0, 0x1e] {
            assert!(
                !changes(Commands::Scsi, Direction::In, 0, &[opcode]),
                "{opcode:#x}"
            );
            assert!(
                !changes(Commands::Scsi, Direction::In, 512, &[opcode]),
                "{opcode:#x}"
            );
        }
        // Reservations and path states of clusters.
        assert!(!changes(Commands::Scsi, Direction::Out, 24, &[0x5f]));
        assert!(!changes(Commands::Scsi, Direction::Out, 8, &[0xa4]));
        assert!(!changes(Commands::Nvme, Direction::Out, 16, &[0x0d]));
        // A power check by smartd.
        let mut cdb = [0_u8; 16];
        (cdb[0], cdb[14]) = (0x85, 0xe5);
        assert!(!changes(Commands::Scsi, Direction::In, 0, &cdb));
        cdb[14] = 0xb0;
        assert!(!changes(Commands::Scsi, Direction::In, 0, &cdb));
        // With data to the device, SMART may carry a write.
        assert!(changes(Commands::Scsi, Direction::Out, 512, &cdb));
    }

    #[test]
    fn ata_commands_without_data_are_looked_into() {
        // Sanitize, security erase prepare, a command nobody knows.
        for ata in [0xb4, 0xf3, 0x0f] {
            let mut cdb = [0_u8; 16];
            (cdb[0], cdb[14]) = (0x85, ata);
            assert!(changes(Commands::Scsi, Direction::In, 0, &cdb), "{ata:#x}");
            let mut cdb = [0_u8; 12];
            (cdb[0], cdb[9]) = (0xa1, ata);
            assert!(changes(Commands::Scsi, Direction::In, 0, &cdb), "{ata:#x}");
        }
        // Identify brings data back.
        let mut cdb = [0_u8; 12];
        (cdb[0], cdb[9]) = (0xa1, 0xec);
        assert!(!changes(Commands::Scsi, Direction::In, 512, &cdb));
    }

    #[test]
    fn a_diagnostic_counts_when_it_may_use_the_medium() {
        assert!(!changes(Commands::Scsi, Direction::In, 0, &[0x1d, 0x24]));
        assert!(changes(Commands::Scsi, Direction::In, 0, &[0x1d, 0x02]));
    }

    #[test]
    fn nvme_commands_without_data_are_told_apart() {
        for opcode in [0x01, 0x04, 0x08, 0x09, 0x19, 0x79, 0x7d, 0x80] {
            assert!(
                changes(Commands::Nvme, Direction::In, 0, &[opcode]),
                "{opcode:#x}"
            );
        }
        for opcode in [0x00, 0x02, 0x0c, 0x0e] {
            assert!(
                !changes(Commands::Nvme, Direction::In, 0, &[opcode]),
                "{opcode:#x}"
            );
        }
        for opcode in [0x0d, 0x80, 0x84, 0x81, 0xc0] {
            assert!(
                changes(Commands::NvmeAdmin, Direction::In, 0, &[opcode]),
                "{opcode:#x}"
            );
        }
        for opcode in [0x02, 0x06, 0x09, 0x0c, 0x18, 0x7c] {
            assert!(
                !changes(Commands::NvmeAdmin, Direction::Out, 0, &[opcode]),
                "{opcode:#x}"
            );
        }
    }
}
