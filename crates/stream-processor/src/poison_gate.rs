//! When poison is too much: a limit on poison in a row and on its share, so that a broken producer pauses a partition
//! instead of sending the whole topic to the dead letters. Counted over the log alone, so a replay decides alike. Pure.

use crate::chunk::Chunk;
use serde::{Deserialize, Serialize};

/// Records over which the share is taken.
pub const WINDOW_RECORDS: u32 = 10_000;

/// Counts below the next offset; part of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PoisonCounts {
    /// Poison in a row up to the last record.
    pub consecutive: u32,
    /// Records of the current window.
    pub window_records: u32,
    /// Poison among them.
    pub window_poison: u32,
}

/// How much poison is too much.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoisonLimits {
    /// In a row.
    pub consecutive: u32,
    /// Of [`WINDOW_RECORDS`] records.
    pub window_poison: u32,
}

/// The record that passed a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("paused at offset {offset}: {cause}; `dlq accept --partition {partition} --up-to {}` goes on", offset + 1)]
pub struct TooMuchPoison {
    /// Kafka partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Which limit, and the last reason.
    pub cause: String,
}

impl PoisonCounts {
    /// The counts after `chunk`; poison below `accepted_up_to` counts as none. Fails at the record that passes a limit.
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
            let mut good = 0;
            while events.next_if(|offset| *offset < poison.offset).is_some() {
                good += 1;
            }
            counts.good(good);
            if poison.offset < accepted_up_to {
                counts.good(1);
                continue;
            }
            counts.roll();
            counts.consecutive += 1;
            counts.window_records += 1;
            counts.window_poison += 1;
            let cause = if counts.consecutive > limits.consecutive {
                format!("over {} records in a row are no events", limits.consecutive)
            } else if counts.window_poison > limits.window_poison {
                format!("over {} of {WINDOW_RECORDS} records are no events", limits.window_poison)
            } else {
                continue;
            };
            let cause = format!("{cause} (the last: {})", poison.reason);
            return Err(TooMuchPoison { partition, offset: poison.offset, cause });
        }
        counts.good(events.count() as u32);
        Ok(counts)
    }

    fn roll(&mut self) {
        if self.window_records >= WINDOW_RECORDS {
            (self.window_records, self.window_poison) = (0, 0);
        }
    }

    fn good(&mut self, records: u32) {
        if records > 0 {
            self.roll();
            self.consecutive = 0;
            self.window_records = self.window_records.saturating_add(records);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Decoder, Record};
    use common::stream::Definition;

    /// `x` is poison, everything else an event.
    fn chunk(first: i64, records: &str) -> Chunk {
        let text = include_str!("../../../streams/user_created.toml");
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
    fn poison_in_a_row_pauses_at_its_offset_across_chunks() {
        let counts = PoisonCounts::default().after(&chunk(0, "..xx"), 2, &LIMITS, 0).unwrap();
        assert_eq!(counts, PoisonCounts { consecutive: 2, window_records: 4, window_poison: 2 });
        let paused = counts.after(&chunk(4, "xx."), 2, &LIMITS, 0).unwrap_err();
        assert_eq!(paused.offset, 5);
        assert!(paused.to_string().contains("dlq accept --partition 2 --up-to 6"), "{paused}");
        assert_eq!(counts.after(&chunk(4, "xx."), 2, &LIMITS, 6).unwrap().consecutive, 0);
    }

    #[test]
    fn a_share_over_the_limit_pauses_even_with_good_records_between() {
        let paused = PoisonCounts::default().after(&chunk(0, "x.x.x.x.x.x."), 0, &LIMITS, 0).unwrap_err();
        assert_eq!(paused.offset, 10);
        let full = PoisonCounts { consecutive: 0, window_records: WINDOW_RECORDS, window_poison: 5 };
        assert_eq!(full.after(&chunk(0, "x"), 0, &LIMITS, 0).unwrap().window_poison, 1, "a new window");
    }
}
