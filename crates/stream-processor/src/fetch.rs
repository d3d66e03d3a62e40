//! Fetching and decoding of one partition, on a thread of its own: the only part that runs ahead of the worker, by at most
//! one chunk in the channel and one in the making.

use crate::chunk::Chunk;
use crate::decode::{Decoder, Record};
use crate::error::ProcessorError;
use crate::group::GroupContext;
use crate::stages::{StageClock, StageState};
use crate::start::{Start, another_record};
use crate::worker::Chunks;
use common::event::fingerprint;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How often a quiet partition looks whether to stop.
const IDLE_POLL: Duration = Duration::from_millis(100);

/// When a chunk is full.
#[derive(Debug, Clone, Copy)]
pub struct ChunkLimits {
    /// Records.
    pub records: usize,
    /// Bytes of values.
    pub bytes: usize,
    /// Time since its first record.
    pub linger: Duration,
}

/// Starts fetching from `start`; ends with `stop`, or when nobody takes chunks any more.
pub fn spawn(
    queue: PartitionQueue<GroupContext>,
    decoder: Decoder,
    start: &Start,
    limits: ChunkLimits,
    (stop, clock): (CancellationToken, Arc<StageClock>),
) -> std::io::Result<(Chunks, JoinHandle<()>)> {
    let (sender, chunks) = mpsc::channel(1);
    let first = FirstRecord::new(start);
    let fetcher = Fetcher { queue, decoder, limits, stop, clock, first };
    let thread = std::thread::Builder::new().name("fetch".into()).spawn(move || fetcher.run(&sender))?;
    Ok((chunks, thread))
}

/// What the record before the next one must be.
#[derive(Debug)]
pub struct FirstRecord {
    next_offset: i64,
    expected: Option<i64>,
}

struct Fetcher {
    queue: PartitionQueue<GroupContext>,
    decoder: Decoder,
    limits: ChunkLimits,
    stop: CancellationToken,
    clock: Arc<StageClock>,
    first: FirstRecord,
}

impl Fetcher {
    fn run(mut self, sender: &mpsc::Sender<Result<Chunk, ProcessorError>>) {
        while !self.stop.is_cancelled() {
            self.clock.enter(StageState::Idle);
            let chunk = match self.chunk() {
                Ok(chunk) if chunk.is_empty() => continue,
                other => other,
            };
            // Between its records the chunk was waited for.
            let decoding = chunk.as_ref().map_or(0, |chunk| chunk.decode_us);
            self.clock.enter_after(Duration::from_micros(decoding), StageState::Backpressured);
            let failed = chunk.is_err();
            if sender.blocking_send(chunk).is_err() || failed {
                return;
            }
        }
    }

    /// Collects records until the chunk is full, its time is over or the partition is quiet.
    fn chunk(&mut self) -> Result<Chunk, ProcessorError> {
        let mut chunk = self.decoder.chunk();
        let mut began: Option<Instant> = None;
        let mut waited = Duration::ZERO;
        let mut last = None;
        while chunk.len() < self.limits.records
            && chunk.bytes() < self.limits.bytes
            && !self.stop.is_cancelled()
        {
            // What is there already is taken without asking the clock, which costs more than the record.
            let polled = match self.queue.poll(Duration::ZERO) {
                None => {
                    let rest = began.map(|began| self.limits.linger.saturating_sub(began.elapsed()));
                    let asked = Instant::now();
                    let polled = self.queue.poll(rest.unwrap_or(IDLE_POLL));
                    waited += asked.elapsed();
                    polled
                }
                polled => polled,
            };
            match polled {
                None if began.is_none() => return Ok(chunk),
                None => break,
                Some(Err(e)) => transient(&e)?,
                Some(Ok(message)) => {
                    let (partition, offset) = (message.partition(), message.offset());
                    if !self.first.admit(partition, offset, || fingerprint_of(&message))? {
                        continue;
                    }
                    if began.is_none() {
                        (began, waited) = (Some(Instant::now()), Duration::ZERO);
                    }
                    decode(&self.decoder, &message, &mut chunk);
                    last = Some(message);
                }
            }
        }
        if let Some(last) = last {
            chunk.fingerprint = fingerprint_of(&last);
        }
        let taken = began.map_or(Duration::ZERO, |began| began.elapsed());
        chunk.decode_us = taken.saturating_sub(waited).as_micros() as u64;
        Ok(chunk)
    }
}

impl FirstRecord {
    /// For a partition that starts there.
    pub fn new(start: &Start) -> FirstRecord {
        FirstRecord { next_offset: start.position.next_offset, expected: start.expected }
    }

    /// Whether the record at `offset` is to be taken; the one before the next offset is only compared.
    pub fn admit(
        &mut self,
        partition: i32,
        offset: i64,
        fingerprint: impl FnOnce() -> i64,
    ) -> Result<bool, ProcessorError> {
        if offset >= self.next_offset {
            return Ok(true);
        }
        let Some(expected) = self.expected.take().filter(|_| offset == self.next_offset - 1) else {
            return Ok(false);
        };
        let found = fingerprint();
        if found == expected {
            return Ok(false);
        }
        Err(another_record(partition, offset, found, expected).into())
    }
}

fn timestamp_ms(message: &BorrowedMessage<'_>) -> i64 {
    message.timestamp().to_millis().unwrap_or(0)
}

/// What tells a record from that of another log.
pub(crate) fn fingerprint_of(message: &BorrowedMessage<'_>) -> i64 {
    fingerprint(
        message.key().unwrap_or_default(),
        message.payload().unwrap_or_default(),
        timestamp_ms(message),
    )
}

/// The headers whose names are UTF-8: the client library panics over any other, and a record must not stop its partition.
pub(crate) fn readable_headers(headers: &impl Headers) -> Vec<(&str, Option<&[u8]>)> {
    let read = |index| catch_unwind(AssertUnwindSafe(|| headers.try_get(index))).ok().flatten();
    (0..headers.count()).filter_map(read).map(|h| (h.key, h.value)).collect()
}

fn decode(decoder: &Decoder, message: &BorrowedMessage<'_>, chunk: &mut Chunk) {
    let headers = message.headers().map(readable_headers).unwrap_or_default();
    let record = Record {
        offset: message.offset(),
        timestamp_ms: timestamp_ms(message),
        key: message.key(),
        value: message.payload(),
        headers: &headers,
    };
    decoder.decode(&record, chunk);
}

/// Lost history ends the partition; everything else librdkafka mends by itself.
fn transient(error: &KafkaError) -> Result<(), ProcessorError> {
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset) => {
            Err(ProcessorError::Refused(format!(
                "kafka: {error}: the next offset is no longer in the log; bring the records back, or give the stream a new name"
            )))
        }
        _ => {
            tracing::warn!(%error, "fetching");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::readable_headers;
    use rdkafka::message::{Header, Headers};

    /// As the client library behaves: a name that is no UTF-8 panics.
    struct Hostile;

    impl Headers for Hostile {
        fn count(&self) -> usize {
            3
        }
        fn try_get(&self, index: usize) -> Option<Header<'_, &[u8]>> {
            assert_ne!(index, 1, "no UTF-8");
            Some(Header { key: ["ce_id", "", "ce_time"][index], value: None })
        }
    }

    #[test]
    fn a_header_whose_name_is_no_utf_8_is_left_out_and_the_others_are_read() {
        assert_eq!(readable_headers(&Hostile), [("ce_id", None), ("ce_time", None)]);
    }
}
