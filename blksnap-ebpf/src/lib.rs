//! Empty library target: the agent's build script depends on this package through it, so that cargo rebuilds
//! the programs when they change. The programs are in `main.rs`, their arithmetic in `blksnap-common`.
#![no_std]
