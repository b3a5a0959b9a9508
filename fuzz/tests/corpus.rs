//! Corpus: every target over the inputs that are kept for it, without the fuzzer.

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

use blksnap_fuzz::{TARGETS, Target};

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus"))
}

/// Names in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("a folder of ours")
                .file_name()
                .into_string()
                .expect("a name in UTF-8")
        })
        .collect();
    names.sort();
    names
}

#[test]
fn every_target_has_inputs_and_every_input_a_target() {
    let mut targets: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    targets.sort_unstable();
    assert_eq!(names(folder()), targets);
    for target in targets {
        assert_ne!(names(&folder().join(target)), [""; 0], "{target}");
    }
}

#[test]
fn every_target_stands_every_input() {
    let fails = |target: &Target, name: &str| {
        let data = fs::read(folder().join(target.name).join(name)).unwrap();
        panic::catch_unwind(AssertUnwindSafe(|| (target.run)(&data))).is_err()
    };
    let failed: Vec<String> = TARGETS
        .iter()
        .flat_map(|target| {
            names(&folder().join(target.name))
                .into_iter()
                .filter(|name| fails(target, name))
                .map(|name| format!("{}/{name}", target.name))
        })
        .collect();
    assert_eq!(failed, [""; 0], "messages above");
}

#[test]
fn every_target_stands_the_inputs_of_all_others() {
    let inputs = TARGETS.iter().flat_map(|target| {
        let folder = folder().join(target.name);
        names(&folder).into_iter().map(move |name| folder.join(name))
    });
    for input in inputs {
        let data = fs::read(&input).unwrap();
        for target in TARGETS {
            (target.run)(&data);
        }
    }
}
