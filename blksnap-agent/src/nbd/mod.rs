//! NBD: images for other people's tools.
