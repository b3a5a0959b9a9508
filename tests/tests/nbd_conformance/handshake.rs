//! Handshake: greeting, flags, options and their replies.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::build::{contexts, info, option};
use blksnap_tests::nbd::client::{PATIENCE, closed};
use blksnap_tests::nbd::{Framing, Haggling, OptionReply, Request, cmd, err, opt, rep, trans};

use super::exports::{Fixture, SIZE};

const ALLOCATION: &str = "base:allocation";
const LAST: &str = "qemu:dirty-bitmap:last";

fn stream(fixture: &Fixture, flags: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(fixture.socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.read_exact(&mut [0; 18])?;
    stream.write_all(&flags.to_be_bytes())?;
    Ok(stream)
}

/// Type of the last reply; then the session must go on.
fn outcome(haggling: &mut Haggling, number: u32, data: &[u8]) -> Result<u32> {
    let outcome = haggling.outcome(number, data)?;
    ensure!(
        haggling.outcome(opt::LIST, b"")? == rep::ACK,
        "the next option behind {number}"
    );
    Ok(outcome)
}

#[test]
fn the_server_speaks_first_and_newstyle_only() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut stream = UnixStream::connect(fixture.socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    // The second magic number is that of newstyle, the flags are the two that there are.
    ensure!(greeting == *b"NBDMAGICIHAVEOPT\0\x03", "{greeting:x?}");
    Ok(())
}

#[test]
fn client_flags_that_are_unknown_close_the_connection() -> Result<()> {
    let fixture = Fixture::new()?;
    for flags in [4, 1 << 31, u32::MAX] {
        closed(&mut stream(&fixture, flags)?)?;
    }
    Ok(())
}

#[test]
fn an_export_that_can_not_be_chosen_ends_the_session() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut stream = stream(&fixture, 3)?;
    stream.write_all(&option(opt::EXPORT_NAME, b"nothing"))?;
    closed(&mut stream)
}

#[test]
fn export_name_gives_size_flags_and_zeroes_unless_declined() -> Result<()> {
    let fixture = Fixture::new()?;
    for (flags, length) in [(3, 10), (1, 134), (0, 134)] {
        let mut stream = stream(&fixture, flags)?;
        stream.write_all(&option(opt::EXPORT_NAME, b"disk"))?;
        stream.write_all(&Request::new(cmd::DISC, 0, 0).encode(Framing::Simple))?;
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply)?;
        ensure!(reply.len() == length, "{} bytes", reply.len());
        ensure!(reply[..8] == SIZE.to_be_bytes() && reply[10..].iter().all(|byte| *byte == 0));
    }
    Ok(())
}

#[test]
fn options_that_fail_leave_the_session_open() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut haggling = fixture.haggling()?;
    for (number, data, wanted) in [
        (4711, vec![], rep::ERR_UNSUP),
        (4, vec![1, 2, 3], rep::ERR_UNSUP),
        (opt::LIST, vec![0], rep::ERR_INVALID),
        (opt::STRUCTURED_REPLY, vec![0], rep::ERR_INVALID),
        (opt::EXTENDED_HEADERS, vec![0], rep::ERR_INVALID),
        (opt::STARTTLS, vec![0], rep::ERR_INVALID),
        (opt::STARTTLS, vec![], rep::ERR_UNSUP),
        (opt::INFO, info("nothing", &[]), rep::ERR_UNKNOWN),
        (opt::GO, info("nothing", &[3]), rep::ERR_UNKNOWN),
        (opt::GO, vec![], rep::ERR_INVALID),
    ] {
        let told = outcome(&mut haggling, number, &data)?;
        ensure!(told == wanted, "option {number}: {told:#x}");
    }
    haggling.go("disk")?.disconnect()
}

#[test]
fn an_error_comes_without_information() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut haggling = fixture.haggling()?;
    let replies = haggling.option(opt::INFO, &info("nothing", &[0, 1, 2, 3]))?;
    ensure!(
        replies.len() == 1 && replies[0].kind == rep::ERR_UNKNOWN,
        "{replies:?}"
    );
    Ok(())
}

#[test]
fn abort_is_acknowledged_whatever_it_carries_and_whoever_waits() -> Result<()> {
    let fixture = Fixture::new()?;
    for data in [b"".as_slice(), b"ignored"] {
        let mut haggling = fixture.haggling()?;
        let replies = haggling.option(opt::ABORT, data)?;
        ensure!(replies.len() == 1 && replies[0].kind == rep::ACK && replies[0].data.is_empty());
        closed(&mut haggling.stream().try_clone()?)?;
        // One that does not wait.
        let mut haggling = fixture.haggling()?;
        haggling.send(&option(opt::ABORT, data))?;
    }
    fixture.haggling()?.go("disk")?.disconnect()
}

#[test]
fn list_has_one_entry_for_each_export() -> Result<()> {
    let fixture = Fixture::new()?;
    let replies = fixture.haggling()?.option(opt::LIST, b"")?;
    let (last, entries) = replies.split_last().context("replies")?;
    ensure!(last.kind == rep::ACK && entries.iter().all(|entry| entry.kind == rep::SERVER));
    let names: Vec<&[u8]> = entries
        .iter()
        .map(|entry| &entry.data[4..4 + usize::from(entry.data[3])])
        .collect();
    ensure!(
        names == [b"coarse".as_slice(), b"disk", b"scratch", b"volatile"],
        "{names:?}"
    );
    Ok(())
}

/// Information by type.
fn information(replies: &[OptionReply]) -> Vec<(u16, Vec<u8>)> {
    let mut all: Vec<_> = replies
        .iter()
        .filter(|reply| reply.kind == rep::INFO)
        .map(|reply| {
            (
                u16::from_be_bytes([reply.data[0], reply.data[1]]),
                reply.data[2..].to_vec(),
            )
        })
        .collect();
    all.sort_unstable();
    all
}

#[test]
fn info_tells_what_is_asked_once_and_ignores_what_is_unknown() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut haggling = fixture.haggling()?;
    let replies = haggling.option(opt::INFO, &info("disk", &[3, 2, 1, 77, 0xffff]))?;
    let told = information(&replies);
    let kinds: Vec<u16> = told.iter().map(|(kind, _)| *kind).collect();
    ensure!(kinds == [0, 1, 2, 3], "{kinds:?}");
    ensure!(told[0].1[..8] == SIZE.to_be_bytes());
    ensure!(told[1].1 == b"disk" && told[2].1 == b"A disk of a test");
    let sizes = [1_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
    ensure!(told[3].1 == sizes, "the defaults of the specification");
    ensure!(replies.last().is_some_and(|reply| reply.kind == rep::ACK));
    Ok(())
}

#[test]
fn go_tells_the_same_as_info_and_begins_at_once() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in Framing::ALL {
        // Without the flag that declines zeroes there are none here either.
        for flags in [1, 3] {
            let mut haggling = Haggling::open(&fixture.socket(), flags)?;
            haggling.frame(framing)?;
            let data = info("disk", &[1, 2, 3]);
            let first = information(&haggling.option(opt::INFO, &data)?);
            let second = information(&haggling.option(opt::GO, &data)?);
            ensure!(first == second, "{framing:?}");
            let mut stream = haggling.stream().try_clone()?;
            stream.write_all(&Request::new(cmd::READ, 0, 1).encode(framing))?;
            let mut magic = [0; 4];
            stream.read_exact(&mut magic)?;
            let wanted: [u8; 4] = match framing {
                Framing::Simple => [0x67, 0x44, 0x66, 0x98],
                Framing::Structured => [0x66, 0x8e, 0x33, 0xef],
                Framing::Extended => [0x6e, 0x8a, 0x27, 0x8c],
            };
            ensure!(magic == wanted, "{magic:x?}");
        }
    }
    Ok(())
}

#[test]
fn sizes_other_than_the_defaults_are_told_to_everybody_and_refuse_nobody() -> Result<()> {
    let fixture = Fixture::new()?;
    for asked in [&[][..], &[3]] {
        let mut haggling = fixture.haggling()?;
        let replies = haggling.option(opt::GO, &info("coarse", asked))?;
        let told = information(&replies);
        let sizes = [512_u32, 4096, 8192].map(u32::to_be_bytes).concat();
        ensure!(told.contains(&(3, sizes)), "{told:?}");
        ensure!(replies.last().is_some_and(|reply| reply.kind == rep::ACK));
    }
    // One that can't be told is let in, too; what it gets wrong fails cleanly.
    let mut stream = stream(&fixture, 3)?;
    stream.write_all(&option(opt::EXPORT_NAME, b"coarse"))?;
    stream.read_exact(&mut [0; 10])?;
    stream.write_all(&Request::new(cmd::READ, 1, 512).encode(Framing::Simple))?;
    let mut reply = [0; 16];
    stream.read_exact(&mut reply)?;
    ensure!(reply[4..8] == err::EINVAL.to_be_bytes());
    Ok(())
}

#[test]
fn transmission_flags_are_those_of_what_works() -> Result<()> {
    let fixture = Fixture::new()?;
    let common = trans::HAS_FLAGS | trans::SEND_FLUSH | trans::SEND_CACHE;
    let writes = trans::SEND_FUA | trans::SEND_TRIM | trans::SEND_WRITE_ZEROES | trans::SEND_FAST_ZERO;
    for framing in Framing::ALL {
        let fragment = if framing.has_chunks() { trans::SEND_DF } else { 0 };
        for (export, flags) in [
            ("disk", trans::READ_ONLY | trans::CAN_MULTI_CONN),
            ("scratch", writes | trans::CAN_MULTI_CONN),
            ("coarse", trans::READ_ONLY | trans::ROTATIONAL),
        ] {
            let client = fixture.client(export, framing, &[])?;
            let wanted = common | fragment | flags;
            ensure!(
                client.agreed().flags == wanted,
                "{export}: {:#x}, wanted is {wanted:#x}",
                client.agreed().flags
            );
            // Resizing is not offered, contexts can't be chosen where none is selected.
            ensure!(client.agreed().flags & (trans::SEND_RESIZE | trans::BLOCK_STATUS_PAYLOAD) == 0);
        }
        let client = fixture.client("disk", framing, &[ALLOCATION])?;
        let offered = client.agreed().flags & trans::BLOCK_STATUS_PAYLOAD != 0;
        ensure!(offered == (framing == Framing::Extended), "{framing:?}");
    }
    Ok(())
}

#[test]
fn contexts_are_listed_as_asked() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut haggling = fixture.haggling()?;
    haggling.frame(Framing::Structured)?;
    for (queries, wanted) in [
        (&[][..], &[ALLOCATION, LAST][..]),
        (&["base:"], &[ALLOCATION]),
        (&["qemu:"], &[LAST]),
        (&["qemu:dirty-bitmap:"], &[LAST]),
        (&[LAST, "base:", ALLOCATION], &[ALLOCATION, LAST]),
        (&["x-unknown:", "x-unknown:leaf"], &[]),
        (&["base:unknown"], &[]),
    ] {
        ensure!(haggling.list("disk", queries)? == wanted, "{queries:?}");
        // The identifier is reserved here.
        let replies = haggling.option(opt::LIST_META_CONTEXT, &contexts("disk", queries))?;
        let (_, listed) = replies.split_last().context("replies")?;
        ensure!(listed.iter().all(|reply| reply.data[..4] == [0; 4]));
    }
    Ok(())
}

#[test]
fn contexts_are_selected_by_their_whole_names() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in [Framing::Structured, Framing::Extended] {
        let mut haggling = fixture.haggling()?;
        haggling.frame(framing)?;
        for (queries, wanted) in [
            (&[][..], 0),
            (
                &[
                    "base:",
                    "qemu:",
                    "qemu:dirty-bitmap:",
                    "base:unknown",
                    "x-unknown:leaf",
                ],
                0,
            ),
            (&[ALLOCATION], 1),
            (&[LAST, ALLOCATION, LAST], 2),
        ] {
            let selected = haggling.select("disk", queries)?;
            ensure!(selected.len() == wanted, "{queries:?}: {selected:?}");
            let mut ids: Vec<u32> = selected.iter().map(|(id, _)| *id).collect();
            ids.dedup();
            ensure!(ids.len() == wanted, "{selected:?}");
        }
    }
    Ok(())
}

#[test]
fn a_selection_replaces_the_one_before_even_if_it_fails() -> Result<()> {
    let fixture = Fixture::new()?;
    for second in [
        contexts("disk", &[]),
        contexts("nothing", &[ALLOCATION]),
        contexts("coarse", &[ALLOCATION]),
        b"broken".to_vec(),
    ] {
        let mut haggling = fixture.haggling()?;
        haggling.frame(Framing::Structured)?;
        haggling.select("disk", &[ALLOCATION])?;
        haggling.outcome(opt::SET_META_CONTEXT, &second)?;
        let mut client = haggling.go("disk")?;
        let answer = client.ask(Request::new(cmd::BLOCK_STATUS, 0, 4096))?;
        ensure!(answer.error == err::EINVAL, "{answer:?}");
    }
    Ok(())
}

#[test]
fn contexts_need_replies_in_chunks() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut haggling = fixture.haggling()?;
    for number in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        let told = outcome(&mut haggling, number, &contexts("disk", &[ALLOCATION]))?;
        ensure!(told == rep::ERR_INVALID, "{told:#x}");
    }
    Ok(())
}

#[test]
fn extended_headers_need_no_structured_replies_and_outrank_them() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut haggling = fixture.haggling()?;
    ensure!(haggling.outcome(opt::EXTENDED_HEADERS, b"")? == rep::ACK);
    ensure!(haggling.outcome(opt::STRUCTURED_REPLY, b"")? == rep::ERR_EXT_HEADER_REQD);
    let mut haggling = fixture.haggling()?;
    haggling.frame(Framing::Structured)?;
    haggling.frame(Framing::Extended)?;
    let mut client = haggling.go("disk")?;
    ensure!(client.read(0, 3)? == b"ddd");
    client.disconnect()
}

#[test]
fn a_server_that_ends_says_so_and_finishes() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let mut haggling = fixture.haggling()?;
    ensure!(haggling.outcome(opt::LIST, b"")? == rep::ACK);
    let stopping = fixture.stop().context("a server")?;
    // The server may have seen the end only after this option.
    let told = loop {
        match haggling.outcome(opt::INFO, &info("disk", &[]))? {
            rep::ACK => {}
            told => break told,
        }
    };
    ensure!(told == rep::ERR_SHUTDOWN, "{told:#x}");
    ensure!(haggling.outcome(opt::ABORT, b"")? == rep::ACK);
    drop(haggling);
    fixture.wait(stopping)
}
