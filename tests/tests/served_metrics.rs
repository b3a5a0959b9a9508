//! Metrics of served devices and of the snapshots that hold them, as they are scraped.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do, by a panic")]

use blksnap_agent::control::client::Client;
use blksnap_tests::{Daemon, run};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A scraped text.
struct Scraped(String);

impl Scraped {
    async fn of(daemon: &Daemon) -> Self {
        let client = Client::new(&daemon.control_socket());
        let text = client.get_bytes("/metrics").await.unwrap();
        Self(String::from_utf8(text.to_vec()).unwrap())
    }

    #[track_caller]
    fn value(&self, series: &str) -> f64 {
        let of_series = |line: &str| -> Option<f64> { line.strip_prefix(series)?.trim().parse().ok() };
        let found = self.0.lines().find_map(of_series);
        found.unwrap_or_else(|| panic!("no {series} in\n{}", self.0))
    }
}

#[tokio::test]
async fn held_writes_and_storage_are_counted() {
    let daemon = Daemon::start().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("web.img");
    std::fs::File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let image = image.to_str().unwrap();
    daemon.run(["serve", image]).unwrap();
    let device = "{device=\"web.img\"}";

    // Before anything has happened the series are there, so that an alert can be written.
    let scraped = Scraped::of(&daemon).await;
    assert_eq!(scraped.value("blksnap_served_devices"), 1.0);
    for name in [
        "held_writes_total",
        "hold_seconds_count",
        "preserved_bytes",
        "store_queue_depth",
    ] {
        assert_eq!(scraped.value(&format!("blksnap_{name}{device}")), 0.0, "{name}");
    }

    let create = |storage: &str| -> Value {
        daemon
            .json(["snapshot", "create", image, "--storage", storage])
            .unwrap()
    };
    let kept = create(directory.path().to_str().unwrap());
    let small = create("memory:1M");
    let write = |what: &str| run("qemu-io", ["-f", "raw", "-c", what, &daemon.nbd_uri("web.img")]).unwrap();
    write("write -P 7 0 8M");
    // Written again: nothing has to be kept.
    write("write -P 8 0 8M");

    let scraped = Scraped::of(&daemon).await;
    let held = scraped.value(&format!("blksnap_held_writes_total{device}"));
    assert!(held >= 1.0, "{held}");
    assert_eq!(
        scraped.value(&format!("blksnap_hold_seconds_count{device}")),
        held
    );
    let all = "{le=\"+Inf\",device=\"web.img\"}";
    assert_eq!(scraped.value(&format!("blksnap_hold_seconds_bucket{all}")), held);
    assert!(scraped.value(&format!("blksnap_hold_seconds_sum{device}")) > 0.0);
    let eight = 8.0 * MIB as f64;
    assert!(scraped.value(&format!("blksnap_preserved_bytes{device}")) >= eight);

    let of = |snapshot: &Value| format!("{{snapshot=\"{}\"}}", snapshot["id"].as_str().unwrap());
    assert_eq!(
        scraped.value(&format!("blksnap_storage_used_bytes{}", of(&kept))),
        eight
    );
    assert!(scraped.value(&format!("blksnap_storage_free_bytes{}", of(&kept))) > 0.0);
    // What has no room for all is lost, and says so; the device has not noticed.
    assert!(scraped.value(&format!("blksnap_storage_used_bytes{}", of(&small))) <= MIB as f64);
    let events = |snapshot: &Value| {
        let id = snapshot["id"].as_str().unwrap();
        scraped.value(&format!(
            "blksnap_snapshot_events_total{{snapshot=\"{id}\",code=\"corrupted\"}}"
        ))
    };
    assert_eq!((events(&kept), events(&small)), (0.0, 1.0));

    for snapshot in [&kept, &small] {
        daemon
            .run(["snapshot", "destroy", snapshot["id"].as_str().unwrap()])
            .unwrap();
    }
    let scraped = Scraped::of(&daemon).await;
    assert!(
        !scraped.0.contains("blksnap_storage_used_bytes{"),
        "{}",
        scraped.0
    );
    assert_eq!(scraped.value(&format!("blksnap_preserved_bytes{device}")), 0.0);
    assert_eq!(scraped.value(&format!("blksnap_held_writes_total{device}")), held);
}
