//! NBD: our server beside qemu-nbd and nbdkit, on the same file in memory, with the same client.
//!
//! Each round measures the three servers one after the other, so that a drift of the machine's speed meets all; a
//! ratio is that of one round, to the better one of the other two.

pub(crate) mod load;
pub(crate) mod servers;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use self::load::{Kind, Load};
use self::servers::Peer;
pub(crate) use self::servers::{SERVE, serve};
use crate::{Bench, REPEATS};

/// Size of the file.
const SIZE: u64 = 512 << 20;
/// Where a file is in memory.
const MEMORY: &str = "/dev/shm";
/// How long each server is measured in a round.
const TIME: Duration = Duration::from_millis(1000);

const GIB: f64 = (1_u64 << 30) as f64;

/// A figure: what is done, and the names of its results.
struct Figure {
    load: Load,
    ratio: &'static str,
    /// Ours: MiB a second, or requests a second.
    rate: &'static str,
    /// Seconds of processor time for a GiB: ours, the better one's.
    cpu: [&'static str; 2],
}

const fn load(kind: Kind, connections: usize) -> Load {
    let (block, depth) = match kind {
        Kind::RandomRead => (4 << 10, 32),
        Kind::SequentialRead | Kind::SequentialWrite => (1 << 20, 4),
    };
    Load {
        kind,
        block,
        depth,
        connections,
        time: TIME,
    }
}

const FIGURES: [Figure; 6] = [
    Figure {
        load: load(Kind::RandomRead, 1),
        ratio: "nbd_randread_ratio",
        rate: "nbd_randread_iops",
        cpu: ["nbd_randread_cpu", "nbd_randread_peer_cpu"],
    },
    Figure {
        load: load(Kind::SequentialRead, 1),
        ratio: "nbd_seqread_ratio",
        rate: "nbd_seqread_mib",
        cpu: ["nbd_seqread_cpu", "nbd_seqread_peer_cpu"],
    },
    Figure {
        load: load(Kind::SequentialWrite, 1),
        ratio: "nbd_seqwrite_ratio",
        rate: "nbd_seqwrite_mib",
        cpu: ["nbd_seqwrite_cpu", "nbd_seqwrite_peer_cpu"],
    },
    Figure {
        load: load(Kind::RandomRead, 4),
        ratio: "nbd_randread_4_ratio",
        rate: "nbd_randread_4_iops",
        cpu: ["nbd_randread_4_cpu", "nbd_randread_4_peer_cpu"],
    },
    Figure {
        load: load(Kind::SequentialRead, 4),
        ratio: "nbd_seqread_4_ratio",
        rate: "nbd_seqread_4_mib",
        cpu: ["nbd_seqread_4_cpu", "nbd_seqread_4_peer_cpu"],
    },
    Figure {
        load: load(Kind::SequentialWrite, 4),
        ratio: "nbd_seqwrite_4_ratio",
        rate: "nbd_seqwrite_4_mib",
        cpu: ["nbd_seqwrite_4_cpu", "nbd_seqwrite_4_peer_cpu"],
    },
];

/// What a server came to in one round.
struct Measured {
    /// MiB or requests a second.
    rate: f64,
    /// Seconds of processor time for a GiB.
    cpu: f64,
}

/// Measures all figures, or the one with this name.
pub(crate) fn measure(bench: &mut Bench, only: Option<&str>) -> Result<()> {
    let wanted = |figure: &&Figure| only.is_none_or(|name| figure.ratio == name);
    ensure!(
        FIGURES.iter().any(|figure| wanted(&figure)),
        "no figure of this name: see `nbd_..._ratio`"
    );
    let directory = tempfile::tempdir()?;
    let file = tempfile::Builder::new()
        .prefix("blksnap-bench-")
        .tempfile_in(Path::new(MEMORY))
        .with_context(|| format!("make a file in {MEMORY}"))?;
    bench.step("nbd: filling the file")?;
    fill(file.as_file())?;
    let peers = servers::start_all(directory.path(), file.path())?;
    for figure in FIGURES.iter().filter(wanted) {
        measure_figure(bench, figure, &peers)?;
    }
    Ok(())
}

fn fill(file: &std::fs::File) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    let data: Vec<u8> = (0..1_u32 << 18)
        .flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect();
    for offset in (0..SIZE).step_by(data.len()) {
        file.write_all_at(&data, offset)?;
    }
    Ok(())
}

fn measure_figure(bench: &mut Bench, figure: &Figure, peers: &[Peer; 3]) -> Result<()> {
    let mut ratios = Vec::new();
    let mut rates = Vec::new();
    let mut cpu = [Vec::new(), Vec::new()];
    let mut others = Vec::new();
    for round in 1..=REPEATS {
        bench.step(&format!("nbd: {}, {round} of {REPEATS}", figure.ratio))?;
        // Whoever is first finds the processor cooler: the order goes round.
        let mut found: [Option<Measured>; 3] = [None, None, None];
        for place in 0..peers.len() {
            let index = (place + round) % peers.len();
            found[index] = Some(once(&figure.load, &peers[index])?);
        }
        let [Some(ours), Some(nbdkit), Some(qemu)] = found else {
            anyhow::bail!("a server was not measured");
        };
        let best = if nbdkit.rate > qemu.rate {
            (peers[1].name, nbdkit)
        } else {
            (peers[2].name, qemu)
        };
        ratios.push(ours.rate / best.1.rate);
        rates.push(ours.rate);
        cpu[0].push(ours.cpu);
        cpu[1].push(best.1.cpu);
        others.push(best.0);
    }
    others.sort_unstable();
    others.dedup();
    let command = format!(
        "{:?}, {} KiB, depth {}, connections {}; better peer {}",
        figure.load.kind,
        figure.load.block >> 10,
        figure.load.depth,
        figure.load.connections,
        others.join(" or ")
    );
    let report = &mut bench.report;
    let [own, peer] = cpu;
    report.add(figure.ratio, ">= 1.2", command.clone(), ratios);
    report.add(figure.rate, "", command.clone(), rates);
    report.add(figure.cpu[0], "", format!("s/GiB; {command}"), own);
    report.add(figure.cpu[1], "", format!("s/GiB; {command}"), peer);
    Ok(())
}

fn once(load: &Load, peer: &Peer) -> Result<Measured> {
    let before = peer.cpu()?;
    let rate =
        load::run(load, &peer.socket, peer.export).with_context(|| format!("measure {}", peer.name))?;
    let cpu = peer.cpu()? - before;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let bytes = rate.requests * load.block as f64;
    Ok(Measured {
        rate: match load.kind {
            Kind::RandomRead => rate.requests / rate.seconds,
            Kind::SequentialRead | Kind::SequentialWrite => bytes / f64::from(1_u32 << 20) / rate.seconds,
        },
        cpu: cpu / (bytes / GIB),
    })
}
