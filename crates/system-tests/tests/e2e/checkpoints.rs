//! Several processors in one consumer group, with a shared checkpoint folder or with separate ones.

use std::collections::BTreeSet;

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn two_processors_with_a_shared_checkpoint_folder_never_open_the_same_state_file() {
    let pipeline = Pipeline::initialised("shared").await;
    let folder = pipeline.folder.join("checkpoints");
    let mut one = pipeline.processor("one");
    one.ready().await;
    let mut two = pipeline.processor("two");
    two.ready().await;
    wait_until("each processor has three partitions", TIMEOUT, || async {
        let (first, second) = (one.open_files(&folder), two.open_files(&folder));
        let together: BTreeSet<_> = first.iter().chain(&second).collect();
        assert_eq!(
            together.len(),
            first.len() + second.len(),
            "a state file is open twice: {first:?} {second:?}"
        );
        first.len() == 3 && second.len() == 3
    })
    .await;
    pipeline.stress(60_000).await;
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= 60_000
    })
    .await;
    two.stop().await;
    wait_until("the first processor has all partitions", TIMEOUT, || async {
        one.open_files(&folder).len() == 6
    })
    .await;
    pipeline.stress(20_000).await;
    wait_until("the remaining events are processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= 80_000
    })
    .await;
    pipeline.assert_counted_once(80_000).await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_counts_once_while_processors_join_leave_and_crash_under_load() {
    const EVENTS: i64 = 60_000;
    let pipeline = Pipeline::initialised("rebalance").await;
    let shared = pipeline.folder.join("checkpoints");
    let separate = pipeline.folder.join("another-volume");
    let own_volume = [("PIPELINE_CHECKPOINTS", separate.display().to_string())];
    let load = pipeline.stress_with(&["--messages", "60000", "--rate", "2500"]);
    let rebalances = async {
        let mut one = pipeline.processor("one");
        one.ready().await;
        let mut two = pipeline.processor("two");
        two.ready().await;
        wait_until("the second processor has partitions", TIMEOUT, || async {
            !two.open_files(&shared).is_empty()
        })
        .await;
        one.kill().await;
        let has_all = || async { two.open_files(&shared).len() == 6 };
        wait_until("the second processor has taken over all partitions", TIMEOUT, has_all).await;
        // Its checkpoint folder is empty. It recovers its partitions from Cassandra.
        let mut three = pipeline.processor_with("three", &own_volume);
        three.ready().await;
        wait_until("the third processor has partitions", TIMEOUT, || async {
            !three.open_files(&separate).is_empty()
        })
        .await;
        two.stop().await;
        let has_all = || async { three.open_files(&separate).len() == 6 };
        wait_until("the third processor has taken over all partitions", TIMEOUT, has_all).await;
        // Its state files are outdated now. It must not resume from them.
        let mut one = pipeline.processor("one");
        one.ready().await;
        wait_until("the first processor has partitions again", TIMEOUT, || async {
            !one.open_files(&shared).is_empty()
        })
        .await;
        (one, three)
    };
    let ((), (one, three)) = tokio::join!(load, rebalances);
    wait_until("the whole log is processed", LONG_TIMEOUT, || async {
        pipeline.progress().await.events >= EVENTS
    })
    .await;
    pipeline.assert_counted_once(EVENTS).await;
    assert_eq!(pipeline.progress().await.duplicates, 0, "a rebalance must not create duplicates");
    pipeline.verify().await;
    one.stop().await;
    three.stop().await;
}
