//! Scene: a daemon that serves disks, and what the tests ask of it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::{Client, Framing, Request, cmd};
use blksnap_tests::{Daemon, DaemonOptions};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use serde_json::Value;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const KIB: u64 = 1 << 10;

/// Most bytes of a read.
const PIECE: u64 = 4 << 20;

/// A snapshot that was taken.
#[derive(Clone, Debug)]
pub(crate) struct Taken {
    pub(crate) id: String,
    /// As it was told at the take.
    pub(crate) value: Value,
}

impl Taken {
    /// The image of the disk that is served under this name.
    pub(crate) fn image(&self, name: &str) -> Result<&Value> {
        let devices = self.value["devices"].as_array().context("no devices")?;
        let device = devices.iter().find(|device| device["name"] == name);
        Ok(&device.with_context(|| format!("{name} is not in {}", self.value))?["image"])
    }

    /// The export of an image.
    pub(crate) fn export(&self, name: &str) -> Result<String> {
        text(&self.image(name)?["export"])
    }

    /// The URI of an image.
    pub(crate) fn uri(&self, name: &str) -> Result<String> {
        text(&self.image(name)?["uri"])
    }

    /// The instant as `cbt extents --since` wants it.
    pub(crate) fn base(&self, name: &str) -> Result<String> {
        let image = self.image(name)?;
        Ok(format!("{}:{}", text(&image["generation"])?, image["number"]))
    }
}

pub(crate) fn text(value: &Value) -> Result<String> {
    let text = value.as_str().with_context(|| format!("no text: {value}"))?;
    Ok(text.to_owned())
}

pub(crate) fn size(bytes: u64) -> Result<usize> {
    Ok(usize::try_from(bytes)?)
}

pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    pub(crate) options: DaemonOptions,
}

impl Scene {
    pub(crate) fn new() -> Result<Self> {
        Self::with(&[])
    }

    /// A daemon with these arguments, too.
    pub(crate) fn with(arguments: &[&OsStr]) -> Result<Self> {
        let options = DaemonOptions {
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            ..DaemonOptions::default()
        };
        Ok(Self {
            daemon: Daemon::with_options(&options)?,
            options,
        })
    }

    /// A file beside the daemon.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.daemon.scratch().join(name)
    }

    /// An image file with random content and holes.
    pub(crate) fn disk(&self, name: &str, bytes: u64, seed: u64) -> Result<PathBuf> {
        let path = self.beside(name);
        let file = File::options().write(true).create_new(true).open(&path)?;
        file.set_len(bytes)?;
        let mut random = StdRng::seed_from_u64(seed);
        let mut block = vec![0; size(256 * KIB)?];
        for offset in (0..bytes).step_by(block.len()) {
            if random.random_bool(0.7) {
                let part = size((bytes - offset).min(256 * KIB))?;
                random.fill_bytes(&mut block[..part]);
                file.write_all_at(&block[..part], offset)?;
            }
        }
        Ok(path)
    }

    /// Serves an image file that is made for it.
    pub(crate) fn serve(&self, name: &str, bytes: u64, seed: u64, more: &[&str]) -> Result<PathBuf> {
        let path = self.disk(name, bytes, seed)?;
        self.serve_path(&path, more)?;
        Ok(path)
    }

    pub(crate) fn serve_path(&self, path: &Path, more: &[&str]) -> Result<()> {
        let arguments = ["serve".as_ref(), path.as_os_str()];
        let all = arguments.into_iter().chain(more.iter().map(AsRef::as_ref));
        self.daemon.run(all).map(drop)
    }

    /// What `served` says of a device.
    pub(crate) fn served(&self, name: &str) -> Result<Value> {
        let mut served = self.daemon.json(["served"])?;
        let list = served["served"].as_array_mut().context("no list")?;
        let device = list.iter_mut().find(|device| device["name"] == name);
        Ok(device.with_context(|| format!("{name} is not served"))?.take())
    }

    /// Takes a snapshot of the disks in these files.
    pub(crate) fn snapshot(&self, disks: &[&Path], more: &[&str]) -> Result<Taken> {
        let arguments: [&OsStr; 2] = ["snapshot".as_ref(), "create".as_ref()];
        let disks = disks.iter().map(|disk| disk.as_os_str());
        let more = more.iter().map(OsStr::new);
        let value = self.daemon.json(arguments.into_iter().chain(disks).chain(more))?;
        ensure!(value["state"] == "taken", "{value}");
        Ok(Taken {
            id: text(&value["id"])?,
            value,
        })
    }

    pub(crate) fn destroy(&self, taken: &Taken) -> Result<()> {
        self.daemon.run(["snapshot", "destroy", &taken.id]).map(drop)
    }

    /// What is known of a snapshot now.
    pub(crate) fn info(&self, id: &str) -> Result<Value> {
        self.daemon.json(["snapshot", "info", id])
    }

    pub(crate) fn client(&self, export: &str) -> Result<Client> {
        self.client_with(export, &[])
    }

    pub(crate) fn client_with(&self, export: &str, contexts: &[&str]) -> Result<Client> {
        let socket = self.daemon.nbd_socket();
        Client::connect(&socket, export, Framing::Structured, contexts).context(export.to_owned())
    }

    /// All bytes of an export.
    pub(crate) fn content(&self, export: &str) -> Result<Vec<u8>> {
        let mut client = self.client(export)?;
        let bytes = content(&mut client)?;
        client.disconnect()?;
        Ok(bytes)
    }

    /// The image of a disk in a snapshot.
    pub(crate) fn image(&self, taken: &Taken, name: &str) -> Result<Vec<u8>> {
        self.content(&taken.export(name)?)
    }

    /// Changed extents, as `cbt extents` with these arguments tells them.
    pub(crate) fn extents(&self, disk: &Path, how: &[&str]) -> Result<Vec<(u64, u64)>> {
        let arguments = ["cbt".as_ref(), "extents".as_ref(), disk.as_os_str()];
        let all = arguments.into_iter().chain(how.iter().map(OsStr::new));
        let answer = self.daemon.json(all)?;
        let extents = answer["extents"]
            .as_array()
            .with_context(|| format!("no extents: {answer}"))?;
        extents
            .iter()
            .map(|extent| {
                let number = |name: &str| extent[name].as_u64().context("a number");
                Ok((number("offset")?, number("length")?))
            })
            .collect()
    }

    /// The next daemon after a kill, with the same options.
    pub(crate) fn launch(&mut self) -> Result<()> {
        let options = self.options.clone();
        self.daemon.launch(&options)
    }

    /// The error number with which the control interface refuses a request.
    pub(crate) fn errno(&self, method: &str, path: &str, body: &Value) -> Result<i64> {
        let body = body.to_string();
        let mut stream = UnixStream::connect(self.daemon.control_socket())?;
        // In one piece: to who asks by GET the answer may come, and the end, before the body was read.
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: blksnap\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (from, to) = answer.find('{').zip(answer.rfind('}')).context(answer.clone())?;
        let value: Value = serde_json::from_str(&answer[from..=to])?;
        find(&value, "errno")
            .and_then(Value::as_i64)
            .with_context(|| format!("no errno in {answer}"))
    }
}

/// The member with this name, wherever it is.
fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(members) => members
            .get(name)
            .or_else(|| members.values().find_map(|member| find(member, name))),
        _ => None,
    }
}

/// All bytes of an export.
pub(crate) fn content(client: &mut Client) -> Result<Vec<u8>> {
    let length = client.agreed().size;
    let mut bytes = Vec::with_capacity(size(length)?);
    for offset in (0..length).step_by(size(PIECE)?) {
        bytes.extend(client.read(offset, PIECE.min(length - offset))?);
    }
    Ok(bytes)
}

/// Carries out a request that must succeed.
pub(crate) fn done(client: &mut Client, request: Request) -> Result<()> {
    let answer = client.ask(request)?;
    ensure!(
        answer.error == 0,
        "{} at {}: {}: {}",
        answer.request.command,
        answer.request.offset,
        answer.error,
        answer.message
    );
    Ok(())
}

/// Writes at random places and gives the ranges; `memory` follows.
pub(crate) fn scribble(
    client: &mut Client,
    memory: &mut [u8],
    random: &mut StdRng,
    writes: usize,
) -> Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    for _ in 0..writes {
        let most = if random.random_bool(0.1) { 300_000 } else { 9000 };
        let length = random.random_range(1..most);
        let offset = random.random_range(0..memory.len() as u64 - length);
        let range = size(offset)?..size(offset + length)?;
        if random.random_bool(0.2) {
            memory[range].fill(0);
            done(client, Request::new(cmd::WRITE_ZEROES, offset, length))?;
        } else {
            random.fill_bytes(&mut memory[range.clone()]);
            done(client, Request::write(offset, memory[range].to_vec()))?;
        }
        ranges.push((offset, length));
    }
    Ok(ranges)
}

/// The numbers of the blocks of `block` bytes that these ranges touch.
pub(crate) fn blocks(ranges: &[(u64, u64)], block: u64) -> std::collections::BTreeSet<u64> {
    ranges
        .iter()
        .filter(|(_, length)| *length > 0)
        .flat_map(|(offset, length)| offset / block..=(offset + length - 1) / block)
        .collect()
}

/// Says where two disks differ first.
pub(crate) fn same(found: &[u8], expected: &[u8], what: &str) -> Result<()> {
    ensure!(found.len() == expected.len(), "{what}: {} bytes", found.len());
    let first = found.iter().zip(expected).position(|(a, b)| a != b);
    ensure!(first.is_none(), "{what}: differs at {first:?}");
    Ok(())
}
