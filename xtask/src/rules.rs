//! Rules: what neither the compiler nor clippy checks.
//!
//! - The core modules decide and nothing else: no runtime, kernel interface, file, socket, clock or `unsafe`.
//! - `unsafe` is in `blksnap-agent/src/sys`, in the eBPF crate, and in the ABI crate's plain-data impls only.
//! - No test is switched off, except the lab's, which guests run; nothing is marked as unfinished, and no host name of a registry or mirror is written
//!   down: the machine's own configuration has them.
//!
//! Rust files are read as tokens, so that comments and strings do not count as code.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use crate::process;

/// The modules of the core, relative to the workspace.
const CORE: [&str; 4] = [
    "blksnap-agent/src/units.rs",
    "blksnap-agent/src/cbt/",
    "blksnap-agent/src/cow/",
    "blksnap-agent/src/nbd/proto/",
];

/// Crates and types that the core may not name.
const CORE_NAMES: [&str; 8] = [
    "tokio",
    "aya",
    "nix",
    "libc",
    "io_uring",
    "Instant",
    "SystemTime",
    "unsafe",
];

/// Modules of std that the core may not name.
const CORE_STD: [&str; 6] = ["fs", "net", "os", "process", "thread", "env"];

/// Where `unsafe` may be.
const UNSAFE: [&str; 3] = [
    "blksnap-agent/src/sys/",
    "blksnap-ebpf/src/",
    "blksnap-common/src/",
];

/// Words that mark something as unfinished, in two halves so that this file does not have them.
const MARKERS: [[&str; 2]; 4] = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["HA", "CK"]];

/// Hosts that a file may name: the licence's own, the name of a format, and names that belong to nobody.
const HOSTS: [&str; 5] = [
    "www.apache.org",
    "www.w3.org",
    "localhost",
    "127.0.0.1",
    "example.org",
];

/// Checks every file that git knows, or would add.
pub(crate) fn check(root: &Path) -> Result<()> {
    let listed = process::output(process::command("git").current_dir(root).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    let mut broken = 0_usize;
    for name in listed.lines() {
        let path = root.join(name);
        // A file that is deleted but not yet committed is listed too; a picture is no text.
        let Ok(bytes) = fs::read(&path) else { continue };
        let Ok(text) = String::from_utf8(bytes) else {
            continue;
        };
        for complaint in complaints(name, &text).with_context(|| format!("reading {name} failed"))? {
            eprintln!("{complaint}");
            broken += 1;
        }
    }
    if broken > 0 {
        bail!("{broken} places break the rules");
    }
    Ok(())
}

/// What is wrong in one file.
fn complaints(name: &str, text: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    if name != "Cargo.lock" {
        check_text(name, text, &mut found);
    }
    if name.ends_with(".rs") {
        let tokens: TokenStream = text
            .parse()
            .map_err(|error| anyhow::anyhow!("it is no Rust source: {error}"))?;
        let words = flatten(tokens);
        check_rust(name, &words, &mut found);
    }
    Ok(found)
}

fn check_text(name: &str, text: &str, found: &mut Vec<String>) {
    for (index, line) in text.lines().enumerate() {
        let place = format!("{name}:{}", index + 1);
        for marker in MARKERS.map(|halves| halves.concat()) {
            if line
                .split(|c: char| !c.is_alphanumeric())
                .any(|word| word == marker)
            {
                found.push(format!("{place}: {marker}: finish it, or write an issue"));
            }
        }
        for (_, rest) in line
            .match_indices("://")
            .map(|(at, mark)| (at, &line[at + mark.len()..]))
        {
            let host = rest
                .split(|c: char| !c.is_alphanumeric() && c != '.' && c != '-')
                .next()
                .unwrap_or_default();
            if host.contains('.') && !HOSTS.contains(&host) && !host.ends_with(".example") {
                found.push(format!("{place}: {host}: no host is named here"));
            }
        }
    }
}

/// A name in the code, with its line; `path` tells that `::` follows.
#[derive(Debug)]
struct Word {
    name: String,
    line: usize,
    path: bool,
    /// The first names of a group `{a, b::c}` that follows `::`, such as in `use std::{fs, io}`.
    group: Vec<String>,
    /// Whether `::` goes before it.
    member: bool,
}

/// All names of a file in order, groups opened.
fn flatten(tokens: TokenStream) -> Vec<Word> {
    let mut words = Vec::new();
    collect(tokens, &mut words);
    words
}

fn collect(tokens: TokenStream, words: &mut Vec<Word>) {
    let mut colons = 0;
    let mut iterator = tokens.into_iter().peekable();
    while let Some(token) = iterator.next() {
        match token {
            TokenTree::Ident(ident) => {
                let line = ident.span().start().line;
                let member = colons == 2;
                words.push(Word {
                    name: ident.to_string(),
                    line,
                    path: false,
                    group: Vec::new(),
                    member,
                });
                colons = 0;
            }
            TokenTree::Punct(punct) if punct.as_char() == ':' => {
                colons += 1;
                if colons == 2
                    && let Some(last) = words.last_mut()
                {
                    last.path = true;
                    if let Some(TokenTree::Group(group)) = iterator.peek()
                        && group.delimiter() == Delimiter::Brace
                    {
                        last.group = first_names(group.stream());
                    }
                }
            }
            TokenTree::Group(group) => {
                colons = 0;
                collect(group.stream(), words);
            }
            TokenTree::Punct(_) | TokenTree::Literal(_) => colons = 0,
        }
    }
}

/// The names at the start of each part of a group.
fn first_names(group: TokenStream) -> Vec<String> {
    let mut names = Vec::new();
    let mut at_start = true;
    for token in group {
        match token {
            TokenTree::Ident(ident) if at_start => {
                names.push(ident.to_string());
                at_start = false;
            }
            TokenTree::Punct(punct) if punct.as_char() == ',' => at_start = true,
            _ => at_start = false,
        }
    }
    names
}

fn check_rust(name: &str, words: &[Word], found: &mut Vec<String>) {
    let core = CORE.iter().any(|place| name.starts_with(place));
    let unsafe_allowed = UNSAFE.iter().any(|place| name.starts_with(place));
    for (index, word) in words.iter().enumerate() {
        let place = format!("{name}:{}", word.line);
        let next = words.get(index + 1);
        if word.name == "unsafe" && !unsafe_allowed && !core {
            found.push(format!(
                "{place}: unsafe: only blksnap-agent/src/sys and the eBPF crate may have it"
            ));
        }
        if word.name == "unsafe"
            && name.starts_with("blksnap-common/")
            && next.is_none_or(|next| next.name != "impl")
        {
            found.push(format!(
                "{place}: unsafe: the ABI crate may have `unsafe impl` of plain data only"
            ));
        }
        // The lab's tests need another kernel; a guest runs them all.
        let lab = name.starts_with("tests/tests/lab_");
        if word.name == "ignore" && word.line > 0 && !lab && is_ignored_test(words, index) {
            found.push(format!("{place}: ignored test: a test runs or is removed"));
        }
        if !core {
            continue;
        }
        let forbidden = CORE_NAMES.contains(&word.name.as_str()) && !(is_crate(&word.name) && word.member);
        if forbidden && (word.path || !is_crate(&word.name) || previous_is_use(words, index)) {
            found.push(format!("{place}: {}: the core may not use it", word.name));
        }
        if word.name == "std" && word.path {
            let mut named = word.group.clone();
            named.extend(next.filter(|next| next.member).map(|next| next.name.clone()));
            for module in named.iter().filter(|module| CORE_STD.contains(&module.as_str())) {
                found.push(format!("{place}: std::{module}: the core may not use it"));
            }
        }
    }
}

/// Whether a forbidden name is a crate (a lower-case name that is no keyword), which counts only at the start of
/// a path.
fn is_crate(name: &str) -> bool {
    name != "unsafe" && name.starts_with(|c: char| c.is_lowercase())
}

fn previous_is_use(words: &[Word], index: usize) -> bool {
    index
        .checked_sub(1)
        .and_then(|before| words.get(before))
        .is_some_and(|word| word.name == "use")
}

/// `#[test] #[ignore]` in any order: the neighbour is the other attribute or the function itself.
fn is_ignored_test(words: &[Word], index: usize) -> bool {
    let neighbours = [index.checked_sub(1), Some(index + 1)];
    let named = |name: &str| {
        neighbours
            .iter()
            .flatten()
            .filter_map(|at| words.get(*at))
            .any(|word| word.name == name)
    };
    named("test") && (named("fn") || named("ignore") || named("test"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CBT: &str = "blksnap-agent/src/cbt/map.rs";

    fn count(name: &str, text: &str) -> usize {
        complaints(name, text).unwrap().len()
    }

    #[test]
    fn the_core_names_no_runtime_file_socket_or_clock() {
        for text in [
            "use tokio::sync::Mutex;",
            "use std::fs;",
            "use std::{io, fs::File};",
            "fn f() { std::net::TcpStream::connect(1); }",
            "use std::time::{Duration, Instant};",
            "fn f(a: SystemTime) {}",
            "fn f() { unsafe { g() } }",
            "fn f() { macro_call!(std::thread::spawn(x)); }",
            "use aya;",
        ] {
            assert_eq!(count(CBT, text), 1, "{text}");
        }
    }

    #[test]
    fn other_words_strings_and_comments_are_no_matter() {
        let text = "//! tokio::x, unsafe, std::fs\nuse std::{fmt, io};\nuse std::time::Duration;\n\
                    fn aya(a: &str) -> bool { a == \"std::fs unsafe\" && crate::aya::x }";
        assert_eq!(count(CBT, text), 0, "{:?}", complaints(CBT, text));
        assert_eq!(
            count(
                "blksnap-agent/src/disk/mod.rs",
                "use std::fs; use tokio::fs as other;"
            ),
            0
        );
    }

    #[test]
    fn unsafe_has_its_places() {
        let code = "fn f() { unsafe { g() } }";
        assert_eq!(count("blksnap-agent/src/sys/ioctl.rs", code), 0);
        assert_eq!(count("blksnap-ebpf/src/main.rs", code), 0);
        assert_eq!(count("blksnap-agent/src/tracker/mod.rs", code), 1);
        assert_eq!(count("tests/tests/oracle.rs", code), 1);
        assert_eq!(count("blksnap-common/src/track.rs", code), 1);
        assert_eq!(
            count("blksnap-common/src/track.rs", "unsafe impl aya::Pod for Slot {}"),
            0
        );
    }

    #[test]
    fn marks_of_unfinished_work_are_found_as_whole_words() {
        let marker = MARKERS.first().unwrap().concat();
        assert_eq!(count("docs/a.md", &format!("first\n{marker}: second")), 1);
        assert_eq!(
            count("docs/a.md", &format!("{marker}ED {}", marker.to_lowercase())),
            0
        );
    }

    #[test]
    fn hosts_are_not_written_down() {
        let text = ["see https:/", "/mirror.invalid/debian"].concat();
        assert_eq!(count("docs/a.md", &text), 1);
        assert_eq!(
            count(
                "docs/a.md",
                "nbd+unix:///image?socket=/run/x.sock http://localhost/ https://a.example/"
            ),
            0
        );
    }

    #[test]
    fn ignored_tests_are_found() {
        assert_eq!(count("tests/tests/a.rs", "#[test]\n#[ignore]\nfn a() {}"), 1);
        assert_eq!(count("tests/tests/a.rs", "#[ignore]\n#[test]\nfn a() {}"), 1);
        assert_eq!(count("tests/tests/a.rs", "fn ignore() {}"), 0);
        assert_eq!(
            count(
                "tests/tests/lab_a/main.rs",
                "#[test]\n#[ignore = \"why\"]\nfn a() {}"
            ),
            0
        );
    }
}
