//! Counts outages of Cassandra, from what becomes of requests.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// An outage lasts at least this long: no snapshot is restored faster. Single failures between successes are none.
const AT_LEAST: Duration = Duration::from_secs(1);
/// After so long without a success there may have been an outage that nobody saw: this process may have stood still.
const UNSEEN: Duration = Duration::from_secs(10);

/// Outages that are over.
#[derive(Debug)]
pub struct Outages {
    began: Instant,
    /// Milliseconds after `began`.
    last_success_ms: AtomicU64,
    has_failed_since: AtomicBool,
    count: AtomicU64,
}

impl Outages {
    /// None yet.
    pub fn new(now: Instant) -> Outages {
        Outages {
            began: now,
            last_success_ms: AtomicU64::new(0),
            has_failed_since: AtomicBool::new(false),
            count: AtomicU64::new(0),
        }
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// A request was answered with an error, or not at all.
    pub fn failed(&self) {
        self.has_failed_since.store(true, Ordering::Release);
    }

    /// A request succeeded. Counted before the caller learns of it.
    pub fn succeeded(&self, now: Instant) {
        let now_ms = now.saturating_duration_since(self.began).as_millis() as u64;
        let last_ms = self.last_success_ms.swap(now_ms, Ordering::AcqRel);
        let without_success = Duration::from_millis(now_ms.saturating_sub(last_ms));
        let has_failed = self.has_failed_since.swap(false, Ordering::AcqRel);
        if without_success >= if has_failed { AT_LEAST } else { UNSEEN } {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_a_second_without_success_in_which_something_failed_or_a_longer_time_in_which_nothing_was_asked()
     {
        let start = Instant::now();
        let outages = Outages::new(start);
        let succeeded = |millis| {
            outages.succeeded(start + Duration::from_millis(millis));
            outages.count()
        };
        assert_eq!(succeeded(100), 0);
        outages.failed();
        assert_eq!(succeeded(200), 0, "a failure between successes");
        assert_eq!(succeeded(5000), 0, "nothing was asked");
        outages.failed();
        assert_eq!(succeeded(6000), 1);
        assert_eq!(succeeded(8000), 1, "it is over");
        assert_eq!(succeeded(18_000), 2, "nothing was asked for long");
    }
}
