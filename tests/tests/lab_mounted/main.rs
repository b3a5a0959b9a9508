//! Images and served devices as block devices of the kernel: connected by netlink, mounted, checked, with servers that
//! die and devices that are ended under load. Needs a kernel with nbd, ext4, XFS and btrfs, and their tools.

mod connect;
mod dies;
mod images;
mod load;
mod scene;
