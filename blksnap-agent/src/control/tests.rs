//! Server and client against each other over a real socket, with a service that answers from a script.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use tokio_util::sync::CancellationToken;

use super::api;
use super::client::{Client, ClientError};
use super::error::{ApiError, Code};
use super::server::{MapPieces, Service, router, serve_unix};
use super::stream::Reporter;
use crate::cbt::ChangedReport;
use crate::nbd::socket::listen_on;
use crate::units::{Generation, SnapshotId};

#[derive(Default)]
struct Script {
    cancelled: AtomicBool,
}

fn refuse<T>(what: &str) -> Result<T, ApiError> {
    Err(ApiError::new(Code::NotAttached, what, "attach it"))
}

impl Service for Script {
    fn version(&self) -> api::Version {
        api::Version {
            name: "script".to_owned(),
            version: "0".to_owned(),
            api: api::API_VERSION,
            abi: 1,
            kernel: "none".to_owned(),
            pid: 1,
        }
    }
    fn devices(&self) -> Result<api::Devices, ApiError> {
        panic!("a handler that panics")
    }
    fn attach(&self, request: &api::Attach) -> Result<api::DeviceStatus, ApiError> {
        refuse(&format!("attach {}", request.device))
    }
    fn plan(&self, request: &api::Attach) -> Result<api::AttachPlan, ApiError> {
        refuse(&format!("plan {}", request.device))
    }
    fn detach(&self, _: &api::DeviceName) -> Result<(), ApiError> {
        Ok(())
    }
    fn cbt_info(&self, request: &api::DeviceName) -> Result<api::CbtInfo, ApiError> {
        refuse(&request.device)
    }
    fn cbt_extents(&self, _: &api::ChangesQuery) -> Result<ChangedReport, ApiError> {
        refuse("extents")
    }
    fn cbt_map(&self, _: &api::MapQuery) -> Result<MapPieces, ApiError> {
        let pieces: [&[u8]; 2] = [&[0, 1], &[2, 255]];
        Ok(Box::new(pieces.into_iter().map(Bytes::from_static)))
    }
    fn cbt_heat(&self, _: &api::HeatQuery) -> Result<api::Heat, ApiError> {
        refuse("heat")
    }
    fn cbt_mark(&self, request: &api::Mark) -> Result<api::Marked, ApiError> {
        Ok(api::Marked {
            blocks: request.ranges.len() as u64,
            ranges: request.ranges.len() as u64,
            bytes: 0,
        })
    }
    fn snapshots(&self) -> Result<api::Snapshots, ApiError> {
        Ok(api::Snapshots::default())
    }
    fn snapshot(&self, _: SnapshotId) -> Result<api::Snapshot, ApiError> {
        refuse("snapshot")
    }
    fn snapshot_create(&self, _: &api::CreateSnapshot) -> Result<api::Snapshot, ApiError> {
        refuse("create")
    }
    fn snapshot_add(&self, _: SnapshotId, _: &api::DeviceName) -> Result<api::Snapshot, ApiError> {
        refuse("add")
    }
    /// Works until it is told to stop.
    fn snapshot_take(
        &self,
        _: SnapshotId,
        _: &api::Limits,
        reporter: &Reporter,
    ) -> Result<api::Snapshot, ApiError> {
        let told = Arc::new(AtomicBool::new(false));
        let _guard = reporter.on_cancel({
            let told = Arc::clone(&told);
            move || told.store(true, Ordering::SeqCst)
        });
        let mut done = 0;
        while !told.load(Ordering::SeqCst) {
            done += 1;
            reporter.progress(&format!("step {done}"), done, 0);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(reporter.cancel().is_cancelled());
        self.cancelled.store(true, Ordering::SeqCst);
        Err(ApiError::new(Code::Cancelled, "take", ""))
    }
    fn snapshot_create_and_take(
        &self,
        _: &api::TakeSnapshot,
        _: &Reporter,
    ) -> Result<api::Snapshot, ApiError> {
        refuse("create and take")
    }
    fn snapshot_append(&self, _: SnapshotId, _: &api::AppendStorage) -> Result<api::Snapshot, ApiError> {
        refuse("append")
    }
    fn snapshot_storage(&self, _: SnapshotId) -> Result<api::StorageExtents, ApiError> {
        refuse("storage")
    }
    fn snapshot_wait(
        &self,
        _: SnapshotId,
        _: &api::WaitEvent,
        _: &Reporter,
    ) -> Result<api::WaitedEvent, ApiError> {
        refuse("wait")
    }
    fn served(&self) -> Result<api::ServedDevices, ApiError> {
        refuse("served")
    }
    fn serve(&self, _: &api::Serve) -> Result<api::ServedDevice, ApiError> {
        refuse("serve")
    }
    fn unserve(&self, _: &str) -> Result<(), ApiError> {
        refuse("unserve")
    }
    fn snapshot_destroy(&self, _: SnapshotId) -> Result<(), ApiError> {
        Ok(())
    }
    fn backup(&self, request: &api::Backup, reporter: &Reporter) -> Result<api::BackupResult, ApiError> {
        for done in 0..=1000 {
            reporter.progress("copy", done, 1000);
        }
        Ok(api::BackupResult {
            device: request.device.clone(),
            target: request.target.clone(),
            kind: api::BackupKind::Full {
                reason: None,
                message: None,
            },
            size: 1000,
            copied_bytes: 1000,
            rounds: 1,
            consistency: api::Consistency::Crash,
            frozen_seconds: 0.0,
            seconds: 0.5,
            taken: api::Base {
                generation: Generation::new(uuid::Uuid::nil()),
                number: 1,
            },
        })
    }
    fn nbd(&self) -> Result<api::NbdStatus, ApiError> {
        Ok(api::NbdStatus::default())
    }
    fn metrics(&self) -> Result<String, ApiError> {
        Ok("# EOF\n".to_owned())
    }
}

struct Running {
    script: Arc<Script>,
    client: Client,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
    _name: crate::nbd::socket::SocketName,
    _directory: tempfile::TempDir,
}

fn start() -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let script = Arc::new(Script::default());
    let stop = CancellationToken::new();
    let (listener, name) = listen_on(&path).unwrap();
    let router = router(Arc::<Script>::clone(&script), stop.clone());
    Running {
        script,
        client: Client::new(&path),
        server: tokio::spawn(serve_unix(listener, router, stop.clone())),
        stop,
        _name: name,
        _directory: directory,
    }
}

fn backup() -> api::Backup {
    api::Backup {
        device: "/dev/x".to_owned(),
        target: "/t".to_owned(),
        ..api::Backup::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_and_errors_pass_as_they_are() {
    let running = start();
    let client = &running.client;
    let version: api::Version = client.get("/v1/version").await.unwrap();
    assert_eq!(version.name, "script");
    assert_eq!(
        &client.get_bytes("/v1/cbt/map?device=/dev/x").await.unwrap()[..],
        [0, 1, 2, 255]
    );
    client
        .delete(&format!("/v1/snapshots/{}", uuid::Uuid::nil()))
        .await
        .unwrap();
    let attach = api::Attach {
        device: "/dev/x".to_owned(),
        ..api::Attach::default()
    };
    let refused = client
        .post::<_, api::DeviceStatus>("/v1/devices/attach", &attach)
        .await;
    let Err(ClientError::Refused(body)) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(
        (&*body.code, body.to_string()),
        ("not_attached", "attach /dev/x: attach it".to_owned())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_answered_in_json() {
    let running = start();
    let client = &running.client;
    for (path, code) in [
        ("/v1/nothing", "unknown_request"),
        ("/v1/devices/attach", "unknown_request"),
        ("/v1/cbt", "invalid_request"),
        ("/v1/cbt?device=/dev/x&what=1", "invalid_request"),
        (
            "/v1/cbt/extents?device=/dev/x&generation=1&number=1",
            "invalid_request",
        ),
        ("/v1/snapshots/no-uuid", "unknown_snapshot"),
        // The handler panics: the daemon lives on and says so.
        ("/v1/devices", "io"),
    ] {
        let answer = client.get::<serde_json::Value>(path).await;
        assert!(
            matches!(&answer, Err(ClientError::Refused(body)) if body.code == code),
            "{path}: {answer:?}"
        );
    }
    let answer = client
        .post::<_, api::Empty>("/v1/devices/detach", &serde_json::json!({"path": 1}))
        .await;
    assert!(matches!(&answer, Err(ClientError::Refused(body)) if body.code == "invalid_request"));
}

#[tokio::test(flavor = "multi_thread")]
async fn work_reports_progress_and_its_result() {
    let running = start();
    let mut seen = Vec::new();
    let result: api::BackupResult = running
        .client
        .run("/v1/backups", &backup(), |progress| seen.push(progress.done))
        .await
        .unwrap();
    assert_eq!(result.copied_bytes, 1000);
    // The first and the last are always sent, those between at most every 100 ms.
    assert_eq!((seen.first(), seen.last()), (Some(&0), Some(&1000)));
    assert!(seen.len() < 500, "{}", seen.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_its_work() {
    let running = start();
    let path = format!("/v1/snapshots/{}/take", uuid::Uuid::nil());
    let (sender, began) = tokio::sync::oneshot::channel();
    let mut sender = Some(sender);
    let client = running.client.clone();
    let work = tokio::spawn(async move {
        client
            .run::<_, api::Snapshot>(&path, &api::Limits::default(), |_| {
                if let Some(sender) = sender.take() {
                    let _ = sender.send(());
                }
            })
            .await
    });
    began.await.unwrap();
    assert!(!running.script.cancelled.load(Ordering::SeqCst));
    work.abort();
    while !running.script.cancelled.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_cancels_work_and_still_answers_it() {
    let running = start();
    let stop = running.stop.clone();
    let path = format!("/v1/snapshots/{}/take", uuid::Uuid::nil());
    let answer = running
        .client
        .run::<_, api::Snapshot>(&path, &api::Limits::default(), |_| stop.cancel())
        .await;
    assert!(matches!(&answer, Err(ClientError::Refused(body)) if body.code == "cancelled"));
    running.server.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_daemon_is_said_with_the_remedy() {
    let error = Client::new(Path::new("/nonexistent/control.sock"))
        .get::<api::Version>("/v1/version")
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("not running") && error.contains("blksnap-agent daemon"),
        "{error}"
    );
}
