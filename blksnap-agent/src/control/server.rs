//! Server: the routes of the control interface.
//!
//! A handler takes the request apart, runs the [`Service`] on a thread for blocking work, and puts the answer
//! together. What can be wrong with a request is answered as JSON too, also an unknown route.

use std::convert::Infallible;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::header;
use axum::http::request::Parts;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use super::api;
use super::error::{ApiError, Code};
use super::stream::{self, Reporter};
use crate::cbt::{ChangedForm, ChangedReport};
use crate::units::SnapshotId;

/// Largest request in bytes: room for half a million ranges of `cbt mark`.
const REQUEST_BYTES: usize = 32 << 20;

/// Content type of what `/metrics` answers.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bytes of a map, made as they are sent.
pub type MapPieces = Box<dyn Iterator<Item = Bytes> + Send>;

/// What the daemon does for its clients. Every call may block.
pub trait Service: Send + Sync + 'static {
    /// Who answers.
    fn version(&self) -> api::Version;
    /// All tracked devices.
    ///
    /// # Errors
    /// As for all calls: an [`ApiError`] says what was tried on what.
    fn devices(&self) -> Result<api::Devices, ApiError>;
    /// Begins to track a device.
    ///
    /// # Errors
    /// No block device, attached already, or the kernel refuses.
    fn attach(&self, request: &api::Attach) -> Result<api::DeviceStatus, ApiError>;
    /// What an attach would do, without doing it.
    ///
    /// # Errors
    /// No block device, or it would be refused for its size.
    fn plan(&self, request: &api::Attach) -> Result<api::AttachPlan, ApiError>;
    /// Ends to track a device.
    ///
    /// # Errors
    /// Not attached, or in use by a snapshot.
    fn detach(&self, request: &api::DeviceName) -> Result<(), ApiError>;
    /// The change map of a device.
    ///
    /// # Errors
    /// Not attached.
    fn cbt_info(&self, request: &api::DeviceName) -> Result<api::CbtInfo, ApiError>;
    /// What changed between a base and the last take.
    ///
    /// # Errors
    /// Not attached, or never taken.
    fn cbt_extents(&self, request: &api::ChangesQuery) -> Result<ChangedReport, ApiError>;
    /// Bytes of the map of the last take.
    ///
    /// # Errors
    /// Not attached, never taken, or out of range.
    fn cbt_map(&self, request: &api::MapQuery) -> Result<MapPieces, ApiError>;
    /// Where and how recently a device changed.
    ///
    /// # Errors
    /// Not attached.
    fn cbt_heat(&self, request: &api::HeatQuery) -> Result<api::Heat, ApiError>;
    /// Marks ranges as changed.
    ///
    /// # Errors
    /// Not attached, or out of range.
    fn cbt_mark(&self, request: &api::Mark) -> Result<api::Marked, ApiError>;
    /// All snapshots.
    ///
    /// # Errors
    /// As for all calls.
    fn snapshots(&self) -> Result<api::Snapshots, ApiError>;
    /// One snapshot.
    ///
    /// # Errors
    /// Unknown.
    fn snapshot(&self, id: SnapshotId) -> Result<api::Snapshot, ApiError>;
    /// Creates a snapshot.
    ///
    /// # Errors
    /// A device is not attached, or the storage can't be used.
    fn snapshot_create(&self, request: &api::CreateSnapshot) -> Result<api::Snapshot, ApiError>;
    /// Adds a device to a snapshot that is not taken yet.
    ///
    /// # Errors
    /// Unknown, taken, or the device is in it already.
    fn snapshot_add(&self, id: SnapshotId, request: &api::DeviceName) -> Result<api::Snapshot, ApiError>;
    /// Takes a snapshot.
    ///
    /// # Errors
    /// No device, taken already, does not converge, no space, or cancelled.
    fn snapshot_take(
        &self,
        id: SnapshotId,
        limits: &api::Limits,
        reporter: &Reporter,
    ) -> Result<api::Snapshot, ApiError>;
    /// Creates a snapshot and takes it. One that can't be taken is destroyed again.
    ///
    /// # Errors
    /// As of both.
    fn snapshot_create_and_take(
        &self,
        request: &api::TakeSnapshot,
        reporter: &Reporter,
    ) -> Result<api::Snapshot, ApiError>;
    /// Releases a snapshot.
    ///
    /// # Errors
    /// Unknown.
    fn snapshot_destroy(&self, id: SnapshotId) -> Result<(), ApiError>;

    /// Adds difference storage to a snapshot.
    ///
    /// # Errors
    /// See [`crate::snapshot::Snapshots::append`].
    fn snapshot_append(
        &self,
        id: SnapshotId,
        request: &api::AppendStorage,
    ) -> Result<api::Snapshot, ApiError>;

    /// Where the difference storage of a snapshot is.
    ///
    /// # Errors
    /// See [`crate::snapshot::Snapshots::storage_extents`].
    fn snapshot_storage(&self, id: SnapshotId) -> Result<api::StorageExtents, ApiError>;

    /// Waits for an event of a snapshot.
    ///
    /// # Errors
    /// No such snapshot, or the client has gone.
    fn snapshot_wait(
        &self,
        id: SnapshotId,
        request: &api::WaitEvent,
        reporter: &Reporter,
    ) -> Result<api::WaitedEvent, ApiError>;

    /// The devices that are served.
    ///
    /// # Errors
    /// None now.
    fn served(&self) -> Result<api::ServedDevices, ApiError>;

    /// Serves a disk.
    ///
    /// # Errors
    /// It can't be opened, is in use, or the name is taken.
    fn serve(&self, request: &api::Serve) -> Result<api::ServedDevice, ApiError>;

    /// Ends serving a disk.
    ///
    /// # Errors
    /// It is not served, or snapshots hold it.
    fn unserve(&self, name: &str) -> Result<(), ApiError>;
    /// Makes or renews a raw image file.
    ///
    /// # Errors
    /// As [`Service::snapshot_take`], and what can be wrong with the file.
    fn backup(&self, request: &api::Backup, reporter: &Reporter) -> Result<api::BackupResult, ApiError>;
    /// The NBD server.
    ///
    /// # Errors
    /// As for all calls.
    fn nbd(&self) -> Result<api::NbdStatus, ApiError>;
    /// All metrics as OpenMetrics text.
    ///
    /// # Errors
    /// They can't be formatted.
    fn metrics(&self) -> Result<String, ApiError>;
}

#[derive(Clone)]
struct Context {
    service: Arc<dyn Service>,
    stop: CancellationToken,
}

type Answer<T> = Result<Json<T>, ApiError>;

async fn blocking<T, W>(context: Context, work: W) -> Result<T, ApiError>
where
    T: Send + 'static,
    W: FnOnce(&dyn Service) -> Result<T, ApiError> + Send + 'static,
{
    tokio::task::spawn_blocking(move || work(&*context.service))
        .await
        .unwrap_or_else(|error| {
            Err(ApiError::new(
                Code::Io,
                format!("run the request: {error}"),
                "see the log of the daemon",
            ))
        })
}

async fn answer<T, W>(context: Context, work: W) -> Answer<T>
where
    T: Serialize + Send + 'static,
    W: FnOnce(&dyn Service) -> Result<T, ApiError> + Send + 'static,
{
    blocking(context, work).await.map(Json)
}

/// A JSON body; a wrong one is answered as [`ApiError`].
struct Body<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let Json(value) = Json::from_request(request, state).await.map_err(|error| {
            ApiError::new(
                Code::InvalidRequest,
                format!("read the request: {}", error.body_text()),
                "send JSON with its content type: docs/control.md has examples",
            )
        })?;
        Ok(Self(value))
    }
}

/// A query string; a wrong one is answered as [`ApiError`].
struct Asked<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Query(value) = Query::from_request_parts(parts, state).await.map_err(|error| {
            ApiError::new(
                Code::InvalidRequest,
                format!("read the query: {}", error.body_text()),
                "name the device, and what else the request takes",
            )
        })?;
        Ok(Self(value))
    }
}

fn snapshot_id(text: &str) -> Result<SnapshotId, ApiError> {
    text.parse().map_err(|_| {
        ApiError::new(
            Code::UnknownSnapshot,
            format!("find snapshot {text}: this is no snapshot id"),
            "`blksnap-agent snapshot list` shows the ids",
        )
    })
}

async fn version(State(context): State<Context>) -> Answer<api::Version> {
    answer(context, |service| Ok(service.version())).await
}

async fn devices(State(context): State<Context>) -> Answer<api::Devices> {
    answer(context, Service::devices).await
}

async fn attach(
    State(context): State<Context>,
    Body(request): Body<api::Attach>,
) -> Answer<api::DeviceStatus> {
    answer(context, move |service| service.attach(&request)).await
}

async fn plan(State(context): State<Context>, Body(request): Body<api::Attach>) -> Answer<api::AttachPlan> {
    answer(context, move |service| service.plan(&request)).await
}

async fn detach(State(context): State<Context>, Body(request): Body<api::DeviceName>) -> Answer<api::Empty> {
    answer(context, move |service| {
        service.detach(&request).map(|()| api::Empty {})
    })
    .await
}

async fn cbt_info(
    State(context): State<Context>,
    Asked(request): Asked<api::DeviceName>,
) -> Answer<api::CbtInfo> {
    answer(context, move |service| service.cbt_info(&request)).await
}

async fn cbt_extents(
    State(context): State<Context>,
    Asked(request): Asked<api::ChangesQuery>,
) -> Result<Response, ApiError> {
    let (form, kind) = if request.lines {
        (ChangedForm::Lines, "application/x-ndjson")
    } else {
        (ChangedForm::Document, "application/json")
    };
    let report = blocking(context, move |service| service.cbt_extents(&request)).await?;
    // Made as the client reads. An error breaks the answer off: what was sent of it is void.
    let body = axum::body::Body::from_stream(futures_util::stream::iter(report.parts(form)));
    Ok(([(header::CONTENT_TYPE, kind)], body).into_response())
}

async fn cbt_map(
    State(context): State<Context>,
    Asked(request): Asked<api::MapQuery>,
) -> Result<Response, ApiError> {
    let pieces = blocking(context, move |service| service.cbt_map(&request)).await?;
    let body = axum::body::Body::from_stream(futures_util::stream::iter(pieces.map(Ok::<_, Infallible>)));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

async fn cbt_heat(
    State(context): State<Context>,
    Asked(request): Asked<api::HeatQuery>,
) -> Answer<api::Heat> {
    answer(context, move |service| service.cbt_heat(&request)).await
}

async fn cbt_mark(State(context): State<Context>, Body(request): Body<api::Mark>) -> Answer<api::Marked> {
    answer(context, move |service| service.cbt_mark(&request)).await
}

async fn snapshots(State(context): State<Context>) -> Answer<api::Snapshots> {
    answer(context, Service::snapshots).await
}

async fn snapshot(State(context): State<Context>, Path(id): Path<String>) -> Answer<api::Snapshot> {
    let id = snapshot_id(&id)?;
    answer(context, move |service| service.snapshot(id)).await
}

async fn snapshot_create(
    State(context): State<Context>,
    Body(request): Body<api::CreateSnapshot>,
) -> Answer<api::Snapshot> {
    answer(context, move |service| service.snapshot_create(&request)).await
}

async fn snapshot_destroy(State(context): State<Context>, Path(id): Path<String>) -> Answer<api::Empty> {
    let id = snapshot_id(&id)?;
    answer(context, move |service| {
        service.snapshot_destroy(id).map(|()| api::Empty {})
    })
    .await
}

async fn snapshot_add(
    State(context): State<Context>,
    Path(id): Path<String>,
    Body(request): Body<api::DeviceName>,
) -> Answer<api::Snapshot> {
    let id = snapshot_id(&id)?;
    answer(context, move |service| service.snapshot_add(id, &request)).await
}

async fn snapshot_take(
    State(context): State<Context>,
    Path(id): Path<String>,
    Body(limits): Body<api::Limits>,
) -> Result<Response, ApiError> {
    let id = snapshot_id(&id)?;
    let Context { service, stop } = context;
    Ok(stream::respond(&stop, move |reporter| {
        service.snapshot_take(id, &limits, reporter)
    }))
}

async fn snapshot_create_and_take(
    State(context): State<Context>,
    Body(request): Body<api::TakeSnapshot>,
) -> Response {
    let Context { service, stop } = context;
    stream::respond(&stop, move |reporter| {
        service.snapshot_create_and_take(&request, reporter)
    })
}

async fn snapshot_append(
    State(context): State<Context>,
    Path(id): Path<String>,
    Body(request): Body<api::AppendStorage>,
) -> Answer<api::Snapshot> {
    let id = snapshot_id(&id)?;
    answer(context, move |service| service.snapshot_append(id, &request)).await
}

async fn snapshot_storage(
    State(context): State<Context>,
    Path(id): Path<String>,
) -> Answer<api::StorageExtents> {
    let id = snapshot_id(&id)?;
    answer(context, move |service| service.snapshot_storage(id)).await
}

async fn snapshot_wait(
    State(context): State<Context>,
    Path(id): Path<String>,
    Body(request): Body<api::WaitEvent>,
) -> Result<Response, ApiError> {
    let id = snapshot_id(&id)?;
    let Context { service, stop } = context;
    Ok(stream::respond(&stop, move |reporter| {
        service.snapshot_wait(id, &request, reporter)
    }))
}

async fn served(State(context): State<Context>) -> Answer<api::ServedDevices> {
    answer(context, Service::served).await
}

async fn serve(State(context): State<Context>, Body(request): Body<api::Serve>) -> Answer<api::ServedDevice> {
    answer(context, move |service| service.serve(&request)).await
}

async fn unserve(State(context): State<Context>, Path(name): Path<String>) -> Answer<api::Empty> {
    answer(context, move |service| {
        service.unserve(&name).map(|()| api::Empty {})
    })
    .await
}

async fn backup(State(context): State<Context>, Body(request): Body<api::Backup>) -> Response {
    let Context { service, stop } = context;
    stream::respond(&stop, move |reporter| service.backup(&request, reporter))
}

async fn nbd(State(context): State<Context>) -> Answer<api::NbdStatus> {
    answer(context, Service::nbd).await
}

async fn metrics(State(context): State<Context>) -> Result<Response, ApiError> {
    let text = blocking(context, Service::metrics).await?;
    Ok(([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response())
}

async fn unknown(request: Request) -> ApiError {
    ApiError::new(
        Code::UnknownRequest,
        format!("{} {}: no such request", request.method(), request.uri().path()),
        "client and daemon may be of different versions: see GET /v1/version",
    )
}

/// All routes.
pub fn router(service: Arc<dyn Service>, stop: CancellationToken) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/devices", get(devices))
        .route("/v1/devices/attach", post(attach))
        .route("/v1/devices/plan", post(plan))
        .route("/v1/devices/detach", post(detach))
        .route("/v1/cbt", get(cbt_info))
        .route("/v1/cbt/extents", get(cbt_extents))
        .route("/v1/cbt/map", get(cbt_map))
        .route("/v1/cbt/heat", get(cbt_heat))
        .route("/v1/cbt/mark", post(cbt_mark))
        .route("/v1/snapshots", get(snapshots).post(snapshot_create))
        .route("/v1/snapshots/take", post(snapshot_create_and_take))
        .route("/v1/snapshots/{id}", get(snapshot).delete(snapshot_destroy))
        .route("/v1/snapshots/{id}/devices", post(snapshot_add))
        .route("/v1/snapshots/{id}/take", post(snapshot_take))
        .route(
            "/v1/snapshots/{id}/storage",
            get(snapshot_storage).post(snapshot_append),
        )
        .route("/v1/snapshots/{id}/wait", post(snapshot_wait))
        .route("/v1/served", get(served).post(serve))
        .route("/v1/served/{name}", delete(unserve))
        .route("/v1/backups", post(backup))
        .route("/v1/nbd", get(nbd))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(DefaultBodyLimit::max(REQUEST_BYTES))
        .with_state(Context { service, stop })
}

/// The one route that is served over TCP.
pub fn metrics_router(service: Arc<dyn Service>, stop: CancellationToken) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .with_state(Context { service, stop })
}

/// Serves `router` on a unix socket until `stop`; requests that run then are cancelled and answered.
///
/// # Errors
/// The socket can't be used by the runtime.
pub async fn serve_unix(
    listener: UnixListener,
    router: Router,
    stop: CancellationToken,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

/// Serves `router` over TCP until `stop`.
///
/// # Errors
/// The socket can't be used by the runtime.
pub async fn serve_tcp(
    listener: TcpListener,
    router: Router,
    stop: CancellationToken,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}
