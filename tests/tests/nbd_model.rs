//! Model: the server and its protocol core against plain models, with random clients.
//!
//! The core must do the same with any fragmentation of its input, and what the specification asks for; the server
//! must keep what it was given as plain memory does, whoever of its clients gave it.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use blksnap_agent::nbd::file::FileExport;
use blksnap_agent::nbd::proto::Tls;
use blksnap_agent::nbd::registry::Exports;
use blksnap_agent::nbd::server::{Server, ServerLimits};
use blksnap_tests::nbd::build::{contexts, info, option, option_claiming};
use blksnap_tests::nbd::oracle::{check_handshake, check_transmission, shown};
use blksnap_tests::nbd::{Agreed, Client, Framing, Request, Verdict, cmd, err, flag, opt};
use blksnap_tests::seed;
use proptest::prelude::*;
use proptest::sample::Index;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

const SIZE: u64 = 1 << 20;

fn framing() -> impl Strategy<Value = Framing> {
    prop::sample::select(Framing::ALL.to_vec())
}

fn cuts() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![3 => 0_u8..40, 1 => any::<u8>()], 0..6)
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => Just("disk".to_owned()),
        1 => Just("coarse".to_owned()),
        1 => Just("scratch".to_owned()),
        1 => Just(String::new()),
        1 => ".{0,8}",
    ]
}

fn query() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("base:".to_owned()),
        Just("base:allocation".to_owned()),
        Just("qemu:".to_owned()),
        Just("qemu:dirty-bitmap:".to_owned()),
        Just("qemu:dirty-bitmap:last".to_owned()),
        Just("qemu:dirty-bitmap:since-x-1".to_owned()),
        Just("qemu:dirty-bitmap:since-y-1".to_owned()),
        ".{0,12}",
    ]
}

/// An option: mostly well formed.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let bare = prop_oneof![
        1 => Just(opt::ABORT),
        3 => Just(opt::LIST),
        2 => Just(opt::STARTTLS),
        9 => Just(opt::STRUCTURED_REPLY),
        9 => Just(opt::EXTENDED_HEADERS),
    ];
    let data = || prop::collection::vec(any::<u8>(), 0..40);
    let well_formed = prop_oneof![
        6 => bare.clone().prop_map(|number| option(number, b"")),
        1 => (bare, data()).prop_map(|(number, data)| option(number, &data)),
        1 => name().prop_map(|name| option(opt::EXPORT_NAME, name.as_bytes())),
        2 => (6_u32..8, name(), prop::collection::vec(0_u16..5, 0..4))
            .prop_map(|(number, name, kinds)| option(number, &info(&name, &kinds))),
        7 => (9_u32..11, name(), prop::collection::vec(query(), 0..4)).prop_map(|(number, name, queries)| {
            let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
            option(number, &contexts(&name, &queries))
        }),
        1 => (any::<u32>(), data()).prop_map(|(number, data)| option(number, &data)),
        1 => (0_u32..13, 0_u32..100, data())
            .prop_map(|(number, length, data)| option_claiming(number, length, &data)),
    ];
    (
        well_formed,
        prop::option::weighted(0.03, (any::<Index>(), any::<u8>())),
    )
        .prop_map(|(mut bytes, broken)| {
            if let Some((place, value)) = broken {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            bytes
        })
}

/// A request: mostly well formed and inside the export.
fn any_request() -> impl Strategy<Value = Request> {
    let block = prop::sample::select(vec![1_u64, 512, 4096]);
    let place = (0..SIZE, 0_u64..70_000, block)
        .prop_map(|(offset, length, block)| (offset / block * block, length / block * block));
    let range = prop_oneof![
        8 => place,
        1 => (any::<u64>(), any::<u64>()),
        1 => (0..SIZE, any::<u32>().prop_map(u64::from)),
    ];
    let flags = prop_oneof![
        4 => Just(0),
        2 => prop::sample::select(vec![flag::FUA, flag::NO_HOLE, flag::DF, flag::REQ_ONE, flag::FAST_ZERO]),
        1 => 0_u16..64,
        1 => any::<u16>(),
    ];
    let command =
        prop_oneof![9 => 0_u16..8, 5 => Just(cmd::BLOCK_STATUS), 1 => Just(cmd::RESIZE), 1 => any::<u16>()];
    let ids = prop::collection::vec(prop_oneof![8 => 1_u32..4, 1 => any::<u32>()], 0..4);
    (command, flags, range, any::<u64>(), ids, any::<u8>()).prop_map(
        |(command, flags, (offset, length), cookie, ids, fill)| {
            let request = match command {
                cmd::WRITE => {
                    // Not all the data that a broken length would need.
                    let told = usize::try_from(length % 5000).unwrap_or(0);
                    Request::write(offset, vec![fill; told])
                }
                cmd::BLOCK_STATUS if fill < 100 => Request::status_of(offset, length, &ids),
                command => Request::new(command, offset, length),
            };
            let request = request.with(flags & !flag::PAYLOAD_LEN);
            Request { cookie, ..request }
        },
    )
}

fn agreed() -> impl Strategy<Value = Agreed> {
    let blocks = prop::sample::select(vec![(1_u32, 1_u32 << 25), (512, 1 << 20), (4096, 4096)]);
    (framing(), blocks, any::<bool>(), 0_u32..4).prop_map(
        |(framing, (minimum, maximum), read_only, contexts)| {
            let contexts = if framing.has_chunks() { contexts } else { 0 };
            Agreed {
                framing,
                size: SIZE,
                minimum,
                maximum,
                flags: shown(framing, read_only, contexts > 0),
                contexts: (1..=contexts).collect(),
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn a_handshake_is_what_the_model_says_in_any_pieces(
        tls in prop::sample::select(vec![Tls::Unavailable, Tls::Offered, Tls::Required]),
        flags in prop_oneof![8 => Just(3_u32), 1 => 0_u32..4, 1 => any::<u32>()],
        options in prop::collection::vec(any_option(), 0..10),
        cuts in cuts(),
    ) {
        let go = option(opt::GO, &info("disk", &[]));
        let input = [flags.to_be_bytes().to_vec(), options.concat(), go].concat();
        check_handshake(tls, &input, &cuts);
    }

    #[test]
    fn a_transmission_is_what_the_model_says_in_any_pieces(
        agreed in agreed(),
        requests in prop::collection::vec(any_request(), 0..10),
        noise in prop::option::weighted(0.1, prop::collection::vec(any::<u8>(), 0..60)),
        cuts in cuts(),
    ) {
        let mut stream: Vec<u8> = requests.iter().flat_map(|one| one.encode(agreed.framing)).collect();
        stream.extend(noise.unwrap_or_default());
        check_transmission(&agreed, &stream, &cuts);
    }

    #[test]
    fn noise_is_borne_in_any_pieces(
        agreed in agreed(),
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        cuts in cuts(),
    ) {
        check_handshake(Tls::Offered, &bytes, &cuts);
        check_transmission(&agreed, &bytes, &cuts);
    }
}

/// A writable export, and plain memory beside it.
struct Bench {
    runtime: tokio::runtime::Runtime,
    server: Option<Server>,
    directory: tempfile::TempDir,
    memory: Vec<u8>,
}

impl Bench {
    fn new(random: &mut StdRng) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("blksnap-nbd-").tempdir()?;
        let mut memory = vec![0; usize::try_from(SIZE)?];
        let half = memory.len() / 2;
        random.fill_bytes(&mut memory[..half]);
        let path = directory.path().join("image");
        std::fs::write(&path, &memory)?;
        let exports = Arc::new(Exports::new());
        exports.add(Arc::new(FileExport::open("scratch", &path, true)?))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let server = {
            let _guard = runtime.enter();
            Server::start(&directory.path().join("s"), exports, &ServerLimits::default())?
        };
        Ok(Self {
            runtime,
            server: Some(server),
            directory,
            memory,
        })
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    /// Does the same to the memory, and compares what was read.
    fn follow(&mut self, answer: &blksnap_tests::nbd::Answer) -> Result<()> {
        let request = &answer.request;
        let from = usize::try_from(request.offset)?;
        let range = from..from + usize::try_from(request.length)?;
        match request.command {
            cmd::READ => ensure!(answer.data == self.memory[range], "read of other bytes"),
            cmd::WRITE => self.memory[range].copy_from_slice(&request.payload),
            cmd::WRITE_ZEROES => self.memory[range].fill(0),
            cmd::BLOCK_STATUS => {
                for (id, extents) in &answer.status {
                    let mut at = from;
                    for (length, flags) in extents {
                        let end = at + usize::try_from(*length)?;
                        let zero = flags & 2 != 0;
                        ensure!(
                            !zero || self.memory[at..end].iter().all(|byte| *byte == 0),
                            "context {id} calls {at}..{end} zero"
                        );
                        at = end;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop());
        }
    }
}

/// A request that a good client may send, or sometimes one that it may not.
fn random_request(random: &mut StdRng) -> Request {
    let aligned = random.random_bool(0.5);
    let unit = if aligned { 4096 } else { 1 };
    let offset = random.random_range(0..SIZE / unit) * unit;
    let most = if random.random_bool(0.1) { SIZE } else { 40_000 };
    let mut length = random.random_range(0..=most.min(SIZE - offset) / unit) * unit;
    if random.random_bool(0.03) {
        length = SIZE - offset + 1;
    }
    let fua = if random.random_bool(0.2) { flag::FUA } else { 0 };
    match random.random_range(0..12_u8) {
        0..4 => Request::new(cmd::READ, offset, length),
        4..7 => {
            let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
            random.fill_bytes(&mut data);
            Request::write(offset, data).with(fua)
        }
        7 | 8 => {
            let mut flags = fua;
            for flag in [flag::NO_HOLE, flag::FAST_ZERO] {
                flags |= if random.random_bool(0.3) { flag } else { 0 };
            }
            Request::new(cmd::WRITE_ZEROES, offset, length).with(flags)
        }
        9 => Request::new(cmd::TRIM, offset, length).with(fua),
        10 => Request::new(cmd::BLOCK_STATUS, offset, length),
        _ => Request::new(
            if random.random_bool(0.5) {
                cmd::FLUSH
            } else {
                cmd::CACHE
            },
            offset,
            length,
        ),
    }
}

#[test]
fn clients_of_every_framing_share_one_disk_that_is_plain_memory() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("clients_of_every_framing_share_one_disk"));
    let mut bench = Bench::new(&mut random)?;
    let mut clients = Framing::ALL
        .iter()
        .map(|framing| Client::connect(&bench.socket(), "scratch", *framing, &["base:allocation"]))
        .collect::<Result<Vec<_>>>()?;
    for _ in 0..1500 {
        let which = random.random_range(0..clients.len());
        let client = &mut clients[which];
        let request = random_request(&mut random);
        let (judged, _) = client.agreed().judge(&request.encode(client.agreed().framing));
        let verdict = judged.into_iter().next().context("a verdict")?.1;
        let answer = client.ask(request.clone())?;
        match verdict {
            Verdict::Carry if answer.error == 0 => bench.follow(&answer)?,
            Verdict::Carry => {
                ensure!(
                    answer.error == err::ENOTSUP && request.flags & flag::FAST_ZERO != 0,
                    "{request:?}: {} {}",
                    answer.error,
                    answer.message
                );
            }
            Verdict::Refuse(errors) => {
                ensure!(errors.contains(&answer.error), "{request:?}: {}", answer.error);
            }
            Verdict::Disconnect => unreachable!("no disconnect is sent"),
        }
        if answer.error == 0 && request.command == cmd::TRIM {
            // Anything may be there now, but the same for everybody.
            let now = client.read(request.offset, request.length)?;
            let from = usize::try_from(request.offset)?;
            bench.memory[from..from + now.len()].copy_from_slice(&now);
        }
    }
    for client in &mut clients {
        ensure!(
            client.read(0, SIZE)? == bench.memory,
            "the disk differs at the end"
        );
    }
    for client in clients {
        client.disconnect()?;
    }
    let file = std::fs::read(bench.directory.path().join("image"))?;
    ensure!(file == bench.memory, "the file differs at the end");
    Ok(())
}

/// What is in flight at once runs at once: each request has a part of the disk of its own.
#[test]
fn many_requests_in_flight_do_not_disturb_each_other() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("many_requests_in_flight"));
    let mut bench = Bench::new(&mut random)?;
    for framing in Framing::ALL {
        let mut client = Client::connect(&bench.socket(), "scratch", framing, &["base:allocation"])?;
        for _ in 0..20 {
            let parts = 32;
            for part in 0..parts {
                let mut request = random_request(&mut random);
                let size = SIZE / parts;
                request.offset = part * size;
                if request.command == cmd::TRIM {
                    request.command = cmd::READ;
                    request.flags = 0;
                }
                if request.command == cmd::WRITE {
                    request.payload.truncate(usize::try_from(size)?);
                    request.length = request.payload.len() as u64;
                }
                request.length = request.length.min(size);
                if request.command == cmd::FLUSH {
                    (request.offset, request.length) = (0, 0);
                }
                request.length = request
                    .length
                    .max(u64::from(request.command == cmd::BLOCK_STATUS));
                client.send(request)?;
            }
            for _ in 0..parts {
                let answer = client.answer()?;
                let told = [0, err::ENOTSUP];
                let simple = framing == Framing::Simple && answer.request.command == cmd::BLOCK_STATUS;
                ensure!(told.contains(&answer.error) || simple, "{answer:?}");
                if answer.error == 0 {
                    bench.follow(&answer)?;
                }
            }
        }
        ensure!(client.read(0, SIZE)? == bench.memory, "the disk differs");
        client.disconnect()?;
    }
    Ok(())
}
