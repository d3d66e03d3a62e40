//! Cassandra goes away, or is asked too much, and comes back: nothing is lost, readiness tells.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::{PATIENT, Pipeline, SOON, Service, wait_until};

/// How long Cassandra is away.
const AWAY: Duration = Duration::from_secs(30);

/// Of a CQL frame: version, flags, stream (two bytes), opcode and the length of the body (four bytes).
const HEADER_BYTES: usize = 9;
const BATCH: u8 = 13;
const ERROR: u8 = 0;
const OVERLOADED: u32 = 0x1001;

/// A way to Cassandra that can be cut, made to stand still, or made to answer as an overloaded node does, so that the other tests keep theirs.
pub struct Way {
    pub address: String,
    pub open: Arc<watch::Sender<bool>>,
    /// Nothing is carried, and no connection ends, as when Cassandra's process stands still.
    pub halted: Arc<watch::Sender<bool>>,
    /// Every second batch is carried out and answered with an error.
    overloaded: Arc<AtomicBool>,
}

impl Way {
    pub async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (open, overloaded) = (Arc::new(watch::Sender::new(true)), Arc::new(AtomicBool::new(false)));
        let halted = Arc::new(watch::Sender::new(false));
        let (gate, halt, overload) = (open.clone(), halted.clone(), overloaded.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, mut gate, overload) = (server.clone(), gate.subscribe(), overload.clone());
                let halt = halt.subscribe();
                tokio::spawn(async move {
                    if !*gate.borrow() {
                        return;
                    }
                    let Ok(server) = TcpStream::connect(server).await else { return };
                    tokio::select! {
                        _ = carry(client, server, (halt, &overload)) => {}
                        _ = gate.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { address, open, halted, overloaded }
    }
}

/// Carries frames both ways until one side ends.
async fn carry(
    client: TcpStream,
    server: TcpStream,
    (mut halted, overloaded): (watch::Receiver<bool>, &AtomicBool),
) -> io::Result<()> {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let refused = Mutex::new(BTreeSet::new());
    let asks = async {
        let mut batches = 0;
        loop {
            let frame = frame(&mut from_client).await?;
            if frame[4] == BATCH && overloaded.load(Ordering::Relaxed) {
                batches += 1;
                if batches % 2 == 0 {
                    refused.lock().unwrap().insert([frame[2], frame[3]]);
                }
            }
            to_server.write_all(&frame).await?;
        }
    };
    let answers = async {
        loop {
            let mut frame = frame(&mut from_server).await?;
            let _ = halted.wait_for(|halted| !halted).await;
            if refused.lock().unwrap().remove(&[frame[2], frame[3]]) {
                let words = b"too much";
                let body =
                    [&OVERLOADED.to_be_bytes()[..], &(words.len() as u16).to_be_bytes(), words].concat();
                let header = [frame[0], 0, frame[2], frame[3], ERROR];
                frame = [&header[..], &(body.len() as u32).to_be_bytes(), &body].concat();
            }
            to_client.write_all(&frame).await?;
        }
    };
    tokio::select! {
        ended = asks => ended,
        ended = answers => ended,
    }
}

async fn frame(from: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; HEADER_BYTES];
    from.read_exact(&mut frame).await?;
    let body_bytes = u32::from_be_bytes([frame[5], frame[6], frame[7], frame[8]]) as usize;
    frame.resize(HEADER_BYTES + body_bytes, 0);
    from.read_exact(&mut frame[HEADER_BYTES..]).await?;
    Ok(frame)
}

/// No partition was taken away meanwhile: each has started once, and at most `redone` of them again, to redo a batch that an outage
/// had interrupted.
async fn assert_kept_its_partitions(processor: &Service, redone: f64) {
    for (how, partitions) in [("earliest", 6.0..=6.0), ("resume", 0.0..=redone), ("recover", 0.0..=0.0)] {
        let name = format!("processor_partition_starts_total{{how=\"{how}\"}}");
        let started = processor.metric(&name).await.unwrap();
        assert!(partitions.contains(&started), "{how}: {started}, {}", processor.words());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_while_cassandra_is_away_for_thirty_seconds() {
    let pipeline = Pipeline::initialised("away").await;
    let way = Way::to(pipeline.cassandra_address()).await;
    let mut processor = pipeline.processor_with("one", &[("PIPELINE_CASSANDRA_NODES", way.address.clone())]);
    processor.ready().await;
    pipeline.stress(40_000).await;
    wait_until("a part is processed", PATIENT, || async { pipeline.progress().await.events > 2_000 }).await;
    way.open.send_replace(false);
    let since = Instant::now();
    wait_until("readiness tells", SOON, || async { !processor.is_ready().await }).await;
    pipeline.stress(10_000).await;
    wait_until("cassandra was away long enough", SOON, || async { since.elapsed() >= AWAY }).await;
    assert!(!processor.is_ready().await, "ready although Cassandra is away");
    way.open.send_replace(true);
    wait_until("ready again", SOON, || async { processor.is_ready().await }).await;
    wait_until("all is processed", PATIENT, || async { pipeline.progress().await.events >= 50_000 }).await;
    pipeline.assert_counted_once(50_000).await;
    assert_kept_its_partitions(&processor, 6.0).await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_cassandra_is_asked_less_at_once_and_more_again_afterwards() {
    const MOST: f64 = 8.0;
    let pipeline = Pipeline::initialised("overloaded").await;
    let way = Way::to(pipeline.cassandra_address()).await;
    let settings = [
        ("PIPELINE_CASSANDRA_NODES", way.address.clone()),
        ("PIPELINE_IN_FLIGHT", MOST.to_string()),
        // Small batches: many requests, each of which may let the limit grow.
        ("PIPELINE_BATCH_RECORDS", "200".to_owned()),
    ];
    let mut processor = pipeline.processor_with("one", &settings);
    processor.ready().await;
    let limit = || async { processor.metric("processor_in_flight_limit").await.unwrap() };
    // It is ready when it is connected, and has a limit a moment later.
    wait_until("all may be in flight", SOON, || async { limit().await >= MOST }).await;
    way.overloaded.store(true, Ordering::Relaxed);
    pipeline.stress(60_000).await;
    wait_until("less is in flight", SOON, || async { limit().await <= MOST / 4.0 }).await;
    way.overloaded.store(false, Ordering::Relaxed);
    wait_until("as much as before is in flight", PATIENT, || async { limit().await >= MOST }).await;
    wait_until("all is processed", PATIENT, || async { pipeline.progress().await.events >= 60_000 }).await;
    pipeline.assert_counted_once(60_000).await;
    assert_kept_its_partitions(&processor, 0.0).await;
    processor.stop().await;
}
