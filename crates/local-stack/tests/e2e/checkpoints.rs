//! Processors that share the partitions, with one checkpoint folder or each with its own.

use std::collections::BTreeSet;

use crate::harness::{PATIENT, Pipeline, SOON, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn two_processors_on_one_checkpoint_folder_share_the_partitions_and_no_file() {
    let pipeline = Pipeline::initialised("shared").await;
    let folder = pipeline.folder.join("checkpoints");
    let mut one = pipeline.processor("one");
    one.ready().await;
    let mut two = pipeline.processor("two");
    two.ready().await;
    wait_until("both have partitions of their own", SOON, || async {
        let (first, second) = (one.open_files(&folder), two.open_files(&folder));
        let together: BTreeSet<_> = first.iter().chain(&second).collect();
        assert_eq!(together.len(), first.len() + second.len(), "a file is open twice: {first:?} {second:?}");
        first.len() == 3 && second.len() == 3
    })
    .await;
    pipeline.stress(60_000).await;
    wait_until("all of the log is processed", PATIENT, || async {
        pipeline.progress().await.events >= 60_000
    })
    .await;
    two.stop().await;
    wait_until("the first has all partitions", SOON, || async { one.open_files(&folder).len() == 6 }).await;
    pipeline.stress(20_000).await;
    wait_until("the rest is processed", PATIENT, || async { pipeline.progress().await.events >= 80_000 })
        .await;
    pipeline.assert_counted_once(80_000).await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processors_join_leave_and_die_under_load_and_every_event_counts_once() {
    const EVENTS: i64 = 60_000;
    let pipeline = Pipeline::initialised("rebalance").await;
    let shared = pipeline.folder.join("checkpoints");
    let apart = pipeline.folder.join("another-volume");
    let own_volume = [("PIPELINE_CHECKPOINTS", apart.display().to_string())];
    let load = pipeline.stress_with(&["--messages", "60000", "--rate", "2500"]);
    let life = async {
        let mut one = pipeline.processor("one");
        one.ready().await;
        let mut two = pipeline.processor("two");
        two.ready().await;
        wait_until("the second has partitions", SOON, || async { !two.open_files(&shared).is_empty() }).await;
        one.kill().await;
        let has_all = || async { two.open_files(&shared).len() == 6 };
        wait_until("the killed one's partitions are taken over", SOON, has_all).await;
        // Its volume knows nothing: what it gets, it recovers from Cassandra.
        let mut three = pipeline.processor_with("three", &own_volume);
        three.ready().await;
        wait_until("the third has partitions", SOON, || async { !three.open_files(&apart).is_empty() }).await;
        two.stop().await;
        let has_all = || async { three.open_files(&apart).len() == 6 };
        wait_until("the stopped one's partitions are taken over", SOON, has_all).await;
        // Its files are behind by now: it must not go on from them.
        let mut one = pipeline.processor("one");
        one.ready().await;
        wait_until("the first is back", SOON, || async { !one.open_files(&shared).is_empty() }).await;
        (one, three)
    };
    let ((), (one, three)) = tokio::join!(load, life);
    wait_until("all of the log is processed", PATIENT, || async {
        pipeline.progress().await.events >= EVENTS
    })
    .await;
    pipeline.assert_counted_once(EVENTS).await;
    assert_eq!(pipeline.progress().await.duplicates, 0, "a partition that moved is no duplicate");
    pipeline.verify().await;
    one.stop().await;
    three.stop().await;
}
