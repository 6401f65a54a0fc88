//! Work on several threads.

use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// Applies a function to each item, on all threads: each takes the next one when it is done with one. The
/// caller's is one of them, and begins before the others are there.
pub(crate) fn each<T: Sync, R: Send>(
    threads: NonZeroUsize,
    items: &[T],
    function: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut results = vec![];
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            match items.get(i) {
                Some(item) => results.push((i, function(item))),
                None => return results,
            }
        }
    };
    let mut results = thread::scope(|scope| {
        let threads = threads.get().min(items.len()).max(1);
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut results = work();
        for other in others {
            match other.join() {
                Ok(of_thread) => results.extend(of_thread),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    });
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}
