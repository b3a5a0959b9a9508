//! Transmission: requests and their answers. What is answered with which error is in `nbd_model.rs`.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::{Client, Framing, Request, cmd, err, flag};

use super::exports::{Fixture, SIZE};

const ALLOCATION: &str = "base:allocation";
const LAST: &str = "qemu:dirty-bitmap:last";
const CHUNKS: [Framing; 2] = [Framing::Structured, Framing::Extended];

fn refused(client: &mut Client, request: Request, error: u32) -> Result<()> {
    let answer = client.ask(request)?;
    ensure!(answer.error == error, "{:?}: {}", answer.request, answer.error);
    if client.agreed().framing.has_chunks() {
        ensure!(
            !answer.message.is_empty(),
            "an error without a message for people"
        );
        ensure!(
            answer.message.len() <= 256,
            "a message of {} bytes",
            answer.message.len()
        );
    }
    Ok(())
}

#[test]
fn every_form_of_reply_answers_every_command() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in Framing::ALL {
        let mut client = fixture.client("scratch", framing, &[ALLOCATION])?;
        for request in [
            Request::new(cmd::READ, 0, 100_000),
            Request::write(4096, vec![1; 5000]),
            Request::new(cmd::TRIM, 8192, 4096),
            Request::new(cmd::WRITE_ZEROES, 8192, 4096),
            Request::new(cmd::CACHE, 0, SIZE),
            Request::new(cmd::FLUSH, 0, 0),
        ] {
            let answer = client.ask(request)?;
            ensure!(answer.error == 0, "{answer:?}");
        }
        client.disconnect()?;
    }
    Ok(())
}

#[test]
fn errors_carry_no_data_and_the_session_goes_on() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in Framing::ALL {
        let mut client = fixture.client("disk", framing, &[])?;
        refused(&mut client, Request::new(cmd::READ, SIZE, 512), err::EINVAL)?;
        refused(&mut client, Request::write(0, vec![0; 512]), err::EPERM)?;
        refused(&mut client, Request::new(1234, 0, 512), err::EINVAL)?;
        refused(&mut client, Request::new(cmd::BLOCK_STATUS, 0, 512), err::EINVAL)?;
        ensure!(client.read(0, 3)? == b"ddd");
        client.disconnect()?;
    }
    Ok(())
}

#[test]
fn a_write_is_there_for_every_connection_once_it_is_answered() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut clients = Framing::ALL
        .iter()
        .map(|framing| fixture.client("scratch", *framing, &[]))
        .collect::<Result<Vec<_>>>()?;
    for (index, value) in (0..3).zip(1_u8..) {
        let data = vec![value; 10_000];
        let answer = clients[index].ask(Request::write(777, data.clone()))?;
        ensure!(answer.error == 0);
        for client in &mut clients {
            ensure!(client.read(777, 10_000)? == data);
        }
    }
    Ok(())
}

#[test]
fn a_flush_on_one_connection_covers_all() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut writers = Framing::ALL
        .iter()
        .map(|framing| fixture.client("volatile", *framing, &[]))
        .collect::<Result<Vec<_>>>()?;
    let mut other = fixture.client("volatile", Framing::Simple, &[])?;
    for (place, writer) in (0..).zip(&mut writers) {
        let answer = writer.ask(Request::write(place * 4096, vec![9; 4096]))?;
        ensure!(answer.error == 0);
    }
    ensure!(fixture.volatile.contents().durable.iter().all(|byte| *byte == 0));
    ensure!(other.ask(Request::new(cmd::FLUSH, 0, 0))?.error == 0);
    let contents = fixture.volatile.contents();
    ensure!(contents.durable[..3 * 4096].iter().all(|byte| *byte == 9));
    Ok(())
}

#[test]
fn fua_is_durable_before_the_answer() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in Framing::ALL {
        let mut client = fixture.client("volatile", framing, &[])?;
        for (request, value) in [
            (Request::write(0, vec![7; 4096]), 7),
            (Request::new(cmd::WRITE_ZEROES, 0, 4096), 0),
            (Request::write(0, vec![8; 4096]), 8),
            (Request::new(cmd::TRIM, 0, 4096), 0),
        ] {
            ensure!(client.ask(request.with(flag::FUA))?.error == 0);
            let contents = fixture.volatile.contents();
            ensure!(
                contents.durable[..4096].iter().all(|byte| *byte == value),
                "{value}"
            );
        }
        // It may come with commands that write nothing.
        for command in [cmd::READ, cmd::CACHE] {
            let request = Request::new(command, 0, 512).with(flag::FUA);
            ensure!(client.ask(request)?.error == 0, "command {command}");
        }
        ensure!(client.ask(Request::new(cmd::FLUSH, 0, 0).with(flag::FUA))?.error == 0);
    }
    Ok(())
}

#[test]
fn zeroes_are_zeroes_and_no_hole_and_speed_are_kept() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut client = fixture.client("volatile", Framing::Structured, &[])?;
    client.ask(Request::write(0, vec![5; 65536]))?;
    // What is not fast fails at once and changes nothing; without the flag it does not.
    let zeroes = Request::new(cmd::WRITE_ZEROES, 0, SIZE);
    refused(&mut client, zeroes.clone().with(flag::FAST_ZERO), err::ENOTSUP)?;
    ensure!(client.read(0, 4)? == [5; 4]);
    ensure!(client.ask(zeroes.with(flag::NO_HOLE))?.error == 0);
    ensure!(client.read(0, 65536)?.iter().all(|byte| *byte == 0));
    ensure!(fixture.volatile.contents().provisioned == [(0, SIZE)]);

    // On a file: a hole by default, allocated with the flag.
    let mut client = fixture.client("scratch", Framing::Extended, &[ALLOCATION])?;
    let status = |client: &mut Client| -> Result<Vec<(u64, u64)>> {
        let answer = client.ask(Request::new(cmd::BLOCK_STATUS, 0, 65536))?;
        answer.status.into_values().next().context("a status")
    };
    ensure!(client.ask(Request::new(cmd::WRITE_ZEROES, 0, 65536))?.error == 0);
    ensure!(status(&mut client)? == [(65536, 3)]);
    let blocks = |fixture: &Fixture| -> Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(std::fs::metadata(fixture.file("scratch"))?.blocks())
    };
    let before = blocks(&fixture)?;
    let allocated = Request::new(cmd::WRITE_ZEROES, 0, 65536).with(flag::NO_HOLE);
    ensure!(client.ask(allocated)?.error == 0);
    ensure!(blocks(&fixture)? >= before + 128, "allocated blocks");
    ensure!(client.read(0, 65536)?.iter().all(|byte| *byte == 0));
    Ok(())
}

#[test]
fn a_read_is_one_chunk_with_all_its_bytes() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in CHUNKS {
        let mut client = fixture.client("disk", framing, &[])?;
        // Data and hole in one, which DF forbids to divide.
        for flags in [0, flag::DF] {
            for (offset, length) in [(0, 1), ((1 << 20) - 100, 200), (0, 65536), (0, SIZE)] {
                let answer = client.ask(Request::new(cmd::READ, offset, length).with(flags))?;
                let file = std::fs::File::open(fixture.file("disk"))?;
                let mut wanted = vec![0; usize::try_from(length)?];
                file.read_exact_at(&mut wanted, offset)?;
                ensure!(answer.error == 0 && answer.data == wanted, "{offset} {length}");
            }
        }
        client.disconnect()?;
    }
    Ok(())
}

#[test]
fn a_read_beyond_the_largest_payload_fails_and_others_may_be_longer() -> Result<()> {
    let fixture = Fixture::new()?;
    for (framing, error) in [
        (Framing::Simple, err::EINVAL),
        (Framing::Structured, err::EOVERFLOW),
        (Framing::Extended, err::EOVERFLOW),
    ] {
        let mut client = fixture.client("coarse", framing, &[])?;
        refused(&mut client, Request::new(cmd::READ, 0, 8192 + 512), error)?;
        ensure!(client.read(0, 8192)?.len() == 8192);
        ensure!(client.ask(Request::new(cmd::CACHE, 0, SIZE))?.error == 0);
        client.disconnect()?;
    }
    Ok(())
}

#[test]
fn requests_that_are_not_aligned_are_invalid() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in Framing::ALL {
        let mut client = fixture.client("coarse", framing, &[ALLOCATION])?;
        for command in [cmd::READ, cmd::CACHE, cmd::BLOCK_STATUS] {
            for (offset, length) in [(1, 512), (0, 511), (256, 256)] {
                refused(&mut client, Request::new(command, offset, length), err::EINVAL)?;
            }
        }
        client.disconnect()?;
    }
    Ok(())
}

#[test]
fn a_status_has_one_chunk_for_each_context() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in CHUNKS {
        let mut haggling = fixture.haggling()?;
        haggling.frame(framing)?;
        let ids: BTreeMap<String, u32> = haggling
            .select("disk", &[ALLOCATION, LAST])?
            .into_iter()
            .map(|(id, name)| (name, id))
            .collect();
        let mut client = haggling.go("disk")?;
        let answer = client.ask(Request::new(cmd::BLOCK_STATUS, 0, SIZE))?;
        let allocation = vec![(1 << 20, 0), (SIZE - (1 << 20), 3)];
        let dirty = vec![(65536, 0), (65536, 1), (SIZE - 131_072, 0)];
        ensure!(answer.status[&ids[ALLOCATION]] == allocation, "{answer:?}");
        ensure!(answer.status[&ids[LAST]] == dirty, "{answer:?}");

        let one = Request::new(cmd::BLOCK_STATUS, 4096, 8192).with(flag::REQ_ONE);
        let answer = client.ask(one)?;
        ensure!(
            answer.status.values().all(|extents| *extents == [(8192, 0)]),
            "{answer:?}"
        );

        if framing == Framing::Extended {
            let chosen = Request::status_of(65536, 4096, &[ids[LAST]]);
            let answer = client.ask(chosen)?;
            ensure!(
                answer.status == BTreeMap::from([(ids[LAST], vec![(4096, 1)])]),
                "{answer:?}"
            );
            for wrong in [&[77][..], &[ids[LAST], ids[LAST]]] {
                refused(&mut client, Request::status_of(0, 4096, wrong), err::EINVAL)?;
            }
        }
        client.disconnect()?;
    }
    Ok(())
}

#[test]
fn a_status_keeps_the_largest_payload_and_always_gets_on() -> Result<()> {
    let fixture = Fixture::new()?;
    for (framing, most) in [(Framing::Structured, 1024), (Framing::Extended, 512)] {
        let mut client = fixture.client("coarse", framing, &[ALLOCATION])?;
        let mut offset = 0;
        while offset < SIZE {
            let answer = client.ask(Request::new(cmd::BLOCK_STATUS, offset, SIZE - offset))?;
            let extents = answer.status.values().next().context("a status")?;
            ensure!(extents.len() <= most, "{} extents", extents.len());
            ensure!(
                extents.windows(2).all(|pair| pair[0].1 != pair[1].1),
                "neighbours differ"
            );
            offset += extents.iter().map(|(length, _)| length).sum::<u64>();
        }
        ensure!(offset == SIZE);
    }
    Ok(())
}

#[test]
fn contexts_that_were_selected_before_the_export_changed_are_not_answered() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut haggling = fixture.haggling()?;
    haggling.frame(Framing::Structured)?;
    haggling.select("disk", &[LAST])?;
    let mut client = haggling.go("coarse")?;
    refused(&mut client, Request::new(cmd::BLOCK_STATUS, 0, 512), err::EINVAL)
}

#[test]
fn a_disconnect_finishes_what_is_in_flight() -> Result<()> {
    let fixture = Fixture::new()?;
    for framing in Framing::ALL {
        let mut client = fixture.client("disk", framing, &[])?;
        for _ in 0..30 {
            client.send(Request::new(cmd::READ, 0, 100_000))?;
        }
        client.send(Request::new(cmd::DISC, 0, 0))?;
        for _ in 0..30 {
            ensure!(client.answer()?.error == 0);
        }
        client.closed()?;
    }
    Ok(())
}

#[test]
fn cookies_come_back_whatever_they_are() -> Result<()> {
    let fixture = Fixture::new()?;
    let client = fixture.client("disk", Framing::Simple, &[])?;
    let mut stream = client.stream().try_clone()?;
    for cookie in [0, 1, u64::MAX, 0x6744_6698_2560_9513] {
        let request = Request {
            cookie,
            ..Request::new(cmd::CACHE, 0, 512)
        };
        stream.write_all(&request.encode(Framing::Simple))?;
        let mut reply = [0; 16];
        stream.read_exact(&mut reply)?;
        ensure!(reply[4..8] == [0; 4] && reply[8..] == cookie.to_be_bytes());
    }
    Ok(())
}

#[test]
fn an_export_that_goes_away_says_shutdown() -> Result<()> {
    let fixture = Fixture::new()?;
    let mut client = fixture.client("disk", Framing::Structured, &[ALLOCATION])?;
    ensure!(fixture.exports.remove("disk"));
    for request in [
        Request::new(cmd::READ, 0, 512),
        Request::new(cmd::BLOCK_STATUS, 0, 512),
    ] {
        refused(&mut client, request, err::ESHUTDOWN)?;
    }
    client.disconnect()
}
