//! Two processors with the same instance name.

use crate::harness::{LONG_TIMEOUT, Pipeline, TIMEOUT, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn the_later_of_two_processors_with_one_name_is_refused_and_the_earlier_one_continues() {
    let pipeline = Pipeline::initialised("one_name").await;
    let mut first = pipeline.processor("same");
    first.ready().await;
    pipeline.stress(200).await;
    // A separate checkpoint folder, as on another machine, so that the lock file for the name does not conflict.
    let separate = [("PIPELINE_CHECKPOINTS", pipeline.folder.join("separate").display().to_string())];
    let mut second = pipeline.processor_with("same", &separate);
    assert_eq!(second.end().await.code(), Some(3), "{}", second.log_text());
    let log = second.log_text();
    assert!(
        log.contains("`same` is alive and started earlier") && log.contains("PIPELINE_INSTANCE"),
        "{log}"
    );
    pipeline.stress(200).await;
    wait_until("the first processor continues", LONG_TIMEOUT, || async {
        pipeline.progress().await.events == 400
    })
    .await;
    wait_until("the first processor is ready", TIMEOUT, || async { first.is_ready().await }).await;
    pipeline.assert_counted_once(400).await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_processor_does_not_block_a_new_one_with_the_same_name() {
    let pipeline = Pipeline::initialised("successor").await;
    let mut first = pipeline.processor("same");
    first.ready().await;
    pipeline.stress(200).await;
    first.kill().await;
    let mut second = pipeline.processor("same");
    second.ready().await;
    pipeline.stress(200).await;
    wait_until("the second processor continues", LONG_TIMEOUT, || async {
        pipeline.progress().await.events == 400
    })
    .await;
    pipeline.assert_counted_once(400).await;
    second.stop().await;
}
