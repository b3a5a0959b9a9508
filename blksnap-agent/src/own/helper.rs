//! Helper: the process that touches file systems on served devices, and the agent's side of it.
//!
//! It reads one request from its standard input and writes one answer, both JSON. The agent waits for the answer as
//! long as it likes: a process that waits for the agent itself, or for a frozen file system, is left alone, and takes
//! back what it made when it finds nobody to tell.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::file::{self, Kept, Made, Make};
use super::place::{Candidate, On, find};
use crate::storage::StorageSpec;
use crate::units::Extent;

/// Name of the hidden subcommand whose body is [`main`].
pub const SUBCOMMAND: &str = "own-file";

/// How long the agent waits: file systems write back what they have first, and may be frozen.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long an end waits for files to be removed. They are removed later, too.
const PATIENCE_AT_END: Duration = Duration::from_secs(20);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    Look {
        text: String,
        served: Vec<Candidate>,
    },
    Make(Make),
    Ranges(PathBuf),
    Release {
        files: Vec<Kept>,
        served: Vec<Candidate>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Looked(Looked),
    Made(Made),
    Ranges(Vec<Extent>),
    /// What could not be let go.
    Released(Vec<Kept>),
    Failed(String),
}

/// Storage as somebody said it, looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Looked {
    /// What it is; its path leads through no links.
    pub spec: StorageSpec,
    /// Where it is.
    pub on: On,
}

/// The process did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It does not start, or does not answer as it should.
    #[error("the process that looks after files on served devices: {0}")]
    Process(#[from] io::Error),
    /// It waits for something.
    #[error("a file system on a served device does not answer; thaw it if it is frozen, and try again")]
    Silent,
    /// It was refused.
    #[error("{0}")]
    Refused(String),
}

/// How the process is started.
#[derive(Clone, Debug)]
pub struct Helper {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl Default for Helper {
    /// The running program itself, with [`SUBCOMMAND`].
    fn default() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            arguments: vec![SUBCOMMAND.into()],
        }
    }
}

impl Helper {
    /// What a text says of storage, and where that is.
    ///
    /// # Errors
    /// See [`HelperError`].
    pub fn look(&self, text: &str, served: &[Candidate]) -> Result<Looked, HelperError> {
        let request = Request::Look {
            text: text.to_owned(),
            served: served.to_vec(),
        };
        match self.ask(&request, PATIENCE)? {
            Answer::Looked(looked) => Ok(looked),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes a file: [`file::make`].
    ///
    /// # Errors
    /// See [`HelperError`].
    pub fn make(&self, make: Make) -> Result<Made, HelperError> {
        match self.ask(&Request::Make(make), PATIENCE)? {
            Answer::Made(made) => Ok(made),
            other => Err(unexpected(&other)),
        }
    }

    /// Where a file is: [`file::ranges`].
    ///
    /// # Errors
    /// See [`HelperError`].
    pub fn ranges(&self, path: &Path) -> Result<Vec<Extent>, HelperError> {
        match self.ask(&Request::Ranges(path.to_owned()), PATIENCE)? {
            Answer::Ranges(ranges) => Ok(ranges),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets files go: [`file::release`]. Gives those that are left.
    ///
    /// # Errors
    /// See [`HelperError`].
    pub fn release(&self, files: &[Kept], served: &[Candidate]) -> Result<Vec<Kept>, HelperError> {
        let request = Request::Release {
            files: files.to_vec(),
            served: served.to_vec(),
        };
        match self.ask(&request, PATIENCE_AT_END)? {
            Answer::Released(left) => Ok(left),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&self, request: &Request, patience: Duration) -> Result<Answer, HelperError> {
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .current_dir("/")
            .spawn()?;
        let question = serde_json::to_vec(request).map_err(io::Error::from)?;
        // It reads all before it does anything.
        let asked = child
            .stdin
            .take()
            .map_or(Ok(()), |mut pipe| pipe.write_all(&question));
        let answer = asked.and_then(|()| read(&mut child, patience));
        // One that waits in the kernel can't be waited for here.
        let reaped = std::thread::Builder::new()
            .name("blksnap-own".to_owned())
            .spawn(move || child.wait());
        drop(reaped);
        match answer? {
            None => Err(HelperError::Silent),
            Some(bytes) => match serde_json::from_slice(&bytes).map_err(io::Error::from)? {
                Answer::Failed(why) => Err(HelperError::Refused(why)),
                answer => Ok(answer),
            },
        }
    }
}

fn unexpected(answer: &Answer) -> HelperError {
    io::Error::new(io::ErrorKind::InvalidData, format!("answer {answer:?}")).into()
}

/// All that the process says, `None` if that takes too long.
fn read(child: &mut Child, patience: Duration) -> io::Result<Option<Vec<u8>>> {
    let Some(mut pipe) = child.stdout.take() else {
        return Ok(None);
    };
    let end = Instant::now() + patience;
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(None),
            Ok(_) => match pipe.read(&mut buffer)? {
                0 => return Ok(Some(bytes)),
                count => bytes.extend_from_slice(&buffer[..count]),
            },
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Body of the process.
///
/// # Errors
/// The request can't be read, or nobody takes the answer.
pub fn main() -> io::Result<()> {
    // What ends the agent's service must not end this halfway.
    let _ = nix::unistd::setsid();
    let mut question = Vec::new();
    io::stdin().read_to_end(&mut question)?;
    let request: Request = serde_json::from_slice(&question)?;
    let answer = carry_out(&request);
    let told = serde_json::to_vec(&answer)
        .map_err(io::Error::from)
        .and_then(|bytes| {
            let mut pipe = io::stdout();
            pipe.write_all(&bytes)?;
            pipe.flush()
        });
    if let (Err(_), Request::Make(make), Answer::Made(made)) = (&told, &request, &answer) {
        file::undo(&make.path, made.created);
    }
    told
}

fn carry_out(request: &Request) -> Answer {
    let answer = match request {
        Request::Look { text, served } => look(text, served).map(Answer::Looked),
        Request::Make(make) => file::make(make).map(Answer::Made),
        Request::Ranges(path) => file::ranges(path).map(Answer::Ranges),
        Request::Release { files, served } => Ok(Answer::Released(file::release(files, served))),
    };
    answer.unwrap_or_else(Answer::Failed)
}

fn look(text: &str, served: &[Candidate]) -> Result<Looked, String> {
    let mut spec: StorageSpec = text.parse().map_err(|error| format!("{error}"))?;
    let opened = match &mut spec {
        StorageSpec::Directory { path, .. } => {
            *path = real(path)?;
            path.clone()
        }
        StorageSpec::File { path, .. } => {
            // One that is to be made has no path of its own yet.
            let whole = real(path).or_else(|_| {
                let parent = real(path.parent().unwrap_or(Path::new("/")))?;
                Ok::<_, String>(parent.join(path.file_name().unwrap_or_default()))
            })?;
            whole.clone_into(path);
            whole.parent().unwrap_or(Path::new("/")).to_owned()
        }
        StorageSpec::Device { .. } | StorageSpec::Memory { .. } | StorageSpec::Own(_) => {
            return Ok(Looked {
                spec,
                on: On::Elsewhere,
            });
        }
    };
    let file = File::open(&opened).map_err(|error| format!("can't open {}: {error}", opened.display()))?;
    let on = find(&file, served).map_err(|error| format!("where {} is: {error}", opened.display()))?;
    Ok(Looked { spec, on })
}

fn real(path: &Path) -> Result<PathBuf, String> {
    path.canonicalize()
        .map_err(|error| format!("can't open {}: {error}", path.display()))
}
