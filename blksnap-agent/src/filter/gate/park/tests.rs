//! Tests of a place with a real parker, on any kernel with FUSE: instead of a program in the kernel, this process reads
//! the parker's memory, with the same faults (`process_vm_readv(2)`).

use std::io::IoSliceMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blksnap_common::gate::{PARKED_WORDS, Request};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::place::{Maps, Place};
use super::{ParkerCommand, parker};
use crate::filter::gate::GateOptions;
use crate::sys::mman::SharedWords;
use crate::sys::sched;

const VARIABLE: &str = "BLKSNAP_TEST_IS_PARKER";
const PLACES: usize = 64;
const PATIENCE: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(600);

/// The body of the process that [`command`] starts; nothing otherwise.
#[test]
fn body_of_the_parker() {
    if std::env::var_os(VARIABLE).is_some() {
        parker::main().unwrap();
    }
}

/// This very program, which runs nothing but the test above.
fn command() -> ParkerCommand {
    let own = std::env::current_exe().unwrap();
    ParkerCommand {
        program: "env".into(),
        arguments: vec![
            format!("{VARIABLE}=1").into(),
            own.into(),
            "--exact".into(),
            "filter::gate::park::tests::body_of_the_parker".into(),
            "--nocapture".into(),
        ],
    }
}

/// Words in a file in place of a map.
fn words(count: usize) -> Arc<SharedWords> {
    let file = tempfile::tempfile().unwrap();
    file.set_len((count * 8) as u64).unwrap();
    Arc::new(SharedWords::map(&file, count).unwrap())
}

fn maps() -> Maps {
    Maps {
        parked: words(PLACES * PARKED_WORDS),
        parker: words(3),
    }
}

/// A place, or `None` where this user may not make one.
fn open(silence: Duration, workers: usize, maps: &Maps) -> Option<Arc<Place>> {
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/fuse").exists() {
        eprintln!("left out: not root, or no FUSE");
        return None;
    }
    let options = GateOptions {
        parker: command(),
        silence,
        threads: workers,
        ..GateOptions::default()
    };
    Some(Place::open(&options, maps.clone()).unwrap())
}

/// What a program does: writes what it needs, and faults.
fn sleep(maps: &Maps, place: usize, request: Request) {
    let at = |n: usize| &maps.parked.words()[place * PARKED_WORDS + n];
    at(0).store(request.first, Ordering::SeqCst);
    at(1).store(request.last, Ordering::SeqCst);
    at(2).store(sched::monotonic(), Ordering::SeqCst);
    at(3).store(request.gate.into(), Ordering::SeqCst);
    let parker = |n: usize| maps.parker.words()[n].load(Ordering::SeqCst);
    let (base, page, pid) = (parker(0), parker(1), parker(2));
    assert!(page > 0, "no place");
    let mut byte = [0];
    let from = RemoteIoVec {
        base: usize::try_from(base + place as u64 * page).unwrap(),
        len: 1,
    };
    let pid = Pid::from_raw(i32::try_from(pid).unwrap());
    let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut byte)], &[from]);
    assert!(read.is_err(), "a page was there");
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn request(first: u64, gate: u32) -> Request {
    Request {
        first,
        last: first + 1,
        gate,
        reserved: 0,
    }
}

#[test]
fn a_sleeper_wakes_when_its_units_are_kept_and_may_sleep_again() {
    let maps = maps();
    let Some(place) = open(LONG, 2, &maps) else { return };
    let kept: Vec<_> = (0..16).map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(sleeper) = place.next() {
                    let at = usize::try_from(sleeper.request.first).unwrap();
                    kept[at].fetch_add(u64::from(sleeper.request.gate), Ordering::SeqCst);
                    place.done(&sleeper);
                }
            });
        }
        let sleepers: Vec<_> = (0..16_usize)
            .map(|number| {
                let (kept, maps) = (&kept, &maps);
                scope.spawn(move || {
                    for round in 1..=20 {
                        sleep(maps, number * 3, request(number as u64, 7));
                        // This call, unlike that of a program, may fault twice.
                        let kept = kept[number].load(Ordering::SeqCst);
                        assert!(kept >= round * 7 && kept % 7 == 0, "{kept} in round {round}");
                    }
                })
            })
            .collect();
        let results: Vec<_> = sleepers
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        // The workers end, whatever was found.
        place.end();
        for result in results {
            result.unwrap();
        }
    });
    assert!(place.is_gone());
}

/// However busy the workers are, who is late or whose gate broke is woken.
#[test]
fn nobody_sleeps_past_the_deadline_or_at_a_broken_gate() {
    let maps = maps();
    let Some(place) = open(LONG, 1, &maps) else { return };
    let awake = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for number in 0..4_usize {
            let (maps, awake) = (&maps, &awake);
            scope.spawn(move || {
                sleep(maps, number, request(0, u32::try_from(number).unwrap()));
                awake.fetch_add(1, Ordering::SeqCst);
            });
        }
        // The only worker takes one, and does not come back.
        let stuck = place.next().unwrap();
        let look = |deadline, broken: Option<u32>| {
            place.look(sched::monotonic(), deadline, |gate| Some(gate) == broken);
        };
        let gate = stuck.request.gate;
        let other = (gate + 1) % 4;
        wait_for("a broken gate", || {
            look(u64::MAX, Some(other));
            awake.load(Ordering::SeqCst) == 1
        });
        wait_for("a broken gate whose worker is stuck", || {
            look(u64::MAX, Some(gate));
            awake.load(Ordering::SeqCst) == 2
        });
        wait_for("a deadline", || {
            look(1, None);
            awake.load(Ordering::SeqCst) == 4
        });
        // It comes back late: nobody waits for its answer.
        place.done(&stuck);
        place.end();
        assert!(place.next().is_none());
    });
}

#[test]
fn a_parker_that_is_killed_is_noticed_and_nobody_sleeps_on() {
    let maps = maps();
    let Some(place) = open(LONG, 1, &maps) else { return };
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| sleep(&maps, 5, request(1, 1)));
        let _stuck = place.next().unwrap();
        place.beat();
        assert!(!place.is_gone());
        let pid = maps.parker.words()[2].load(Ordering::SeqCst);
        nix::sys::signal::kill(
            Pid::from_raw(i32::try_from(pid).unwrap()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        wait_for("the end of the parker", || {
            place.beat();
            place.is_gone()
        });
        sleeper.join().unwrap();
    });
    assert!(place.has_just_gone() && !place.has_just_gone());
    assert_eq!(
        maps.parker.words()[1].load(Ordering::SeqCst),
        0,
        "there is no place now"
    );
}

/// An agent that gives no sign of life: the parker ends all sleeps.
#[test]
fn a_silent_agent_lets_nobody_sleep() {
    let maps = maps();
    let Some(place) = open(Duration::from_secs(1), 1, &maps) else {
        return;
    };
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| sleep(&maps, 0, request(1, 1)));
        let _stuck = place.next().unwrap();
        sleeper.join().unwrap();
        assert!(place.next().is_none(), "the connection is there");
    });
    assert!(place.is_gone());
}
