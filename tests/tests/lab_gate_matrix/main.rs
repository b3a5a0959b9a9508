//! The gate under every kind of load, on every kind of device: a table of cases, one test each. Every byte of an image
//! is compared with the instant, and the kernel's log is read. `BLKSNAP_GATE_SECONDS` says how long each load lasts.
//!
//! Numbers of processors and memory are those of the guest: `cargo xtask test --vm 7.2+4cpus,7.2+1cpu+512m --
//! lab_gate_matrix`.

mod load;
mod origin;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, ensure};
use blksnap_agent::engine::cow::Image;
use blksnap_agent::filter::gate::park::{self, ParkerCommand};
use blksnap_agent::filter::gate::{Gate, GateOptions, Wish};
use blksnap_tests::lab::{self, KernelLog};
use blksnap_tests::{agent_binary, seed};
use clap::ValueEnum as _;

use load::{Fio, Load};
use origin::{Held, Kind, Origin};

const MIB: u64 = 1 << 20;

/// Bound against hanging for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device, and who writes to it.
struct Case {
    kind: Kind,
    /// Bytes of the device.
    size: u64,
    load: Load,
    /// More writers wait at once than there are copies of the program: the gate may break, and then it must say so.
    beyond: bool,
}

const fn raw(load: Fio) -> Case {
    Case {
        kind: Kind::Partition,
        size: 64 * MIB,
        load: Load::Fio(load),
        beyond: false,
    }
}

const fn files(kind: &'static str, size: u64, load: Load) -> Case {
    Case {
        kind: Kind::FileSystem(kind),
        size,
        load,
        beyond: false,
    }
}

macro_rules! cases {
    ($($name:ident: $case:expr;)*) => {$(
        #[test]
        #[ignore = "needs fentry and preemption: cargo xtask test --vm 7.2"]
        fn $name() -> Result<()> {
            holds(stringify!($name), &$case)
        }
    )*};
}

cases! {
    psync_1_writer: raw(Fio::new("psync", 1, 1));
    psync_30_writers: raw(Fio::new("psync", 1, 30));
    psync_128_writers: Case { beyond: true, ..raw(Fio::new("psync", 1, 128)) };
    psync_512_writers: Case { beyond: true, ..raw(Fio::new("psync", 1, 512)) };
    libaio_depth_1: raw(Fio::new("libaio", 1, 1));
    libaio_depth_32_by_4: raw(Fio::new("libaio", 32, 4));
    libaio_depth_256: raw(Fio::new("libaio", 256, 1));
    io_uring_depth_1: raw(Fio::new("io_uring", 1, 1));
    io_uring_depth_64_by_2: raw(Fio::new("io_uring", 64, 2));
    io_uring_depth_256: raw(Fio::new("io_uring", 256, 1));
    large_writes: raw(Fio { more: &["--bsrange=512k-4m"], ..Fio::new("psync", 1, 4) });
    sectors: raw(Fio { more: &["--bs=512"], ..Fio::new("psync", 1, 4) });
    discards: raw(Fio { more: &["--rw=randtrim", "--bsrange=4k-4m"], ..Fio::new("psync", 1, 4) });
    discards_and_writes: raw(Fio { more: &["--rw=trimwrite", "--bsrange=4k-256k"], ..Fio::new("psync", 1, 4) });
    a_whole_disk: Case { kind: Kind::Disk, ..raw(Fio::new("libaio", 16, 4)) };
    page_cache_and_fsync: raw(Fio { more: &["--direct=0", "--fsync=1"], ..Fio::new("psync", 1, 8) });
    ext4: files("ext4", 64 * MIB, Load::Files(4));
    xfs: files("xfs", 304 * MIB, Load::Files(4));
    btrfs: files("btrfs", 128 * MIB, Load::Files(4));
    ext4_fsyncs: files("ext4", 64 * MIB, Load::Fsyncs(16));
    xfs_fsyncs: files("xfs", 304 * MIB, Load::Fsyncs(16));
    btrfs_fsyncs: files("btrfs", 128 * MIB, Load::Fsyncs(16));
    swap_on_the_same_disk: files("ext4", 64 * MIB, Load::Swap);
    swap_in_a_file_of_it: files("ext4", 96 * MIB, Load::SwapFile);
    dirty_pages_of_more_than_the_memory: files("ext4", 256 * MIB, Load::Dirty);
}

/// How long a load lasts.
fn time() -> Duration {
    let given = std::env::var("BLKSNAP_GATE_SECONDS").ok();
    Duration::from_secs(given.and_then(|text| text.parse().ok()).unwrap_or(8))
}

/// In an emulated guest time runs in jerks: bounds that only a real machine keeps are wide here.
fn options() -> Result<GateOptions> {
    Ok(GateOptions {
        deadline: Duration::from_secs(10),
        silence: Duration::from_secs(8),
        technique: Wish::from_str(&lab::gate_technique(), false).map_err(Error::msg)?,
        // This program is not the agent.
        parker: ParkerCommand {
            program: agent_binary()?,
            arguments: vec![park::SUBCOMMAND.into()],
        },
        ..GateOptions::default()
    })
}

/// Cases share the guest's disks.
static ONE: Mutex<()> = Mutex::new(());

fn holds(name: &str, case: &Case) -> Result<()> {
    lab::inside()?;
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    case.load.needs()?;
    let seed = seed(name);
    let mut log = KernelLog::follow()?;
    let held = Held::new(options()?)?;
    let mut origin = Origin::new(case.kind, case.size, seed)?;
    // A file system is busy when it is taken; on a raw device writing begins after the instant, which is known then.
    let began = Instant::now();
    let (image, mut running) = if origin.is_file_system() {
        let running = case.load.start(&origin, seed, time())?;
        std::thread::sleep(Duration::from_secs(1));
        (origin.take(&held, case.load.storage()?)?, running)
    } else {
        let image = origin.take(&held, case.load.storage()?)?;
        (image, case.load.start(&origin, seed, time())?)
    };
    running.taken()?;
    let written = running.finish().context("the origin suffered")?;
    let gate = origin.gate()?;
    let state = gate.state();
    println!(
        "{name}: {written} writes in {:?}: {} held, mean {} us, longest {} us, {} copies, {} passed, broken {:#x}",
        began.elapsed(),
        state.held,
        state.held_nanoseconds / state.held.max(1) / 1000,
        state.longest / 1000,
        state.copies,
        gate.passed()?,
        state.broken,
    );
    ensure!(state.held > 0, "no write waited: {state:?}");
    let broken = judge(case, &gate, &held, &origin, &image)?;
    gate.release(image.key());
    drop((image, gate));
    origin.check()?;
    log.is_quiet()?;
    if broken {
        println!("{name}: broken, and said so");
    }
    Ok(())
}

/// The image is exact, or it says that it is not. Gives whether it was broken.
fn judge(case: &Case, gate: &Gate, held: &Held, origin: &Origin, image: &Image) -> Result<bool> {
    let compared = origin.compare(image);
    let state = gate.state();
    if state.broken == 0 {
        compared?;
        ensure!(held.told() == 0, "a snapshot is lost, and its gate is whole");
        return Ok(false);
    }
    ensure!(case.beyond, "the gate broke: {state:?}");
    let started = Instant::now();
    while held.told() == 0 {
        ensure!(started.elapsed() < PATIENCE, "nobody was told: {state:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut bytes = [0; 4096];
    for offset in [0, image.size() / 2, image.size() - 4096] {
        ensure!(
            image.read_at(&mut bytes, offset).is_err(),
            "a lost image was read at {offset}"
        );
    }
    Ok(true)
}
