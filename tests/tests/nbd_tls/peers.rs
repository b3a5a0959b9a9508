//! Peers: other people's programs with TLS, each of which gets all it asks for.

use std::process::Command;

use anyhow::{Result, ensure};
use blksnap_agent::nbd::tls::Clients;

use crate::scene::{NAME, SIZE, Scene, libnbd, succeeded};

/// What qemu calls a version of TLS alone.
const TLS_1_2: &str = "NORMAL:-VERS-ALL:+VERS-TLS1.2";
const TLS_1_3: &str = "NORMAL:-VERS-ALL:+VERS-TLS1.3";

fn program(name: &str, arguments: &[&str]) -> Result<String> {
    succeeded(&libnbd(name, arguments)?)
}

#[test]
fn libnbd_asks_copies_and_writes() -> Result<()> {
    let scene = Scene::new("libnbd_asks_copies_and_writes", Clients::Certified)?;
    let uri = scene.uri(&scene.certified());
    let said = program("nbdinfo", &["--json", &uri])?;
    ensure!(said.contains("\"TLS\": true"), "{said}");
    ensure!(said.contains(&format!("\"export-size\": {SIZE}")), "{said}");
    let copy = scene.beside("copy");
    let copy = copy.display().to_string();
    program("nbdcopy", &["--connections=4", "--requests=16", &uri, &copy])?;
    scene.assert_copy("copy")?;

    // What the client writes is in the file, over several connections.
    let mut other = scene.content.clone();
    other.reverse();
    std::fs::write(&copy, &other)?;
    program("nbdcopy", &["--connections=4", "--flush", &copy, &uri])?;
    ensure!(scene.now()? == other, "the file differs from what was written");
    Ok(())
}

#[test]
fn nbdsh_sees_the_same_in_every_framing() -> Result<()> {
    let scene = Scene::new("nbdsh_sees_the_same_in_every_framing", Clients::Certified)?;
    let script = format!(
        r#"
first = None
for structured in (False, True):
    h = nbd.NBD()
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_certificates("{directory}")
    h.set_request_structured_replies(structured)
    h.set_export_name("{NAME}")
    h.add_meta_context("base:allocation")
    h.connect_tcp("localhost", "{port}")
    assert h.get_tls_negotiated()
    # Behind STARTTLS everything is negotiated anew.
    assert h.get_structured_replies_negotiated() == structured
    assert h.can_meta_context("base:allocation") == structured
    data = h.pread(3 << 20, 1 << 20)
    assert first is None or first == data
    first = data
    h.pwrite(b"x" * (1 << 20), 4 << 20, nbd.CMD_FLAG_FUA)
    h.zero(1 << 20, 6 << 20)
    h.trim(4096, 7 << 20)
    h.flush()
    assert h.pread(1 << 20, 4 << 20) == b"x" * (1 << 20)
    assert h.pread(1 << 20, 6 << 20) == bytes(1 << 20)
    h.shutdown()
"#,
        directory = scene.certified().display(),
        port = scene.port()
    );
    // Without -u nbdsh connects to nothing.
    program("nbdsh", &["-c", &script])?;
    let now = scene.now()?;
    ensure!(now[4 << 20..5 << 20].iter().all(|byte| *byte == b'x'));
    ensure!(now[6 << 20..7 << 20].iter().all(|byte| *byte == 0));
    ensure!(now[..4 << 20] == scene.content[..4 << 20]);
    Ok(())
}

#[test]
fn qemu_img_speaks_both_versions() -> Result<()> {
    let scene = Scene::new("qemu_img_speaks_both_versions", Clients::Certified)?;
    for (index, version) in [TLS_1_2, TLS_1_3].into_iter().enumerate() {
        let [option, credentials, image] = scene.qemu(&scene.certified(), version);
        let name = format!("copy{index}");
        let target = scene.beside(&name).display().to_string();
        let convert = [
            "convert",
            &option,
            &credentials,
            "--image-opts",
            &image,
            "-O",
            "raw",
        ];
        succeeded(&Command::new("qemu-img").args(convert).arg(&target).output()?)?;
        scene.assert_copy(&name)?;
        let target = format!("driver=file,filename={target}");
        let compare = ["compare", &option, &credentials, "--image-opts", &image, &target];
        let said = succeeded(&Command::new("qemu-img").args(compare).output()?)?;
        ensure!(said.contains("identical"), "{said}");
    }
    Ok(())
}

#[test]
fn qemu_io_writes() -> Result<()> {
    let scene = Scene::new("qemu_io_writes", Clients::Certified)?;
    let [option, credentials, image] = scene.qemu(&scene.certified(), "NORMAL");
    let commands = [
        "-c",
        "write -P 0x77 -f 1M 2M",
        "-c",
        "read -P 0x77 1M 2M",
        "-c",
        "flush",
    ];
    let mut command = Command::new("qemu-io");
    command
        .args([&option, &credentials, "--image-opts", &image])
        .args(commands);
    let said = succeeded(&command.output()?)?;
    ensure!(!said.contains("failed"), "{said}");
    let now = scene.now()?;
    ensure!(now[1 << 20..3 << 20].iter().all(|byte| *byte == 0x77));
    ensure!(now[..1 << 20] == scene.content[..1 << 20]);
    Ok(())
}

/// nbdkit stands between: a client of ours with TLS, a server in the clear for nbdcopy.
#[test]
fn nbdkit_is_a_client() -> Result<()> {
    let scene = Scene::new("nbdkit_is_a_client", Clients::Certified)?;
    let copy = scene.beside("copy").display().to_string();
    let certificates = format!("tls-certificates={}", scene.certified().display());
    let port = format!("port={}", scene.port());
    let export = format!("export={NAME}");
    for shared in ["shared=false", "shared=true"] {
        let run = format!("nbdcopy \"$uri\" {copy}");
        let said = Command::new("nbdkit")
            .args([
                "--exit-with-parent",
                "--unix",
                "-",
                "nbd",
                "hostname=localhost",
                &port,
                &export,
            ])
            .args(["tls=require", &certificates, shared, "--run", &run])
            .env("HOME", "/nonexistent")
            .output()?;
        succeeded(&said)?;
        scene.assert_copy("copy")?;
        std::fs::remove_file(&copy)?;
    }
    Ok(())
}

#[test]
fn anybody_is_served_where_that_is_wanted() -> Result<()> {
    let scene = Scene::new("anybody_is_served_where_that_is_wanted", Clients::Anybody)?;
    // A directory with the authority only: the client checks the server and shows nothing.
    let stranger = scene.client("stranger")?;
    let [option, credentials, image] = scene.qemu(&stranger, "NORMAL");
    let copy = scene.beside("copy").display().to_string();
    let convert = [
        "convert",
        &option,
        &credentials,
        "--image-opts",
        &image,
        "-O",
        "raw",
        &copy,
    ];
    succeeded(&Command::new("qemu-img").args(convert).output()?)?;
    scene.assert_copy("copy")?;
    scene.assert_serves()
}

/// The same directory serves qemu-nbd and nbdkit, and the same client finds them good.
#[test]
fn the_directory_is_that_of_qemu_and_nbdkit() -> Result<()> {
    let scene = Scene::new("the_directory_is_that_of_qemu_and_nbdkit", Clients::Certified)?;
    scene.assert_serves()?;
    let server = scene.beside("server");
    let uri = |socket: &str| {
        format!(
            "nbds+unix:///?socket={socket}&tls-certificates={}&tls-hostname=localhost",
            scene.certified().display()
        )
    };
    let socket = scene.beside("k").display().to_string();
    let run = format!("nbdinfo --size '{}'", uri(&socket));
    let said = Command::new("nbdkit")
        .args([
            "--exit-with-parent",
            "--tls=require",
            "--tls-verify-peer",
            "--unix",
            &socket,
        ])
        .arg(format!("--tls-certificates={}", server.display()))
        .args(["memory", "1M", "--run", &run])
        .env("HOME", "/nonexistent")
        .output()?;
    ensure!(succeeded(&said)?.trim() == "1048576", "{said:?}");

    let socket = scene.beside("q").display().to_string();
    let credentials = format!(
        "tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={}",
        server.display()
    );
    let mut qemu = Command::new("qemu-nbd")
        .args([
            "--object",
            &credentials,
            "--tls-creds",
            "t",
            "--format",
            "raw",
            "--read-only",
        ])
        .args(["--socket", &socket])
        .arg(scene.beside("disk"))
        .spawn()?;
    let mut said = libnbd("nbdinfo", &["--size", &uri(&socket)]);
    for _ in 0..600 {
        if qemu.try_wait()?.is_some() || said.as_ref().is_ok_and(|said| said.status.success()) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        said = libnbd("nbdinfo", &["--size", &uri(&socket)]);
    }
    // It ends with its client, unless none came.
    let _ = qemu.kill();
    qemu.wait()?;
    ensure!(succeeded(&said?)?.trim() == SIZE.to_string());
    Ok(())
}
