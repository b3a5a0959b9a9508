//! Lint: format, clippy on the host and on the eBPF crate, documentation, and the project's own rules.

use std::env;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use crate::toolchain::locate::{self, Compiler, Toolchain};
use crate::{process, rules, support, toolchain, workspace};

/// The target of the eBPF object.
const EBPF_TARGET: &str = if cfg!(target_endian = "big") {
    "bpfeb-unknown-none"
} else {
    "bpfel-unknown-none"
};

/// One of the checks.
type Check = fn() -> Result<()>;

/// Runs every check, also after one failed, and fails if any did.
pub(crate) fn run() -> Result<()> {
    toolchain::set_up(None)?;
    for component in ["rustfmt", "clippy"] {
        set_up_component(component)?;
    }
    let checks: [(&str, Check); 9] = [
        ("format", format),
        ("rules", || rules::check(workspace::root())),
        ("kernel support", || support::run(true)),
        ("clippy on the host crates", clippy_host),
        ("clippy on the agent with all features", clippy_features),
        ("clippy on the eBPF crate", clippy_ebpf),
        ("documentation", documentation),
        ("licences and advisories", || {
            optional("cargo-deny", &["check", "bans", "licenses", "sources"])
        }),
        ("spelling", || optional("typos", &[])),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        println!("lint: {name}");
        if let Err(error) = check() {
            eprintln!("lint: {name}: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("lint failed: {} (see above)", failed.join(", "));
    }
    Ok(())
}

/// A minimal toolchain has neither rustfmt nor clippy.
fn set_up_component(component: &str) -> Result<()> {
    let program = if component == "rustfmt" { "fmt" } else { component };
    if process::output(workspace::cargo().args([program, "--version"])).is_ok() {
        return Ok(());
    }
    println!("lint: adding the component {component} to the toolchain");
    process::output(process::command("rustup").args(["component", "add", component]))
        .with_context(|| format!("`cargo {program}` is missing: install {component}"))?;
    Ok(())
}

fn format() -> Result<()> {
    process::run(workspace::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy_host() -> Result<()> {
    clippy(&["--workspace", "--exclude", "blksnap-ebpf"])
}

/// The agent with everything that is left out of it otherwise.
fn clippy_features() -> Result<()> {
    clippy(&["--package", "blksnap-agent", "--features", workspace::FEATURES])
}

fn clippy(what: &[&str]) -> Result<()> {
    process::run(
        workspace::cargo()
            .args(["clippy", "--quiet", "--all-targets"])
            .args(what)
            .args(["--", "-D", "warnings"]),
    )
}

/// clippy of the toolchain that builds the object, for the object's target.
fn clippy_ebpf() -> Result<()> {
    let toolchain = Toolchain::from_environment();
    let compiler = Compiler::query(&toolchain).map_err(|error| anyhow!(error))?;
    let cache = locate::cache_folder().map_err(|error| anyhow!(error))?;
    let library = compiler.library(&cache).context("the library sources are gone")?;
    let mut command: Command = toolchain.command("cargo");
    command
        .current_dir(workspace::root())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", library)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        )
        .args([
            "clippy",
            "--quiet",
            "--package",
            "blksnap-ebpf",
            "--package",
            "blksnap-common",
        ])
        .args([
            "--lib",
            "--bins",
            "--release",
            "-Z",
            "build-std=core",
            "--target",
            EBPF_TARGET,
        ])
        .arg("--target-dir")
        .arg(workspace::target().join("ebpf-clippy"))
        .args(["--", "-D", "warnings"]);
    process::run(&mut command)
}

fn documentation() -> Result<()> {
    process::run(workspace::cargo().env("RUSTDOCFLAGS", "-D warnings").args([
        "doc",
        "--quiet",
        "--workspace",
        "--exclude",
        "blksnap-ebpf",
        "--no-deps",
    ]))
}

/// A check by a program that a fresh machine does not have; left out, and said so, when it is missing.
fn optional(program: &str, arguments: &[&str]) -> Result<()> {
    if process::find(program).is_none() {
        println!("lint: {program} is not installed: left out");
        return Ok(());
    }
    process::run(
        process::command(program)
            .current_dir(workspace::root())
            .args(arguments),
    )
}
