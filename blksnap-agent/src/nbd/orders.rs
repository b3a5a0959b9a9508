//! Orders of steps in what connections share: the exports, the memory and the wake-ups, in orders that shuttle draws.

use std::sync::Arc;

use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;

use super::export::Export;
use super::limits::{Budget, FLOOR};
use super::registry::Exports;
use super::testing::Ones;
use super::wake::Waker;

/// How many orders are drawn.
const ORDERS: usize = 3000;

#[test]
fn an_export_that_was_removed_serves_nobody() {
    shuttle::check_random(
        || {
            let exports = Arc::new(Exports::new());
            let export: Arc<dyn Export> = Arc::new(Ones::new("a"));
            let alive = Arc::downgrade(&export);
            exports.add(export).unwrap();
            let removed = Arc::new(AtomicBool::new(false));
            let clients: Vec<_> = (0..2)
                .map(|_| {
                    let (exports, removed) = (Arc::clone(&exports), Arc::clone(&removed));
                    thread::spawn(move || {
                        let Some(entry) = exports.open("a") else { return };
                        let _client = entry.client();
                        let was_removed = removed.load(Ordering::SeqCst);
                        let request = entry.export();
                        assert!(request.is_none() || !was_removed);
                    })
                })
                .collect();
            assert!(exports.remove("a"));
            removed.store(true, Ordering::SeqCst);
            for client in clients {
                client.join().unwrap();
            }
            assert!(alive.upgrade().is_none(), "the export is still held");
            exports.add(Arc::new(Ones::new("a"))).unwrap();
            assert_eq!(exports.clients("a"), 0);
        },
        ORDERS,
    );
}

#[test]
fn memory_is_neither_lost_nor_given_twice() {
    shuttle::check_random(
        || {
            let budget = Arc::new(Budget::new(8 * FLOOR));
            let connections: Vec<_> = (0..3)
                .map(|_| {
                    let budget = Arc::clone(&budget);
                    thread::spawn(move || {
                        let mut held = Vec::new();
                        let mut own = 0;
                        for _ in 0..3 {
                            if let Some(more) = budget.try_take(FLOOR, own) {
                                own += more.bytes();
                                held.push(more);
                            }
                            // What is over the whole is the floor of connections that had nothing.
                            assert!(budget.used() <= 8 * FLOOR + 2 * FLOOR);
                        }
                        assert!(own >= FLOOR, "a connection got nothing");
                    })
                })
                .collect();
            for connection in connections {
                connection.join().unwrap();
            }
            assert_eq!(budget.used(), 0);
        },
        ORDERS,
    );
}

#[test]
fn who_waits_for_memory_is_woken() {
    shuttle::check_random(
        || {
            let budget = Arc::new(Budget::new(2 * FLOOR));
            let first = budget.try_take(FLOOR, 0).expect("all is free");
            let waiter = {
                let budget = Arc::clone(&budget);
                thread::spawn(move || {
                    let waker = Arc::new(Waker::new().expect("a descriptor is left"));
                    // As a connection that has something already: it may have to wait.
                    if budget.try_take(FLOOR / 2, FLOOR / 2).is_some() {
                        return;
                    }
                    budget.wake_later(&waker);
                    waker.prepare();
                    if budget.try_take(FLOOR / 2, FLOOR / 2).is_some() {
                        return;
                    }
                    // It would wait now: for as long as nobody wakes it.
                    while !waker.take(false) {
                        waker.prepare();
                        if budget.used() == 0 {
                            // Given back after the last look: the wake-up is on its way, or was this one.
                            return;
                        }
                        thread::yield_now();
                    }
                })
            };
            drop(first);
            waiter.join().unwrap();
        },
        ORDERS,
    );
}

#[test]
fn a_wake_up_is_never_missed() {
    shuttle::check_random(
        || {
            let waker = Arc::new(Waker::new().expect("a descriptor is left"));
            let work = Arc::new(AtomicBool::new(false));
            let giver = {
                let (waker, work) = (Arc::clone(&waker), Arc::clone(&work));
                thread::spawn(move || {
                    work.store(true, Ordering::SeqCst);
                    waker.wake();
                })
            };
            waker.prepare();
            let seen = work.load(Ordering::SeqCst);
            giver.join().unwrap();
            // Either the work was seen, or the wait ends.
            assert!(seen | waker.take(false), "it would sleep for ever");
        },
        ORDERS,
    );
}
