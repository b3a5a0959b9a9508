//! Devices: attached, listed, looked into, measured.

use std::os::unix::fs::FileExt as _;
use std::path::Path;

use blksnap_agent::control::client::Client;
use blksnap_tests::{Daemon, DaemonOptions, LoopDevice, run};

use crate::{MIB, fill, path, refused, tracked};

#[test]
fn a_device_is_attached_seen_and_detached() {
    let daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(64 * MIB).unwrap();
    let node = path(device.path());
    assert!(daemon.run(["status"]).unwrap().contains("no device is tracked"));
    let attached = daemon.json(["attach", node, "--block-size", "4K"]).unwrap();
    assert_eq!(attached["devices"][0]["cbt"]["block_size"], 4096);
    assert_eq!(attached["devices"][0]["cbt"]["block_count"], 16_384);
    assert_eq!(attached["devices"][0]["name"], device.name());

    fill(device.path(), 1, MIB);
    let status = daemon.json(["status", node]).unwrap();
    assert_eq!(status["devices"][0]["cbt"]["dirty_blocks"], 256);
    let counters = &status["devices"][0]["counters"];
    assert!(counters["bytes"]["write"].as_u64().unwrap() >= MIB, "{status}");
    assert_eq!(counters["run_misses"], 0);
    let text = daemon.run(["status"]).unwrap();
    assert!(
        text.contains(node) && text.contains("64 MiB") && text.contains("4 KiB"),
        "{text}"
    );

    daemon.run(["detach", node]).unwrap();
    assert!(tracked(&daemon).is_empty());
    refused(
        &daemon.try_run(["detach", node]).unwrap(),
        &[node, "not tracked", "attach"],
    );
}

#[test]
fn bad_input_is_one_line_with_the_remedy_and_leaves_nothing() {
    let daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(16 * MIB).unwrap();
    let node = path(device.path());
    let scratch = daemon.scratch();
    let file = scratch.join("file");
    std::fs::write(&file, b"no device").unwrap();
    let (file, target) = (path(&file), scratch.join("target.img"));
    let target = path(&target);
    let unknown = "01234567-89ab-cdef-0123-456789abcdef";
    let base = format!("{unknown}:1");
    let cases: &[(&[&str], &[&str])] = &[
        (
            &["attach", "/dev/no-such-device"],
            &["/dev/no-such-device", "lsblk"],
        ),
        (&["attach", "name/with/a/slash"], &["name/with/a/slash", "lsblk"]),
        (&["attach", file], &[file, "not a block device"]),
        (&["attach", "/dev/null"], &["/dev/null", "not a block device"]),
        (&["attach", "/dev"], &["/dev", "not a block device"]),
        (
            &["attach", node, "--block-size", "5000"],
            &["5000", "power of two"],
        ),
        (&["attach", node, "--block-size", "128M"], &["power of two"]),
        (&["detach", node], &[node, "not tracked", "attach"]),
        (&["status", node], &[node, "not tracked", "attach"]),
        (&["cbt", "info", node], &[node, "not tracked"]),
        (
            &["cbt", "extents", node, "--since", &base],
            &[node, "not tracked"],
        ),
        (&["cbt", "map", node], &[node, "not tracked"]),
        (&["cbt", "mark", node, "--range", "0:4K"], &[node, "not tracked"]),
        (&["snapshot", "info", unknown], &[unknown, "snapshot list"]),
        (&["snapshot", "take", unknown], &[unknown, "snapshot list"]),
        (&["snapshot", "destroy", unknown], &[unknown, "snapshot list"]),
        (&["snapshot", "add", unknown, node], &[unknown, "snapshot list"]),
        (
            &["snapshot", "create", "/dev/no-such-device"],
            &["/dev/no-such-device"],
        ),
        (&["snapshot", "create", file], &[file, "not a block device"]),
        (&["snapshot", "create", node, "--storage", file], &[file]),
        (
            &["snapshot", "create", node, "--freeze-hook", "/nonexistent/hook"],
            &["/nonexistent/hook"],
        ),
        (
            &["backup", "/dev/no-such-device", target],
            &["/dev/no-such-device"],
        ),
        (&["backup", file, target], &[file, "not a block device"]),
        (&["backup", node, "/nonexistent/dir/x.img"], &["/nonexistent/dir"]),
        (&["backup", node, "/dev"], &["/dev"]),
        (&["backup", node, node], &[node]),
        (
            &["backup", "--snapshot", unknown, node, target],
            &[unknown, "snapshot list"],
        ),
    ];
    for (arguments, expected) in cases {
        println!("{arguments:?}");
        let answer = daemon.try_run(*arguments).unwrap();
        println!("  {}", answer.stderr.trim());
        refused(&answer, expected);
        assert!(
            tracked(&daemon).is_empty(),
            "{arguments:?} left a device attached"
        );
        assert!(!Path::new(target).exists());
    }
    assert_eq!(
        daemon.json(["snapshot", "list"]).unwrap()["snapshots"],
        serde_json::json!([])
    );

    daemon.run(["attach", node]).unwrap();
    let twice = daemon.try_run(["attach", node]).unwrap();
    refused(&twice, &[node, "attached already", "status"]);
    // By another name of the same device, too.
    let link = scratch.join("link");
    std::os::unix::fs::symlink(device.path(), &link).unwrap();
    refused(
        &daemon.try_run(["attach", path(&link)]).unwrap(),
        &["attached already"],
    );
    for range in ["16M:1", "0:17M", "16777215:2"] {
        let answer = daemon.try_run(["cbt", "mark", node, "--range", range]).unwrap();
        refused(&answer, &[node, "past"]);
    }
    refused(&daemon.try_run(["cbt", "map", node]).unwrap(), &[node, "take"]);
    assert_eq!(tracked(&daemon), [node]);
}

#[test]
fn changes_are_listed_marked_and_summed_up() {
    let daemon = Daemon::start().unwrap();
    let device = LoopDevice::new(8 * MIB).unwrap();
    let node = path(device.path());
    daemon.run(["attach", node]).unwrap();
    let take = || {
        let snapshot = daemon.json(["snapshot", "create", node]).unwrap();
        let image = snapshot["devices"][0]["image"].clone();
        daemon
            .run(["snapshot", "destroy", snapshot["id"].as_str().unwrap()])
            .unwrap();
        format!(
            "{}:{}",
            image["generation"].as_str().unwrap(),
            image["number"].as_u64().unwrap()
        )
    };
    let extents = |base: &str| daemon.json(["cbt", "extents", node, "--since", base]).unwrap();
    let first = take();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(device.path())
        .unwrap();
    file.write_all_at(&[1; 4096], 65_536 * 3).unwrap();
    file.sync_all().unwrap();
    let second = take();
    let block = |at: u64, count: u64| serde_json::json!({"offset": at * 65_536, "length": count * 65_536});
    assert_eq!(extents(&first)["extents"], serde_json::json!([block(3, 1)]));
    assert_eq!(extents(&second)["extents"], serde_json::json!([]));

    // Marked ranges count at once and at the next take; each one of the list.
    let marked = daemon
        .json(["cbt", "mark", node, "--range", "0:1", "--range", "1M:65537"])
        .unwrap();
    assert_eq!(marked["blocks"], 3);
    let want = serde_json::json!([block(0, 1), block(3, 1), block(16, 2)]);
    assert_eq!(extents(&first)["extents"], want);
    take();
    assert_eq!(
        extents(&second)["extents"],
        serde_json::json!([block(0, 1), block(16, 2)])
    );

    let map = daemon.scratch().join("map");
    daemon.run(["cbt", "map", node, "--file", path(&map)]).unwrap();
    let bytes = std::fs::read(&map).unwrap();
    assert_eq!(bytes.len(), 128);
    assert_eq!(
        (bytes[0], bytes[3], bytes[16], bytes[17], bytes[18]),
        (3, 2, 3, 3, 0)
    );
    let summary = daemon.json(["cbt", "map", node]).unwrap();
    assert_eq!(
        summary["periods"][0],
        serde_json::json!({"number": 0, "blocks": 124})
    );

    let stale = format!("{}:1", "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!(extents(&stale)["full_needed"]["reason"], "generation_ended");
    let text = daemon.run(["cbt", "extents", node, "--since", &stale]).unwrap();
    assert!(text.starts_with("full needed"), "{text}");
}

#[tokio::test]
async fn metrics_are_served_on_the_socket_and_on_loopback() {
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let options = DaemonOptions {
        arguments: vec![format!("--metrics-listen=127.0.0.1:{port}").into()],
        ..DaemonOptions::default()
    };
    let daemon = Daemon::with_options(&options).unwrap();
    let device = LoopDevice::new(16 * MIB).unwrap();
    daemon.run(["attach", path(device.path())]).unwrap();
    fill(device.path(), 3, MIB);
    let id = daemon.run(["snapshot", "create", path(device.path())]).unwrap();
    let export = format!("{}/{}", id.lines().next().unwrap(), device.name());
    run("nbdcopy", [&daemon.nbd_uri(&export), "null:"]).unwrap();

    let client = Client::new(&daemon.control_socket());
    let text = String::from_utf8(client.get_bytes("/metrics").await.unwrap().to_vec()).unwrap();
    let name = device.name();
    let value = |series: &str| -> f64 {
        text.lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no {series} in\n{text}"))
            .parse()
            .unwrap()
    };
    let written = format!("blksnap_device_written_bytes_total{{device=\"{name}\",operation=\"write\"}}");
    assert!(value(&written) >= MIB as f64);
    for zero in [
        format!("blksnap_device_ring_full_total{{device=\"{name}\"}}"),
        format!("blksnap_device_run_misses_total{{device=\"{name}\"}}"),
        format!("blksnap_device_generation_resets_total{{device=\"{name}\",reason=\"run_missed\"}}"),
        "blksnap_takes_total{result=\"failed\"}".to_owned(),
        "blksnap_nbd_errors_total{error=\"eio\"}".to_owned(),
    ] {
        assert_eq!(value(&zero), 0.0, "{zero}");
    }
    assert_eq!(value("blksnap_snapshots{state=\"taken\"}"), 1.0);
    assert_eq!(value("blksnap_takes_total{result=\"succeeded\"}"), 1.0);
    assert!(value("blksnap_difference_storage_bytes") >= MIB as f64);
    assert!(value("blksnap_nbd_requests_total{command=\"read\"}") >= 1.0);
    assert!(value("blksnap_nbd_read_bytes_total") >= MIB as f64);
    assert!(text.ends_with("# EOF\n"));

    // Over TCP there are the metrics and nothing else.
    let get = |path: &str| {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = get("/metrics");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("application/openmetrics-text"));
    assert!(answer.contains("blksnap_build_info"));
    assert!(get("/v1/devices").starts_with("HTTP/1.1 404"));

    let answer = daemon
        .try_run([
            "daemon",
            "--metrics-listen=0.0.0.0:9911",
            "--runtime-dir",
            "/nonexistent/run",
        ])
        .unwrap();
    refused(&answer, &["loopback", "127.0.0.1"]);
}
