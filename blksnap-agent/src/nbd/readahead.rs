//! Read-ahead: which part of an image will be read next, by what was read before.
//!
//! A few streams are followed at once, because clients with several requests in flight read at several places. A
//! stream that goes on where it ended, or near it (requests in flight overtake each other), gets a window ahead of it
//! that doubles with every hint, up to a bound. A stream that jumps starts again. Nothing is hinted before some
//! requests have read at least half of what they span, so that random reads cost nothing; a stream that gets thin, as
//! when a client begins to skip, loses its window. The past counts less and less.

/// Streams followed at once.
const STREAMS: usize = 8;
/// First window in bytes.
const FIRST: u64 = 512 << 10;
/// How far a request may be from where a stream ended and still be a part of it.
const NEAR: u64 = 4 << 20;
/// A stream that spans more than this forgets its first half, in bytes.
const MEMORY: u64 = 32 << 20;
/// Requests of a stream before anything is hinted.
const PROOF: u32 = 3;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Where the lowest request began.
    start: u64,
    /// Where the furthest request ended.
    end: u64,
    /// Bytes read.
    read: u64,
    /// Up to where was hinted.
    hinted: u64,
    window: u64,
    seen: u32,
    /// When it was last used, in requests.
    used: u64,
}

/// Follows the reads of an export.
#[derive(Clone, Debug, Default)]
pub(super) struct ReadAhead {
    streams: Vec<Stream>,
    clock: u64,
}

/// A range that will be read soon: offset and length.
pub(super) type Hint = (u64, u64);

impl ReadAhead {
    /// Largest window in bytes.
    pub(super) const LARGEST: u64 = 16 << 20;

    /// Takes note of a read, and tells what should be read ahead now of an export of `size` bytes, at most `largest`
    /// bytes ahead; nothing unless `ready` is set: then the next read will tell.
    pub(super) fn observe(
        &mut self,
        offset: u64,
        length: u64,
        size: u64,
        largest: u64,
        ready: bool,
    ) -> Option<Hint> {
        self.clock += 1;
        let end = offset.saturating_add(length);
        let known = self.streams.iter_mut().find(|stream| {
            offset <= stream.end.saturating_add(NEAR) && end.saturating_add(NEAR) >= stream.end
        });
        let Some(stream) = known else {
            self.begin(offset, end);
            return None;
        };
        stream.used = self.clock;
        stream.seen += 1;
        stream.read = stream.read.saturating_add(length);
        stream.start = stream.start.min(offset);
        stream.end = stream.end.max(end);
        let span = stream.end - stream.start;
        if span > MEMORY {
            stream.start += span / 2;
            stream.read = (stream.read / 2).min(span - span / 2);
        }
        let span = stream.end - stream.start;
        if stream.read < span / 2 {
            stream.window = 0;
            return None;
        }
        // The next hint comes when half of what was hinted is used up.
        if !ready || stream.seen < PROOF || stream.hinted > stream.end.saturating_add(stream.window / 2) {
            return None;
        }
        let from = stream.hinted.max(stream.end);
        stream.window = (stream.window * 2).clamp(FIRST.min(largest), largest);
        let until = stream.end.saturating_add(stream.window).min(size);
        if until <= from {
            return None;
        }
        stream.hinted = until;
        Some((from, until - from))
    }

    /// A new stream, in place of the one that was not used for the longest time.
    fn begin(&mut self, start: u64, end: u64) {
        if self.streams.len() == STREAMS
            && let Some(oldest) = (0..STREAMS).min_by_key(|index| self.streams[*index].used)
        {
            self.streams.swap_remove(oldest);
        }
        self.streams.push(Stream {
            start,
            end,
            read: end - start,
            seen: 1,
            used: self.clock,
            ..Stream::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 30;
    const BLOCK: u64 = 64 << 10;

    fn see(ahead: &mut ReadAhead, offset: u64, length: u64) -> Option<Hint> {
        ahead.observe(offset, length, SIZE, ReadAhead::LARGEST, true)
    }

    #[test]
    fn a_stream_gets_a_growing_window_ahead_of_it() {
        let mut ahead = ReadAhead::default();
        let mut hinted = 0;
        let mut windows = Vec::new();
        for index in 0..4096 {
            let offset = index * BLOCK;
            if let Some((from, length)) = see(&mut ahead, offset, BLOCK) {
                assert!(from >= offset + BLOCK, "what is read now needs no hint");
                assert!(from >= hinted, "nothing is hinted twice");
                hinted = from + length;
                windows.push(hinted - (offset + BLOCK));
            }
            assert!(
                index < PROOF.into() || hinted >= (offset + BLOCK).min(SIZE),
                "at {index}"
            );
        }
        assert_eq!(windows[0], FIRST);
        assert_eq!(windows.last(), Some(&ReadAhead::LARGEST));
        assert!(windows.is_sorted());
    }

    #[test]
    fn several_streams_and_requests_out_of_order() {
        let mut ahead = ReadAhead::default();
        let mut hints = [0_u32; 4];
        for index in 0..256_u64 {
            // Pairs of requests overtake each other.
            let index = index ^ 1;
            for stream in 0..4 {
                let offset = stream * (SIZE / 4) + index * BLOCK;
                if let Some((from, _)) = see(&mut ahead, offset, BLOCK) {
                    assert_eq!(from / (SIZE / 4), stream);
                    hints[usize::try_from(stream).unwrap()] += 1;
                }
            }
        }
        assert!(hints.iter().all(|count| *count > 3), "{hints:?}");
    }

    #[test]
    fn a_client_that_begins_to_skip_loses_its_window() {
        let mut ahead = ReadAhead::default();
        for index in 0..4096 {
            see(&mut ahead, index * BLOCK, BLOCK);
        }
        // A sixteenth of what lies there, ever forwards: near enough to be the same stream.
        let begin = 4096 * BLOCK;
        let mut hints = Vec::new();
        for index in 0..512_u64 {
            if let Some((_, length)) = see(&mut ahead, begin + index * 16 * BLOCK, BLOCK) {
                hints.push((index, length));
            }
        }
        assert!(hints.iter().all(|(index, _)| *index < 64), "{hints:?}");
        // In order again: it grows from the beginning.
        let begin = begin + 512 * 16 * BLOCK;
        let first = (0..4096).find_map(|index| see(&mut ahead, begin + index * BLOCK, BLOCK));
        assert!(first.is_some_and(|(_, length)| length <= FIRST), "{first:?}");
    }

    #[test]
    fn what_was_not_ready_is_told_later() {
        let mut ahead = ReadAhead::default();
        let mut observe = |index: u64, ready| ahead.observe(index * BLOCK, BLOCK, SIZE, 1 << 20, ready);
        for index in 0..10 {
            assert_eq!(observe(index, false), None);
        }
        assert_eq!(observe(10, true), Some((11 * BLOCK, FIRST)));
        let mut furthest = 0;
        for index in 11..200 {
            if let Some((from, length)) = observe(index, true) {
                furthest = furthest.max(from + length - (index + 1) * BLOCK);
            }
        }
        assert_eq!(furthest, 1 << 20, "the window that was asked for");
    }

    #[test]
    fn the_end_of_the_export_is_the_end() {
        let mut ahead = ReadAhead::default();
        for index in 0..16 {
            if let Some((from, length)) =
                ahead.observe(index * BLOCK, BLOCK, 16 * BLOCK, ReadAhead::LARGEST, true)
            {
                assert!(from + length <= 16 * BLOCK);
            }
        }
        assert_eq!(
            ahead.observe(u64::MAX - 5, 100, u64::MAX, ReadAhead::LARGEST, true),
            None
        );
    }

    proptest! {
        #[test]
        fn random_reads_over_a_large_export_are_left_alone(
            offsets in prop::collection::vec(0_u64..1 << 40, 1..200),
        ) {
            let mut ahead = ReadAhead::default();
            let hints = offsets.iter().filter(|offset| ahead.observe(**offset & !4095, 4096, 1 << 41, ReadAhead::LARGEST, true).is_some()).count();
            prop_assert!(hints <= 1, "{} hints", hints);
        }
    }
}
