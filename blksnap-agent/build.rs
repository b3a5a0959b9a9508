//! Builds the eBPF object that the agent embeds.
//!
//! The programs are compiled with the toolchain cargo runs with, or the one that `BLKSNAP_EBPF_TOOLCHAIN` names
//! (`nightly`, say), and with `core` from that compiler's own library sources, which `cargo xtask setup` provides.
//! What aya-build reads from the environment is set by running this program a second time: a process can't safely
//! change its own.

#[path = "../xtask/src/toolchain/locate.rs"]
mod locate;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use locate::{Compiler, Toolchain};

/// What to do when something is missing.
const REMEDY: &str = "run `cargo xtask setup`";

/// Set for the second run.
const PREPARED: &str = "BLKSNAP_EBPF_BUILD_PREPARED";

/// What the second run needs in its environment.
struct Tools {
    library: PathBuf,
    linker: PathBuf,
}

fn main() {
    let outcome = if env::var_os(PREPARED).is_some() {
        build()
    } else {
        prepare()
    };
    if let Err(error) = outcome {
        println!("cargo::error={error}");
    }
}

/// Runs this program again with everything the eBPF build needs.
fn prepare() -> Result<(), String> {
    for variable in [
        locate::TOOLCHAIN_VARIABLE,
        "RUSTUP_TOOLCHAIN",
        "BLKSNAP_CACHE",
        "XDG_CACHE_HOME",
        "HOME",
    ] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let tools = find_tools()?;
    let folder = tools.linker.parent().unwrap_or(Path::new("/"));
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([folder.to_owned()].into_iter().chain(env::split_paths(&path)))
        .map_err(|error| format!("{} can't be part of PATH: {error}", folder.display()))?;
    let this = env::current_exe().map_err(|error| format!("this build script has no path: {error}"))?;
    let output = Command::new(&this)
        .env(PREPARED, "1")
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &tools.library)
        .env("PATH", path)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("running {} again failed: {error}", this.display()))?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        if !output.status.success() || !is_progress(line) {
            println!("{line}");
        }
    }
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("the eBPF build ended with {}", output.status))
    }
}

/// Whether a line is what cargo says of its progress, which aya-build passes on as a warning.
fn is_progress(line: &str) -> bool {
    let said = line
        .strip_prefix("cargo:warning=")
        .or_else(|| line.strip_prefix("cargo::warning="));
    let verb = said.and_then(|said| said.split_whitespace().next());
    verb.is_some_and(|verb| {
        [
            "Adding",
            "Blocking",
            "Compiling",
            "Downloaded",
            "Downloading",
            "Finished",
            "Locking",
            "Updating",
        ]
        .contains(&verb)
    })
}

/// What `cargo xtask setup` leaves behind, or the same from the machine.
fn find_tools() -> Result<Tools, String> {
    let toolchain = Toolchain::from_environment();
    let compiler = Compiler::query(&toolchain)?;
    let cache = locate::cache_folder()?;
    let library = compiler.library(&cache).ok_or_else(|| {
        format!(
            "the library sources of Rust {} are neither in the toolchain nor in {}: {REMEDY}",
            compiler.release,
            locate::sources_folder(&cache)
                .join(compiler.cache_key())
                .display()
        )
    })?;
    let linker = locate::linker(&cache).ok_or_else(|| {
        format!(
            "bpf-linker {} is neither on PATH nor in {}: {REMEDY}",
            locate::BPF_LINKER_VERSION,
            locate::linker_root(&cache).display()
        )
    })?;
    println!("cargo::rerun-if-changed={}", library.join("Cargo.lock").display());
    Ok(Tools { library, linker })
}

/// Compiles the programs; aya-build puts the object into `OUT_DIR`.
fn build() -> Result<(), String> {
    let toolchain = Toolchain::from_environment();
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "blksnap-ebpf",
            root_dir: "../blksnap-ebpf",
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(toolchain.name()),
    )
    .map_err(|error| format!("the eBPF programs did not build: {error:#}"))
}
