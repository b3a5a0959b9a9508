//! Hostile handshakes: what clients do before the transmission that no client should, by hand, case by case.
//!
//! Each case has a server process of its own; [`besiege`] checks that others are served meanwhile, that memory is
//! bounded, and that nothing panics.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::build::{contexts, counted, info, option, option_claiming};
use blksnap_tests::nbd::client::closed;
use blksnap_tests::nbd::siege::besiege;
use blksnap_tests::nbd::{Client, Framing, Haggling, Request, Served, cmd, opt, rep};

fn attack<T>(arguments: &[&str], attack: impl FnOnce(&Served) -> Result<T>) -> Result<()> {
    besiege(Path::new(env!("CARGO_BIN_EXE_blksnap-serve")), arguments, attack)
}

/// A socket that got the greeting and sent these bytes.
fn dial(served: &Served, bytes: &[u8]) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(served.socket())?;
    stream.set_read_timeout(Some(blksnap_tests::nbd::client::PATIENCE))?;
    stream.set_write_timeout(Some(blksnap_tests::nbd::client::PATIENCE))?;
    stream.read_exact(&mut [0; 18])?;
    stream.write_all(bytes)?;
    Ok(stream)
}

/// Client flags and what follows.
fn hello(rest: &[u8]) -> Vec<u8> {
    [[0, 0, 0, 3].as_slice(), rest].concat()
}

/// Writes until the server no longer reads for a while, or closes; gives the number of bytes written.
fn pour(stream: &mut UnixStream, bytes: &[u8], times: usize) -> Result<usize> {
    stream.set_write_timeout(Some(Duration::from_millis(300)))?;
    let mut poured = 0;
    for _ in 0..times {
        match stream.write(bytes) {
            // A part of a message more or less: what follows is anything anyway.
            Ok(written) if written > 0 => poured += written,
            _ => break,
        }
    }
    Ok(poured)
}

#[test]
fn clients_that_leave_at_once() -> Result<()> {
    attack(&[], |served| {
        for _ in 0..1000 {
            drop(UnixStream::connect(served.socket())?);
        }
        Ok(())
    })
}

#[test]
fn clients_that_say_nothing_or_half_of_their_flags() -> Result<()> {
    attack(&[], |served| {
        (0..200)
            .map(|index| dial(served, &[0, 0, 0][..index % 4]))
            .collect::<Result<Vec<_>>>()
    })
}

#[test]
fn thousands_of_connections() -> Result<()> {
    attack(&[], |served| {
        let mut held = Vec::new();
        for _ in 0..3000 {
            held.push(UnixStream::connect(served.socket())?);
        }
        // One that is let in after all the others have gone.
        drop(held);
        let mut late = loop {
            // The server closes those beyond its limit.
            match served.client(Framing::Extended) {
                Ok(client) => break client,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        late.read(0, 4096)?;
        late.disconnect()
    })
}

/// Many clients have all the descriptors that there are: those who are in are served, what needs one more included.
#[test]
fn clients_that_use_up_all_descriptors() -> Result<()> {
    const MOST: usize = 96;
    let served = Served::start_in(
        Path::new("/dev/shm"),
        Path::new(env!("CARGO_BIN_EXE_blksnap-serve")),
        &["--writable", "--descriptors", "96", "--handshake-ms", "600000"],
    )?;
    let mut good = served.client(Framing::Simple)?;
    // They say nothing: the server waits for them with a descriptor each.
    let held = (0..MOST)
        .map(|_| Ok(UnixStream::connect(served.socket())?))
        .collect::<Result<Vec<_>>>()?;
    while served.descriptors()? < MOST {
        std::thread::sleep(Duration::from_millis(5));
    }
    let data: Vec<u8> = (0..2_u32 << 20).map(|byte| byte.to_le_bytes()[1]).collect();
    for offset in [0, 5 << 20] {
        ensure!(good.ask(Request::write(offset, data.clone()))?.error == 0);
        ensure!(good.read(offset, 2 << 20)? == data);
    }
    drop(held);
    // And when they have gone others are let in.
    served.wait_for_sockets(8)?;
    ensure!(served.client(Framing::Extended)?.read(0, 2 << 20)? == data);
    served.end()
}

#[test]
fn thousands_of_sessions_one_after_the_other() -> Result<()> {
    attack(&[], |served| {
        let before = served.sockets()?;
        for index in 0..2000 {
            let mut client = served.client(Framing::ALL[index % 3])?;
            if index % 2 == 0 {
                client.read(4096, 4096)?;
            }
        }
        served.wait_for_sockets(before)?;
        Ok(())
    })
}

#[test]
fn handshakes_that_stop_are_ended() -> Result<()> {
    attack(&["--handshake-ms=200"], |served| {
        let starts = [
            vec![],
            vec![0, 0],
            hello(b""),
            hello(b"IHAVE"),
            hello(&option_claiming(opt::GO, 100, b"half")),
            hello(&option_claiming(99, u32::MAX, b"half")),
        ];
        for start in starts {
            let mut stream = dial(served, &start)?;
            closed(&mut stream).with_context(|| format!("{start:x?}"))?;
        }
        Ok(())
    })
}

#[test]
fn a_client_that_goes_on_very_slowly_does_not_last() -> Result<()> {
    attack(&["--handshake-ms=300"], |served| {
        // A byte now and then must not begin the time anew.
        let mut stream = dial(served, b"")?;
        let bytes = hello(&option(opt::LIST, b"").repeat(100));
        let mut sent = 0;
        for byte in &bytes {
            if stream.write_all(&[*byte]).is_err() {
                break;
            }
            sent += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
        ensure!(
            sent < bytes.len(),
            "a handshake of {sent} bytes at ten milliseconds each"
        );
        Ok(())
    })
}

#[test]
fn flags_that_nobody_offered() -> Result<()> {
    attack(&[], |served| {
        for flags in [4_u32, 7, 1 << 16, 1 << 31, u32::MAX] {
            closed(&mut dial(served, &flags.to_be_bytes())?)?;
        }
        Ok(())
    })
}

#[test]
fn other_protocols() -> Result<()> {
    attack(&[], |served| {
        let hellos: [&[u8]; 5] = [
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
            b"SSH-2.0-OpenSSH_9.9\r\n",
            b"\0\0\0\x03\x25\x60\x95\x13\0\0\0\0\0\0\0\0",
            &[0xff; 64],
        ];
        for hello in hellos {
            closed(&mut dial(served, hello)?)?;
        }
        Ok(())
    })
}

#[test]
fn an_option_of_four_gibibytes_that_never_comes() -> Result<()> {
    attack(&[], |served| {
        (0..100_u32)
            .map(|index| dial(served, &hello(&option_claiming(index % 13, u32::MAX, &[7; 1000]))))
            .filter(Result::is_ok)
            .collect::<Result<Vec<_>>>()
    })
}

#[test]
fn an_option_of_four_gibibytes_of_which_much_comes() -> Result<()> {
    attack(&[], |served| {
        let mut held = Vec::new();
        for number in [opt::GO, opt::SET_META_CONTEXT, opt::LIST, 77] {
            let mut stream = dial(served, &hello(&option_claiming(number, u32::MAX, b"")))?;
            let poured = pour(&mut stream, &[b'x'; 1 << 20], 64)?;
            ensure!(poured > 1 << 20, "option {number}: {poured} bytes were read");
            held.push(stream);
        }
        Ok(held)
    })
}

#[test]
fn the_next_option_is_understood_behind_a_long_one() -> Result<()> {
    attack(&[], |served| {
        let mut haggling = served.haggling()?;
        for number in [opt::INFO, opt::GO, opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
            let outcome = haggling.outcome(number, &vec![b'x'; 1 << 20])?;
            ensure!(outcome == rep::ERR_TOO_BIG, "{outcome:#x}");
        }
        ensure!(haggling.outcome(1234, &vec![0; 5 << 20])? == rep::ERR_UNSUP);
        haggling.go("disk")?.disconnect()
    })
}

#[test]
fn export_names_that_can_not_be() -> Result<()> {
    attack(&[], |served| {
        let names = [
            option_claiming(opt::EXPORT_NAME, u32::MAX, b"disk"),
            option_claiming(opt::EXPORT_NAME, 4097, b"disk"),
            option(opt::EXPORT_NAME, &[b'd'; 4096]),
            option(opt::EXPORT_NAME, b"\xff\xfe"),
            option(opt::EXPORT_NAME, b"disk\0"),
            option(opt::EXPORT_NAME, b"../../etc/passwd"),
        ];
        for name in names {
            closed(&mut dial(served, &hello(&name))?)?;
        }
        Ok(())
    })
}

#[test]
fn a_flood_of_lists_whose_replies_nobody_reads() -> Result<()> {
    attack(&["--takes=250"], |served| {
        let mut held = Vec::new();
        for _ in 0..20 {
            let mut stream = dial(served, &hello(b""))?;
            pour(&mut stream, &option(opt::LIST, b"").repeat(1000), 100)?;
            held.push(stream);
        }
        Ok(held)
    })
}

#[test]
fn a_flood_of_context_lists_whose_replies_nobody_reads() -> Result<()> {
    attack(&["--takes=250"], |served| {
        let mut held = Vec::new();
        for _ in 0..20 {
            let mut stream = dial(served, &hello(&option(opt::STRUCTURED_REPLY, b"")))?;
            let list = option(opt::LIST_META_CONTEXT, &contexts("disk", &[]));
            pour(&mut stream, &list.repeat(200), 100)?;
            held.push(stream);
        }
        Ok(held)
    })
}

#[test]
fn a_flood_of_options_ends() -> Result<()> {
    attack(&[], |served| {
        let mut stream = dial(served, &hello(b""))?;
        let mut reader = stream.try_clone()?;
        let reading = std::thread::spawn(move || reader.read_to_end(&mut Vec::new()));
        let mut sent = 0;
        let unknown = option(4711, b"data");
        while sent < 100_000 && stream.write_all(&unknown).is_ok() {
            sent += 1;
        }
        ensure!(sent < 100_000, "100000 options are borne");
        // However it ends, it ends.
        let _ = reading.join();
        Ok(())
    })
}

#[test]
fn lengths_inside_options_that_lie() -> Result<()> {
    attack(&[], |served| {
        let mut haggling = served.haggling()?;
        haggling.frame(Framing::Structured)?;
        let long = u32::MAX.to_be_bytes();
        let name = counted(b"disk");
        let infos: [Vec<u8>; 5] = [
            long.to_vec(),
            [long.to_vec(), b"disk\0\0".to_vec()].concat(),
            [name.clone(), vec![0xff, 0xff]].concat(),
            [name.clone(), vec![0]].concat(),
            [info("disk", &[3]), vec![0; 3]].concat(),
        ];
        for data in infos {
            for number in [opt::INFO, opt::GO] {
                let outcome = haggling.outcome(number, &data)?;
                ensure!(outcome == rep::ERR_INVALID, "{number} {data:x?}: {outcome:#x}");
            }
        }
        let queries: [Vec<u8>; 6] = [
            [name.clone(), long.to_vec()].concat(),
            [name.clone(), vec![0, 0, 0, 1], long.to_vec()].concat(),
            [name.clone(), vec![0, 0, 0, 1], vec![0xff, 0xff, 0xff, 0xfc]].concat(),
            [name.clone(), vec![0, 0, 0, 2], counted(b"base:")].concat(),
            [name.clone(), vec![0, 0, 0, 0], b"more".to_vec()].concat(),
            [long.to_vec(), vec![0; 4]].concat(),
        ];
        for data in queries {
            for number in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
                let outcome = haggling.outcome(number, &data)?;
                ensure!(outcome == rep::ERR_INVALID, "{number} {data:x?}: {outcome:#x}");
            }
        }
        haggling.go("disk")?.disconnect()
    })
}

#[test]
fn strings_that_are_none() -> Result<()> {
    attack(&[], |served| {
        let mut haggling = served.haggling()?;
        haggling.frame(Framing::Structured)?;
        for bytes in [b"\xff".as_slice(), b"a\0b", b"\xed\xa0\x80"] {
            let data = [counted(bytes), vec![0, 0]].concat();
            ensure!(
                haggling.outcome(opt::INFO, &data)? == rep::ERR_INVALID,
                "{bytes:x?}"
            );
            let data = [counted(b"disk"), vec![0, 0, 0, 1], counted(bytes)].concat();
            ensure!(haggling.outcome(opt::SET_META_CONTEXT, &data)? == rep::ERR_INVALID);
        }
        haggling.go("disk")?.disconnect()
    })
}

#[test]
fn contexts_that_overlap_repeat_and_are_too_many() -> Result<()> {
    attack(&["--takes=250"], |served| {
        let mut haggling = served.haggling()?;
        haggling.frame(Framing::Extended)?;
        let all = haggling.list("disk", &[])?;
        ensure!(all.len() == 1 + 1 + 251, "{} contexts", all.len());
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let same = vec!["base:allocation"; 128];
        let selected = haggling.select("disk", &same)?;
        ensure!(selected.len() == 1, "{selected:?}");
        let prefixes = [
            "base:",
            "base:allocation",
            "qemu:",
            "qemu:dirty-bitmap:",
            "qemu:dirty-bitmap:last",
        ];
        let listed = haggling.list("disk", &prefixes)?;
        ensure!(listed.len() == all.len(), "each once: {}", listed.len());
        for (count, outcome) in [(16, rep::ACK), (17, rep::ERR_TOO_BIG), (128, rep::ERR_TOO_BIG)] {
            let told = haggling.outcome(opt::SET_META_CONTEXT, &contexts("disk", &all[..count]))?;
            ensure!(told == outcome, "{count} contexts: {told:#x}");
        }
        let told = haggling.outcome(opt::LIST_META_CONTEXT, &contexts("disk", &all[..129]))?;
        ensure!(told == rep::ERR_TOO_BIG, "129 queries: {told:#x}");
        haggling.go("disk")?.disconnect()
    })
}

#[test]
fn contexts_before_structured_replies() -> Result<()> {
    attack(&[], |served| {
        let mut haggling = served.haggling()?;
        for number in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
            let outcome = haggling.outcome(number, &contexts("disk", &["base:allocation"]))?;
            ensure!(outcome == rep::ERR_INVALID, "{outcome:#x}");
        }
        let mut client = haggling.go("disk")?;
        let answer = client.ask(Request::new(cmd::BLOCK_STATUS, 0, 4096))?;
        ensure!(answer.error == 22, "{answer:?}");
        client.disconnect()
    })
}

#[test]
fn starttls_again_and_again_where_there_is_none() -> Result<()> {
    attack(&[], |served| {
        let mut haggling = served.haggling()?;
        for _ in 0..500 {
            ensure!(haggling.outcome(opt::STARTTLS, b"")? == rep::ERR_UNSUP);
        }
        // The hello of TLS where an option should be.
        let mut stream = dial(served, &hello(&option(opt::STARTTLS, b"")))?;
        stream.read_exact(&mut [0; 20])?;
        stream.write_all(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\0\0\0\0\0")?;
        let mut rest = Vec::new();
        // The message of the error, then the end.
        let _ = stream.read_to_end(&mut rest);
        ensure!(rest.len() < 300, "{} bytes", rest.len());
        Ok(())
    })
}

#[test]
fn an_abort_with_data_and_what_follows_it() -> Result<()> {
    attack(&[], |served| {
        let mut haggling = served.haggling()?;
        ensure!(haggling.outcome(opt::ABORT, &vec![1; 1 << 20])? == rep::ACK);
        let mut stream = dial(served, &hello(&option(opt::ABORT, b"")))?;
        // It may be gone already.
        let _ = stream.write_all(&option(opt::LIST, b"").repeat(100));
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        ensure!(all.len() <= 20, "{} bytes behind an abort", all.len());
        Ok(())
    })
}

#[test]
fn options_where_the_transmission_has_begun() -> Result<()> {
    attack(&[], |served| {
        let go = option(opt::GO, &info("disk", &[]));
        let mut stream = dial(served, &hello(&[go.clone(), go].concat()))?;
        let mut all = Vec::new();
        // The reply to the first, then the end: the second is no request.
        let _ = stream.read_to_end(&mut all);
        ensure!(all.len() < 100, "{} bytes", all.len());
        Ok(())
    })
}

#[test]
fn export_name_behind_extended_headers() -> Result<()> {
    attack(&[], |served| {
        let mut haggling = served.haggling()?;
        haggling.frame(Framing::Extended)?;
        haggling.send(&option(opt::EXPORT_NAME, b"disk"))?;
        let mut stream = haggling.stream().try_clone()?;
        closed(&mut stream)
    })
}

#[test]
fn clients_without_fixed_newstyle_that_negotiate() -> Result<()> {
    attack(&[], |served| {
        for number in [opt::LIST, opt::GO, opt::STARTTLS, opt::ABORT, 99] {
            let mut stream = dial(served, &[vec![0; 4], option(number, b"")].concat())?;
            closed(&mut stream)?;
        }
        Ok(())
    })
}

#[test]
fn a_whole_session_in_one_write_and_byte_by_byte() -> Result<()> {
    attack(&[], |served| {
        let requests = [
            Request::new(cmd::READ, 4096, 512).encode(Framing::Simple),
            Request::new(cmd::DISC, 0, 0).encode(Framing::Simple),
        ];
        let session = hello(&[option(opt::GO, &info("disk", &[])), requests.concat()].concat());
        for piece in [session.len(), 1, 7] {
            let mut stream = dial(served, b"")?;
            for piece in session.chunks(piece) {
                stream.write_all(piece)?;
            }
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            let (_, data) = all.split_at(all.len() - 512);
            ensure!(data == &served.memory()[4096..4608], "pieces of {piece}");
        }
        Ok(())
    })
}

#[test]
fn clients_that_close_their_half_in_the_middle() -> Result<()> {
    attack(&[], |served| {
        let places = [
            vec![],
            hello(b""),
            hello(b"IHAVEOPT"),
            hello(&option_claiming(opt::GO, 10, b"abc")),
            hello(&option(opt::LIST, b"")),
        ];
        let mut held = Vec::new();
        for bytes in places {
            let mut stream = dial(served, &bytes)?;
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_to_end(&mut Vec::new())?;
            held.push(stream);
        }
        Ok(held)
    })
}

#[test]
fn hundreds_that_negotiate_and_never_enter() -> Result<()> {
    attack(&["--takes=100"], |served| {
        (0..200)
            .map(|_| {
                let mut haggling = served.haggling()?;
                haggling.frame(Framing::Extended)?;
                haggling.select("disk", &["base:allocation", "qemu:dirty-bitmap:last"])?;
                Ok(haggling)
            })
            .collect::<Result<Vec<Haggling>>>()
    })
}

#[test]
fn hundreds_that_enter_and_do_nothing() -> Result<()> {
    attack(&[], |served| {
        (0..200)
            .map(|index| served.client(Framing::ALL[index % 3]))
            .collect::<Result<Vec<Client>>>()
    })
}
