//! Runs the ledger suite against Cassandra. `./test e2e` starts Cassandra and runs this target.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking, helpers included"
)]

#[path = "../src/ledger/suite.rs"]
mod suite;

use common::contracts::schema;
use ingest_producer::ledger::Ledger;
use ingest_producer::ledger::cassandra::CassandraLedger;
use scylla::client::session_builder::SessionBuilder;
use std::sync::Arc;

#[tokio::test(flavor = "multi_thread")]
async fn the_cassandra_ledger_passes_the_ledger_suite() {
    let node = std::env::var("PIPELINE_TEST_CASSANDRA")
        .expect("PIPELINE_TEST_CASSANDRA is not set; run this test with ./test e2e");
    let session = Arc::new(SessionBuilder::new().known_node(node).build().await.unwrap());
    let keyspace = format!("ledger_{}", std::process::id());
    let replication = "{'class': 'SimpleStrategy', 'replication_factor': 1}";
    let create = format!("CREATE KEYSPACE {keyspace} WITH replication = {replication}");
    session.query_unpaged(create, ()).await.unwrap();
    for table in schema::shared_tables() {
        session.query_unpaged(table.create(&keyspace), ()).await.unwrap();
    }
    suite::all(async |stream| {
        Arc::new(CassandraLedger::new(session.clone(), &keyspace, stream).await.unwrap()) as Arc<dyn Ledger>
    })
    .await;
}
