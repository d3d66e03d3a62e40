//! Cassandra becomes unreachable or overloaded and recovers. No event may be lost, and readiness must report the
//! outage.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::{LONG_TIMEOUT, Pipeline, Service, TIMEOUT, wait_until};

/// Length of the outage.
const OUTAGE: Duration = Duration::from_secs(30);

/// Header of a CQL frame: version, flags, stream (two bytes), opcode, and length of the body (four bytes).
const HEADER_BYTES: usize = 9;
/// CQL opcodes.
const BATCH: u8 = 13;
const ERROR: u8 = 0;
/// CQL error code of an overloaded node.
const OVERLOADED: u32 = 0x1001;

/// A proxy in front of Cassandra that can close its connections, stop forwarding answers, or answer like an overloaded
/// node. Each test has its own, so the other tests are not affected.
pub struct Proxy {
    pub address: String,
    /// While false, the proxy closes all connections and accepts no new ones.
    pub open: Arc<watch::Sender<bool>>,
    /// While true, connections stay open but no answer arrives, as when Cassandra's process is suspended.
    pub hangs: Arc<watch::Sender<bool>>,
    /// While true, Cassandra executes every second batch but the proxy answers it with an error.
    overloaded: Arc<AtomicBool>,
}

impl Proxy {
    /// Starts a proxy to the address `server`.
    pub async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (open, overloaded) = (Arc::new(watch::Sender::new(true)), Arc::new(AtomicBool::new(false)));
        let hangs = Arc::new(watch::Sender::new(false));
        let (gate, hang, overload) = (open.clone(), hangs.clone(), overloaded.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, mut gate, overload) = (server.clone(), gate.subscribe(), overload.clone());
                let hang = hang.subscribe();
                tokio::spawn(async move {
                    if !*gate.borrow() {
                        return;
                    }
                    let Ok(server) = TcpStream::connect(server).await else { return };
                    tokio::select! {
                        _ = forward(client, server, hang, &overload) => {}
                        _ = gate.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { address, open, hangs, overloaded }
    }
}

/// Forwards frames in both directions until one side closes its connection.
async fn forward(
    client: TcpStream,
    server: TcpStream,
    mut hangs: watch::Receiver<bool>,
    overloaded: &AtomicBool,
) -> io::Result<()> {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let refused = Mutex::new(BTreeSet::new());
    let requests = async {
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
            let _ = hangs.wait_for(|hangs| !hangs).await;
            if refused.lock().unwrap().remove(&[frame[2], frame[3]]) {
                let message = b"too much";
                let body =
                    [&OVERLOADED.to_be_bytes()[..], &(message.len() as u16).to_be_bytes(), message].concat();
                let header = [frame[0], 0, frame[2], frame[3], ERROR];
                frame = [&header[..], &(body.len() as u32).to_be_bytes(), &body].concat();
            }
            to_client.write_all(&frame).await?;
        }
    };
    tokio::select! {
        ended = requests => ended,
        ended = answers => ended,
    }
}

/// Reads one frame.
async fn frame(from: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; HEADER_BYTES];
    from.read_exact(&mut frame).await?;
    let body_bytes = u32::from_be_bytes([frame[5], frame[6], frame[7], frame[8]]) as usize;
    frame.resize(HEADER_BYTES + body_bytes, 0);
    from.read_exact(&mut frame[HEADER_BYTES..]).await?;
    Ok(frame)
}

/// Asserts that the processor kept all partitions. Each of them started once. At most `redone` started again, to repeat
/// a batch that the outage interrupted.
async fn assert_kept_its_partitions(processor: &Service, redone: f64) {
    for (how, partitions) in [("earliest", 6.0..=6.0), ("resume", 0.0..=redone), ("recover", 0.0..=0.0)] {
        let name = format!("processor_partition_starts_total{{how=\"{how}\"}}");
        let started = processor.metric(&name).await.unwrap();
        assert!(partitions.contains(&started), "{how}: {started}, {}", processor.log_text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_lost_during_a_cassandra_outage_of_thirty_seconds() {
    let pipeline = Pipeline::initialised("away").await;
    let proxy = Proxy::to(pipeline.cassandra_address()).await;
    let mut processor =
        pipeline.processor_with("one", &[("PIPELINE_CASSANDRA_NODES", proxy.address.clone())]);
    processor.ready().await;
    pipeline.stress(40_000).await;
    wait_until("part of the log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events > 2_000
    })
    .await;
    proxy.open.send_replace(false);
    let since = Instant::now();
    wait_until("the processor is not ready", TIMEOUT, || async { !processor.is_ready().await }).await;
    pipeline.stress(10_000).await;
    wait_until("the outage has lasted long enough", TIMEOUT, || async { since.elapsed() >= OUTAGE }).await;
    assert!(!processor.is_ready().await, "the processor is ready although cassandra is unreachable");
    proxy.open.send_replace(true);
    wait_until("the processor is ready again", TIMEOUT, || async { processor.is_ready().await }).await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= 50_000
    })
    .await;
    pipeline.assert_counted_once(50_000).await;
    assert_kept_its_partitions(&processor, 6.0).await;
    processor.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fewer_requests_are_in_flight_while_cassandra_is_overloaded() {
    const MAX_IN_FLIGHT: f64 = 8.0;
    let pipeline = Pipeline::initialised("overloaded").await;
    let proxy = Proxy::to(pipeline.cassandra_address()).await;
    let settings = [
        ("PIPELINE_CASSANDRA_NODES", proxy.address.clone()),
        ("PIPELINE_IN_FLIGHT", MAX_IN_FLIGHT.to_string()),
        // Small batches cause many requests. Each successful one may raise the limit.
        ("PIPELINE_BATCH_RECORDS", "200".to_owned()),
    ];
    let mut processor = pipeline.processor_with("one", &settings);
    processor.ready().await;
    let limit = || async { processor.metric("processor_in_flight_limit").await.unwrap() };
    // The processor is ready as soon as it is connected. The limit is exported shortly after that.
    wait_until("the limit is at its maximum", TIMEOUT, || async { limit().await >= MAX_IN_FLIGHT }).await;
    proxy.overloaded.store(true, Ordering::Relaxed);
    pipeline.stress(60_000).await;
    wait_until("the limit has fallen", TIMEOUT, || async { limit().await <= MAX_IN_FLIGHT / 4.0 }).await;
    proxy.overloaded.store(false, Ordering::Relaxed);
    wait_until("the limit is at its maximum again", LONG_TIMEOUT, || async {
        limit().await >= MAX_IN_FLIGHT
    })
    .await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= 60_000
    })
    .await;
    pipeline.assert_counted_once(60_000).await;
    assert_kept_its_partitions(&processor, 0.0).await;
    processor.stop().await;
}
