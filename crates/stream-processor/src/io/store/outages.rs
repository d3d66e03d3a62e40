//! Counts outages of Cassandra, derived from the outcomes of requests.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Minimum duration of an outage with failed requests. Restoring a snapshot takes longer, so shorter failures do not
/// count.
const MIN_OUTAGE: Duration = Duration::from_secs(1);
/// A gap of this length between two successes counts as an outage even without a failure: this process may have been
/// suspended.
const UNOBSERVED_GAP: Duration = Duration::from_secs(10);

/// Counts the outages that have ended.
#[derive(Debug)]
pub struct Outages {
    created: Instant,
    /// Milliseconds since `created`.
    last_success_ms: AtomicU64,
    has_failed_since: AtomicBool,
    count: AtomicU64,
}

impl Outages {
    /// Starts at zero outages. `now` counts as a success.
    pub fn new(now: Instant) -> Outages {
        Outages {
            created: now,
            last_success_ms: AtomicU64::new(0),
            has_failed_since: AtomicBool::new(false),
            count: AtomicU64::new(0),
        }
    }

    /// Number of outages that have ended.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Records a request that failed or timed out.
    pub fn failed(&self) {
        self.has_failed_since.store(true, Ordering::Release);
    }

    /// Records a successful request. Must be called before the result is used, so that its user sees an outage that
    /// just ended.
    pub fn succeeded(&self, now: Instant) {
        let now_ms = now.saturating_duration_since(self.created).as_millis() as u64;
        let last_ms = self.last_success_ms.swap(now_ms, Ordering::AcqRel);
        let without_success = Duration::from_millis(now_ms.saturating_sub(last_ms));
        let has_failed = self.has_failed_since.swap(false, Ordering::AcqRel);
        if without_success >= if has_failed { MIN_OUTAGE } else { UNOBSERVED_GAP } {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_a_second_without_success_after_a_failure_or_ten_seconds_without_any_request() {
        let start = Instant::now();
        let outages = Outages::new(start);
        let succeeded = |millis| {
            outages.succeeded(start + Duration::from_millis(millis));
            outages.count()
        };
        assert_eq!(succeeded(100), 0);
        outages.failed();
        assert_eq!(succeeded(200), 0, "a failure between two successes 100 ms apart");
        assert_eq!(succeeded(5000), 0, "no request for less than 10 s");
        outages.failed();
        assert_eq!(succeeded(6000), 1);
        assert_eq!(succeeded(8000), 1, "the outage is counted once");
        assert_eq!(succeeded(18_000), 2, "no request for 10 s");
    }
}
