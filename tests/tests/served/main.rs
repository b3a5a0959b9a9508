//! Served devices, through the daemon: image files and block devices that it serves over NBD, with change maps and
//! snapshots, written to by clients of our own and by other people's. Needs fio, qemu-io, qemu-img,
//! qemu-storage-daemon, nbdcopy and nbdkit.

mod image;
mod load;
mod maps;
mod peers;
mod refused;
mod scene;
mod space;
