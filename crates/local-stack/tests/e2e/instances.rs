//! Two processes that share what only one may have.

use crate::harness::{PATIENT, Pipeline, SOON, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn of_two_processors_of_one_name_the_later_one_gives_way_and_the_earlier_one_goes_on() {
    let pipeline = Pipeline::initialised("one_name").await;
    let mut first = pipeline.processor("same");
    first.ready().await;
    pipeline.stress(200).await;
    // Another machine: the name's lock in the checkpoint folder does not tell.
    let apart = [("PIPELINE_CHECKPOINTS", pipeline.folder.join("apart").display().to_string())];
    let mut second = pipeline.processor_with("same", &apart);
    assert_eq!(second.end().await.code(), Some(3), "{}", second.words());
    let words = second.words();
    assert!(
        words.contains("`same` is alive and started earlier") && words.contains("PIPELINE_INSTANCE"),
        "{words}"
    );
    pipeline.stress(200).await;
    wait_until("the first goes on", PATIENT, || async { pipeline.progress().await.events == 400 }).await;
    wait_until("the first is ready", SOON, || async { first.is_ready().await }).await;
    pipeline.assert_counted_once(400).await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_processor_that_was_killed_is_no_rival_of_its_successor() {
    let pipeline = Pipeline::initialised("successor").await;
    let mut first = pipeline.processor("same");
    first.ready().await;
    pipeline.stress(200).await;
    first.kill().await;
    let mut second = pipeline.processor("same");
    second.ready().await;
    pipeline.stress(200).await;
    wait_until("the second goes on", PATIENT, || async { pipeline.progress().await.events == 400 }).await;
    pipeline.assert_counted_once(400).await;
    second.stop().await;
}
