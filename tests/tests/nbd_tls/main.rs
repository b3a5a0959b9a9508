//! TLS: other people's clients with TLS against our server, and those who must be kept out.
//!
//! Needs nbdinfo, nbdcopy, nbdsh, nbdkit, qemu-img, qemu-nbd and setpriv. Certificates are made by each test.

mod authority;
mod daemon;
mod peers;
mod refused;
mod scene;
