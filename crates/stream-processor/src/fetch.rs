//! Fetches and decodes one partition, on a thread of its own: the only part that runs ahead of the worker, by at most one
//! chunk in the channel and one in the making.

use crate::chunk::Chunk;
use crate::decode::{Decoder, Record};
use crate::error::{Halt, ProcessorError};
use crate::group::client::GroupContext;
use crate::log_reader::{first_readable_after, is_out_of_range};
use crate::partition::LastRecord;
use crate::stages::{StageClock, StageState};
use crate::start::{Start, another_record};
use crate::worker::{Chunks, Fetched};
use common::event::{fingerprint, floor_to};
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::Offset;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Poll interval of a quiet partition.
const IDLE_POLL: Duration = Duration::from_millis(100);
/// How long a partition is quiet before its worker is told, and told again.
const QUIET_AFTER: Duration = Duration::from_secs(5);
/// How long to look for the first readable record behind one that cannot be read.
const LOOK_AHEAD: Duration = Duration::from_secs(20);

/// When a chunk is full.
#[derive(Debug, Clone, Copy)]
pub struct ChunkLimits {
    /// Records.
    pub records: usize,
    /// Bytes of values.
    pub bytes: usize,
    /// Panes that its events fall into: all of them are in memory at once.
    pub panes: usize,
    /// Time since its first record.
    pub linger: Duration,
}

/// One assigned partition of a consumer.
pub struct AssignedPartition {
    /// Its records.
    pub queue: PartitionQueue<GroupContext>,
    /// The consumer it is assigned to, which knows its position.
    pub consumer: Arc<BaseConsumer<GroupContext>>,
    /// Bootstrap servers.
    pub brokers: String,
    /// Events topic.
    pub topic: String,
    /// Kafka partition.
    pub id: i32,
}

/// Starts fetching from `start`; ends when `stop` is cancelled or the worker drops its end of the channel.
pub fn spawn(
    source: AssignedPartition,
    decoder: Decoder,
    start: &Start,
    limits: ChunkLimits,
    (stop, clock): (CancellationToken, Arc<StageClock>),
) -> std::io::Result<(Chunks, JoinHandle<()>)> {
    let (sender, chunks) = mpsc::channel(1);
    let next_offset = start.skip.as_ref().map_or(start.position.next_offset, |skip| skip.end);
    let first = FirstRecord::new(start);
    let quiet_since = Instant::now();
    let fetcher = Fetcher { source, decoder, limits, stop, clock, first, next_offset, quiet_since };
    let skipped = start.skip.clone();
    let thread = std::thread::Builder::new().name("fetch".into()).spawn(move || {
        let skipped = skipped.map(|skipped| Chunk { skipped: Some(skipped), ..fetcher.up_to_here() });
        if skipped.is_none_or(|chunk| sender.blocking_send(Ok(Fetched::Chunk(Box::new(chunk)))).is_ok()) {
            fetcher.run(&sender);
        }
    })?;
    Ok((chunks, thread))
}

/// Compares the last record that was taken with the one that the log holds, on the way to the next one.
#[derive(Debug)]
pub struct FirstRecord {
    next_offset: i64,
    expected: Option<LastRecord>,
}

struct Fetcher {
    source: AssignedPartition,
    decoder: Decoder,
    limits: ChunkLimits,
    stop: CancellationToken,
    clock: Arc<StageClock>,
    first: FirstRecord,
    /// Offset after everything that was handed to the worker or lies in the chunk that is being filled.
    next_offset: i64,
    quiet_since: Instant,
}

impl Fetcher {
    fn run(mut self, sender: &mpsc::Sender<Result<Fetched, ProcessorError>>) {
        while !self.stop.is_cancelled() {
            self.clock.enter(StageState::Idle);
            let (chunk, error) = self.chunk();
            let moved = chunk.next_offset > chunk.first_offset;
            // Time between the records of a chunk was spent waiting for them.
            self.clock.enter_after(Duration::from_micros(chunk.decode_us), StageState::Backpressured);
            let fetched = if moved {
                Some(Fetched::Chunk(Box::new(chunk)))
            } else if self.quiet_since.elapsed() >= QUIET_AFTER {
                Some(Fetched::Quiet)
            } else {
                None
            };
            if let Some(fetched) = fetched {
                self.quiet_since = Instant::now();
                if sender.blocking_send(Ok(fetched)).is_err() {
                    return;
                }
            }
            if let Some(error) = error {
                // The worker ends with it; if it is gone already, there is nobody to tell.
                let _told = sender.blocking_send(Err(error));
                return;
            }
        }
    }

    /// An empty chunk that ends at the next offset.
    fn up_to_here(&self) -> Chunk {
        Chunk { first_offset: self.next_offset, next_offset: self.next_offset, ..self.decoder.chunk() }
    }

    /// Collects records until the chunk is full, its time is over, the partition is quiet or an error ends it.
    fn chunk(&mut self) -> (Chunk, Option<ProcessorError>) {
        let mut chunk = self.up_to_here();
        let (ending, last_record) = self.collect(&mut chunk);
        chunk.last_record = last_record;
        self.next_offset = chunk.next_offset;
        let followed = match &ending {
            Ending::OtherLog(_) => Ok(()),
            Ending::Full | Ending::Quiet | Ending::Failed(_) => self.follow_position(&mut chunk),
        };
        let error = match ending {
            Ending::Full | Ending::Quiet => None,
            Ending::OtherLog(error) => Some(error),
            Ending::Failed(error) => Some(self.failed(&error)),
        };
        (chunk, followed.err().or(error))
    }

    /// Fills `chunk`; gives why it ended, and its last record.
    fn collect(&mut self, chunk: &mut Chunk) -> (Ending, Option<LastRecord>) {
        let mut panes = PaneCount::new(self.decoder.pane_ms());
        let mut began: Option<Instant> = None;
        let mut waited = Duration::ZERO;
        let mut last = None;
        let ending = loop {
            let limits = &self.limits;
            let is_full = chunk.len() >= limits.records || chunk.bytes() >= limits.bytes;
            if is_full || panes.len() >= limits.panes {
                break Ending::Full;
            }
            // A record that is there already costs no look at the clock, which takes longer than the record.
            let polled = match self.source.queue.poll(Duration::ZERO) {
                None => {
                    let rest = began.map(|began| limits.linger.saturating_sub(began.elapsed()));
                    let asked = Instant::now();
                    let polled = self.source.queue.poll(rest.unwrap_or(IDLE_POLL));
                    waited += asked.elapsed();
                    polled
                }
                polled => polled,
            };
            let message = match polled {
                None => break Ending::Quiet,
                Some(Ok(message)) => message,
                Some(Err(error)) if is_transient(&error) => {
                    tracing::warn!(partition = self.source.id, %error, "fetching");
                    continue;
                }
                Some(Err(error)) => break Ending::Failed(error),
            };
            let offset = message.offset();
            match self.first.admit(self.source.id, offset, || fingerprint_of(&message)) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => break Ending::OtherLog(error),
            }
            if began.is_none() {
                (began, waited) = (Some(Instant::now()), Duration::ZERO);
            }
            decode(&self.decoder, &message, chunk);
            if let Some(event) = chunk.events.last().filter(|event| event.offset == offset) {
                panes.add(event.time_ms);
            }
            last = Some(message);
        };
        let taken = began.map_or(Duration::ZERO, |began| began.elapsed());
        chunk.decode_us = taken.saturating_sub(waited).as_micros() as u64;
        let last = last.map(|last| LastRecord { offset: last.offset(), fingerprint: fingerprint_of(&last) });
        (ending, last)
    }

    /// Moves the end of `chunk` past transaction markers and aborted records, which are never delivered as records.
    fn follow_position(&mut self, chunk: &mut Chunk) -> Result<(), ProcessorError> {
        let Some(position) = self.source.position().filter(|position| *position > self.next_offset) else {
            return Ok(());
        };
        self.first.passed(self.source.id, position)?;
        self.next_offset = position;
        chunk.next_offset = position;
        Ok(())
    }

    /// What an error that is not transient means for the partition.
    fn failed(&self, error: &KafkaError) -> ProcessorError {
        let (partition, offset) = (self.source.id, self.next_offset);
        if is_out_of_range(error) {
            return ProcessorError::Reopen(format!(
                "partition {partition}: kafka has no record at offset {offset} to fetch from ({error})"
            ));
        }
        let AssignedPartition { brokers, topic, .. } = &self.source;
        let deadline = Instant::now() + LOOK_AHEAD;
        let readable_from = first_readable_after(brokers, topic, (partition, offset), deadline);
        Halt { partition, offset, cause: format!("kafka: {error}"), readable_from }.into()
    }
}

/// Why a chunk ended.
enum Ending {
    Full,
    Quiet,
    /// The record that was taken last is not in the log.
    OtherLog(ProcessorError),
    Failed(KafkaError),
}

impl AssignedPartition {
    /// Offset after everything that was polled, transaction markers and aborted records included.
    fn position(&self) -> Option<i64> {
        let positions = self.consumer.position().ok()?;
        let of_this = positions.elements().into_iter().find(|element| element.partition() == self.id)?;
        match of_this.offset() {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        }
    }
}

impl FirstRecord {
    /// For a partition that starts there.
    pub fn new(start: &Start) -> FirstRecord {
        let next_offset = start.skip.as_ref().map_or(start.position.next_offset, |skip| skip.end);
        FirstRecord { next_offset, expected: start.expected }
    }

    /// Offset of the first record to take.
    #[cfg(test)]
    pub fn next_offset(&self) -> i64 {
        self.next_offset
    }

    /// Whether to take the record at `offset`. The record that was taken last is only compared; another one in its place, or
    /// none, is refused.
    pub fn admit(
        &mut self,
        partition: i32,
        offset: i64,
        fingerprint: impl FnOnce() -> i64,
    ) -> Result<bool, ProcessorError> {
        if let Some(expected) = self.expected.take_if(|expected| offset >= expected.offset) {
            let found = (offset == expected.offset).then(fingerprint);
            if found != Some(expected.fingerprint) {
                return Err(another_record(partition, expected, found).into());
            }
        }
        Ok(offset >= self.next_offset)
    }

    /// Fetching has reached `position` without a record: the one that was taken last must have been seen before.
    pub fn passed(&mut self, partition: i32, position: i64) -> Result<(), ProcessorError> {
        match self.expected.filter(|expected| expected.offset < position) {
            Some(expected) => Err(another_record(partition, expected, None).into()),
            None => Ok(()),
        }
    }
}

/// The panes that a chunk's events fall into.
struct PaneCount {
    pane_ms: i64,
    starts: HashSet<i64>,
    last: Option<i64>,
}

impl PaneCount {
    fn new(pane_ms: i64) -> PaneCount {
        PaneCount { pane_ms, starts: HashSet::new(), last: None }
    }

    fn add(&mut self, time_ms: i64) {
        let start = Some(floor_to(time_ms, self.pane_ms));
        // Most events fall into the pane of the one before.
        if start != self.last {
            self.starts.extend(start);
            self.last = start;
        }
    }

    fn len(&self) -> usize {
        self.starts.len()
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

/// Errors that pass by themselves: librdkafka goes on at the same offset. Every other error could hide records, so it stops the
/// partition.
fn is_transient(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    let Some(code) = error.rdkafka_error_code() else { return false };
    matches!(
        code,
        Code::AllBrokersDown
            | Code::BrokerNotAvailable
            | Code::BrokerTransportFailure
            | Code::FencedLeaderEpoch
            | Code::KafkaStorageError
            | Code::LeaderNotAvailable
            | Code::ListenerNotFound
            | Code::NetworkException
            | Code::NotLeaderForPartition
            | Code::OffsetNotAvailable
            | Code::OperationTimedOut
            | Code::ReplicaNotAvailable
            | Code::RequestTimedOut
            | Code::Resolve
            | Code::UnknownLeaderEpoch
            | Code::UnknownPartition
            | Code::UnknownTopic
            | Code::UnknownTopicOrPartition
            | Code::WaitingForCoordinator
            // The client is dead, and the group builds another one.
            | Code::Fatal
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdkafka::message::Header;

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

    fn first(next_offset: i64, expected: Option<i64>) -> FirstRecord {
        FirstRecord { next_offset, expected: expected.map(|offset| LastRecord { offset, fingerprint: 9 }) }
    }

    #[test]
    fn the_last_record_is_compared_and_not_taken_again() {
        let mut first = first(5, Some(4));
        assert!(!first.admit(0, 4, || 9).unwrap());
        assert!(first.admit(0, 5, || panic!("not compared twice")).unwrap());
        first.passed(0, 9).unwrap();
    }

    #[test]
    fn another_record_in_its_place_or_none_at_all_is_refused() {
        let check = |result: Result<bool, ProcessorError>, part: &str| {
            let error = result.unwrap_err();
            assert!(error.exit_code() == 3 && error.to_string().contains(part), "{error}");
        };
        check(first(5, Some(4)).admit(0, 4, || 8), "its fingerprint is 8, expected 9");
        check(first(5, Some(4)).admit(0, 5, || 9), "there is none");
        check(first(5, Some(2)).passed(0, 4).map(|()| true), "there is none");
        first(5, Some(4)).passed(0, 4).unwrap();
    }

    #[test]
    fn panes_are_counted_once_however_often_events_fall_into_them() {
        let mut panes = PaneCount::new(10);
        [3, 9, 12, 5, 19, 30].into_iter().for_each(|time_ms| panes.add(time_ms));
        assert_eq!(panes.len(), 3);
    }
}
