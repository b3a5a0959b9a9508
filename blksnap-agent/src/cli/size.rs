//! Size: bytes as people write and read them. Units are binary: K is 1024.

/// The bytes of `text`, as [`crate::units::parse_bytes`] reads it.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    crate::units::parse_bytes(text)
        .map_err(|_| "give a size in bytes, or with a suffix as in 64K, 1M, 2GiB".to_owned())
}

/// `bytes` with a unit, as `1.5 GiB`; without a fraction where it is exact.
pub(super) fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be rounded to 1024.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let exact = bytes.is_multiple_of(1 << (10 * (unit + 1)));
    let unit = UNITS[unit];
    if exact {
        format!("{value:.0} {unit}")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// A duration of `seconds`, in ms below one second.
pub(super) fn duration(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.1} ms", seconds * 1000.0)
    } else {
        format!("{seconds:.1} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4K", 4096),
            ("64KiB", 65_536),
            ("3M", 3 << 20),
            ("2G", 2 << 30),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for wrong in [
            "",
            "K",
            "-1",
            "1.5M",
            "1X",
            "1 K",
            "99999999999999999999",
            "16777216T",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (65_536, "64 KiB"),
            (1536, "1.5 KiB"),
            (1_048_575, "1.0 MiB"),
            (1 << 40, "1 TiB"),
            (300 << 20, "300 MiB"),
            ((300 << 20) + 512, "300.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
        assert_eq!(duration(0.0123), "12.3 ms");
        assert_eq!(duration(75.0), "75.0 s");
    }
}
