//! Set-up: every place that may have the Rust library sources, each with a cache and a toolchain of its own.
//!
//! The compiler, rustup and bpf-linker are small scripts; apt, dpkg-deb and the archives are real. The mirror is a
//! folder with an index and a package made here.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// Where a toolchain has its library sources.
const IN_SYSROOT: &str = "lib/rustlib/src/rust/library";

/// A machine with a compiler, bpf-linker and nothing else on PATH.
struct Machine {
    folder: TempDir,
}

impl Machine {
    fn new() -> Self {
        let machine = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        for name in ["bin", "sysroot", "home"] {
            fs::create_dir(machine.path(name)).unwrap();
        }
        machine.program(
            "rustc",
            &format!(
                "case $1 in -vV) echo 'rustc 1.95.0'; echo 'release: 1.95.0'; echo 'commit-hash: 123456789abc';; \
                 *) echo {};; esac",
                machine.path("sysroot").display()
            ),
        );
        machine.program("bpf-linker", "echo bpf-linker 0.10.4");
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts a shell script on PATH.
    fn program(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Adds rustup, which runs the compiler; `add` is what it does when asked for a component.
    fn rustup(&self, add: &str) {
        let rustc = self.path("bin/rustc");
        self.program(
            "rustup",
            &format!(
                "case $1 in run) shift 3; exec {} \"$@\";; *) {add};; esac",
                rustc.display()
            ),
        );
    }

    /// Puts programs of this machine on PATH.
    fn borrow(&self, programs: &[&str]) {
        for program in programs {
            let found = std::env::split_paths(&std::env::var_os("PATH").unwrap())
                .map(|folder| folder.join(program))
                .find(|path| path.is_file())
                .unwrap_or_else(|| panic!("{program} is not on PATH"));
            symlink(found, self.path("bin").join(program)).unwrap();
        }
    }

    fn setup(&self, environment: &[(&str, &Path)]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["setup", "--toolchain"])
            .env_clear()
            .env("PATH", self.path("bin"))
            .env("HOME", self.path("home"))
            .envs(environment.iter().copied())
            .output()
            .unwrap()
    }

    fn cached(&self) -> PathBuf {
        self.path("home/.cache/blksnap/rust-src/1.95.0/library")
    }

    /// The names in the cache of sources; nothing temporary may stay.
    fn cache_entries(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("home/.cache/blksnap/rust-src")) else {
            return Vec::new();
        };
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

/// Makes a folder that looks like the library sources of a release.
fn make_library(folder: &Path, release: &str) {
    fs::create_dir_all(folder.join("core/src")).unwrap();
    fs::write(folder.join("Cargo.lock"), "version = 4\n").unwrap();
    fs::write(folder.join("core/Cargo.toml"), "[package]\n").unwrap();
    let text = format!("#[stable(feature = \"core\", since = \"{release}\")]\npub fn core() {{}}\n");
    fs::write(folder.join("core/src/lib.rs"), text).unwrap();
}

/// A tar archive with the sources of `release` where the official archive has them, and some other file.
fn tar_archive(release: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    make_library(&folder.path().join("library"), release);
    fs::write(folder.path().join("README"), "none of ours").unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    builder
        .append_path_with_name(folder.path().join("README"), "rust-src/README")
        .unwrap();
    let inside = format!("rust-src/rust-src/{IN_SYSROOT}");
    builder
        .append_dir_all(inside, folder.path().join("library"))
        .unwrap();
    builder.into_inner().unwrap()
}

fn succeeded(output: &Output) {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The one line of an error.
fn refused(output: &Output) -> String {
    assert!(
        !output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(
        text.starts_with("error: ") && text.trim_end().lines().count() == 1,
        "{text}"
    );
    text
}

#[test]
fn sources_in_the_toolchain_are_used() {
    let machine = Machine::new();
    make_library(&machine.path("sysroot").join(IN_SYSROOT), "1.95.0");
    let output = machine.setup(&[]);
    succeeded(&output);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains(&machine.path("sysroot").display().to_string()),
        "{text}"
    );
    assert!(!machine.path("home/.cache").exists());
}

#[test]
fn rustup_is_asked_for_the_component() {
    let machine = Machine::new();
    let library = machine.path("sysroot").join(IN_SYSROOT);
    let made = machine.path("made");
    make_library(&made, "1.95.0");
    machine.borrow(&["mkdir", "mv"]);
    machine.rustup(&format!(
        "[ \"$*\" = 'component add rust-src --toolchain stable' ] && mkdir -p {} && mv {} {}",
        library.parent().unwrap().display(),
        made.display(),
        library.display()
    ));
    succeeded(&machine.setup(&[]));
    assert!(library.join("core/src/lib.rs").is_file());
}

#[test]
fn archives_of_every_compression_are_unpacked() {
    let plain = tar_archive("1.95.0");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let mut xz = Vec::new();
    lzma_rs::xz_compress(&mut plain.as_slice(), &mut xz).unwrap();
    let zstd =
        ruzstd::encoding::compress_to_vec(plain.as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
    for (name, content) in [
        ("tar", plain),
        ("tar.gz", gzip.finish().unwrap()),
        ("tar.xz", xz),
        ("tar.zst", zstd),
    ] {
        let machine = Machine::new();
        let archive = machine.path("archive");
        fs::write(&archive, content).unwrap();
        let environment = [("BLKSNAP_RUST_SRC_ARCHIVE", archive.as_path())];
        succeeded(&machine.setup(&environment));
        assert!(machine.cached().join("core/src/lib.rs").is_file(), "{name}");
        assert_eq!(machine.cache_entries(), ["1.95.0"], "{name}");
        // Once there, the archive is not needed.
        fs::remove_file(&archive).unwrap();
        succeeded(&machine.setup(&environment));
    }
}

#[test]
fn the_cache_is_where_the_environment_says() {
    let machine = Machine::new();
    let archive = machine.path("archive");
    fs::write(&archive, tar_archive("1.95.0")).unwrap();
    for (variable, folder) in [("BLKSNAP_CACHE", "own"), ("XDG_CACHE_HOME", "xdg/blksnap")] {
        let value = machine.path(folder.split('/').next().unwrap());
        succeeded(&machine.setup(&[("BLKSNAP_RUST_SRC_ARCHIVE", &archive), (variable, &value)]));
        assert!(
            machine
                .path(folder)
                .join("rust-src/1.95.0/library/Cargo.lock")
                .is_file(),
            "{variable}"
        );
    }
}

#[test]
fn an_archive_of_another_release_is_refused() {
    let machine = Machine::new();
    let archive = machine.path("archive");
    fs::write(&archive, tar_archive("1.94.0")).unwrap();
    let text = refused(&machine.setup(&[("BLKSNAP_RUST_SRC_ARCHIVE", &archive)]));
    assert!(
        text.contains("it has the sources of Rust 1.94, not of 1.95.0"),
        "{text}"
    );
    assert_eq!(machine.cache_entries(), [""; 0]);
}

#[test]
fn without_any_source_one_line_says_what_to_do() {
    let machine = Machine::new();
    let text = refused(&machine.setup(&[]));
    for way in [
        "component rust-src",
        "package rust-src 1.95.0",
        "BLKSNAP_RUST_SRC_ARCHIVE",
    ] {
        assert!(text.contains(way), "{text}");
    }
}

#[test]
fn when_rustup_refuses_the_mirror_is_asked() {
    let mirror = Mirror::new("1.95.0+dfsg1-2");
    let machine = mirror.machine();
    machine.rustup("echo 'could not download' >&2; exit 1");
    succeeded(&mirror.setup(&machine));
    assert!(machine.cached().join("core/src/lib.rs").is_file());
    assert_eq!(machine.cache_entries(), ["1.95.0"]);
}

#[test]
fn a_mirror_without_this_release_is_named_with_what_it_has() {
    let mirror = Mirror::new("1.94.1+dfsg1-1");
    let machine = mirror.machine();
    machine.rustup("echo 'could not download' >&2; exit 1");
    let text = refused(&mirror.setup(&machine));
    assert!(
        text.contains("could not download") && text.contains("it has 1.94.1+dfsg1-1"),
        "{text}"
    );
    assert_eq!(machine.cache_entries(), [""; 0]);
}

#[test]
fn a_package_that_differs_from_the_index_is_refused() {
    let mirror = Mirror::new("1.95.0+dfsg1-2");
    let machine = mirror.machine();
    let package = mirror.package();
    let mut content = fs::read(&package).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::write(&package, content).unwrap();
    let text = refused(&mirror.setup(&machine));
    assert!(
        text.contains("Hash Sum mismatch") || text.contains("wrong"),
        "{text}"
    );
    assert_eq!(machine.cache_entries(), [""; 0]);
}

/// A Debian mirror with one suite and one package, and apt's configuration for it.
struct Mirror {
    folder: TempDir,
}

impl Mirror {
    fn new(version: &str) -> Self {
        let mirror = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        // apt's own checks of files it may not open as another user.
        fs::set_permissions(mirror.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let tree = mirror.path("tree");
        make_library(&tree.join("usr/src/rustc-1.95.0/library"), "1.95.0");
        fs::create_dir(tree.join("DEBIAN")).unwrap();
        let control = format!(
            "Package: rust-src\nVersion: {version}\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n\
             Description: library sources\n"
        );
        fs::write(tree.join("DEBIAN/control"), &control).unwrap();
        let root = mirror.path("debian");
        let index = root.join("dists/trixie-backports/main/binary-all");
        fs::create_dir_all(&index).unwrap();
        let build = Command::new("dpkg-deb")
            .arg("-b")
            .arg(&tree)
            .arg(mirror.package())
            .output()
            .unwrap();
        assert!(
            build.status.success(),
            "{}",
            String::from_utf8_lossy(&build.stderr)
        );

        let entry = format!(
            "{control}Filename: rust-src.deb\nSize: {}\nSHA256: {}\n",
            mirror.package().metadata().unwrap().len(),
            sha256(&mirror.package())
        );
        let packages = index.join("Packages");
        fs::write(&packages, entry).unwrap();
        fs::write(
            root.join("dists/trixie-backports/Release"),
            format!(
                "Origin: Debian\nSuite: trixie-backports\nCodename: trixie-backports\nArchitectures: all\n\
                 Components: main\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {} {} main/binary-all/Packages\n",
                sha256(&packages),
                packages.metadata().unwrap().len()
            ),
        )
        .unwrap();

        fs::create_dir(mirror.path("parts")).unwrap();
        let source = format!("deb file:{} bookworm main\n", root.display());
        fs::write(mirror.path("parts/one.list"), source).unwrap();
        let mut configuration = File::create(mirror.path("apt.conf")).unwrap();
        writeln!(
            configuration,
            "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{}\";\n\
             Acquire::AllowInsecureRepositories \"true\";\nAPT::Get::AllowUnauthenticated \"true\";",
            mirror.path("parts").display()
        )
        .unwrap();
        mirror
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn package(&self) -> PathBuf {
        self.path("debian/rust-src.deb")
    }

    /// A machine that has apt.
    fn machine(&self) -> Machine {
        let machine = Machine::new();
        machine.borrow(&[
            "apt-get",
            "apt-cache",
            "dpkg",
            "dpkg-deb",
            "tar",
            "xz",
            "zstd",
            "rm",
        ]);
        machine
    }

    fn setup(&self, machine: &Machine) -> Output {
        machine.setup(&[("APT_CONFIG", &self.path("apt.conf"))])
    }
}

fn sha256(file: &Path) -> String {
    let output = Command::new("sha256sum").arg(file).output().unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .to_owned()
}
