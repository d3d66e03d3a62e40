//! Pauses a partition that has too many undecodable records. There is a limit on consecutive undecodable records and
//! one on their share of a window. A broken producer therefore pauses the partition instead of filling the dead-letter
//! topic. The counts depend on the log alone, so a replay pauses at the same record. Pure.

use crate::record::chunk::Chunk;
use serde::{Deserialize, Serialize};

/// Window size in records for the share of undecodable records.
pub const WINDOW_RECORDS: u32 = 10_000;

/// Counts of undecodable records below the next offset. Part of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PoisonCounts {
    /// Consecutive undecodable records, up to and including the last record.
    pub consecutive: u32,
    /// Records in the current window.
    pub window_records: u32,
    /// Undecodable records in the current window.
    pub window_poison: u32,
}

/// Limits above which a partition pauses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoisonLimits {
    /// Maximum number of consecutive undecodable records.
    pub consecutive: u32,
    /// Maximum number of undecodable records in a window of [`WINDOW_RECORDS`] records.
    pub window_poison: u32,
}

/// A partition exceeded one of its limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "paused at offset {offset}: {cause}; to continue, run \
     `stream-processor dlq accept --partition {partition} --up-to {}`",
    offset + 1
)]
pub struct TooMuchPoison {
    /// Kafka partition.
    pub partition: i32,
    /// Offset of the record that exceeded the limit.
    pub offset: i64,
    /// The limit that was exceeded, and why the last record could not be decoded.
    pub cause: String,
}

impl PoisonCounts {
    /// Returns the counts after `chunk`. Undecodable records below `accepted_up_to` count as decoded. Fails at the
    /// first record that exceeds a limit.
    pub fn after(
        &self,
        chunk: &Chunk,
        partition: i32,
        limits: &PoisonLimits,
        accepted_up_to: i64,
    ) -> Result<PoisonCounts, TooMuchPoison> {
        let mut counts = *self;
        let mut events = chunk.events.iter().map(|e| e.offset).peekable();
        for poison in &chunk.poison {
            let mut decoded = 0;
            while events.next_if(|offset| *offset < poison.offset).is_some() {
                decoded += 1;
            }
            counts.count_decoded(decoded);
            if poison.offset < accepted_up_to {
                counts.count_decoded(1);
                continue;
            }
            counts.start_window_if_full();
            counts.consecutive += 1;
            counts.window_records += 1;
            counts.window_poison += 1;
            let cause = if counts.consecutive > limits.consecutive {
                format!("more than {} consecutive records cannot be decoded", limits.consecutive)
            } else if counts.window_poison > limits.window_poison {
                format!("more than {} of {WINDOW_RECORDS} records cannot be decoded", limits.window_poison)
            } else {
                continue;
            };
            let cause = format!("{cause} (last reason: {})", poison.reason);
            return Err(TooMuchPoison { partition, offset: poison.offset, cause });
        }
        counts.count_decoded(events.count() as u32);
        Ok(counts)
    }

    /// Starts a new window if the current one is full.
    fn start_window_if_full(&mut self) {
        if self.window_records >= WINDOW_RECORDS {
            (self.window_records, self.window_poison) = (0, 0);
        }
    }

    fn count_decoded(&mut self, records: u32) {
        if records > 0 {
            self.start_window_if_full();
            self.consecutive = 0;
            self.window_records = self.window_records.saturating_add(records);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::decode::{Decoder, Record};
    use common::contracts::stream::Definition;

    /// Builds a chunk that starts at offset `first`. `x` is an undecodable record, any other character an event.
    fn chunk(first: i64, records: &str) -> Chunk {
        let text = include_str!("../../../../streams/user_created.toml");
        let decoder = Decoder::new(&Definition::parse("user_created.toml", text).unwrap(), 0);
        let mut chunk = decoder.chunk();
        for (offset, kind) in (first..).zip(records.chars()) {
            let id = offset.to_string();
            let headers =
                [("ce_id", Some(id.as_bytes())), ("ce_time", Some(b"2020-01-01T00:00:00Z".as_slice()))];
            let value = if kind == 'x' { &b"x"[..] } else { br#"{"first_name":"A","last_name":"B"}"# };
            let timestamp_ms = 1_577_836_800_000;
            decoder.decode(
                &Record { offset, timestamp_ms, key: None, value: Some(value), headers: &headers },
                &mut chunk,
            );
        }
        chunk
    }

    const LIMITS: PoisonLimits = PoisonLimits { consecutive: 3, window_poison: 5 };

    #[test]
    fn consecutive_undecodable_records_pause_across_chunks_at_the_record_over_the_limit() {
        let counts = PoisonCounts::default().after(&chunk(0, "..xx"), 2, &LIMITS, 0).unwrap();
        assert_eq!(counts, PoisonCounts { consecutive: 2, window_records: 4, window_poison: 2 });
        let paused = counts.after(&chunk(4, "xx."), 2, &LIMITS, 0).unwrap_err();
        assert_eq!(paused.offset, 5);
        assert!(paused.to_string().contains("dlq accept --partition 2 --up-to 6"), "{paused}");
        assert_eq!(counts.after(&chunk(4, "xx."), 2, &LIMITS, 6).unwrap().consecutive, 0);
    }

    #[test]
    fn a_share_over_the_limit_pauses_even_if_decodable_records_are_in_between() {
        let paused = PoisonCounts::default().after(&chunk(0, "x.x.x.x.x.x."), 0, &LIMITS, 0).unwrap_err();
        assert_eq!(paused.offset, 10);
        let full = PoisonCounts { consecutive: 0, window_records: WINDOW_RECORDS, window_poison: 5 };
        assert_eq!(
            full.after(&chunk(0, "x"), 0, &LIMITS, 0).unwrap().window_poison,
            1,
            "a full window starts over"
        );
    }
}
