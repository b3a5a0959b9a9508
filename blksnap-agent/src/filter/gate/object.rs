//! Object: the gate's programs and maps as loaded. Nothing of it is pinned: what the agent attached goes with the agent,
//! so that writers of a dead agent's gate wait no longer.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::{ArrayOfMaps, HashMap, Map, MapData, PerCpuArray, RingBuf};
use aya::programs::{BtfTracePoint, FEntry};
use aya::{Btf, Ebpf, EbpfLoader};
use blksnap_common::gate::{COPIES, GateState, MAX_GATES, PARKED_WORDS, Parker, STATE_WORDS};
use blksnap_common::track::{DiskSlots, SLOTS_PER_DISK, Slot};

use super::technique::Technique;
use super::{GateError, GateOptions, park};
use crate::sys::mman::{self, SharedWords};
use crate::tracker::{KernelBtf, one_line, verdict};

/// The compiled programs.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gate"));

impl Technique {
    /// The function that the waiting programs are attached to.
    const fn entry(self) -> &'static str {
        match self {
            Self::Spin => "submit_bio_noacct",
            Self::Park => "should_fail_bio",
        }
    }

    /// The name of a copy of the waiting program.
    fn program(self, copy: usize) -> String {
        match self {
            Self::Spin => format!("wait_{copy}"),
            Self::Park => format!("park_{copy}"),
        }
    }
}

/// The auditors, and their tracepoints.
const AUDITORS: [(&str, &str); 2] = [
    ("audit_queue", "block_bio_queue"),
    ("audit_remap", "block_bio_remap"),
];

/// Programs, links and maps; dropping it detaches all.
pub(super) struct Object {
    disks: HashMap<MapData, u32, DiskSlots>,
    kept: ArrayOfMaps<MapData, MapData>,
    passed: PerCpuArray<MapData, u64>,
    /// What `disks` holds.
    table: BTreeMap<u32, DiskSlots>,
    used: [bool; MAX_GATES as usize],
    _ebpf: Ebpf,
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object").finish_non_exhaustive()
    }
}

/// What a load hands to others.
pub(super) struct Loaded {
    pub(super) object: Object,
    pub(super) requests: RingBuf<MapData>,
    pub(super) states: States,
    pub(super) epoch: SharedWords,
    pub(super) park: park::Maps,
    /// 1 when the first copy of the sleeping program has seen anything.
    pub(super) hits: SharedWords,
    /// Where writes sleep, if they do and it was made.
    pub(super) place: Option<Arc<park::Place>>,
}

impl Object {
    /// Loads the programs and attaches them: the auditors first, so that no write is held that is not looked at.
    pub(super) fn load(options: &GateOptions, technique: Technique) -> Result<Loaded, GateError> {
        let load = |error: &dyn std::error::Error| GateError::Load(verdict(&one_line(error)));
        let places = places()?;
        let mut ebpf = prepare(options, technique, places)?;
        let mut take = |name: &'static str| {
            ebpf.take_map(name)
                .ok_or_else(|| GateError::Load(format!("the object has no map {name}")))
        };
        let state = words_of(&take("STATE")?, MAX_GATES as usize * STATE_WORDS)?;
        let epoch = words_of(&take("EPOCH")?, 1)?;
        // 0 is the epoch of a note that is no note.
        epoch.words()[0].store(1, Ordering::Release);
        let park = park::Maps {
            parked: Arc::new(words_of(&take("PARKED")?, places as usize * PARKED_WORDS)?),
            parker: Arc::new(words_of(&take("PARKER")?, size_of::<Parker>() / 8)?),
        };
        let hits = words_of(&take("HITS")?, 1)?;
        let requests = RingBuf::try_from(take("REQUESTS")?).map_err(|e| load(&e))?;
        let disks = HashMap::try_from(take("DISKS")?).map_err(|e| load(&e))?;
        let kept = ArrayOfMaps::try_from(take("KEPT")?).map_err(|e| load(&e))?;
        let passed = PerCpuArray::try_from(take("PASSED")?).map_err(|e| load(&e))?;
        for (name, _) in AUDITORS {
            let program: &mut BtfTracePoint = program(&mut ebpf, name)?;
            program.attach().map_err(|e| load(&e))?;
        }
        // What is attached last runs first (`bpf_trampoline_link_prog` adds at the head): so the first copy is the first.
        for copy in (0..options.copies.clamp(1, COPIES)).rev() {
            let program: &mut FEntry = program(&mut ebpf, &technique.program(copy))?;
            program.attach().map_err(|e| load(&e))?;
        }
        Ok(Loaded {
            object: Self {
                disks,
                kept,
                passed,
                table: BTreeMap::new(),
                used: [false; MAX_GATES as usize],
                _ebpf: ebpf,
            },
            requests,
            states: States(state),
            epoch,
            park,
            hits,
            place: None,
        })
    }

    /// Loads the programs, attaches none: whether the kernel takes them.
    pub(super) fn check(options: &GateOptions) -> Result<(), GateError> {
        prepare(options, Technique::Spin, 1).map(|_| ())
    }

    /// A number for a gate on `disk`.
    pub(super) fn reserve(&mut self, disk: u32, device: &std::path::Path) -> Result<u32, GateError> {
        let full = |limit, what| GateError::Full {
            device: device.to_owned(),
            limit,
            what,
        };
        if self
            .table
            .get(&disk)
            .is_some_and(|slots| slots.count as usize == SLOTS_PER_DISK)
        {
            return Err(full(SLOTS_PER_DISK, "ranges of its disk"));
        }
        let free = (0..MAX_GATES)
            .find(|gate| !self.used[*gate as usize])
            .ok_or_else(|| full(MAX_GATES as usize, "devices"))?;
        self.used[free as usize] = true;
        Ok(free)
    }

    /// Gives a number back.
    pub(super) fn give_back(&mut self, gate: u32) {
        self.used[gate as usize] = false;
    }

    /// Lets the programs look at `bitmap` for a gate that no disk has yet.
    pub(super) fn set_kept(&mut self, gate: u32, bitmap: &MapData) -> Result<(), GateError> {
        self.kept.set(gate, bitmap, 0).map_err(|e| GateError::Map {
            action: "set the bitmap of",
            gate,
            reason: one_line(&e),
        })
    }

    /// Puts a gate on a disk.
    pub(super) fn insert(&mut self, disk: u32, zone_sectors: u32, slot: Slot) -> Result<(), GateError> {
        let mut slots = self.table.get(&disk).copied().unwrap_or(DiskSlots {
            disk,
            zone_sectors,
            ..DiskSlots::EMPTY
        });
        slots.slots[slots.count as usize] = slot;
        slots.count += 1;
        self.set_disk(disk, slots)
    }

    /// Takes a gate from its disk.
    pub(super) fn remove(&mut self, disk: u32, gate: u32) -> Result<(), GateError> {
        let Some(mut slots) = self.table.get(&disk).copied() else {
            return Ok(());
        };
        let count = slots.count as usize;
        let Some(at) = slots.slots[..count].iter().position(|slot| slot.id == gate) else {
            return Ok(());
        };
        slots.slots.copy_within(at + 1..count, at);
        slots.count -= 1;
        self.set_disk(disk, slots)
    }

    fn set_disk(&mut self, disk: u32, slots: DiskSlots) -> Result<(), GateError> {
        let error = |e: aya::maps::MapError| GateError::Map {
            action: "change the disk of",
            gate: slots.slots[0].id,
            reason: one_line(&e),
        };
        if slots.count == 0 {
            self.disks.remove(&disk).map_err(error)?;
            self.table.remove(&disk);
        } else {
            self.disks.insert(disk, slots, 0).map_err(error)?;
            self.table.insert(disk, slots);
        }
        Ok(())
    }

    /// Writes that found everything kept.
    pub(super) fn passed(&self, gate: u32) -> Result<u64, GateError> {
        let values = self.passed.get(&gate, 0).map_err(|e| GateError::Map {
            action: "read the counters of",
            gate,
            reason: one_line(&e),
        })?;
        Ok(values.iter().sum())
    }
}

/// Map `STATE`.
#[derive(Debug)]
pub(super) struct States(SharedWords);

/// The words of a gate's state, by name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Word {
    Armed = 0,
    Broken = 1,
    Deadline = 2,
    Beat = 3,
    Silence = 4,
}

const _: () = {
    assert!(std::mem::offset_of!(GateState, armed) == 8 * Word::Armed as usize);
    assert!(std::mem::offset_of!(GateState, broken) == 8 * Word::Broken as usize);
    assert!(std::mem::offset_of!(GateState, deadline) == 8 * Word::Deadline as usize);
    assert!(std::mem::offset_of!(GateState, beat) == 8 * Word::Beat as usize);
    assert!(std::mem::offset_of!(GateState, silence) == 8 * Word::Silence as usize);
};

impl States {
    /// A word, shared with the programs.
    pub(super) fn word(&self, gate: u32, word: Word) -> &AtomicU64 {
        &self.0.words()[gate as usize * STATE_WORDS + word as usize]
    }

    /// All words of a gate, one after the other.
    pub(super) fn read(&self, gate: u32) -> GateState {
        let words = &self.0.words()[gate as usize * STATE_WORDS..][..STATE_WORDS];
        let at = |n: usize| words[n].load(Ordering::Acquire);
        let first = std::mem::offset_of!(GateState, hold_buckets) / 8;
        GateState {
            armed: at(0),
            broken: at(1),
            deadline: at(2),
            beat: at(3),
            silence: at(4),
            held: at(5),
            held_nanoseconds: at(6),
            longest: at(7),
            requests: at(8),
            ring_full: at(9),
            bypassed: at(10),
            copies: at(11),
            hold_buckets: std::array::from_fn(|n| at(first + n)),
        }
    }

    /// Clears all words of a gate that is not on a disk.
    pub(super) fn clear(&self, gate: u32) {
        let words = &self.0.words()[gate as usize * STATE_WORDS..][..STATE_WORDS];
        words.iter().for_each(|word| word.store(0, Ordering::Release));
    }
}

fn words_of(map: &Map, words: usize) -> Result<SharedWords, GateError> {
    let Map::Array(data) = map else {
        return Err(GateError::Load("a map is no array".to_owned()));
    };
    SharedWords::map(data.fd().as_fd(), words).map_err(|e| GateError::Load(e.to_string()))
}

/// Places to sleep: one for each copy on each CPU that there may be.
fn places() -> Result<u32, GateError> {
    let cpus = aya::util::nr_cpus().map_err(|(what, error)| GateError::Load(format!("{what}: {error}")))?;
    u32::try_from(cpus * COPIES).map_err(|_| GateError::Load(format!("{cpus} CPUs are too many")))
}

/// Loads maps and programs.
fn prepare(options: &GateOptions, technique: Technique, places: u32) -> Result<Ebpf, GateError> {
    let load = |error: &dyn std::error::Error| GateError::Load(verdict(&one_line(error)));
    let kernel = KernelBtf::read(&options.btf)?;
    let globals = globals(&kernel)?;
    let mut object = Cow::Borrowed(OBJECT);
    if technique == Technique::Park {
        park::put_calls(object.to_mut(), &kernel)?;
    }
    // Parsed once: that takes long.
    let btf = Btf::from_sys_fs().map_err(|e| load(&e))?;
    let mut loader = EbpfLoader::new();
    loader.btf(Some(&btf));
    for (name, value) in &globals {
        loader.override_global(name, value, true);
    }
    loader.map_max_entries("PARKED", places);
    let mut ebpf = loader.load(&object).map_err(|e| load(&e))?;
    for (name, tracepoint) in AUDITORS {
        let program: &mut BtfTracePoint = program(&mut ebpf, name)?;
        program.load(tracepoint, &btf).map_err(|e| load(&e))?;
    }
    for copy in 0..options.copies.clamp(1, COPIES) {
        let program: &mut FEntry = program(&mut ebpf, &technique.program(copy))?;
        program.load(technique.entry(), &btf).map_err(|e| load(&e))?;
    }
    // Types are tens of MiB, and what this process has is locked later on.
    drop(loader);
    drop((kernel, btf));
    mman::give_back();
    Ok(ebpf)
}

/// The frozen globals of the programs.
fn globals(btf: &KernelBtf) -> Result<[(&'static str, u32); 11], GateError> {
    Ok([
        ("BIO_BDEV", btf.member_offset("bio", &["bi_bdev"])?),
        ("BIO_OPF", btf.member_offset("bio", &["bi_opf"])?),
        ("BIO_FLAGS", btf.member_offset("bio", &["bi_flags"])?),
        ("BIO_SECTOR", btf.member_offset("bio", &["bi_iter", "bi_sector"])?),
        ("BIO_SIZE", btf.member_offset("bio", &["bi_iter", "bi_size"])?),
        ("BDEV_DISK", btf.member_offset("block_device", &["bd_disk"])?),
        ("BDEV_DEV", btf.member_offset("block_device", &["bd_dev"])?),
        (
            "BDEV_START",
            btf.member_offset("block_device", &["bd_start_sect"])?,
        ),
        ("DISK_PART0", btf.member_offset("gendisk", &["part0"])?),
        ("TRACE_COMPLETION_BIT", btf.enumerator("BIO_TRACE_COMPLETION")?),
        ("REMAPPED_BIT", btf.enumerator("BIO_REMAPPED")?),
    ])
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, GateError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or_else(|| GateError::Load(format!("the object has no program {name}")))?
        .try_into()
        .map_err(|e: aya::programs::ProgramError| GateError::Load(one_line(&e)))
}
