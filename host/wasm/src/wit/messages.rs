//! Messages of guests on their way to whoever reads them, who may be slow or gone.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::bindings::tightfit::host::log::Level;
use super::emit;

/// Messages that wait. How many is limited by whoever puts them here.
#[derive(Debug, Clone, Default)]
pub(crate) struct Messages(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    messages: VecDeque<(Level, String)>,
    /// No more will come.
    is_closed: bool,
}

impl Messages {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing panics while it is held.
        let waiting = self.0.waiting.lock();
        waiting.unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one; never waits for a reader.
    pub(super) fn push(&self, level: Level, message: String) {
        self.waiting().messages.push_back((level, message));
        self.0.more.notify_one();
    }

    /// Returns the bytes of what is there as it would be shown, with this many more for each.
    #[cfg(test)]
    pub(super) fn shown_bytes(&self, each: usize) -> usize {
        let waiting = self.waiting();
        let messages = waiting.messages.iter();
        messages
            .map(|(_, message)| {
                each + message
                    .chars()
                    .map(tightfit::text::shown_bytes)
                    .sum::<usize>()
            })
            .sum()
    }

    /// Hands on what is there, in order.
    fn emit(&self) {
        loop {
            // Not held while it is handed on.
            let next = self.waiting().messages.pop_front();
            let Some((level, message)) = next else {
                return;
            };
            emit(level, &message);
        }
    }

    /// Hands on what is there and what comes, until no more will.
    fn emit_until_closed(&self) {
        loop {
            self.emit();
            let waiting = self.waiting();
            let waiting = self.0.more.wait_while(waiting, |waiting| {
                waiting.messages.is_empty() && !waiting.is_closed
            });
            let waiting = waiting.unwrap_or_else(PoisonError::into_inner);
            if waiting.messages.is_empty() {
                return;
            }
        }
    }

    /// Makes a call in which messages are put here, and hands them on after it; with `live`, in a
    /// thread of its own, as they come.
    pub(crate) fn emit_around<R>(&self, live: bool, call: impl FnOnce() -> R) -> R {
        let closed = Closed(self);
        let result = match live {
            false => call(),
            true => thread::scope(|scope| {
                // Where it cannot be started they are handed on after the call, too.
                let dispatch = tracing::dispatcher::get_default(Clone::clone);
                let emitting = move || {
                    tracing::dispatcher::with_default(&dispatch, || self.emit_until_closed());
                };
                let thread = thread::Builder::new().name("tightfit-log".to_owned());
                let _ = thread.spawn_scoped(scope, emitting);
                // Also when it panics, so that the thread ends.
                let _closed = Closed(self);
                call()
            }),
        };
        drop(closed);
        self.emit();
        result
    }
}

/// Says when dropped that no more will come.
struct Closed<'a>(&'a Messages);

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.waiting().is_closed = true;
        self.0.0.more.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tracing::span::{Attributes, Id, Record};
    use tracing::{Dispatch, Event, Metadata, Subscriber};

    use super::*;

    /// Tells of each event and then waits to be let go on.
    struct Slow {
        told: mpsc::SyncSender<()>,
        go_on: Mutex<mpsc::Receiver<()>>,
    }

    impl Subscriber for Slow {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn event(&self, _: &Event<'_>) {
            self.told.send(()).unwrap();
            self.go_on.lock().unwrap().recv().unwrap();
        }
        fn enter(&self, _: &Id) {}
        fn exit(&self, _: &Id) {}
    }

    fn slow() -> (Dispatch, mpsc::Receiver<()>, mpsc::SyncSender<()>) {
        let (told, tells) = mpsc::sync_channel(10);
        let (go, go_on) = mpsc::sync_channel(10);
        let go_on = Mutex::new(go_on);
        (Dispatch::new(Slow { told, go_on }), tells, go)
    }

    #[test]
    fn a_call_does_not_wait_for_whoever_reads() {
        for live in [false, true] {
            let (dispatch, tells, go) = slow();
            let messages = Messages::default();
            tracing::dispatcher::with_default(&dispatch, || {
                messages.emit_around(live, || {
                    for _ in 0..3 {
                        messages.push(Level::Warn, "a message".to_owned());
                    }
                    // The call gets here with nobody let go on.
                    for _ in 0..3 {
                        go.send(()).unwrap();
                    }
                });
            });
            assert_eq!(tells.try_iter().count(), 3, "{live}");
        }
    }

    #[test]
    fn what_takes_long_is_heard_of_while_it_runs() {
        let (dispatch, tells, go) = slow();
        let messages = Messages::default();
        tracing::dispatcher::with_default(&dispatch, || {
            messages.emit_around(true, || {
                messages.push(Level::Warn, "a message".to_owned());
                tells.recv_timeout(Duration::from_secs(60)).unwrap();
                go.send(()).unwrap();
            });
        });
    }
}
