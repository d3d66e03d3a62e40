//! Cassandra goes away and comes back: nothing is lost, readiness tells.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::{PATIENT, Pipeline, SOON, wait_until};

/// How long Cassandra is away.
const AWAY: Duration = Duration::from_secs(30);

/// A way to Cassandra that can be cut, so that the other tests keep theirs.
pub struct Way {
    pub address: String,
    pub open: Arc<watch::Sender<bool>>,
}

impl Way {
    pub async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let open = Arc::new(watch::Sender::new(true));
        let gate = open.clone();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (server, mut gate) = (server.clone(), gate.subscribe());
                tokio::spawn(async move {
                    if !*gate.borrow() {
                        return;
                    }
                    let Ok(mut server) = TcpStream::connect(server).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        _ = gate.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { address, open }
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
    processor.stop().await;
}
