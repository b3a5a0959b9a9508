//! Checksum of the oracles: CRC-32C as the remainder of a division of polynomials.

/// CRC-32C (Castagnoli) of `bytes`, bit by bit from the front, with the polynomial as it is written down.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    let remainder = bytes.iter().fold(u32::MAX, |remainder, byte| {
        (0..8).fold(
            remainder ^ u32::from(byte.reverse_bits()) << 24,
            |remainder, _| (remainder << 1) ^ (0x1edc_6f41 * (remainder >> 31)),
        )
    });
    !remainder.reverse_bits()
}
