//! Every link of the chain, whole and broken.

use std::cell::RefCell;
use std::path::PathBuf;

use uuid::Uuid;

use super::*;
use crate::cbt::SavedHeader;
use crate::disk::identity::PartitionIdentity;
use crate::seal::record::{SavedGranularity, SealHeader};
use crate::statefile::Format;
use crate::units::{BlockSize, Generation, Sectors};

const BLOCKS: u64 = 100;

fn identity() -> DeviceIdentity {
    DeviceIdentity {
        wwid: Some("naa.5000".to_owned()),
        serial: Some("A".to_owned()),
        model: None,
        dm_uuid: None,
        md_uuid: None,
        backing_file: None,
        partition: Some(PartitionIdentity {
            number: 1,
            start: Sectors::new(2048),
            uuid: Some("1-2-3".to_owned()),
        }),
        capacity: Sectors::new(BLOCKS * 8),
        logical_block: 512,
    }
}

fn record() -> Record {
    Record {
        name: Uuid::from_u128(1),
        path: PathBuf::from("/dev/sda1"),
        identity: identity(),
        granularity: SavedGranularity::Fixed(4096),
    }
}

fn map() -> CbtMap {
    let size = BlockSize::from_shift(12).unwrap();
    let mut map = CbtMap::new(
        Generation::new(Uuid::from_u128(7)),
        size,
        Sectors::new(BLOCKS * 8),
    )
    .unwrap();
    map.mark_blocks(3, 9);
    map.take(Generation::new(Uuid::from_u128(8)), map.capacity())
        .unwrap();
    map.mark_blocks(5, 5);
    map
}

fn sealed_of(map: &CbtMap) -> Sealed {
    let saved = map.save();
    Sealed {
        sections: saved.sections().iter().map(crate::cbt::Blocks::to_vec).collect(),
        header: SealHeader {
            record: record(),
            boot: "before".to_owned(),
            at: 1,
            identity: identity(),
            counters: Vec::new(),
            fingerprint: Fingerprint::default(),
            map: saved.header,
        },
    }
}

fn sealed() -> Sealed {
    sealed_of(&map())
}

/// What the tests know of a device.
struct Known {
    boot: Option<String>,
    before: Option<String>,
    identity: DeviceIdentity,
    written: Vec<(String, WriteCounters)>,
    provable: bool,
    content: bool,
    /// In which order things were asked for.
    asked: RefCell<Vec<&'static str>>,
}

fn known() -> Known {
    Known {
        boot: Some("now".to_owned()),
        before: Some("before".to_owned()),
        identity: identity(),
        written: vec![("sda1".to_owned(), WriteCounters::default())],
        provable: true,
        content: true,
        asked: RefCell::default(),
    }
}

impl Evidence for Known {
    fn boot(&self) -> Option<String> {
        self.asked.borrow_mut().push("boot");
        self.boot.clone()
    }

    fn boot_before(&self) -> Option<String> {
        self.before.clone()
    }

    fn identity(&self) -> Result<DeviceIdentity, DiskError> {
        self.asked.borrow_mut().push("identity");
        Ok(self.identity.clone())
    }

    fn written(&self) -> Result<Vec<(String, WriteCounters)>, Unprovable> {
        self.asked.borrow_mut().push("written");
        if self.provable {
            Ok(self.written.clone())
        } else {
            Err(Unprovable::Virtual("loop0".to_owned()))
        }
    }

    fn content(&self, _: &Fingerprint) -> Result<(), ContentDiffers> {
        self.asked.borrow_mut().push("content");
        if self.content {
            Ok(())
        } else {
            Err(ContentDiffers::Differs {
                offset: 0,
                length: 512,
            })
        }
    }
}

#[test]
fn a_whole_chain_goes_on_with_the_same_map() {
    let evidence = known();
    let resumed = decide(&record(), Ok(Some(sealed())), &evidence).unwrap();
    assert_eq!(resumed.info(), map().info());
    assert_eq!(resumed.save().sections(), map().save().sections());
    // The disk is read last: most often something cheaper says no.
    assert_eq!(
        evidence.asked.into_inner(),
        ["identity", "boot", "written", "content"]
    );
}

#[test]
fn every_broken_link_begins_a_new_generation() {
    use ResetReason::{ContinuityUnproven, DeviceReplaced, Resized, RunMissed, StateDamaged, StateVersion};
    type Break = fn(&mut Known, &mut Sealed);
    let broken: [(Break, ResetReason); 26] = [
        (
            |known, _| known.boot = Some("before".to_owned()),
            ContinuityUnproven,
        ),
        (|known, _| known.boot = None, ContinuityUnproven),
        (|known, _| known.boot = Some(String::new()), ContinuityUnproven),
        (
            |known, _| known.before = Some("between".to_owned()),
            ContinuityUnproven,
        ),
        (|known, _| known.before = None, ContinuityUnproven),
        (|_, sealed| sealed.header.boot = String::new(), ContinuityUnproven),
        (
            |known, _| known.identity.serial = Some("B".to_owned()),
            DeviceReplaced,
        ),
        (
            |known, _| known.identity.wwid = Some("eui.1".to_owned()),
            DeviceReplaced,
        ),
        (|known, _| known.identity.wwid = None, ContinuityUnproven),
        (
            |known, _| known.identity.partition.as_mut().unwrap().uuid = Some("4".to_owned()),
            DeviceReplaced,
        ),
        (
            |known, _| known.identity.partition.as_mut().unwrap().start = Sectors::new(4096),
            DeviceReplaced,
        ),
        (|known, _| known.identity.logical_block = 4096, DeviceReplaced),
        (|known, _| known.identity.capacity = Sectors::new(808), Resized),
        (
            |known, sealed| {
                known.identity.capacity = Sectors::new(808);
                sealed.header.identity.capacity = Sectors::new(808);
            },
            Resized,
        ),
        (|known, _| known.written[0].1.writes = 1, ContinuityUnproven),
        (|known, _| known.written[0].1.sectors = 1, ContinuityUnproven),
        (|known, _| known.written[0].1.discards = 1, ContinuityUnproven),
        (|known, _| known.written[0].1.discarded = 1, ContinuityUnproven),
        (|known, _| known.written[0].1.in_flight = 1, ContinuityUnproven),
        (|known, _| known.provable = false, ContinuityUnproven),
        (|known, _| known.content = false, ContinuityUnproven),
        (
            |_, sealed| sealed.header.record.name = Uuid::from_u128(2),
            StateDamaged,
        ),
        (|_, sealed| sealed.sections[0][0] = 9, StateDamaged),
        (|_, sealed| sealed.sections.truncate(1), StateDamaged),
        (
            |_, sealed| {
                sealed.header.map = SavedHeader {
                    active: 0,
                    ..sealed.header.map.clone()
                }
            },
            StateDamaged,
        ),
        (
            |_, sealed| {
                let mut doubted = map();
                doubted.corrupt(RunMissed);
                *sealed = sealed_of(&doubted);
            },
            RunMissed,
        ),
    ];
    for (number, (change, reason)) in broken.into_iter().enumerate() {
        let (mut evidence, mut sealed) = (known(), sealed());
        change(&mut evidence, &mut sealed);
        let doubt = decide(&record(), Ok(Some(sealed)), &evidence).unwrap_err();
        assert_eq!(doubt.reason(), reason, "{number}: {doubt}");
        assert!(!doubt.to_string().contains('\n'));
    }

    let doubt = decide(&record(), Ok(None), &known()).unwrap_err();
    assert_eq!(doubt.reason(), ContinuityUnproven);
    let path = PathBuf::from("/x.seal");
    for (error, reason) in [
        (
            StateFileError::Damaged {
                path: path.clone(),
                why: "cut".to_owned(),
            },
            StateDamaged,
        ),
        (
            StateFileError::Version {
                path: path.clone(),
                found: "version 9".to_owned(),
                format: Format {
                    name: "blksnap-seal",
                    version: 1,
                },
            },
            StateVersion,
        ),
        (
            StateFileError::Io {
                action: "read",
                path,
                source: std::io::ErrorKind::Other.into(),
            },
            StateDamaged,
        ),
    ] {
        let doubt = decide(&record(), Err(error), &known()).unwrap_err();
        assert_eq!(doubt.reason(), reason, "{doubt}");
    }
}

#[test]
fn a_device_that_nothing_identifies_proves_nothing() {
    let anonymous = DeviceIdentity {
        wwid: None,
        serial: None,
        partition: None,
        ..identity()
    };
    let record = Record {
        identity: anonymous.clone(),
        ..record()
    };
    let mut sealed = sealed();
    sealed.header.record = record.clone();
    sealed.header.identity = anonymous.clone();
    let evidence = Known {
        identity: anonymous,
        ..known()
    };
    let doubt = decide(&record, Ok(Some(sealed)), &evidence).unwrap_err();
    assert!(
        matches!(doubt, Doubt::Device(Difference::Unidentified)),
        "{doubt}"
    );
    assert_eq!(doubt.reason(), ResetReason::ContinuityUnproven);
}

#[test]
fn the_proof_is_asked_for_again_when_the_device_is_tracked() {
    settle(&identity(), &known()).unwrap();
    let mut evidence = known();
    evidence.written[0].1.writes = 1;
    let doubt = settle(&identity(), &evidence).unwrap_err();
    assert_eq!(doubt.reason(), ResetReason::ContinuityUnproven);
    let mut evidence = known();
    evidence.identity.serial = Some("B".to_owned());
    let doubt = settle(&identity(), &evidence).unwrap_err();
    assert_eq!(doubt.reason(), ResetReason::DeviceReplaced);
}
