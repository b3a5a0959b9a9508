//! Mapped: a volume of LVM with snapshots by the dm filter, whose power is cut.
//!
//! `/dev/vda` has the state of the agent and the difference storage, `/dev/vdb` is a physical volume. The machine's
//! mapping of devices ends with the power: after it the volume is as LVM makes it, has every write that was flushed, and
//! the next agent says of each snapshot that it is lost, and leaves no file of it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use blksnap_agent::sys::AlignedBuffer;
use blksnap_tests::volumes::{Group, lvm, ours, table};
use blksnap_tests::{complain, lab, read_device, run};
use serde_json::{Value, json};

use super::agent::Agent;
use super::blocks::{BLOCK, Numbers};
use super::{Arguments, Before, Found, HOME, destroy, recover, say, text};

const GROUP: &str = "power";
const VOLUME: &str = "/dev/mapper/power-volume";
/// MiB of the volume.
const MIB: u64 = 8;
/// Writes between two flushes.
const FLUSHED: u64 = 8;
/// Snapshots that are held at the same time.
const HELD: usize = 2;

/// One boot.
pub(super) fn work(arguments: &Arguments) -> Result<()> {
    lab::target("snapshot", "dm_snapshot")?;
    let numbers = Numbers {
        seed: arguments.seed,
        blocks: MIB * (1 << 20) / BLOCK,
    };
    let before: Before = match &arguments.before {
        Some(path) => serde_json::from_slice(&fs::read(path)?)?,
        None => Before::default(),
    };
    if arguments.new {
        make()?;
    } else {
        recover("/dev/vda", HOME)?;
        lvm("vgchange", &["-ay", GROUP])?;
    }
    plain().context("as the machine has started")?;
    let last = numbers.check(&read_device(Path::new(VOLUME))?, &before.flushed)?;
    say("started", &json!(last))?;
    let agent = Agent::start(Path::new(HOME))?;
    let found = check(&agent, &before.known)?;
    plain().context("after the agent has started")?;
    say("checked", &json!(found))?;
    if arguments.last {
        drop(agent);
        return run("umount", [HOME]).map(drop);
    }
    let writer = start(numbers, last)?;
    let mut held = Vec::new();
    loop {
        held.push(take(&agent)?);
        if held.len() == HELD {
            say("writing", &Value::Null)?;
        }
        if held.len() > HELD {
            destroy(&agent, &held.remove(0))?;
        }
        std::thread::sleep(Duration::from_millis(300));
        if writer.is_finished() {
            bail!("the writer has failed: {:?}", writer.join());
        }
    }
}

fn make() -> Result<()> {
    run("mkfs.ext4", ["-q", "-F", "/dev/vda"])?;
    fs::create_dir_all(HOME)?;
    run("mount", ["/dev/vda", HOME])?;
    fs::create_dir_all(storage())?;
    let group = Group::new(GROUP, Path::new("/dev/vdb"))?;
    let node = group.thick("volume", MIB)?;
    ensure!(node == Path::new(VOLUME), "{}", node.display());
    // It is there for the boots to come.
    std::mem::forget(group);
    for at in 0..MIB {
        blksnap_tests::volumes::fill(&node, at << 20, 1 << 20, 0)?;
    }
    run("sync", [HOME]).map(drop)
}

fn storage() -> PathBuf {
    Path::new(HOME).join("old")
}

/// Nothing of a snapshot is there, and LVM finds its volume as it made it.
fn plain() -> Result<()> {
    let left = ours()?;
    ensure!(left.is_empty(), "{left:?} are there");
    let table = table(Path::new(VOLUME))?;
    ensure!(table.contains(" linear "), "{table}");
    lvm("vgck", &[GROUP])?;
    let fields = ["--noheadings", "-o", "lv_name,lv_size,lv_attr,segtype", GROUP];
    let shown = lvm("lvs", &fields)?;
    let words: Vec<&str> = shown.split_whitespace().collect();
    ensure!(
        matches!(words.as_slice(), ["volume", "8.00m", attributes, "linear"] if attributes.starts_with("-wi-a")),
        "{shown}"
    );
    Ok(())
}

/// Every snapshot that was told of is lost, and says so; no file of any is left.
fn check(agent: &Agent, known: &[Value]) -> Result<Found> {
    let mut found = Found::default();
    let files = || -> Result<Vec<String>> {
        let entries = fs::read_dir(storage())?;
        Ok(entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with("blksnap-"))
            .collect())
    };
    let list = agent.json(&["snapshot", "list"])?;
    let list = list["snapshots"].as_array().context("a list")?;
    for known in known {
        let id = text(known, "id")?;
        match list.iter().find(|snapshot| snapshot["id"] == id) {
            Some(snapshot) => {
                ensure!(snapshot["state"] == "corrupted", "{snapshot}");
                let reason = text(snapshot, "reason")?;
                // Of one that was being destroyed the journal may be gone already.
                let ending = known["ending"] == true;
                ensure!(ending || reason.contains("started again"), "{snapshot}");
                found.refused += 1;
                found.reasons.insert(reason.to_owned());
            }
            None if known["ending"] == true => found.ended += 1,
            None => bail!("{id} is gone without a word"),
        }
    }
    let left = files()?;
    ensure!(left.is_empty(), "{left:?} are left");
    for snapshot in list {
        let id = text(snapshot, "id")?;
        ensure!(snapshot["state"] == "corrupted", "{snapshot}");
        found.born += u32::from(known.iter().all(|known| known["id"] != id));
        destroy(agent, id)?;
    }
    Ok(found)
}

/// Takes the volume. A flush of a busy host's disk may take longer than the volume may be suspended; then it was not
/// taken, and is tried again.
fn take(agent: &Agent) -> Result<String> {
    const LATE: &str = "went on before all devices were taken";
    const TRIES: usize = 5;
    let storage = storage().display().to_string();
    let words = [
        "snapshot",
        "create",
        VOLUME,
        "--filter=dm",
        "--minimum=16M",
        "--storage",
        &storage,
    ];
    let mut late = 0;
    let taken = loop {
        match agent.json(&words) {
            Err(error) if late + 1 < TRIES && format!("{error:#}").contains(LATE) => {
                late += 1;
                complain(format_args!("{error:#}"));
            }
            done => break done?,
        }
    };
    ensure!(taken["state"] == "taken" && taken["filter"] == "dm", "{taken}");
    let id = text(&taken, "id")?;
    say("known", &json!({"id": id}))?;
    Ok(id.to_owned())
}

/// Sends the writes behind number `last` past the page cache, and tells the host what was flushed.
fn start(numbers: Numbers, last: u64) -> Result<std::thread::JoinHandle<Result<()>>> {
    let volume = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(VOLUME)?;
    let mut buffer = AlignedBuffer::zeroed(usize::try_from(BLOCK)?);
    Ok(std::thread::spawn(move || {
        for number in last + 1.. {
            buffer.as_mut_slice().copy_from_slice(&numbers.data(number));
            let offset = numbers.block(number) * BLOCK;
            volume
                .write_all_at(buffer.as_slice(), offset)
                .with_context(|| format!("write {number}"))?;
            if number % FLUSHED == 0 {
                volume.sync_data().context("flush")?;
                say("flushed", &json!(number))?;
            }
        }
        Ok(())
    }))
}
