//! Client: requests to the daemon over its unix socket.

use std::fmt::Write as _;
use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::LOCK_FILE;
use super::api::{ErrorBody, Event, Progress};

/// Longest line of a streamed answer: a snapshot of thousands of devices fits.
const LINE_BYTES: usize = 16 << 20;

/// Longest wait for a daemon that is starting: the kernel verifies its programs.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Wait for a daemon that was started in the same breath and has not made its lock file yet.
const FIRST_MOMENT: Duration = Duration::from_millis(200);

/// Pause between attempts.
const RETRY: Duration = Duration::from_millis(20);

/// A request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "connect to the daemon at {}: it is not running: start it with `blksnap-agent daemon`, or name its socket with --socket",
        socket.display()
    )]
    NotRunning {
        /// The socket.
        socket: PathBuf,
    },
    /// The socket is not ours to use.
    #[error("connect to the daemon at {}: needs root: run with sudo", socket.display())]
    NotAllowed {
        /// The socket.
        socket: PathBuf,
    },
    /// The socket can't be used.
    #[error("connect to the daemon at {}: {source}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("talk to the daemon at {}: {message}: see the log of the daemon", socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        message: String,
    },
    /// The daemon says no.
    #[error("{0}")]
    Refused(ErrorBody),
}

/// A client of the daemon behind one socket. Each request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the daemon at `socket`.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    fn broken(&self, message: impl ToString) -> ClientError {
        ClientError::Broken {
            socket: self.socket.clone(),
            message: message.to_string(),
        }
    }

    /// Connects; a daemon that is just starting is waited for.
    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let began = Instant::now();
        loop {
            let socket = self.socket.clone();
            let source = match UnixStream::connect(&self.socket).await {
                Ok(stream) => return Ok(stream),
                Err(source) => source,
            };
            match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    let patience = if self.daemon_lives() {
                        START_LIMIT
                    } else {
                        FIRST_MOMENT
                    };
                    if began.elapsed() >= patience {
                        return Err(ClientError::NotRunning { socket });
                    }
                }
                io::ErrorKind::PermissionDenied => return Err(ClientError::NotAllowed { socket }),
                _ => return Err(ClientError::Connect { socket, source }),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Whether the process in the lock file lives and is a daemon.
    fn daemon_lives(&self) -> bool {
        let pid = std::fs::read_to_string(self.socket.with_file_name(LOCK_FILE)).unwrap_or_default();
        pid.parse::<u32>().is_ok_and(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim_end() == env!("CARGO_PKG_NAME"))
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(error))?;
        // It ends with the last of request and answer; its error shows in these.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost");
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| self.broken(error))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| self.broken(error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let bytes = self.collect(response).await?;
        match serde_json::from_slice(&bytes) {
            Ok(body) => Err(ClientError::Refused(body)),
            Err(_) => Err(self.broken(status)),
        }
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = response.into_body().collect().await;
        Ok(body.map_err(|error| self.broken(error))?.to_bytes())
    }

    async fn read<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, ClientError> {
        let bytes = self.collect(response).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.broken(error))
    }

    fn encode<B: Serialize>(&self, body: &B) -> Result<Option<Vec<u8>>, ClientError> {
        serde_json::to_vec(body)
            .map(Some)
            .map_err(|error| self.broken(error))
    }

    /// `GET` with an answer in JSON.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.read(self.send(Method::GET, path, None).await?).await
    }

    /// `GET` with an answer in bytes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get_bytes(&self, path: &str) -> Result<Bytes, ClientError> {
        self.collect(self.send(Method::GET, path, None).await?).await
    }

    /// `GET` with an answer of a JSON object a line.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get_lines<T: DeserializeOwned>(&self, path: &str) -> Result<Objects<T>, ClientError> {
        Ok(Objects {
            lines: Lines::of(self.send(Method::GET, path, None).await?),
            client: self.clone(),
            kind: PhantomData,
        })
    }

    /// `POST` with an answer in JSON.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.read(self.send(Method::POST, path, self.encode(body)?).await?)
            .await
    }

    /// `DELETE`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.collect(self.send(Method::DELETE, path, None).await?)
            .await
            .map(drop)
    }

    /// `POST` whose answer is a stream of [`Event`]s; `progress` sees each one until the last. Dropping the
    /// future cancels the work.
    ///
    /// # Errors
    /// See [`ClientError`]; also when the stream ends before the work does.
    pub async fn run<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        mut progress: impl FnMut(&Progress),
    ) -> Result<T, ClientError> {
        let response = self.send(Method::POST, path, self.encode(body)?).await?;
        let mut lines = Lines::of(response);
        while let Some(line) = lines.next(self).await? {
            match serde_json::from_slice(&line).map_err(|error| self.broken(error))? {
                Event::Progress(now) => progress(&now),
                Event::Done { result } => return Ok(result),
                Event::Error(body) => return Err(ClientError::Refused(body)),
            }
        }
        Err(self.broken("it ended before the work was done"))
    }
}

/// The objects of an answer, as they come.
#[derive(Debug)]
pub struct Objects<T> {
    lines: Lines,
    client: Client,
    kind: PhantomData<T>,
}

impl<T: DeserializeOwned> Objects<T> {
    /// The next one; none when the answer ended as it should.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        let Some(line) = self.lines.next(&self.client).await? else {
            return Ok(None);
        };
        let object = serde_json::from_slice(&line).map_err(|error| self.client.broken(error))?;
        Ok(Some(object))
    }
}

/// The lines of an answer.
#[derive(Debug)]
struct Lines {
    body: Incoming,
    /// What has come and was not given yet, from `used` on.
    rest: Vec<u8>,
    used: usize,
}

impl Lines {
    fn of(response: Response<Incoming>) -> Self {
        Self {
            body: response.into_body(),
            rest: Vec::new(),
            used: 0,
        }
    }

    /// The next line; what comes after the last end of a line is left out.
    async fn next(&mut self, client: &Client) -> Result<Option<Vec<u8>>, ClientError> {
        let mut looked = self.used;
        loop {
            if let Some(length) = self.rest[looked..].iter().position(|byte| *byte == b'\n') {
                let end = looked + length + 1;
                let line = self.rest[self.used..end].to_vec();
                self.used = end;
                return Ok(Some(line));
            }
            self.rest.drain(..self.used);
            self.used = 0;
            looked = self.rest.len();
            if looked > LINE_BYTES {
                return Err(client.broken("a line of the answer is too long"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame.map_err(|error| client.broken(error))?;
                    self.rest
                        .extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
                }
            }
        }
    }
}

/// `text` as it may stand in a query or behind a slash of a path: everything but letters, digits and `-._~/:` is
/// escaped (RFC 3986, 2.1 and 3.4).
#[must_use]
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string can't fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// `path` with a query string.
#[must_use]
pub fn with_query(path: &str, query: &[(&str, &str)]) -> String {
    let mut text = path.to_owned();
    for (number, (key, value)) in query.iter().enumerate() {
        text.push(if number == 0 { '?' } else { '&' });
        text.push_str(key);
        text.push('=');
        text.push_str(&encode(value));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_escaped() {
        assert_eq!(
            with_query("/v1/cbt", &[("device", "/dev/a b&c=ü"), ("number", "3")]),
            "/v1/cbt?device=/dev/a%20b%26c%3D%C3%BC&number=3"
        );
        assert_eq!(with_query("/v1/cbt", &[]), "/v1/cbt");
    }
}
