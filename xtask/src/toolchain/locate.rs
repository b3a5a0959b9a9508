//! Locate: which compiler builds the eBPF object, and where its library sources and linker are.
//!
//! `blksnap-agent/build.rs` includes this file too, so that what the set-up leaves behind is found by a plain
//! `cargo build`. Nothing here changes the machine. std only.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version of bpf-linker that loads the LLVM of rustc itself. Later ones bring another LLVM.
pub(crate) const BPF_LINKER_VERSION: &str = "0.10.4";

/// Names the toolchain that builds the eBPF object, when it shall not be the one cargo runs with.
pub(crate) const TOOLCHAIN_VARIABLE: &str = "BLKSNAP_EBPF_TOOLCHAIN";

/// A toolchain by its rustup name; without rustup on the machine, whatever is on PATH.
pub(crate) struct Toolchain {
    name: String,
    rustup: bool,
}

impl Toolchain {
    /// The one asked for by [`TOOLCHAIN_VARIABLE`], else the one this cargo runs with, else `stable`.
    pub(crate) fn from_environment() -> Self {
        let name = [TOOLCHAIN_VARIABLE, "RUSTUP_TOOLCHAIN"]
            .into_iter()
            .find_map(|variable| env::var(variable).ok().filter(|name| !name.is_empty()))
            .unwrap_or_else(|| "stable".to_owned());
        Self {
            name,
            rustup: on_path("rustup").is_some(),
        }
    }

    /// The name as rustup knows it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `program` (rustc, cargo) of this toolchain.
    pub(crate) fn command(&self, program: &str) -> Command {
        if self.rustup {
            let mut command = Command::new("rustup");
            command.args(["run", &self.name, program]);
            command
        } else {
            Command::new(program)
        }
    }
}

/// What the compiler says of itself.
pub(crate) struct Compiler {
    /// The release, such as `1.95.0` or `1.97.0-nightly`.
    pub(crate) release: String,
    /// The first digits of the commit, empty when the compiler was built without one.
    commit: String,
    /// Where its own libraries are.
    sysroot: PathBuf,
}

impl Compiler {
    /// Asks the toolchain's rustc.
    pub(crate) fn query(toolchain: &Toolchain) -> Result<Self, String> {
        let ask = |arguments: &[&str]| {
            let failed = |why: String| {
                format!(
                    "asking rustc of toolchain `{}` for {arguments:?} failed: {why}: install that toolchain, or name \
                     another in {TOOLCHAIN_VARIABLE}",
                    toolchain.name()
                )
            };
            let output = toolchain
                .command("rustc")
                .args(arguments)
                .output()
                .map_err(|error| failed(error.to_string()))?;
            if output.status.success() {
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            } else {
                Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
            }
        };
        let version = ask(&["-vV"])?;
        let field = |name: &str| {
            let value = version
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap_or_default();
            value.trim().to_owned()
        };
        Ok(Self {
            release: field("release:"),
            commit: field("commit-hash:").chars().take(9).collect(),
            sysroot: PathBuf::from(ask(&["--print", "sysroot"])?.trim()),
        })
    }

    /// The name of this compiler's folder in the cache. A release that is not final has many versions.
    pub(crate) fn cache_key(&self) -> String {
        if self.release.contains('-') && !self.commit.is_empty() {
            format!("{}-{}", self.release, self.commit)
        } else {
            self.release.clone()
        }
    }

    /// The folder `library` of the sources of exactly this compiler: in its sysroot, or in `cache`.
    pub(crate) fn library(&self, cache: &Path) -> Option<PathBuf> {
        [
            self.sysroot.join("lib/rustlib/src/rust/library"),
            sources_folder(cache).join(self.cache_key()).join("library"),
        ]
        .into_iter()
        .find(|folder| is_library(folder))
    }
}

/// Whether `folder` has what `-Z build-std=core` reads.
pub(crate) fn is_library(folder: &Path) -> bool {
    ["Cargo.lock", "core/Cargo.toml", "core/src/lib.rs"]
        .iter()
        .all(|file| folder.join(file).is_file())
}

/// The folder of our own: `BLKSNAP_CACHE`, else `blksnap` in `XDG_CACHE_HOME` or `~/.cache`.
pub(crate) fn cache_folder() -> Result<PathBuf, String> {
    let folder = |variable: &str| {
        env::var_os(variable)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    folder("BLKSNAP_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("blksnap")))
        .or_else(|| folder("HOME").map(|home| home.join(".cache/blksnap")))
        .ok_or_else(|| "no cache folder: HOME is not set: set BLKSNAP_CACHE to a folder".to_owned())
}

/// Where in the cache the library sources are, a folder per compiler.
pub(crate) fn sources_folder(cache: &Path) -> PathBuf {
    cache.join("rust-src")
}

/// Where in the cache bpf-linker is installed (`bin/bpf-linker` below it).
pub(crate) fn linker_root(cache: &Path) -> PathBuf {
    cache.join(format!("bpf-linker-{BPF_LINKER_VERSION}"))
}

/// The bpf-linker of the right version: the one on PATH, else the one in `cache`.
pub(crate) fn linker(cache: &Path) -> Option<PathBuf> {
    let cached = linker_root(cache).join("bin/bpf-linker");
    on_path("bpf-linker").into_iter().chain([cached]).find(|program| {
        Command::new(program)
            .arg("--version")
            .output()
            .is_ok_and(|output| {
                String::from_utf8_lossy(&output.stdout).split_whitespace().nth(1) == Some(BPF_LINKER_VERSION)
            })
    })
}

/// The file that running `program` would start.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}
