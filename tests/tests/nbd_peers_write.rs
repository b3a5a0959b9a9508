//! Peers that write: other people's NBD clients against a writable export, a server process of its own for each test.
//!
//! What a client wrote is compared with the file behind the export, so that no client has to be believed. Needs nbdsh,
//! nbdcopy, nbdfuse, nbdkit, qemu-io, qemu-img, qemu and fio.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::Served;
use blksnap_tests::nbd::served::{SIZE, compare};
use blksnap_tests::{run, seed};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

const MIB: u64 = 1 << 20;

fn served(arguments: &[&str]) -> Result<Served> {
    Served::start(Path::new(env!("CARGO_BIN_EXE_blksnap-serve")), arguments)
}

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("the path is text")?.to_owned())
}

/// Runs a script of nbdsh; `h` is connected to the export.
fn nbdsh(served: &Served, script: &str) -> Result<String> {
    // The distribution's own Python has the module.
    let path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    run("env", [path, "nbdsh", "-u", &served.uri(), "-c", script])
}

/// What the file behind the export holds now.
fn now(served: &Served) -> Result<Vec<u8>> {
    Ok(std::fs::read(served.file())?)
}

/// A random image with holes, and its path.
fn source(served: &Served, random: &mut StdRng) -> Result<(String, Vec<u8>)> {
    let path = served.beside("source");
    let file = File::options().write(true).create_new(true).open(&path)?;
    file.set_len(SIZE)?;
    let mut memory = vec![0; usize::try_from(SIZE)?];
    for block in (0..SIZE).step_by(1 << 20) {
        if random.random_bool(0.4) {
            let range = usize::try_from(block)?..usize::try_from(block + MIB)?;
            random.fill_bytes(&mut memory[range.clone()]);
            file.write_all_at(&memory[range], block)?;
        }
    }
    Ok((text(&path)?, memory))
}

#[test]
fn nbdsh_writes_zeroes_trims_and_flushes() -> Result<()> {
    let served = served(&["--writable"])?;
    nbdsh(
        &served,
        r#"
assert not h.is_read_only() and h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero()
assert h.can_fast_zero() and h.can_multi_conn() and h.can_cache() and h.can_df()
assert not h.is_rotational()
h.pwrite(b"x" * 65536, 4096, nbd.CMD_FLAG_FUA)
h.pwrite(b"y" * 3, 70001)
assert h.pread(5, 70000)[1:4] == b"yyy"
h.zero(32768, 8192)
h.zero(4096, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
h.zero(1 << 20, 16 << 20, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
h.trim(1 << 20, 2 << 20, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
assert h.pread(8, 8192) == b"\x00" * 8 and h.pread(4, 4096) == b"xxxx"
"#,
    )?;
    let now = now(&served)?;
    let at = |from: u64, to: u64| -> Result<&[u8]> { Ok(&now[usize::try_from(from)?..usize::try_from(to)?]) };
    ensure!(at(4096, 8192)?.iter().all(|byte| *byte == b'x'));
    ensure!(at(8192, 8192 + 32768)?.iter().all(|byte| *byte == 0));
    ensure!(at(40960, 4096 + 65536)?.iter().all(|byte| *byte == b'x'));
    ensure!(at(70001, 70004)? == b"yyy");
    ensure!(at(16 * MIB, 17 * MIB)?.iter().all(|byte| *byte == 0));
    served.end()
}

#[test]
fn nbdsh_gets_the_errors_of_the_specification() -> Result<()> {
    let script = r#"
import errno
h.set_strict_mode(0)
size = h.get_size()
def fails(number, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == number, (call, arguments, error.errnum, number)
    else:
        raise AssertionError((call, arguments))
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.EINVAL, h.cache, 512, size - 511)
fails(errno.EINVAL, h.pread, 512, 0, 1 << 7)
fails(errno.EINVAL, h.block_status, 512, 0, lambda *a: 0)
writes = [(h.pwrite, (b"1" * 512, size)), (h.zero, (512, size)), (h.trim, (512, size))]
for call, arguments in writes:
    number = errno.EPERM if h.is_read_only() else (errno.EINVAL if call == h.trim else errno.ENOSPC)
    fails(number, call, *arguments)
assert len(h.pread(512, 0)) == 512
"#;
    for arguments in [&["--writable"][..], &[]] {
        let served = served(arguments)?;
        nbdsh(&served, script)?;
        compare(&served.file(), served.memory())?;
        served.end()?;
    }
    Ok(())
}

#[test]
fn nbdsh_sees_one_disk_on_many_connections() -> Result<()> {
    let served = served(&["--writable"])?;
    nbdsh(
        &served,
        r#"
uri = h.get_uri()
many = [nbd.NBD() for _ in range(6)]
for index, one in enumerate(many):
    one.set_request_structured_replies(index % 2 == 0)
    one.connect_uri(uri)
for index, one in enumerate(many):
    one.pwrite(bytes([index + 1]) * 5000, index * 5000)
many[0].flush()
for one in many:
    for index in range(6):
        assert one.pread(5000, index * 5000) == bytes([index + 1]) * 5000
for one in many:
    one.shutdown()
"#,
    )?;
    let now = now(&served)?;
    for index in 0..6 {
        let part = &now[usize::from(index) * 5000..][..5000];
        ensure!(part.iter().all(|byte| *byte == index + 1), "part {index}");
    }
    served.end()
}

#[test]
fn nbdsh_keeps_many_requests_in_flight() -> Result<()> {
    let served = served(&["--writable"])?;
    nbdsh(
        &served,
        r#"
import random
blocks = list(range(512))
random.shuffle(blocks)
def write(block):
    data = nbd.Buffer.from_bytearray(bytearray([block % 256]) * 16384)
    return h.aio_pwrite(data, block * 16384)
for cookie in [write(block) for block in blocks]:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
h.flush()
"#,
    )?;
    let now = now(&served)?;
    for block in 0..512_usize {
        let part = &now[block * 16384..][..16384];
        ensure!(
            part.iter().all(|byte| usize::from(*byte) == block % 256),
            "block {block}"
        );
    }
    served.end()
}

#[test]
fn nbdsh_lists_and_selects_contexts() -> Result<()> {
    let served = served(&["--takes=9"])?;
    let script = r#"
since = "qemu:dirty-bitmap:since-00000000-0000-0000-0000-000000000001-"
o = nbd.NBD()
o.set_opt_mode(True)
o.set_export_name("disk")
o.connect_unix("SOCKET")
def listed(*queries):
    o.clear_meta_contexts()
    for query in queries:
        o.add_meta_context(query)
    names = []
    o.opt_list_meta_context(lambda name: names.append(name))
    return names
everything = ["base:allocation", "qemu:dirty-bitmap:last"] + [since + str(n) for n in range(9, -1, -1)]
assert listed() == everything, listed()
assert listed("base:") == everything[:1]
assert listed("qemu:") == everything[1:] and listed("qemu:dirty-bitmap:") == everything[1:]
assert listed(since + "3", "x-unknown:y") == [since + "3"]
assert listed(since + "77") == []
o.clear_meta_contexts()
for name in (since + "7", "qemu:dirty-bitmap:last", "base:allocation"):
    o.add_meta_context(name)
o.opt_go()
extents = {}
def tell(context, offset, entries, error):
    extents[context] = list(zip(entries[::2], entries[1::2]))
block = 65536
o.block_status(16 * block, 0, tell)
assert extents[since + "7"] == [(8 * block, 0), (2 * block, 1), (6 * block, 0)], extents
assert extents["qemu:dirty-bitmap:last"] == [(9 * block, 0), (block, 1), (6 * block, 0)], extents
assert extents["base:allocation"][:2] == [(4096, 0), (4096, 3)], extents
o.shutdown()
# One that can't be told is not there, and the client sees it.
other = since.replace("1-", "2-") + "1"
o = nbd.NBD()
o.set_export_name("disk")
o.add_meta_context(other)
o.connect_unix("SOCKET")
assert not o.can_meta_context(other)
o.shutdown()
"#;
    nbdsh(&served, &script.replace("SOCKET", &text(&served.socket())?))?;
    served.end()
}

#[test]
fn qemu_io_writes_patterns() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("qemu_io_writes_patterns"));
    let served = served(&["--writable"])?;
    let mut memory = served.memory().to_vec();
    let mut arguments = vec!["-f".to_owned(), "raw".to_owned()];
    for _ in 0..80 {
        let offset = random.random_range(0..SIZE / 512 - 2048) * 512;
        let length = random.random_range(1..=2048_u64) * 512;
        let range = usize::try_from(offset)?..usize::try_from(offset + length)?;
        let pattern: u8 = random.random_range(1..=255);
        let (command, value) = match random.random_range(0..5_u8) {
            0 => (format!("write -z {offset} {length}"), 0),
            1 => (format!("write -z -u {offset} {length}"), 0),
            2 => (format!("write -f -P {pattern} {offset} {length}"), pattern),
            _ => (format!("write -P {pattern} {offset} {length}"), pattern),
        };
        memory[range].fill(value);
        let check = format!("read -P {value} {offset} {length}");
        for command in [command, check] {
            arguments.extend(["-c".to_owned(), command]);
        }
        if random.random_bool(0.1) {
            arguments.extend(["-c".to_owned(), "flush".to_owned()]);
        }
    }
    // What is discarded is written again, as nobody knows what is there.
    for command in ["discard 1M 4M", "write -P 77 1M 4M"] {
        arguments.extend(["-c".to_owned(), command.to_owned()]);
    }
    memory[usize::try_from(MIB)?..usize::try_from(5 * MIB)?].fill(77);
    arguments.push(served.uri());
    let said = run("qemu-io", &arguments)?;
    ensure!(!said.contains("failed"), "{said}");
    compare(&served.file(), &memory)?;
    served.end()
}

#[test]
fn qemu_img_converts_into_the_export() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("qemu_img_converts_into_the_export"));
    let served = served(&["--writable"])?;
    let (path, memory) = source(&served, &mut random)?;
    for options in [&["-W", "-m", "8"][..], &["-S", "4k"], &["-S", "0"]] {
        std::fs::write(served.file(), served.memory())?;
        let uri = served.uri();
        let arguments = ["convert", "-n", "-f", "raw", "-O", "raw"]
            .into_iter()
            .chain(options.iter().copied())
            .chain([path.as_str(), &uri]);
        run("qemu-img", arguments)?;
        compare(&served.file(), &memory).with_context(|| format!("{options:?}"))?;
    }
    run(
        "qemu-img",
        ["compare", "-f", "raw", "-F", "raw", &path, &served.uri()],
    )?;
    let uri = served.uri();
    let bench = [
        "bench",
        "-w",
        "-c",
        "3000",
        "-d",
        "32",
        "-s",
        "4096",
        "--pattern=7",
        "--flush-interval=64",
        "-f",
        "raw",
        &uri,
    ];
    run("qemu-img", bench)?;
    let written = now(&served)?;
    ensure!(written[..3000 * 4096].iter().all(|byte| *byte == 7));
    ensure!(written[3000 * 4096..] == memory[3000 * 4096..]);
    served.end()
}

#[test]
fn nbdcopy_writes_every_byte() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("nbdcopy_writes_every_byte"));
    let served = served(&["--writable"])?;
    let (path, memory) = source(&served, &mut random)?;
    let cases: [&[&str]; 4] = [
        &["--connections=1", "--requests=1"],
        &["--threads=4", "--connections=4", "--requests=64", "--flush"],
        &["--threads=2", "--connections=2", "--request-size=33554432"],
        &["--allocated", "--synchronous"],
    ];
    for case in cases {
        std::fs::write(served.file(), served.memory())?;
        let uri = served.uri();
        run("nbdcopy", case.iter().copied().chain([path.as_str(), &uri]))?;
        compare(&served.file(), &memory).with_context(|| format!("nbdcopy {case:?}"))?;
    }
    served.end()
}

#[test]
fn fio_verifies_what_it_wrote() -> Result<()> {
    let served = served(&["--writable"])?;
    let uri = format!("--uri={}", served.uri());
    // fio takes a signed number.
    let randseed = format!("--randseed={}", seed("fio_verifies_what_it_wrote") >> 1);
    for (name, options) in [
        (
            "random",
            &["--rw=randwrite", "--bsrange=512-64k", "--iodepth=32"][..],
        ),
        (
            "mixed",
            &["--rw=randrw", "--bs=4k", "--iodepth=16", "--numjobs=1"],
        ),
        (
            "sequential",
            &["--rw=write", "--bs=1M", "--iodepth=8", "--fsync=7"],
        ),
        // What is in flight at once has no order, and fio sends the write right behind the trim.
        ("trims", &["--rw=randtrimwrite", "--bs=16k", "--iodepth=1"]),
    ] {
        let name = format!("--name={name}");
        let fixed = [
            "--size=32M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            // No file of its own in the directory of the test.
            "--verify_state_save=0",
            &randseed,
        ];
        let arguments = [name.as_str(), "--ioengine=nbd", &uri]
            .into_iter()
            .chain(fixed)
            .chain(options.iter().copied());
        let said = run("fio", arguments).with_context(|| name.clone())?;
        ensure!(said.contains("err= 0"), "{said}");
    }
    served.end()
}

#[test]
fn nbdkit_passes_everything_through() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("nbdkit_passes_everything_through"));
    let served = served(&["--writable"])?;
    let (path, memory) = source(&served, &mut random)?;
    let uri = format!("uri={}", served.uri());
    let copy = served.beside("copy");
    let script = format!(
        "nbdcopy {path} \"$uri\" && nbdcopy \"$uri\" {} && nbdinfo --map \"$uri\"",
        text(&copy)?
    );
    let said = run("nbdkit", ["-U", "-", "nbd", &uri, "--run", &script])?;
    ensure!(said.contains("hole,zero") && said.contains("data"), "{said}");
    compare(&copy, &memory)?;
    compare(&served.file(), &memory)?;
    // With more than one connection to us.
    let script = format!("nbdcopy --connections=4 --threads=4 \"$uri\" {}", text(&copy)?);
    run(
        "nbdkit",
        ["-U", "-", "nbd", &uri, "shared=true", "--run", &script],
    )?;
    compare(&copy, &memory)?;
    served.end()
}

#[test]
fn nbdfuse_shows_a_file() -> Result<()> {
    let served = served(&["--writable"])?;
    let directory = served.beside("mount");
    std::fs::create_dir(&directory)?;
    let file = directory.join("disk");
    let mut fuse = Command::new("nbdfuse")
        .arg(&file)
        .arg(served.uri())
        .spawn()
        .context("start nbdfuse")?;
    let used = || -> Result<()> {
        let begun = Instant::now();
        while !file.exists() {
            ensure!(
                begun.elapsed() < Duration::from_secs(60),
                "nbdfuse does not mount"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        compare(&file, served.memory())?;
        let written = File::options().write(true).open(&file)?;
        written.write_all_at(&[0x5a; 100_000], 12_345)?;
        written.sync_all()?;
        Ok(())
    };
    let outcome = used();
    let unmounted = run("umount", [&directory]);
    if unmounted.is_err() {
        fuse.kill()?;
    }
    fuse.wait()?;
    outcome?;
    unmounted?;
    let mut memory = served.memory().to_vec();
    memory[12_345..112_345].fill(0x5a);
    compare(&served.file(), &memory)?;
    served.end()
}

#[test]
fn a_virtual_machine_attaches_the_export_as_its_disk() -> Result<()> {
    use std::io::Write as _;
    let served = served(&["--writable"])?;
    let disk = format!(
        "driver=nbd,node-name=disk,server.type=unix,server.path={},export=disk",
        text(&served.socket())?
    );
    let mut machine = Command::new("qemu-system-x86_64")
        .args([
            "-S",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-m",
            "64",
            "-qmp",
            "stdio",
        ])
        .args(["-blockdev", &disk, "-device", "virtio-blk-pci,drive=disk,id=vd"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start qemu-system-x86_64")?;
    let mut commands = machine.stdin.take().context("stdin")?;
    let io = |command: &str| {
        let line = format!("qemu-io -d /machine/peripheral/vd/virtio-backend \\\"{command}\\\"");
        format!(r#"{{"execute": "human-monitor-command", "arguments": {{"command-line": "{line}"}}}}"#)
    };
    for command in [
        r#"{"execute": "qmp_capabilities"}"#.to_owned(),
        r#"{"execute": "query-block"}"#.to_owned(),
        io("write -P 99 1M 1M"),
        io("read -P 99 1M 1M"),
        r#"{"execute": "quit"}"#.to_owned(),
    ] {
        writeln!(commands, "{command}")?;
    }
    let output = machine.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{said}{complaint}");
    ensure!(!said.contains("failed") && !said.contains("\"error\""), "{said}");
    ensure!(said.contains("virtio"), "{said}");
    let mut memory = served.memory().to_vec();
    memory[1 << 20..2 << 20].fill(99);
    compare(&served.file(), &memory)?;
    served.end()
}
