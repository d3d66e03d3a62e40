//! Limits the number of requests in flight. The limit shrinks when the cluster is overloaded and grows as requests
//! succeed.

use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Semaphore, SemaphorePermit};

/// The limit grows by one after this number of consecutive successes, times the limit.
const GROW_AFTER: usize = 20;

/// A limit with additive increase and multiplicative decrease.
#[derive(Debug)]
pub struct InFlight {
    permits: Semaphore,
    limit: AtomicUsize,
    max: usize,
    successes: AtomicUsize,
}

impl InFlight {
    /// The limit starts at `max` and never exceeds it.
    pub fn new(max: usize) -> InFlight {
        let max = max.max(1);
        InFlight {
            permits: Semaphore::new(max),
            limit: AtomicUsize::new(max),
            max,
            successes: AtomicUsize::new(0),
        }
    }

    /// The current limit.
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// Waits for a permit. Never returns `None`, because the semaphore is never closed.
    pub async fn acquire(&self) -> Option<SemaphorePermit<'_>> {
        self.permits.acquire().await.ok()
    }

    /// Records a successful request. The limit may grow.
    pub fn succeeded(&self) {
        let limit = self.limit();
        if limit >= self.max || self.successes.fetch_add(1, Ordering::Relaxed) < GROW_AFTER * limit {
            return;
        }
        self.successes.store(0, Ordering::Relaxed);
        if self.limit.compare_exchange(limit, limit + 1, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.permits.add_permits(1);
        }
    }

    /// Halves the limit because the cluster is overloaded. The caller's `permit` is one of those that are removed.
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
        // Permits that are in use cannot be removed, so the limit shrinks by fewer.
        self.limit.fetch_add(missing, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn overload_halves_the_limit_and_successes_restore_it() {
        let flight = InFlight::new(8);
        flight.overloaded(flight.acquire().await.unwrap());
        assert_eq!((flight.limit(), flight.permits.available_permits()), (4, 4));
        for _ in 0..1000 {
            flight.succeeded();
        }
        assert_eq!((flight.limit(), flight.permits.available_permits()), (8, 8));
    }

    #[tokio::test]
    async fn the_limit_never_falls_below_one_or_the_permits_in_use() {
        let flight = InFlight::new(4);
        let held = [
            flight.acquire().await.unwrap(),
            flight.acquire().await.unwrap(),
            flight.acquire().await.unwrap(),
        ];
        flight.overloaded(flight.acquire().await.unwrap());
        assert_eq!(flight.limit(), 3, "three permits are in use");
        drop(held);
        for _ in 0..4 {
            flight.overloaded(flight.acquire().await.unwrap());
        }
        assert_eq!((flight.limit(), flight.permits.available_permits()), (1, 1));
    }
}
