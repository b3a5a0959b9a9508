//! Records and seals in a directory.

use super::*;
use crate::cbt::CbtMap;
use crate::units::{BlockSize, Generation, Sectors};

fn identity() -> DeviceIdentity {
    DeviceIdentity {
        wwid: None,
        serial: Some("A".to_owned()),
        model: None,
        dm_uuid: None,
        md_uuid: None,
        backing_file: None,
        partition: None,
        capacity: Sectors::new(800),
        logical_block: 512,
    }
}

fn record(name: u128) -> Record {
    Record {
        name: Uuid::from_u128(name),
        path: PathBuf::from("/dev/sda"),
        identity: identity(),
        granularity: SavedGranularity::Adaptive(TrackingParams::default()),
    }
}

fn map() -> CbtMap {
    let size = BlockSize::from_shift(12).unwrap();
    let mut map = CbtMap::new(Generation::new(Uuid::from_u128(7)), size, Sectors::new(800)).unwrap();
    map.mark_blocks(3, 9);
    map.take(Generation::new(Uuid::from_u128(8)), map.capacity())
        .unwrap();
    map
}

fn seal(directory: &StateDirectory, record: &Record) {
    let map = map();
    let saved = map.save();
    let header = SealHeader {
        record: record.clone(),
        boot: "before".to_owned(),
        at: 1,
        identity: identity(),
        counters: vec![SealedCounters {
            name: "sda".to_owned(),
            counters: WriteCounters::default(),
        }],
        fingerprint: Fingerprint::default(),
        map: saved.header.clone(),
    };
    directory.write_seal(&header, &saved).unwrap();
}

#[test]
fn a_seal_lives_until_the_device_is_tracked_again() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = StateDirectory::new(scratch.path().join("state"));
    assert_eq!(directory.records().unwrap(), []);
    let (one, two) = (record(1), record(2));
    directory.begin(&one).unwrap();
    directory.begin(&two).unwrap();
    assert_eq!(directory.records().unwrap(), [one.clone(), two.clone()]);
    assert!(directory.seal(one.name).unwrap().is_none());

    seal(&directory, &one);
    let sealed = directory.seal(one.name).unwrap().unwrap();
    assert_eq!(sealed.header.record, one);
    assert_eq!(sealed.into_map().unwrap().info(), map().info());
    assert!(directory.seal(two.name).unwrap().is_none());
    directory.begin(&one).unwrap();
    assert!(directory.seal(one.name).unwrap().is_none());

    seal(&directory, &one);
    directory.break_seal(one.name).unwrap();
    assert!(directory.seal(one.name).unwrap().is_none());
    seal(&directory, &one);
    directory.forget(one.name).unwrap();
    assert_eq!(directory.records().unwrap(), [two]);
    assert!(directory.seal(one.name).unwrap().is_none());

    fs::write(directory.path().join("notes.txt"), "of somebody else").unwrap();
    assert!(directory.purge().unwrap());
    assert!(!directory.purge().unwrap());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    assert!(!StateDirectory::new(scratch.path().join("none")).purge().unwrap());
}

#[test]
fn the_boot_before_is_the_one_of_the_last_start() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = StateDirectory::new(scratch.path().join("state"));
    assert_eq!(directory.enter("one").unwrap(), None);
    assert_eq!(directory.enter("one").unwrap(), None);
    for _ in 0..2 {
        assert_eq!(directory.enter("two").unwrap().as_deref(), Some("one"));
    }
    assert_eq!(directory.enter("three").unwrap().as_deref(), Some("two"));
    fs::write(directory.path().join(BOOTS_FILE), "{").unwrap();
    assert_eq!(directory.enter("four").unwrap(), None);
    assert_eq!(directory.enter("five").unwrap().as_deref(), Some("four"));
}

#[test]
fn a_damaged_record_is_known_from_its_seal_and_a_damaged_seal_is_told() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = StateDirectory::new(scratch.path().to_owned());
    let record = record(1);
    directory.begin(&record).unwrap();
    seal(&directory, &record);
    let path = directory.file(record.name, RECORD_SUFFIX);
    let whole = fs::read(&path).unwrap();
    for damaged in [&whole[..whole.len() / 2], b"", b"{}"] {
        fs::write(&path, damaged).unwrap();
        assert_eq!(directory.records().unwrap(), std::slice::from_ref(&record));
    }
    // A file under a name that is not its own.
    let other = directory.file(Uuid::from_u128(9), RECORD_SUFFIX);
    fs::write(&other, &whole).unwrap();
    assert_eq!(directory.records().unwrap(), std::slice::from_ref(&record));
    fs::remove_file(&other).unwrap();

    let path = directory.file(record.name, SEAL_SUFFIX);
    let mut seal = fs::read(&path).unwrap();
    let middle = seal.len() / 2;
    seal[middle] ^= 1;
    fs::write(&path, &seal).unwrap();
    let error = directory.seal(record.name).unwrap_err();
    assert!(matches!(error, StateFileError::Damaged { .. }), "{error}");
    assert_eq!(directory.records().unwrap(), []);
}
