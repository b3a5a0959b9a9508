//! Hostile transmissions: what clients do with an export that no client should, by hand, case by case.
//!
//! Each case has a server process of its own; [`besiege`] checks that others are served meanwhile, that memory is
//! bounded, and that nothing panics.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use blksnap_tests::nbd::client::closed;
use blksnap_tests::nbd::served::{SIZE, STRIPED, compare};
use blksnap_tests::nbd::siege::besiege;
use blksnap_tests::nbd::{Client, Framing, Request, Served, cmd, err, flag};
use blksnap_tests::seed;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

const MIB: u64 = 1 << 20;

fn attack<T>(arguments: &[&str], attack: impl FnOnce(&Served) -> Result<T>) -> Result<()> {
    besiege(Path::new(env!("CARGO_BIN_EXE_blksnap-serve")), arguments, attack)
}

/// Sends a request and wants this error.
fn refused(client: &mut Client, request: Request, error: u32) -> Result<()> {
    let answer = client.ask(request)?;
    ensure!(answer.error == error, "{:?}: {}", answer.request, answer.error);
    Ok(())
}

/// The same request, again and again, with no answer read, until the server takes no more for a while.
fn pour(client: &Client, request: &Request, times: usize) -> Result<usize> {
    let mut stream = client.stream().try_clone()?;
    stream.set_write_timeout(Some(Duration::from_millis(300)))?;
    let bytes = request.encode(client.agreed().framing);
    for sent in 0..times {
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match stream.write(rest) {
                Ok(written) if written > 0 => rest = &rest[written..],
                _ => return Ok(sent),
            }
        }
    }
    Ok(times)
}

#[test]
fn half_a_request() -> Result<()> {
    attack(&[], |served| {
        let mut held = Vec::new();
        for framing in Framing::ALL {
            let request = Request::new(cmd::READ, 0, 4096).encode(framing);
            for length in [1, 3, 4, 5, 27] {
                let mut client = served.client(framing)?;
                client.raw(&request[..length])?;
                held.push(client);
            }
        }
        Ok(held)
    })
}

#[test]
fn magic_numbers_of_anything_else() -> Result<()> {
    attack(&[], |served| {
        for framing in Framing::ALL {
            let magics: [&[u8]; 7] = [
                b"IHAVEOPT",
                &[0x12, 0x56, 0x09, 0x53],
                &[0x25, 0x60, 0x95, 0x14],
                &[0x67, 0x44, 0x66, 0x98],
                &[0x66, 0x8e, 0x33, 0xef],
                &[0; 4],
                if framing == Framing::Extended {
                    &[0x25, 0x60, 0x95, 0x13]
                } else {
                    &[0x21, 0xe4, 0x1c, 0x71]
                },
            ];
            for magic in magics {
                let mut client = served.client(framing)?;
                client.raw(magic)?;
                client
                    .closed()
                    .with_context(|| format!("{framing:?} {magic:x?}"))?;
            }
        }
        Ok(())
    })
}

#[test]
fn ranges_that_wrap_around_or_lie_beyond_the_end() -> Result<()> {
    attack(&["--writable"], |served| {
        for framing in Framing::ALL {
            let mut client = served.client(framing)?;
            let ranges = [
                (u64::MAX, 1),
                (u64::MAX, u64::from(u32::MAX)),
                (u64::MAX - 4095, 4096),
                (1 << 63, 4096),
                (SIZE, 1),
                (SIZE - 1, 2),
                (SIZE + 1, 0),
                (0, SIZE + 1),
                (4096, u64::from(u32::MAX)),
            ];
            for (offset, length) in ranges {
                for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::BLOCK_STATUS] {
                    refused(&mut client, Request::new(command, offset, length), err::EINVAL)?;
                }
                refused(
                    &mut client,
                    Request::new(cmd::WRITE_ZEROES, offset, length),
                    err::ENOSPC,
                )?;
                if length <= 4096 {
                    let data = vec![1; usize::try_from(length)?];
                    refused(&mut client, Request::write(offset, data), err::ENOSPC)?;
                }
            }
            if framing == Framing::Extended {
                for (offset, length) in [(0, u64::MAX), (1, u64::MAX), (SIZE, 1 << 63), (4096, 1 << 32)] {
                    for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::BLOCK_STATUS] {
                        refused(&mut client, Request::new(command, offset, length), err::EINVAL)?;
                    }
                    refused(
                        &mut client,
                        Request::new(cmd::WRITE_ZEROES, offset, length),
                        err::ENOSPC,
                    )?;
                }
            }
            client.disconnect()?;
        }
        compare(&served.file(), served.memory())
    })
}

#[test]
fn writes_of_four_gibibytes() -> Result<()> {
    attack(&["--writable"], |served| {
        for framing in Framing::ALL {
            for length in [u64::from(u32::MAX), (32 << 20) + 1, 1 << 31] {
                let mut client = served.client(framing)?;
                let mut header = Request::new(cmd::WRITE, 0, length).encode(framing);
                header.extend_from_slice(&[7; 1000]);
                client.raw(&header)?;
                client.closed()?;
            }
        }
        let mut client = served.client(Framing::Extended)?;
        client.raw(&Request::new(cmd::WRITE, 0, u64::MAX).encode(Framing::Extended))?;
        client.closed()?;
        compare(&served.file(), served.memory())
    })
}

#[test]
fn large_writes_that_never_come() -> Result<()> {
    attack(&["--writable"], |served| {
        (0..60)
            .map(|index| {
                let framing = Framing::ALL[index % 3];
                let mut client = served.client(framing)?;
                client.raw(&Request::new(cmd::WRITE, 0, 32 * MIB).encode(framing))?;
                client.raw(&[9; 5000][..index * 50])?;
                Ok(client)
            })
            .collect::<Result<Vec<Client>>>()
    })
}

#[test]
fn a_write_that_stops_in_the_middle_is_ended_and_writes_nothing() -> Result<()> {
    attack(&["--writable", "--write-ms=300"], |served| {
        let mut client = served.client(Framing::Simple)?;
        client.raw(&Request::new(cmd::WRITE, 0, 2 * MIB).encode(Framing::Simple))?;
        client.raw(&vec![0xee; 1 << 20])?;
        client.closed().context("a client that stopped in its data")?;
        // One that leaves instead.
        let mut client = served.client(Framing::Extended)?;
        client.raw(&Request::new(cmd::WRITE, 0, 2 * MIB).encode(Framing::Extended))?;
        client.raw(&vec![0xee; 1 << 20])?;
        drop(client);
        std::thread::sleep(Duration::from_millis(100));
        compare(&served.file(), served.memory())
    })
}

#[test]
fn writes_to_a_read_only_export() -> Result<()> {
    attack(&[], |served| {
        for framing in Framing::ALL {
            let mut client = served.client(framing)?;
            for _ in 0..20 {
                refused(&mut client, Request::write(0, vec![1; 1 << 20]), err::EPERM)?;
                refused(&mut client, Request::new(cmd::TRIM, 0, SIZE), err::EPERM)?;
                refused(&mut client, Request::new(cmd::WRITE_ZEROES, 0, SIZE), err::EPERM)?;
            }
            client.disconnect()?;
        }
        compare(&served.file(), served.memory())
    })
}

#[test]
fn a_payload_for_commands_that_have_none() -> Result<()> {
    attack(&["--writable"], |served| {
        let mut client = served.client(Framing::Extended)?;
        for command in [
            cmd::READ,
            cmd::FLUSH,
            cmd::TRIM,
            cmd::CACHE,
            cmd::WRITE_ZEROES,
            cmd::RESIZE,
            99,
        ] {
            for length in [1, 4096, 1 << 20] {
                let request = Request {
                    length,
                    payload: vec![0x21; usize::try_from(length)?],
                    ..Request::new(command, 0, 0)
                };
                refused(&mut client, request.with(flag::PAYLOAD_LEN), err::EINVAL)?;
            }
            // The flag without a payload.
            let bare = Request::new(command, 0, 0).with(flag::PAYLOAD_LEN);
            refused(&mut client, bare, err::EINVAL)?;
        }
        client.disconnect()?;
        // In compact requests it is only a flag that does not exist.
        let mut client = served.client(Framing::Structured)?;
        refused(
            &mut client,
            Request::new(cmd::READ, 0, 512).with(flag::PAYLOAD_LEN),
            err::EINVAL,
        )?;
        refused(
            &mut client,
            Request::write(0, vec![3; 512]).with(flag::PAYLOAD_LEN),
            err::EINVAL,
        )?;
        client.disconnect()?;
        compare(&served.file(), served.memory())
    })
}

#[test]
fn payloads_beyond_the_largest() -> Result<()> {
    attack(&["--writable"], |served| {
        for length in [(32 << 20) + 1, 1 << 40, 1 << 63, u64::MAX] {
            for command in [cmd::READ, cmd::WRITE, cmd::BLOCK_STATUS, 77] {
                let mut client = served.client(Framing::Extended)?;
                let request = Request::new(command, 0, length).with(flag::PAYLOAD_LEN);
                client.raw(&request.encode(Framing::Extended))?;
                client
                    .closed()
                    .with_context(|| format!("command {command}, {length} bytes"))?;
            }
        }
        Ok(())
    })
}

#[test]
fn lists_of_contexts_that_are_wrong() -> Result<()> {
    attack(&["--takes=20"], |served| {
        let names = ["base:allocation", "qemu:dirty-bitmap:last"];
        let mut client = Client::connect(&served.socket(), "disk", Framing::Extended, &names)?;
        let ids = client.agreed().contexts.clone();
        let (a, b) = (ids[0], ids[1]);
        for wrong in [
            &[a, a][..],
            &[a, b, a],
            &[0],
            &[u32::MAX],
            &[a, b, 77],
            &[a; 100],
            &[a; 100_000],
        ] {
            refused(&mut client, Request::status_of(0, 4096, wrong), err::EINVAL)?;
        }
        for length in [1_u64, 4, 7, 9, 10, 11, 13, 1001] {
            let request = Request {
                length,
                payload: vec![0; usize::try_from(length)?],
                ..Request::new(cmd::BLOCK_STATUS, 0, 0)
            };
            refused(&mut client, request.with(flag::PAYLOAD_LEN), err::EINVAL)?;
        }
        for range in [0, SIZE + 1, u64::MAX] {
            refused(&mut client, Request::status_of(0, range, &[a]), err::EINVAL)?;
        }
        let answer = client.ask(Request::status_of(0, SIZE, &[b]))?;
        ensure!(answer.error == 0 && answer.status.len() == 1, "{answer:?}");
        client.disconnect()
    })
}

#[test]
fn every_flag_with_every_command() -> Result<()> {
    attack(&["--writable"], |served| {
        for framing in Framing::ALL {
            let mut client = served.client(framing)?;
            for command in (0..10).filter(|command| *command != cmd::DISC) {
                for bit in 0..16 {
                    let request = match command {
                        cmd::WRITE => Request::write(STRIPED, vec![0; 512]),
                        cmd::FLUSH => Request::new(command, 0, 0),
                        _ => Request::new(command, STRIPED, 512),
                    };
                    let request = request.with(1 << bit);
                    if framing == Framing::Extended
                        && request.flags == flag::PAYLOAD_LEN
                        && command != cmd::WRITE
                    {
                        continue;
                    }
                    let (judged, _) = client.agreed().judge(&request.encode(framing));
                    let answer = client.ask(request)?;
                    use blksnap_tests::nbd::Verdict;
                    match judged.first().map(|(_, verdict)| verdict) {
                        Some(Verdict::Refuse(errors)) => {
                            ensure!(errors.contains(&answer.error), "{answer:?}");
                        }
                        Some(Verdict::Carry) => {
                            let fast = bit == 4 && answer.error == err::ENOTSUP;
                            ensure!(answer.error == 0 || fast, "{answer:?}");
                        }
                        other => anyhow::bail!("{other:?}"),
                    }
                }
            }
            client.disconnect()?;
        }
        // Zeroes were written over zeroes.
        compare(&served.file(), served.memory())
    })
}

#[test]
fn commands_that_do_not_exist() -> Result<()> {
    attack(&[], |served| {
        for framing in Framing::ALL {
            let mut client = served.client(framing)?;
            for command in (8..200).chain([0x7fff, 0x8000, 0xffff]) {
                refused(&mut client, Request::new(command, 0, 4096), err::EINVAL)?;
            }
            client.disconnect()?;
        }
        Ok(())
    })
}

#[test]
fn a_resize_to_nothing_and_to_everything() -> Result<()> {
    attack(&["--writable"], |served| {
        let mut client = served.client(Framing::Structured)?;
        for size in [0, 1, SIZE * 2, u64::MAX] {
            let answer = client.ask(Request::new(cmd::RESIZE, size, 0))?;
            ensure!([err::EPERM, err::EINVAL].contains(&answer.error), "{answer:?}");
        }
        client.disconnect()?;
        compare(&served.file(), served.memory())
    })
}

#[test]
fn reads_whose_answers_nobody_reads() -> Result<()> {
    attack(&[], |served| {
        (0..40)
            .map(|index| {
                let client = served.client(Framing::ALL[index % 3])?;
                let length = [4096, MIB, 32 * MIB][index / 3 % 3];
                pour(&client, &Request::new(cmd::READ, 0, length), 500)?;
                Ok(client)
            })
            .collect::<Result<Vec<Client>>>()
    })
}

#[test]
fn errors_that_nobody_reads() -> Result<()> {
    attack(&[], |served| {
        let mut held = Vec::new();
        for index in 0..9 {
            let client = served.client(Framing::ALL[index % 3])?;
            let sent = pour(&client, &Request::new(77, 0, 4096), 500_000)?;
            ensure!(sent < 500_000, "500000 errors are kept for nobody");
            held.push(client);
        }
        Ok(held)
    })
}

#[test]
fn statuses_that_nobody_reads() -> Result<()> {
    attack(&["--takes=250"], |served| {
        let names = ["base:allocation", "qemu:dirty-bitmap:last"];
        (0..20)
            .map(|index| {
                let framing = [Framing::Structured, Framing::Extended][index % 2];
                let client = Client::connect(&served.socket(), "disk", framing, &names)?;
                pour(&client, &Request::new(cmd::BLOCK_STATUS, 0, STRIPED), 2000)?;
                Ok(client)
            })
            .collect::<Result<Vec<Client>>>()
    })
}

#[test]
fn a_client_that_reads_a_byte_now_and_then_is_served() -> Result<()> {
    attack(&[], |served| {
        let mut client = served.client(Framing::Simple)?;
        for _ in 0..4 {
            client.raw(&Request::new(cmd::READ, SIZE - 8 * MIB, 8 * MIB).encode(Framing::Simple))?;
        }
        let mut stream = client.stream().try_clone()?;
        for _ in 0..200 {
            stream.read_exact(&mut [0])?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(client)
    })
}

#[test]
fn a_client_that_reads_nothing_is_dropped() -> Result<()> {
    attack(&["--write-ms=300"], |served| {
        let before = served.sockets()?;
        let mut held = Vec::new();
        for framing in Framing::ALL {
            let client = served.client(framing)?;
            pour(&client, &Request::new(cmd::READ, 0, 8 * MIB), 20)?;
            held.push(client);
        }
        served.wait_for_sockets(before)?;
        Ok(held)
    })
}

#[test]
fn one_cookie_for_everything() -> Result<()> {
    attack(&[], |served| {
        let mut client = served.client(Framing::Simple)?;
        let request = Request::new(cmd::READ, SIZE - 512, 512).encode(Framing::Simple);
        client.raw(&request.repeat(300))?;
        let mut stream = client.stream().try_clone()?;
        for _ in 0..300 {
            let mut answer = [0; 16 + 512];
            stream.read_exact(&mut answer)?;
            let wanted = &served.memory()[served.memory().len() - 512..];
            ensure!(answer[..8] == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] && &answer[16..] == wanted);
        }
        client.disconnect()
    })
}

#[test]
fn requests_behind_a_disconnect_are_not_carried_out() -> Result<()> {
    attack(&["--writable"], |served| {
        for framing in Framing::ALL {
            let mut client = served.client(framing)?;
            let mut bytes = Request::new(cmd::READ, 0, 512).encode(framing);
            bytes.extend(Request::new(cmd::DISC, 0, 0).encode(framing));
            bytes.extend(Request::write(0, vec![0xcc; 4096]).encode(framing));
            client.raw(&bytes)?;
            let mut all = Vec::new();
            // The server may have closed with data unread, which resets the connection.
            let _ = client.stream().try_clone()?.read_to_end(&mut all);
            ensure!(all.len() <= 40 + 512, "{} bytes", all.len());
        }
        compare(&served.file(), served.memory())
    })
}

#[test]
fn a_disconnect_that_carries_what_it_must_not() -> Result<()> {
    attack(&[], |served| {
        for (offset, length, flags) in [(1, 0, 0), (0, 1, 0), (u64::MAX, u64::from(u32::MAX), 0xffdf)] {
            for framing in Framing::ALL {
                let mut client = served.client(framing)?;
                let request = Request::new(cmd::DISC, offset, length).with(flags);
                client.raw(&request.encode(framing))?;
                client.closed()?;
            }
        }
        Ok(())
    })
}

#[test]
fn clients_that_leave_with_everything_in_flight() -> Result<()> {
    attack(&["--writable"], |served| {
        let before = served.sockets()?;
        for round in 0..60 {
            let framing = Framing::ALL[round % 3];
            let client = served.client(framing)?;
            pour(&client, &Request::new(cmd::READ, SIZE - 8 * MIB, MIB), 64)?;
            if round % 2 == 0 {
                client.stream().shutdown(Shutdown::Both)?;
            }
        }
        served.wait_for_sockets(before)?;
        Ok(())
    })
}

#[test]
fn clients_that_close_their_half_get_their_answers() -> Result<()> {
    attack(&[], |served| {
        for framing in Framing::ALL {
            let mut client = served.client(framing)?;
            let mut waiting = 0;
            for _ in 0..20 {
                client.send(Request::new(cmd::READ, SIZE - MIB, 100_000))?;
                waiting += 1;
            }
            client.stream().shutdown(Shutdown::Write)?;
            // What had arrived is answered; whether all of it must be is nobody's rule, that nothing hangs is ours.
            while waiting > 0 && client.answer().is_ok_and(|answer| answer.error == 0) {
                waiting -= 1;
            }
            let mut stream = client.stream().try_clone()?;
            closed(&mut stream)?;
        }
        Ok(())
    })
}

#[test]
fn requests_of_no_bytes() -> Result<()> {
    attack(&["--writable"], |served| {
        for framing in Framing::ALL {
            let mut client = served.client(framing)?;
            for round in 0..300 {
                let offset = round * 4096;
                for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
                    let answer = client.ask(Request::new(command, offset, 0))?;
                    ensure!(answer.error == 0 && answer.data.is_empty(), "{answer:?}");
                }
                let answer = client.ask(Request::write(offset, vec![]))?;
                ensure!(answer.error == 0, "{answer:?}");
                refused(
                    &mut client,
                    Request::new(cmd::BLOCK_STATUS, offset, 0),
                    err::EINVAL,
                )?;
            }
            client.disconnect()?;
        }
        compare(&served.file(), served.memory())
    })
}

#[test]
fn floods_of_flushes() -> Result<()> {
    attack(&["--writable"], |served| {
        let mut held = Vec::new();
        for index in 0..8 {
            let client = served.client(Framing::ALL[index % 3])?;
            pour(&client, &Request::new(cmd::FLUSH, 0, 0), 3000)?;
            held.push(client);
        }
        let mut client = served.client(Framing::Structured)?;
        for request in [Request::new(cmd::FLUSH, 1, 0), Request::new(cmd::FLUSH, 0, 1)] {
            refused(&mut client, request, err::EINVAL)?;
        }
        client.disconnect()?;
        Ok(held)
    })
}

#[test]
fn reads_and_statuses_of_everything_at_once() -> Result<()> {
    attack(&["--takes=250"], |served| {
        let all: Vec<String> = (235..250)
            .map(|take| format!("qemu:dirty-bitmap:since-00000000-0000-0000-0000-000000000001-{take}"))
            .chain(["base:allocation".to_owned()])
            .collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let mut client = Client::connect(&served.socket(), "disk", Framing::Extended, &all)?;
        for _ in 0..64 {
            client.send(Request::new(cmd::BLOCK_STATUS, 0, SIZE))?;
        }
        for _ in 0..64 {
            let answer = client.answer()?;
            ensure!(answer.error == 0 && answer.status.len() == 16, "{}", answer.error);
        }
        // Beyond the largest payload.
        refused(&mut client, Request::new(cmd::READ, 0, SIZE), err::EOVERFLOW)?;
        client.disconnect()
    })
}

#[test]
fn noise_behind_good_requests() -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed("noise_behind_good_requests"));
    attack(&["--writable"], |served| {
        for round in 0..100 {
            let framing = Framing::ALL[round % 3];
            let mut client = served.client(framing)?;
            for _ in 0..random.random_range(0..4) {
                client.read(0, 4096)?;
            }
            let mut noise = vec![0; random.random_range(1..3000)];
            random.fill_bytes(&mut noise);
            // No request by chance.
            noise[0] = 0;
            client.raw(&noise)?;
            let mut stream = client.stream().try_clone()?;
            let _ = stream.read_to_end(&mut Vec::new());
        }
        compare(&served.file(), served.memory())
    })
}

#[test]
fn many_hands_at_once() -> Result<()> {
    let base = seed("many_hands_at_once");
    attack(&["--writable"], |served| {
        std::thread::scope(|scope| -> Result<()> {
            let hands: Vec<_> = (0..12_u64)
                .map(|hand| {
                    scope.spawn(move || -> Result<()> {
                        let mut random = StdRng::seed_from_u64(base ^ hand);
                        for _ in 0..40 {
                            meddle(served, &mut random)?;
                        }
                        Ok(())
                    })
                })
                .collect();
            for hand in hands {
                hand.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok(())
        })?;
        compare(&served.file(), served.memory())
    })
}

/// Does something bad, but for writes to other bytes than were there.
fn meddle(served: &Served, random: &mut StdRng) -> Result<()> {
    let framing = Framing::ALL[random.random_range(0..3)];
    let mut client = served.client(framing)?;
    for _ in 0..random.random_range(0..20) {
        let offset = random.random_range(0..SIZE);
        let length = random.random_range(0..200_000_u64).min(SIZE - offset);
        let request = match random.random_range(0..6_u8) {
            0 => {
                let from = usize::try_from(offset)?;
                let data = &served.memory()[from..from + usize::try_from(length)?];
                Request::write(offset, data.to_vec())
            }
            1 => Request::new(cmd::BLOCK_STATUS, offset, length),
            2 => Request::new(random.random_range(8..=u16::MAX), offset, length),
            3 => Request::new(cmd::CACHE, offset, length).with(random.random::<u16>() & !flag::PAYLOAD_LEN),
            _ => Request::new(cmd::READ, offset, length),
        };
        if random.random_bool(0.3) {
            client.ask(request)?;
        } else {
            let mut bytes = request.encode(framing);
            let cut = random.random_range(0..=bytes.len());
            if random.random_bool(0.1) {
                bytes.truncate(cut);
            }
            // The server is allowed to be gone.
            let _ = client.raw(&bytes);
            break;
        }
    }
    Ok(())
}
