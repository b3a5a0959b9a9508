//! Fingerprints of bytes.

use proptest::prelude::*;

use super::*;

struct Bytes(Vec<u8>);

impl Content for Bytes {
    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, buffer: &mut AlignedBuffer, offset: u64, length: usize) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        let bytes = self
            .0
            .get(start..start + length)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.as_mut_slice()[..length].copy_from_slice(bytes);
        Ok(())
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn both_ends_partitions_and_what_changed_last_are_looked_at() {
    let block = 128 << 10;
    let mut map = vec![0; 512];
    map[100] = 3;
    map[101] = 2;
    let got = places(64 * MIB + 512, &[MIB, 40 * MIB + 4096], &map.into(), block);
    let want = [
        (0, MIB),
        (MIB, PARTITION),
        (100 * block, BLOCK),
        (101 * block, BLOCK),
        (40 * MIB, PARTITION + UNIT),
        (63 * MIB, MIB + 512),
    ];
    let got: Vec<_> = got.iter().map(|place| (place.offset, place.length)).collect();
    assert_eq!(got, want);
}

#[test]
fn the_latest_blocks_are_chosen_evenly() {
    let mut map = vec![1; 10_000];
    map[..10].fill(7);
    map[9_000..9_100].fill(5);
    let chosen = latest(&map.into());
    assert_eq!(chosen.len(), BLOCKS);
    assert!((0..10).chain(9_000..9_100).all(|block| chosen.contains(&block)));
    let rest: Vec<u64> = chosen
        .iter()
        .copied()
        .filter(|block| *block >= 10 && !(9_000..9_100).contains(block))
        .collect();
    assert_eq!(rest.len(), BLOCKS - 110);
    assert_eq!(rest[0], 10);
    assert!(rest.windows(2).all(|pair| pair[1] - pair[0] < 200));
    assert_eq!(latest(&vec![0; 1000].into()), [0; 0]);
    assert_eq!(latest(&vec![0, 255, 0, 1].into()), [1, 3]);
    assert_eq!(latest(&vec![255; 256].into()).len(), 256);
    assert_eq!(latest(&vec![1; 257].into()).len(), 256);
}

#[test]
fn any_change_in_a_place_is_seen() {
    let length = 6 * MIB;
    let mut map = vec![0; 96];
    map[40..42].fill(2);
    let places = places(length, &[2 * MIB], &map.into(), 64 << 10);
    let fresh = || Bytes((0..length).map(|at| at.to_le_bytes()[1]).collect());
    let fingerprint = Fingerprint::of(&fresh(), &places).unwrap();
    fingerprint.check(&fresh()).unwrap();
    let mut content = fresh();
    for at in (0..length).step_by(32 * 1024 + 1) {
        let index = usize::try_from(at).unwrap();
        content.0[index] ^= 1;
        let seen = fingerprint.check(&content).is_err();
        content.0[index] ^= 1;
        let inside = places
            .iter()
            .any(|place| (place.offset..place.end()).contains(&at));
        assert_eq!(seen, inside, "byte {at}");
    }
    let short = Bytes(vec![0; 1000]);
    assert!(matches!(
        fingerprint.check(&short),
        Err(ContentDiffers::Differs { .. })
    ));
    assert!(matches!(
        Fingerprint::default().check(&short),
        Err(ContentDiffers::Empty)
    ));
    let beyond = Extent {
        offset: 0,
        length: 2000,
    };
    assert!(matches!(
        Fingerprint::of(&short, &[beyond]),
        Err(ContentDiffers::Io { .. })
    ));
    let text = serde_json::to_string(&fingerprint).unwrap();
    assert_eq!(serde_json::from_str::<Fingerprint>(&text).unwrap(), fingerprint);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn places_ascend_within_the_device(
        sectors in 1..200_000_u64,
        partitions in prop::collection::vec(0..110_000_000_u64, 0..4),
        shift in 12..21_u32,
        seed in prop::collection::vec((any::<u8>(), 1..300_usize), 1..40),
    ) {
        let (length, block) = (sectors * 512, 1_u64 << shift);
        let blocks = usize::try_from(length.div_ceil(block)).unwrap();
        let map: Vec<u8> = seed.iter().cycle().flat_map(|(b, n)| std::iter::repeat_n(*b, *n)).take(blocks).collect();
        let places = places(length, &partitions, &map.into(), block);
        prop_assert!(!places.is_empty() && places.len() <= MAX_SAMPLES);
        prop_assert_eq!(places[0].offset, 0);
        prop_assert_eq!(places.last().unwrap().end(), length);
        for pair in places.windows(2) {
            prop_assert!(pair[0].end() <= pair[1].offset);
        }
        for place in &places {
            prop_assert!(place.length > 0 && place.length <= ENDS + UNIT);
            prop_assert!(place.offset % UNIT == 0 && (place.end() % UNIT == 0 || place.end() == length));
        }
    }
}
