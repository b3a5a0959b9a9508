//! Fuzzer: libFuzzer around the target that the environment names.

#![no_main]

use std::env;
use std::sync::LazyLock;

use blksnap_fuzz::{TARGETS, Target};

/// Names the target: the command line is libFuzzer's.
const VARIABLE: &str = "BLKSNAP_FUZZ_TARGET";

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = env::var(VARIABLE).unwrap_or_default();
    TARGETS
        .iter()
        .find(|target| target.name == name)
        .unwrap_or_else(|| panic!("{VARIABLE} is {name:?}, which names no target: use `cargo xtask fuzz`"))
});

libfuzzer_sys::fuzz_target!(init: LazyLock::force(&TARGET), |data| (TARGET.run)(data));
