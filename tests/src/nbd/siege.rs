//! Siege: a server under attack, and whether others notice.
//!
//! While the attack lasts, a client from before reads at random places and compares every byte. Afterwards, with
//! whatever the attackers still hold open, newcomers of every framing must be served, the process must not have had
//! more memory than its limits explain, and it must end in good order, without a panic.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use rand::Rng as _;

use super::build::Framing;
use super::client::Client;
use super::served::{SIZE, Served};

/// Bytes of requests and answers that the server may hold, for all connections.
const TOTAL: u64 = 64 << 20;

/// What the process may have at most: the limit above, and for the program, its threads and 256 connections.
pub const MOST: u64 = TOTAL + (96 << 20);

/// Attacks a server of its own, started as `program` with `arguments`, and checks that nobody else suffers. What
/// `attack` gives back stays open until the checks are done.
///
/// # Errors
/// The attack says so, or somebody suffers.
pub fn besiege<T>(
    program: &Path,
    arguments: &[&str],
    attack: impl FnOnce(&Served) -> Result<T>,
) -> Result<()> {
    let total = format!("--total-bytes={TOTAL}");
    let own = format!("--connection-bytes={}", 40 << 20);
    let served = Served::start(program, &[&[total.as_str(), &own], arguments].concat())?;
    let witness = served.client(Framing::Structured)?;
    let over = AtomicBool::new(false);
    let held = std::thread::scope(|scope| -> Result<T> {
        let watching = scope.spawn(|| watch(&served, witness, &over));
        let held = attack(&served);
        over.store(true, Ordering::Release);
        let watched = watching
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let held = held?;
        watched.context("the client from before")?;
        Ok(held)
    })?;
    for framing in Framing::ALL {
        let newcomer = || -> Result<()> {
            let mut client = served.client(framing)?;
            read(&served, &mut client)?;
            client.disconnect()
        };
        newcomer().with_context(|| format!("a newcomer ({framing:?})"))?;
    }
    let peak = served.memory_of("VmHWM")?;
    println!("most memory: {} MiB", peak >> 20);
    ensure!(peak <= MOST, "the server had {} MiB", peak >> 20);
    drop(held);
    served.end()
}

/// Reads until the attack is over, and once more.
fn watch(served: &Served, mut client: Client, over: &AtomicBool) -> Result<()> {
    loop {
        let last = over.load(Ordering::Acquire);
        read(served, &mut client)?;
        if last {
            return client.disconnect();
        }
    }
}

/// Reads at a random place and compares.
fn read(served: &Served, client: &mut Client) -> Result<()> {
    let length = rand::rng().random_range(1..100_000);
    let offset = rand::rng().random_range(0..SIZE - length);
    let range = usize::try_from(offset)?..usize::try_from(offset + length)?;
    ensure!(
        client.read(offset, length)? == served.memory()[range],
        "other bytes at {offset}"
    );
    Ok(())
}
