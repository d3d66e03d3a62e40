//! How many requests may be in flight at once: shrinks when the cluster is overloaded, grows again with what succeeds.

use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Successes in a row, per request of the limit, before the limit grows by one.
const GROW_AFTER: usize = 20;

/// Additive increase, halving decrease.
#[derive(Debug)]
pub struct InFlight {
    permits: Semaphore,
    limit: AtomicUsize,
    most: usize,
    successes: AtomicUsize,
}

impl InFlight {
    /// Starts at, and never exceeds, `most`.
    pub fn new(most: usize) -> InFlight {
        let most = most.max(1);
        InFlight {
            permits: Semaphore::new(most),
            limit: AtomicUsize::new(most),
            most,
            successes: AtomicUsize::new(0),
        }
    }

    /// The limit now in force.
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// Waits for a place; `None` never happens, as the semaphore is never closed.
    pub async fn enter(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.acquire().await.ok()
    }

    /// A request succeeded: the limit may grow.
    pub fn succeeded(&self) {
        let limit = self.limit();
        if limit >= self.most || self.successes.fetch_add(1, Ordering::Relaxed) < GROW_AFTER * limit {
            return;
        }
        self.successes.store(0, Ordering::Relaxed);
        if self.limit.compare_exchange(limit, limit + 1, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.permits.add_permits(1);
        }
    }

    /// The cluster is overloaded: halve the limit. The caller's `permit` is among those given up.
    pub fn overloaded(&self, permit: SemaphorePermit<'_>) {
        self.successes.store(0, Ordering::Relaxed);
        let limit = self.limit();
        let target = (limit / 2).max(1);
        if limit == target
            || self.limit.compare_exchange(limit, target, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return;
        }
        permit.forget();
        let missing = (limit - target - 1) - self.permits.forget_permits(limit - target - 1);
        // Places that are taken just now cannot be given up at once: the limit stands as far as it got.
        self.limit.fetch_add(missing, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn overload_halves_the_limit_and_success_brings_it_back() {
        let flight = InFlight::new(8);
        flight.overloaded(flight.enter().await.unwrap());
        assert_eq!((flight.limit(), flight.permits.available_permits()), (4, 4));
        for _ in 0..1000 {
            flight.succeeded();
        }
        assert_eq!((flight.limit(), flight.permits.available_permits()), (8, 8));
    }

    #[tokio::test]
    async fn the_limit_never_falls_below_one_and_counts_taken_places() {
        let flight = InFlight::new(4);
        let held =
            [flight.enter().await.unwrap(), flight.enter().await.unwrap(), flight.enter().await.unwrap()];
        flight.overloaded(flight.enter().await.unwrap());
        assert_eq!(flight.limit(), 3, "three places are taken");
        drop(held);
        for _ in 0..4 {
            flight.overloaded(flight.enter().await.unwrap());
        }
        assert_eq!((flight.limit(), flight.permits.available_permits()), (1, 1));
    }
}
