//! Fetches and decodes one partition on a dedicated thread. The thread runs ahead of the worker by at most two chunks:
//! one in the channel and one that is being filled.

use crate::error::{Halt, ProcessorError};
use crate::io::log_reader::{first_readable_after, is_out_of_range};
use crate::pipeline::group::client::GroupContext;
use crate::pipeline::stages::{StageClock, StageState};
use crate::pipeline::start::{Start, record_mismatch};
use crate::record::chunk::{Chunk, LastRecord};
use crate::record::decode::{Decoder, Record};
use common::contracts::event::{fingerprint, floor_to};
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

/// How long to wait for the first record of a chunk.
const IDLE_POLL: Duration = Duration::from_millis(100);
/// A partition without records for this long sends [`Fetched::Quiet`] to its worker, and again after each such
/// interval.
const QUIET_AFTER: Duration = Duration::from_secs(5);
/// How long to search for the first readable record after one that cannot be read.
const READABLE_SEARCH_TIMEOUT: Duration = Duration::from_secs(20);

/// The limits at which a chunk is handed to the worker.
#[derive(Debug, Clone, Copy)]
pub struct ChunkLimits {
    /// Maximum number of records.
    pub records: usize,
    /// Maximum size of the record values, in bytes.
    pub bytes: usize,
    /// Maximum number of panes that the events fall into. All of them are in memory at the same time.
    pub panes: usize,
    /// Maximum time since the first record.
    pub linger: Duration,
}

/// What a fetch thread sends to its worker.
#[derive(Debug)]
pub enum Fetched {
    /// The next records of the log.
    Chunk(Box<Chunk>),
    /// No record has arrived for a while.
    Quiet,
}

/// The channel from a fetch thread to its worker. Holds at most one chunk.
pub type Chunks = mpsc::Receiver<Result<Fetched, ProcessorError>>;

/// One assigned partition of a consumer.
pub struct AssignedPartition {
    /// Queue of the partition's records.
    pub queue: PartitionQueue<GroupContext>,
    /// The consumer that the partition is assigned to. It provides the fetch position.
    pub consumer: Arc<BaseConsumer<GroupContext>>,
    /// Bootstrap servers.
    pub brokers: String,
    /// Events topic.
    pub topic: String,
    /// Kafka partition.
    pub id: i32,
    /// Decodes its records.
    pub decoder: Decoder,
}

/// Starts a fetch thread at `start`. The thread ends after an error, when `stop` is cancelled, or when the worker drops
/// the receiver.
pub fn spawn(
    source: AssignedPartition,
    start: &Start,
    limits: ChunkLimits,
    stop: CancellationToken,
    clock: Arc<StageClock>,
) -> std::io::Result<(Chunks, JoinHandle<()>)> {
    let (sender, chunks) = mpsc::channel(1);
    let next_offset = start.skip.as_ref().map_or(start.position.next_offset, |skip| skip.end);
    let first = FirstRecord::new(start);
    let quiet_since = Instant::now();
    let fetcher = Fetcher { source, limits, stop, clock, first, next_offset, quiet_since };
    let skipped = start.skip.clone();
    let thread = std::thread::Builder::new().name("fetch".into()).spawn(move || {
        let skipped = skipped.map(|skipped| Chunk { skipped: Some(skipped), ..fetcher.empty_chunk() });
        if skipped.is_none_or(|chunk| sender.blocking_send(Ok(Fetched::Chunk(Box::new(chunk)))).is_ok()) {
            fetcher.run(&sender);
        }
    })?;
    Ok((chunks, thread))
}

/// Compares the log's record at the offset of the last processed record with that record, before the next record is
/// admitted.
#[derive(Debug)]
pub struct FirstRecord {
    next_offset: i64,
    expected: Option<LastRecord>,
}

struct Fetcher {
    source: AssignedPartition,
    limits: ChunkLimits,
    stop: CancellationToken,
    clock: Arc<StageClock>,
    first: FirstRecord,
    /// Offset after the last chunk, including transaction markers and aborted records after it.
    next_offset: i64,
    quiet_since: Instant,
}

impl Fetcher {
    fn run(mut self, sender: &mpsc::Sender<Result<Fetched, ProcessorError>>) {
        while !self.stop.is_cancelled() {
            self.clock.enter(StageState::Idle);
            let (chunk, error) = self.chunk();
            let moved = chunk.next_offset > chunk.first_offset;
            // Only decoding counts as busy. The rest of the time was spent waiting for records.
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
                // The worker ends with this error. Sending fails if the worker has already ended.
                let _sent = sender.blocking_send(Err(error));
                return;
            }
        }
    }

    /// An empty chunk at the next offset.
    fn empty_chunk(&self) -> Chunk {
        Chunk { first_offset: self.next_offset, next_offset: self.next_offset, ..self.source.decoder.chunk() }
    }

    /// Collects records until a limit of the chunk is reached, no record arrives in time or an error occurs.
    fn chunk(&mut self) -> (Chunk, Option<ProcessorError>) {
        let mut chunk = self.empty_chunk();
        let (ending, last_record) = self.collect(&mut chunk);
        chunk.last_record = last_record;
        self.next_offset = chunk.next_offset;
        let followed = match &ending {
            ChunkEnd::LogMismatch(_) => Ok(()),
            ChunkEnd::Full | ChunkEnd::Quiet | ChunkEnd::Failed(_) => self.follow_position(&mut chunk),
        };
        let error = match ending {
            ChunkEnd::Full | ChunkEnd::Quiet => None,
            ChunkEnd::LogMismatch(error) => Some(error),
            ChunkEnd::Failed(error) => Some(self.fetch_error(&error)),
        };
        (chunk, followed.err().or(error))
    }

    /// Fills `chunk`. Returns why the chunk ended and its last record.
    fn collect(&mut self, chunk: &mut Chunk) -> (ChunkEnd, Option<LastRecord>) {
        let mut panes = PaneCount::new(self.source.decoder.pane_ms());
        let mut started: Option<Instant> = None;
        let mut waited = Duration::ZERO;
        let mut last = None;
        let ending = loop {
            let limits = &self.limits;
            let is_full = chunk.len() >= limits.records || chunk.bytes() >= limits.bytes;
            if is_full || panes.len() >= limits.panes {
                break ChunkEnd::Full;
            }
            // Poll without waiting first, so that the clock is read only if no record is queued: reading it takes
            // longer than handling a record.
            let polled = match self.source.queue.poll(Duration::ZERO) {
                None => {
                    let rest = started.map(|started| limits.linger.saturating_sub(started.elapsed()));
                    let wait_started = Instant::now();
                    let polled = self.source.queue.poll(rest.unwrap_or(IDLE_POLL));
                    waited += wait_started.elapsed();
                    polled
                }
                polled => polled,
            };
            let message = match polled {
                None => break ChunkEnd::Quiet,
                Some(Ok(message)) => message,
                Some(Err(error)) if is_transient(&error) => {
                    tracing::warn!(partition = self.source.id, %error, "fetch failed, retrying");
                    continue;
                }
                Some(Err(error)) => break ChunkEnd::Failed(error),
            };
            let offset = message.offset();
            match self.first.admit(self.source.id, offset, || fingerprint_of(&message)) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => break ChunkEnd::LogMismatch(error),
            }
            if started.is_none() {
                (started, waited) = (Some(Instant::now()), Duration::ZERO);
            }
            decode(&self.source.decoder, &message, chunk);
            if let Some(event) = chunk.events.last().filter(|event| event.offset == offset) {
                panes.add(event.time_ms);
            }
            last = Some(message);
        };
        let elapsed = started.map_or(Duration::ZERO, |started| started.elapsed());
        chunk.decode_us = elapsed.saturating_sub(waited).as_micros() as u64;
        let last = last.map(|last| LastRecord { offset: last.offset(), fingerprint: fingerprint_of(&last) });
        (ending, last)
    }

    /// Moves the end of `chunk` past transaction markers and aborted records, which Kafka does not deliver.
    fn follow_position(&mut self, chunk: &mut Chunk) -> Result<(), ProcessorError> {
        let Some(position) = self.source.position().filter(|position| *position > self.next_offset) else {
            return Ok(());
        };
        self.first.passed(self.source.id, position)?;
        self.next_offset = position;
        chunk.next_offset = position;
        Ok(())
    }

    /// Maps an error that is not transient to what the partition does about it: reopen or halt.
    fn fetch_error(&self, error: &KafkaError) -> ProcessorError {
        let (partition, offset) = (self.source.id, self.next_offset);
        if is_out_of_range(error) {
            return ProcessorError::Reopen(format!(
                "partition {partition}: offset {offset} is out of the log's range ({error})"
            ));
        }
        let AssignedPartition { brokers, topic, .. } = &self.source;
        let deadline = Instant::now() + READABLE_SEARCH_TIMEOUT;
        let readable_from = first_readable_after(brokers, topic, partition, offset, deadline);
        Halt { partition, offset, cause: format!("kafka: {error}"), readable_from }.into()
    }
}

/// Why a chunk ended.
enum ChunkEnd {
    /// A limit was reached.
    Full,
    /// No record arrived in time.
    Quiet,
    /// The log does not hold the last processed record.
    LogMismatch(ProcessorError),
    /// Kafka reported an error that is not transient.
    Failed(KafkaError),
}

impl AssignedPartition {
    /// Offset after everything that was polled, including transaction markers and aborted records. `None` before the
    /// first poll.
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
    /// For a partition that starts at `start`.
    pub fn new(start: &Start) -> FirstRecord {
        let next_offset = start.skip.as_ref().map_or(start.position.next_offset, |skip| skip.end);
        FirstRecord { next_offset, expected: start.expected }
    }

    /// Offset of the first record to process.
    #[cfg(test)]
    pub fn next_offset(&self) -> i64 {
        self.next_offset
    }

    /// Returns whether to process the record at `offset`. The last processed record is only compared. Fails if the log
    /// holds another record, or none, at its offset.
    pub fn admit(
        &mut self,
        partition: i32,
        offset: i64,
        fingerprint: impl FnOnce() -> i64,
    ) -> Result<bool, ProcessorError> {
        if let Some(expected) = self.expected.take_if(|expected| offset >= expected.offset) {
            let found = (offset == expected.offset).then(fingerprint);
            if found != Some(expected.fingerprint) {
                return Err(record_mismatch(partition, expected, found).into());
            }
        }
        Ok(offset >= self.next_offset)
    }

    /// Notes that fetching has reached `position` without delivering a record. Fails if the last processed record
    /// should have been delivered below it.
    pub fn passed(&mut self, partition: i32, position: i64) -> Result<(), ProcessorError> {
        match self.expected.filter(|expected| expected.offset < position) {
            Some(expected) => Err(record_mismatch(partition, expected, None).into()),
            None => Ok(()),
        }
    }
}

/// Counts the distinct panes that a chunk's events fall into.
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
        // Most events fall into the same pane as the event before.
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

/// The fingerprint that distinguishes a record from the record at the same offset of another log.
pub(crate) fn fingerprint_of(message: &BorrowedMessage<'_>) -> i64 {
    fingerprint(
        message.key().unwrap_or_default(),
        message.payload().unwrap_or_default(),
        timestamp_ms(message),
    )
}

/// The headers whose names are UTF-8. The client library panics on any other name, and one record must not stop its
/// partition.
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

/// Whether librdkafka recovers from an error and continues at the same offset. Any other error could hide records, so
/// it stops the partition.
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
            // The client is unusable. The group's thread replaces it.
            | Code::Fatal
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdkafka::message::Header;

    /// Behaves like the client library: panics on a name that is not UTF-8.
    struct PanickingHeaders;

    impl Headers for PanickingHeaders {
        fn count(&self) -> usize {
            3
        }
        fn try_get(&self, index: usize) -> Option<Header<'_, &[u8]>> {
            assert_ne!(index, 1, "not UTF-8");
            Some(Header { key: ["ce_id", "", "ce_time"][index], value: None })
        }
    }

    #[test]
    fn a_header_whose_name_is_not_utf_8_is_left_out_and_the_others_are_read() {
        assert_eq!(readable_headers(&PanickingHeaders), [("ce_id", None), ("ce_time", None)]);
    }

    fn first(next_offset: i64, expected: Option<i64>) -> FirstRecord {
        FirstRecord { next_offset, expected: expected.map(|offset| LastRecord { offset, fingerprint: 9 }) }
    }

    #[test]
    fn the_last_record_is_compared_and_not_processed_again() {
        let mut first = first(5, Some(4));
        assert!(!first.admit(0, 4, || 9).unwrap());
        assert!(first.admit(0, 5, || panic!("not compared twice")).unwrap());
        first.passed(0, 9).unwrap();
    }

    #[test]
    fn another_record_or_none_at_the_offset_of_the_last_record_is_refused() {
        let check = |result: Result<bool, ProcessorError>, part: &str| {
            let error = result.unwrap_err();
            assert!(error.exit_code() == 3 && error.to_string().contains(part), "{error}");
        };
        check(first(5, Some(4)).admit(0, 4, || 8), "found fingerprint 8, expected fingerprint 9");
        check(first(5, Some(4)).admit(0, 5, || 9), "found no record");
        check(first(5, Some(2)).passed(0, 4).map(|()| true), "found no record");
        first(5, Some(4)).passed(0, 4).unwrap();
    }

    #[test]
    fn a_pane_is_counted_once_even_if_several_events_fall_into_it() {
        let mut panes = PaneCount::new(10);
        [3, 9, 12, 5, 19, 30].into_iter().for_each(|time_ms| panes.add(time_ms));
        assert_eq!(panes.len(), 3);
    }
}
