//! How long work is asked to stop, and how it sees to it.

use std::cmp::Ordering;
use std::sync::Arc;
#[cfg(test)]
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::{self, AtomicBool};
use std::time::Instant;

/// Asks long work to stop: opening a checkpoint, planning, downloading, loading. Clones ask for the
/// same.
#[derive(Debug, Clone, Default)]
pub struct CancelToken {
    flag: Arc<AtomicBool>,
    deadline: Option<Instant>,
    /// Looks that are left before it counts as used.
    #[cfg(test)]
    looks: Option<Arc<AtomicUsize>>,
}

impl CancelToken {
    /// Returns a token that has not been used.
    pub fn new() -> CancelToken {
        CancelToken::default()
    }

    /// Returns a token for work that has to end at `deadline`: it counts as used from then on, and
    /// when this one is used. Of several deadlines the earliest holds.
    pub fn until(&self, deadline: Instant) -> CancelToken {
        CancelToken {
            flag: Arc::clone(&self.flag),
            deadline: Some(self.deadline.map_or(deadline, |own| own.min(deadline))),
            #[cfg(test)]
            looks: self.looks.clone(),
        }
    }

    /// A token that is used when it is looked at for the time with this number, from 0.
    #[cfg(test)]
    pub(crate) fn at_look(number: usize) -> CancelToken {
        CancelToken {
            looks: Some(Arc::new(AtomicUsize::new(number))),
            ..CancelToken::default()
        }
    }

    /// Looks that are left of those of [`CancelToken::at_look`].
    #[cfg(test)]
    pub(crate) fn looks_left(&self) -> usize {
        let looks = self.looks.as_ref();
        looks.map_or(0, |looks| looks.load(atomic::Ordering::Relaxed))
    }

    /// Asks whatever was given this token to stop as soon as it looks.
    pub fn cancel(&self) {
        self.flag.store(true, atomic::Ordering::Relaxed);
    }

    /// Returns whether it has been asked to, or its deadline has passed.
    pub fn is_cancelled(&self) -> bool {
        #[cfg(test)]
        if let Some(looks) = &self.looks {
            let relaxed = atomic::Ordering::Relaxed;
            let fewer = |left: usize| left.checked_sub(1);
            if looks.fetch_update(relaxed, relaxed, fewer).is_err() {
                return true;
            }
        }
        self.flag.load(atomic::Ordering::Relaxed)
            || self.deadline.is_some_and(|end| Instant::now() >= end)
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub(crate) fn check(&self) -> Result<(), Cancelled> {
        match self.is_cancelled() {
            true => Err(Cancelled),
            false => Ok(()),
        }
    }
}

/// Work was asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub(crate) struct Cancelled;

/// Looks at a token after about every millisecond of work: often enough that nobody waits for long,
/// and seldom enough that it costs nothing.
#[derive(Debug)]
pub(crate) struct Watch<'a> {
    token: &'a CancelToken,
    left: usize,
    stopped: bool,
}

impl<'a> Watch<'a> {
    /// Bytes between two looks: about a millisecond of parsing, hashing or comparing.
    const BETWEEN: usize = 256 << 10;
    /// What an item costs beside its bytes: what is allocated for it, looked up and compared.
    const ITEM: usize = 256;

    pub(crate) fn new(token: &'a CancelToken) -> Watch<'a> {
        Watch {
            token,
            left: Watch::BETWEEN,
            stopped: false,
        }
    }

    /// Counts one item with this many bytes.
    ///
    /// # Errors
    /// [`Cancelled`] when it is time to stop.
    pub(crate) fn item(&mut self, bytes: usize) -> Result<(), Cancelled> {
        let cost = bytes.saturating_add(Watch::ITEM);
        if cost < self.left {
            self.left -= cost;
            return Ok(());
        }
        self.left = Watch::BETWEEN;
        let outcome = self.token.check();
        self.stopped |= outcome.is_err();
        outcome
    }

    /// Whether it has said so once: where the error itself has gone through somebody else's hands.
    pub(crate) fn has_stopped(&self) -> bool {
        self.stopped
    }
}

/// Sorts stably, like [`slice::sort_by`], but can be stopped: a comparison of long names takes its
/// time, and the standard library's sorting makes millions of them without asking.
///
/// # Errors
/// [`Cancelled`], with the items gone.
pub(crate) fn sort_by<T>(
    items: Vec<T>,
    cancel: &CancelToken,
    compare: impl Fn(&T, &T) -> Ordering,
) -> Result<Vec<T>, Cancelled> {
    /// Items that are sorted at once.
    const RUN: usize = 512;
    let mut watch = Watch::new(cancel);
    let mut is_sorted = true;
    for pair in items.windows(2) {
        watch.item(0)?;
        if compare(&pair[0], &pair[1]).is_gt() {
            is_sorted = false;
            break;
        }
    }
    if is_sorted {
        return Ok(items);
    }
    let mut runs = Vec::with_capacity(items.len().div_ceil(RUN));
    let mut items = items.into_iter();
    loop {
        let mut run: Vec<T> = items.by_ref().take(RUN).collect();
        if run.is_empty() {
            break;
        }
        run.sort_by(&compare);
        runs.push(run);
        cancel.check()?;
    }
    while runs.len() > 1 {
        let mut merged = Vec::with_capacity(runs.len().div_ceil(2));
        let mut pairs = runs.into_iter();
        while let Some(first) = pairs.next() {
            merged.push(match pairs.next() {
                Some(second) => merge(first, second, &mut watch, &compare)?,
                None => first,
            });
        }
        runs = merged;
    }
    Ok(runs.pop().unwrap_or_default())
}

/// Two sorted lists as one; of equal items those of the first come first.
fn merge<T>(
    first: Vec<T>,
    second: Vec<T>,
    watch: &mut Watch<'_>,
    compare: impl Fn(&T, &T) -> Ordering,
) -> Result<Vec<T>, Cancelled> {
    let mut merged = Vec::with_capacity(first.len() + second.len());
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    while let (Some(a), Some(b)) = (first.as_slice().first(), second.as_slice().first()) {
        watch.item(0)?;
        let from = match compare(a, b).is_gt() {
            true => &mut second,
            false => &mut first,
        };
        merged.extend(from.next());
    }
    merged.extend(first);
    merged.extend(second);
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn used() -> CancelToken {
        let token = CancelToken::new();
        token.cancel();
        token
    }

    #[test]
    fn a_token_is_used_by_hand_or_by_the_clock() {
        let token = CancelToken::new();
        let (past, future) = (Instant::now(), Instant::now() + Duration::from_secs(86_400));
        assert!(!token.until(future).is_cancelled());
        assert!(token.until(past).is_cancelled());
        assert!(token.until(past).until(future).is_cancelled());
        assert!(token.until(future).until(past).is_cancelled());
        assert!(!token.is_cancelled());
        // Clones and tokens with deadlines are one.
        let derived = token.until(future);
        token.clone().cancel();
        assert!(derived.is_cancelled());
    }

    #[test]
    fn a_watch_looks_after_many_items_and_after_large_ones() {
        let token = used();
        let mut watch = Watch::new(&token);
        let items = (1..).find(|_| watch.item(0).is_err()).unwrap();
        assert!((500..=1024).contains(&items), "{items}");
        assert!(watch.has_stopped());
        let mut watch = Watch::new(&token);
        assert_eq!(watch.item(usize::MAX), Err(Cancelled));
        let token = CancelToken::new();
        let mut watch = Watch::new(&token);
        assert!((0..10_000).all(|_| watch.item(1000).is_ok()));
        assert!(!watch.has_stopped());
    }

    #[test]
    fn sorting_is_what_the_standard_library_does() {
        let mut state = 7u64;
        let mut next = |limit: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % limit
        };
        for length in [0, 1, 2, 511, 512, 513, 1024, 5000] {
            // With many equal keys, whose order shows.
            let items: Vec<(u64, usize)> = (0..length).map(|at| (next(50), at)).collect();
            let mut expected = items.clone();
            expected.sort_by_key(|&(key, _)| key);
            let compare = |a: &(u64, usize), b: &(u64, usize)| a.0.cmp(&b.0);
            let sorted = sort_by(items, &CancelToken::new(), compare).unwrap();
            assert!(sorted == expected, "{length}");
            let again = sort_by(sorted, &CancelToken::new(), compare).unwrap();
            assert!(again == expected, "{length}");
        }
    }

    #[test]
    fn sorting_stops() {
        let items: Vec<u32> = (0..100_000).rev().collect();
        assert_eq!(sort_by(items, &used(), u32::cmp), Err(Cancelled));
        let sorted: Vec<u32> = (0..100_000).collect();
        assert_eq!(sort_by(sorted, &used(), u32::cmp), Err(Cancelled));
    }
}
