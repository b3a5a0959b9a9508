//! Daemon: images over TCP with TLS, and a socket that somebody else made.

use std::ffi::OsString;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, agent_binary};

use crate::authority::{Authority, Role, Valid};
use crate::scene::{libnbd, stdout, succeeded};

const MIB: u64 = 1 << 20;

fn options(arguments: &[&str]) -> DaemonOptions {
    DaemonOptions {
        arguments: arguments.iter().map(OsString::from).collect(),
        ..DaemonOptions::default()
    }
}

#[test]
fn images_are_copied_over_tcp_with_tls() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (server, client) = (directory.path().join("server"), directory.path().join("client"));
    let authority = Authority::new("authority")?;
    authority.trust(&server)?;
    authority.trust(&client)?;
    authority.issue(&server, Role::Server, Valid::Now, 1)?;
    authority.issue(&client, Role::Client, Valid::Now, 2)?;
    let server = server.to_str().context("the path is text")?;
    let daemon = Daemon::with_options(&options(&[
        "--nbd-listen=127.0.0.1:0",
        "--nbd-tls",
        server,
        "--nbd-tls-required",
    ]))?;
    let device = LoopDevice::new(8 * MIB)?;
    let content: Vec<u8> = (0..8 * MIB).map(|byte| (byte / 777).to_le_bytes()[0]).collect();
    std::fs::write(device.path(), &content)?;
    let node = device.path().to_str().context("the path is text")?;
    let snapshot = daemon.json(["snapshot", "create", node])?;
    let export = snapshot["devices"][0]["image"]["export"]
        .as_str()
        .context("an export")?;
    // The image stays, whatever becomes of the device.
    std::fs::write(device.path(), vec![0xee; 8 << 20])?;

    let status = daemon.json(["nbd", "status"])?;
    let endpoints = status["endpoints"].as_array().context("endpoints")?;
    let tcp = endpoints
        .iter()
        .find(|endpoint| endpoint["tls"] == "required")
        .context("an endpoint with TLS")?;
    let port = tcp["address"]
        .as_str()
        .and_then(|address| address.strip_prefix("127.0.0.1:"))
        .context("its port")?;
    let uri = format!(
        "nbds://localhost:{port}/{export}?tls-certificates={}",
        client.display()
    );
    let copy = directory.path().join("copy");
    let copied = libnbd("nbdcopy", &[&uri, &copy.display().to_string()])?;
    succeeded(&copied)?;
    ensure!(std::fs::read(&copy)? == content, "the copy is not the image");
    let clear = libnbd("nbdinfo", &[&format!("nbd://localhost:{port}/{export}")])?;
    ensure!(!clear.status.success(), "{clear:?}");
    Ok(())
}

#[test]
fn a_daemon_does_not_listen_for_everybody_without_tls() {
    let error = Daemon::with_options(&options(&["--nbd-listen=0.0.0.0:0"])).map(drop);
    let said = error.expect_err("it must not start").to_string();
    assert!(said.contains("no TLS") && said.contains("--nbd-tls"), "{said}");
}

/// libnbd makes the socket, starts the daemon with it as a service manager does, and is its client.
#[test]
fn a_daemon_takes_the_socket_of_a_service_manager() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let place = |name: &str| directory.path().join(name).display().to_string();
    let script = format!(
        r#"
import json, subprocess
agent = "{agent}"
run = "{run}"
h.set_full_info(True)
h.set_opt_mode(True)
h.connect_systemd_socket_activation([agent, "daemon", "--runtime-dir", run, "--storage", "{storage}",
    "--state-dir", "{state}", "--bpffs", "{bpffs}"])
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == [], names
status = json.loads(subprocess.check_output([agent, "--socket", run + "/control.sock", "nbd", "status",
    "--output", "json"]))
assert len(status["endpoints"]) == 1 and status["counters"]["connections"] == 1, status
h.opt_abort()
"#,
        agent = agent_binary()?.display(),
        run = place("run"),
        storage = place("storage"),
        state = place("state"),
        bpffs = place("bpf"),
    );
    let said = std::process::Command::new("nbdsh")
        .args(["-c", &script])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LISTEN_FDNAMES", "nbd")
        .output()?;
    // The daemon may have mounted a place for its programs.
    let _ = nix::mount::umount2(
        directory.path().join("bpf").as_path(),
        nix::mount::MntFlags::MNT_DETACH,
    );
    succeeded(&said).with_context(|| stdout(&said))?;
    Ok(())
}
