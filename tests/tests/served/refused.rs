//! What is refused: with the error number of the original's interface, in one line, with a remedy.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::{Answer, LoopDevice, run};
use nix::errno::Errno;
use serde_json::{Value, json};

use crate::scene::{MIB, Scene, same, text};

/// An error is one line of ours with these texts, and nothing on standard output.
fn refused(answer: &Answer, expected: &[&str]) -> Result<()> {
    ensure!(answer.code > 0 && answer.stdout.is_empty(), "{answer:?}");
    ensure!(answer.stderr.lines().count() == 1, "{answer:?}");
    ensure!(answer.stderr.starts_with("blksnap-agent: "), "{answer:?}");
    for part in expected {
        ensure!(answer.stderr.contains(part), "no {part:?} in {answer:?}");
    }
    Ok(())
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

/// The request is refused with this error number.
fn fails(scene: &Scene, request: (&str, &str), body: &Value, errno: Errno) -> Result<()> {
    let found = scene.errno(request.0, request.1, body)?;
    ensure!(
        found == errno as i64,
        "{request:?} {body}: {found} instead of {errno}"
    );
    Ok(())
}

#[test]
fn what_can_not_be_served() -> Result<()> {
    let scene = Scene::new()?;
    let path = scene.serve("disk", MIB, 1, &[])?;
    let serve = |arguments: &[&str]| scene.daemon.try_run(["serve"].iter().chain(arguments));
    let errno = |body: Value, errno| fails(&scene, ("POST", "/v1/served"), &body, errno);
    refused(
        &serve(&[&show(&path)])?,
        &["served as disk", "`blksnap-agent served`"],
    )?;
    errno(json!({"path": show(&path)}), Errno::EALREADY)?;
    // By another name it is the same file.
    let link = scene.beside("link");
    std::os::unix::fs::symlink(&path, &link)?;
    refused(&serve(&[&show(&link), "--name=other"])?, &["served as disk"])?;
    let other = scene.disk("other", MIB, 2)?;
    refused(
        &serve(&[&show(&other), "--name=disk"])?,
        &["another disk is served", "--name"],
    )?;
    for name in ["", "a/b", ".hidden", "with space", &"n".repeat(65)] {
        let option = format!("--name={name}");
        refused(&serve(&[&show(&other), &option])?, &["1 to 64", "--name"])?;
        errno(json!({"path": show(&other), "name": name}), Errno::EINVAL)?;
    }
    let missing = show(&scene.beside("missing"));
    refused(&serve(&[&missing])?, &["No such file", "give the path"])?;
    errno(json!({"path": missing}), Errno::ENODEV)?;
    refused(&serve(&[&show(scene.daemon.scratch())])?, &[])?;
    refused(&serve(&["/dev/null"])?, &[])?;
    for option in ["--block-size=3K", "--chunk-size=3K", "--chunk-size=1T"] {
        refused(&serve(&[&show(&other), option])?, &[])?;
    }
    let odd = scene.disk("odd", MIB + 100, 3)?;
    refused(&serve(&[&show(&odd)])?, &["multiple of 512"])?;
    // The lab tries it where the kernel has it; here it depends on what the agent was built with.
    if !Path::new("/dev/ublk-control").exists() {
        let answer = serve(&[&show(&other), "--ublk"])?;
        let built = !answer.stderr.contains("built without ublk");
        let remedy = if built {
            "modprobe ublk_drv"
        } else {
            "--features ublk"
        };
        refused(&answer, &["serve", remedy])?;
        errno(json!({"path": show(&other), "ublk": true}), Errno::EOPNOTSUPP)?;
    }
    // None of these left anything behind.
    let list = scene.daemon.json(["served"])?;
    ensure!(list["served"].as_array().context("a list")?.len() == 1, "{list}");
    scene.serve_path(&other, &["--chunk-size=32K", "--block-size=4K"])?;
    refused(
        &scene.daemon.try_run(["unserve", "nobody"])?,
        &["no such device", "`blksnap-agent served`"],
    )?;
    fails(
        &scene,
        ("DELETE", "/v1/served/nobody"),
        &Value::Null,
        Errno::ENOENT,
    )
}

#[test]
fn what_others_use_is_not_served() -> Result<()> {
    // Dropped after the daemon, which has it open.
    let mut device = LoopDevice::new(64 * MIB)?;
    let scene = Scene::new()?;
    let path = scene.disk("locked", 4 * MIB, 1)?;
    let socket = scene.beside("qemu.sock");
    let mut qemu = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=disk,filename={},locking=on",
            path.display()
        ))
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", socket.display()))
        .args(["--export", "type=nbd,id=disk,node-name=disk,writable=on"])
        .stdin(Stdio::null())
        .spawn()
        .context("start qemu-storage-daemon")?;
    let begun = Instant::now();
    while !socket.exists() && begun.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(20));
    }
    let busy = scene.daemon.try_run(["serve", &show(&path)]);
    let errno = fails(
        &scene,
        ("POST", "/v1/served"),
        &json!({"path": show(&path)}),
        Errno::EBUSY,
    );
    qemu.kill()?;
    qemu.wait()?;
    refused(&busy?, &[&show(&path)])?;
    errno?;
    scene.serve_path(&path, &[])?;
    // The other way round qemu is kept out.
    let qemu = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 4k", &show(&path)])
        .output()?;
    ensure!(!qemu.status.success(), "{qemu:?}");
    // A device with a mounted file system.
    device.mkfs("ext4")?;
    device.mount()?;
    let node = show(device.path());
    refused(&scene.daemon.try_run(["serve", &node])?, &[&node])?;
    fails(
        &scene,
        ("POST", "/v1/served"),
        &json!({"path": node}),
        Errno::EBUSY,
    )?;
    device.unmount()?;
    scene.daemon.run(["serve", &node])?;
    // Nobody mounts it while it is served.
    let target = scene.beside("mount");
    std::fs::create_dir(&target)?;
    ensure!(
        run("mount", [device.path(), &target]).is_err(),
        "mounted while it is served"
    );
    scene.daemon.run(["unserve", &device.name()])?;
    device.mount()?;
    Ok(())
}

#[test]
fn snapshots_that_can_not_be() -> Result<()> {
    // Dropped after the daemon, which tracks it.
    let device = LoopDevice::new(16 * MIB)?;
    let scene = Scene::new()?;
    let run = |arguments: &[&str]| scene.daemon.try_run(["snapshot"].iter().chain(arguments));
    let path = show(&scene.serve("disk", 4 * MIB, 1, &[])?);
    let unknown = uuid::Uuid::new_v4().to_string();
    for command in ["take", "info", "destroy", "storage", "wait"] {
        refused(
            &run(&[command, &unknown])?,
            &["no snapshot", "`blksnap-agent snapshot list`"],
        )?;
    }
    refused(&run(&["append", &unknown, "memory:1M"])?, &["no snapshot"])?;
    refused(&run(&["add", &unknown, &path])?, &["no snapshot"])?;
    let at = |what: &str| format!("/v1/snapshots/{unknown}{what}");
    fails(&scene, ("GET", &at("")), &Value::Null, Errno::ESRCH)?;
    fails(&scene, ("DELETE", &at("")), &Value::Null, Errno::ESRCH)?;
    fails(
        &scene,
        ("POST", &at("/devices")),
        &json!({"device": path}),
        Errno::ESRCH,
    )?;
    fails(
        &scene,
        ("POST", &at("/storage")),
        &json!({"storage": "memory:1M"}),
        Errno::ESRCH,
    )?;
    let empty = text(&scene.daemon.json(["snapshot", "create"])?["id"])?;
    refused(
        &run(&["take", &empty])?,
        &["no device", "`blksnap-agent snapshot add`"],
    )?;
    scene.daemon.run(["snapshot", "add", &empty, &path])?;
    refused(&run(&["add", &empty, &path])?, &["is in snapshot"])?;
    let devices = format!("/v1/snapshots/{empty}/devices");
    fails(
        &scene,
        ("POST", &devices),
        &json!({"device": path}),
        Errno::EALREADY,
    )?;
    scene.daemon.run(["snapshot", "take", &empty])?;
    refused(&run(&["take", &empty])?, &["taken already", "create another one"])?;
    refused(&run(&["add", &empty, &path])?, &["taken already"])?;
    fails(
        &scene,
        ("POST", &devices),
        &json!({"device": path}),
        Errno::EALREADY,
    )?;
    // While it is held.
    refused(
        &scene.daemon.try_run(["unserve", "disk"])?,
        &["1 snapshots hold it", "destroy"],
    )?;
    fails(&scene, ("DELETE", "/v1/served/disk"), &Value::Null, Errno::EBUSY)?;
    // Storage that is none.
    for (storage, why) in [
        ("memory:0", "0 bytes"),
        ("memory:much", "much"),
        ("/dev/null", ""),
        ("/nonexistent/folder/file", ""),
    ] {
        refused(&run(&["append", &empty, storage])?, &[why])?;
        refused(&run(&["create", &path, "--storage", storage])?, &[why])?;
    }
    let storage = format!("/v1/snapshots/{empty}/storage");
    fails(
        &scene,
        ("POST", &storage),
        &json!({"storage": "memory:0"}),
        Errno::EINVAL,
    )?;
    // A disk that is served, as the storage of its own snapshot.
    refused(&run(&["create", &path, "--storage", &path])?, &[])?;
    // Tracked devices and served ones have no common instant.
    let node = show(device.path());
    refused(
        &run(&["create", &path, &node])?,
        &["can't be in snapshot", "one snapshot for each kind"],
    )?;
    let body = json!({"devices": [path, node]});
    fails(&scene, ("POST", "/v1/snapshots"), &body, Errno::EINVAL)?;
    let list = scene.daemon.json(["snapshot", "list"])?;
    ensure!(
        list["snapshots"].as_array().context("a list")?.len() == 1,
        "{list}"
    );
    scene.daemon.run(["snapshot", "destroy", &empty])?;
    scene.daemon.run(["unserve", "disk"])?;
    ensure!(scene.client("disk").is_err(), "still exported");
    Ok(())
}

#[test]
fn waiting_ends_in_time_or_with_the_snapshot() -> Result<()> {
    let scene = Scene::new()?;
    let path = scene.serve("disk", MIB, 1, &[])?;
    let taken = scene.snapshot(&[&path], &["--storage=memory:64M", "--minimum=1M"])?;
    // Storage is wanted from the beginning.
    let first = scene
        .daemon
        .json(["snapshot", "wait", &taken.id, "--timeout=60000"])?;
    ensure!(
        first["event"] == "low_free_space" && first["code"] == 0,
        "{first}"
    );
    ensure!(first["requested_nr_sect"] == 2048, "{first}");
    let none = scene
        .daemon
        .try_run(["snapshot", "wait", &taken.id, "--timeout=50", "--output=json"])?;
    ensure!(none.code == 3, "{none:?}");
    ensure!(
        serde_json::from_str::<Value>(&none.stdout)?["event"] == "none",
        "{none:?}"
    );
    let waiting = scene
        .daemon
        .command(["snapshot", "wait", &taken.id, "--timeout=600000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let watching = scene
        .daemon
        .command(["snapshot", "watch", &taken.id])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    sleep(Duration::from_millis(300));
    scene.destroy(&taken)?;
    for child in [waiting, watching] {
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            !output.status.success() && output.status.code() != Some(3),
            "{output:?}"
        );
        ensure!(
            said.contains("no snapshot") && said.lines().count() == 1,
            "{said}"
        );
    }
    Ok(())
}

#[test]
fn every_listing_is_json() -> Result<()> {
    let scene = Scene::new()?;
    let path = scene.serve("disk", 4 * MIB, 1, &[])?;
    let mut listings = vec![vec!["served"], vec!["snapshot", "list"], vec!["status"]];
    for listing in &listings {
        ensure!(scene.daemon.json(listing)?.is_object(), "{listing:?}");
    }
    let taken = scene.snapshot(&[&path], &[])?;
    let node = show(&path);
    listings.extend([
        vec!["snapshot", "info", &taken.id],
        vec!["cbt", "info", &node],
        vec!["cbt", "map", &node],
        vec!["snapshot", "wait", &taken.id],
    ]);
    for listing in &listings {
        let value = scene.daemon.json(listing)?;
        ensure!(value.is_object() || value.is_array(), "{listing:?}: {value}");
        if listing[1..] != ["wait", &taken.id][..] {
            let shown = scene.daemon.run(listing)?;
            ensure!(!shown.trim().is_empty(), "{listing:?}");
        }
    }
    let info = scene.info(&taken.id)?;
    ensure!(info["filter"] == "served" && info["state"] == "taken", "{info}");
    ensure!(info["devices"][0]["image"]["consistency"] == "crash", "{info}");
    let served = scene.served("disk")?;
    ensure!(served["snapshots"] == 1 && served["size"] == 4 * MIB, "{served}");
    same(&scene.image(&taken, "disk")?, &std::fs::read(&path)?, "the image")
}
