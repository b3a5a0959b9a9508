//! blksnap agent: changed-block tracking and point-in-time snapshots of block devices in use, from user space.
//!
//! Lower modules never use higher ones. `units`, `cbt`, `cow` and `nbd::proto` are the *core*: no async runtime, no
//! eBPF loader, no file system or network, no clock, no unsafe; `cargo xtask lint` keeps it so. Unsafe code
//! lives in `sys` only.
//!
//! | module | what it is |
//! |---|---|
//! | [`sync`] | locks and atomics that tests can put into any order |
//! | [`units`] | quantities and identifiers with checked constructors |
//! | [`cbt`] | the change map: numbers, generations, changed extents (core) |
//! | [`cow`] | copy on write: what must be kept before a write, and where an image is (core) |
//! | [`sys`] | system calls and ioctls behind safe functions; the only unsafe |
//! | [`disk`] | block devices: identity, geometry, direct reads, mounts, freeze |
//! | [`engine`] | moves bytes from a device to a sink |
//! | [`tracker`] | the eBPF programs and what they record |
//! | [`filter`] | how old data survives; `converge` needs to hold no write |
//! | [`statefile`] | small documents that survive a crash |
//! | [`seal`] | change maps that go on after a reboot |
//! | [`storage`] | difference storage |
//! | [`own`] | files on a served device as difference storage of its snapshots |
//! | [`snapshot`] | snapshots over several devices, one instant |
//! | [`backup`] | raw image files, full and incremental |
//! | [`nbd`] | NBD: protocol core and server |
//! | [`ublk`] | served devices as block devices of this machine (feature `ublk`) |
//! | [`control`] | HTTP/JSON interface on a unix socket, server and client |
//! | [`telemetry`] | logging and metrics |
//! | [`daemon`] | the long-running process |
//! | [`cli`] | the commands |

pub mod backup;
pub mod cbt;
#[cfg(any(test, feature = "testing"))]
pub mod choices;
pub mod cli;
pub mod control;
pub mod cow;
pub mod daemon;
pub mod disk;
pub mod engine;
pub mod filter;
pub mod nbd;
pub mod own;
pub mod seal;
pub mod snapshot;
pub mod statefile;
pub mod storage;
pub mod sync;
pub mod sys;
pub mod telemetry;
pub mod tracker;
pub mod ublk;
pub mod units;
