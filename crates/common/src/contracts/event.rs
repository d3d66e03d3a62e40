//! The contract of one event: its Kafka headers, its id, and the placement of its row in Cassandra. Pure. The producer
//! extracts events from source records, and the processor decodes them with the declared columns.

use crate::contracts::run_ledger::Interval;
use serde::Serialize;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

/// A day in milliseconds.
pub const DAY_MS: i64 = 86_400_000;
/// CloudEvents id. All `ce_` headers follow the binary content mode of the Kafka protocol binding.
pub const HEADER_ID: &str = "ce_id";
/// CloudEvents source: the source URL of the stream up to the query or the first placeholder.
pub const HEADER_SOURCE: &str = "ce_source";
/// CloudEvents type.
pub const HEADER_TYPE: &str = "ce_type";
/// CloudEvents version, always [`SPEC_VERSION`].
pub const HEADER_SPEC_VERSION: &str = "ce_specversion";
/// Event time, RFC 3339 with milliseconds.
pub const HEADER_TIME: &str = "ce_time";
/// Media type of the value.
pub const HEADER_CONTENT_TYPE: &str = "content-type";
/// The run that fetched the event.
pub const HEADER_RUN_ID: &str = "run_id";
/// W3C trace context.
pub const HEADER_TRACEPARENT: &str = "traceparent";
/// Time at which the producer passed the event to the Kafka client, in Unix microseconds on its own clock. Used only to
/// measure latency.
pub const HEADER_PRODUCED_AT: &str = "produced_at";
/// Why the producer could not extract an event from the source record. A record with this header is always a dead
/// letter.
pub const HEADER_REFUSED: &str = "ingest_refused";
/// The CloudEvents version this pipeline writes.
pub const SPEC_VERSION: &str = "1.0";
/// Earliest event time in Unix milliseconds.
pub const MIN_EVENT_TIME_MS: i64 = 0;
/// Latest event time in Unix milliseconds: the last millisecond of the year 9999.
pub const MAX_EVENT_TIME_MS: i64 = 253_402_300_799_999;

/// Default and least value of `event.ahead`, how far an event time may be ahead of the record's timestamp in Kafka: one
/// hour. One event from 2099 would advance the watermark so far that all other events would be late.
pub const DEFAULT_AHEAD_MS: i64 = 3_600_000;

/// Namespace of derived event ids (a random UUID generated once for this project).
const EVENT_NAMESPACE: Uuid = Uuid::from_u128(0x6f1d_2c5e_8a43_4b0e_9d57_3e1f_70c2_a9b4);

/// The UUID v5 of an event whose record has no id. `index` counts the records of the interval in the order of its
/// pages. A repeated fetch of the interval yields the same ids.
pub fn derived_event_id(stream: &str, interval_start_ms: i64, index: u64) -> Uuid {
    Uuid::new_v5(&EVENT_NAMESPACE, format!("{stream}\n{interval_start_ms}\n{index}").as_bytes())
}

/// The time of an event whose record has no time: a point within the interval, in Unix milliseconds. It depends only on
/// stream, interval and id, so a repeated fetch yields the same time even if other records were added or removed.
pub fn derived_event_time(stream: &str, interval: Interval, id: &str) -> i64 {
    let hash = xxh3_64(format!("{stream}\n{}\n{id}", interval.start_ms).as_bytes());
    let length = u128::from(interval.end_ms.abs_diff(interval.start_ms));
    // Scales the hash, a fraction of 2^64, to the length. The result is always below the length.
    interval.start_ms + ((u128::from(hash) * length) >> 64) as i64
}

/// The Kafka partition of a key, computed like the Java client does. Producers set the partition explicitly, so that
/// partitions added to a topic while they run do not move any key.
pub fn partition_of(key: &[u8], partitions: i32) -> i32 {
    (murmur2(key) & i32::MAX) % partitions.max(1)
}

/// MurmurHash2 with Kafka's seed.
fn murmur2(data: &[u8]) -> i32 {
    const M: u32 = 0x5bd1_e995;
    const SEED: u32 = 0x9747_b28c;
    let mut hash = SEED ^ data.len() as u32;
    let mut words = data.chunks_exact(4);
    for word in &mut words {
        let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ (word ^ (word >> 24)).wrapping_mul(M);
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        let last = rest.iter().rev().fold(0, |last, byte| (last << 8) | u32::from(*byte));
        hash = (hash ^ last).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    (hash ^ (hash >> 15)).cast_signed()
}

/// The Cassandra shard of an event. Each Kafka partition owns `shards` shards per bucket.
pub fn shard(kafka_partition: i32, shards: u32, event_id: &[u8]) -> i32 {
    let within = (xxh3_64(event_id) % u64::from(shards.max(1))) as i32;
    kafka_partition * shards.max(1) as i32 + within
}

/// The 64-bit hash of event time and id that the deduplication filters of the processor store.
pub fn seen_hash(event_time_ms: i64, event_id: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(event_id, event_time_ms as u64)
}

/// A hash that identifies a record of the log by its key, its value and its broker timestamp.
pub fn fingerprint(key: &[u8], value: &[u8], timestamp_ms: i64) -> i64 {
    let seed = xxhash_rust::xxh3::xxh3_64_with_seed(key, timestamp_ms as u64);
    xxhash_rust::xxh3::xxh3_64_with_seed(value, seed) as i64
}

/// Rounds `at_ms` down to a multiple of `span_ms`.
pub fn floor_to(at_ms: i64, span_ms: i64) -> i64 {
    at_ms.div_euclid(span_ms) * span_ms
}

/// Time span of one Cassandra partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Bucket {
    /// Ten minutes.
    TenMinutes,
    /// One hour.
    Hour,
    /// One day.
    Day,
}

impl Bucket {
    /// All variants.
    pub const ALL: [Bucket; 3] = [Bucket::TenMinutes, Bucket::Hour, Bucket::Day];

    /// The name used in stream files.
    pub fn name(self) -> &'static str {
        match self {
            Bucket::TenMinutes => "10m",
            Bucket::Hour => "1h",
            Bucket::Day => "1d",
        }
    }

    /// Length in milliseconds.
    pub fn millis(self) -> i64 {
        match self {
            Bucket::TenMinutes => 600_000,
            Bucket::Hour => 3_600_000,
            Bucket::Day => DAY_MS,
        }
    }

    /// Start of the bucket that contains `event_time_ms`, in Unix milliseconds.
    pub fn start_of(self, event_time_ms: i64) -> i64 {
        floor_to(event_time_ms, self.millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_derived_time_depends_only_on_stream_interval_and_id() {
        let minute = Interval { start_ms: 60_000, end_ms: 120_000 };
        let at = |stream, id| derived_event_time(stream, minute, id);
        assert_eq!(at("s", "a"), 81_942, "stored times depend on this value");
        assert_eq!(at("s", "a"), at("s", "a"));
        assert_ne!(at("s", "a"), at("s", "b"));
        assert_ne!(at("s", "a"), at("t", "a"));
    }

    proptest! {
        #[test]
        fn derived_times_are_within_their_interval(
            start_ms in 0i64..2_000_000_000_000, length in 1i64..100_000_000, id in ".{0,40}",
        ) {
            let interval = Interval { start_ms, end_ms: start_ms + length };
            let at = derived_event_time("s", interval, &id);
            prop_assert!((interval.start_ms..interval.end_ms).contains(&at), "{at}");
        }
    }

    #[test]
    fn derived_times_are_spread_evenly_over_the_interval() {
        let hour = Interval { start_ms: 0, end_ms: 3_600_000 };
        let mut tenths = [0; 10];
        for n in 0..10_000 {
            tenths[derived_event_time("s", hour, &format!("id-{n}")) as usize / 360_000] += 1;
        }
        assert!(tenths.iter().all(|count| (850..1150).contains(count)), "{tenths:?}");
    }

    #[test]
    fn derived_ids_are_the_same_for_the_same_interval_and_differ_between_records() {
        let a = derived_event_id("s", 60_000, 0);
        assert_eq!(a, derived_event_id("s", 60_000, 0));
        assert_ne!(a, derived_event_id("s", 60_000, 1));
        assert_ne!(a, derived_event_id("s", 0, 0));
        assert_eq!(a.to_string(), "c481b4a6-459d-52e1-b57a-2e607a1d9142", "stored ids depend on this value");
    }

    #[test]
    fn keys_are_hashed_like_in_the_java_client() {
        // From org.apache.kafka.common.utils.UtilsTest.
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()), hash, "{key}");
            assert_eq!(partition_of(key.as_bytes(), 6), (hash & i32::MAX) % 6);
        }
    }

    #[test]
    fn two_kafka_partitions_never_share_a_shard() {
        for id in 0..1000u32 {
            let id = id.to_string();
            assert!((0..4).contains(&shard(0, 4, id.as_bytes())));
            assert!((20..24).contains(&shard(5, 4, id.as_bytes())));
        }
    }

    #[test]
    fn times_before_the_epoch_are_rounded_down() {
        assert_eq!(floor_to(-1, 10), -10);
        assert_eq!(floor_to(19, 10), 10);
    }
}
