//! Ends calls whose time is up.
//!
//! One thread for the whole process wakes the engines of calls that are over their deadline. It is
//! started by a call and ends when it finds none running. A call that is woken before its time
//! goes on.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use wasmtime::{Engine, Store, UpdateDeadline};

use super::GuestFailure;

/// How often a call that is over its deadline is reminded of it: the first time it may have just
/// looked at the clock, or be inside a host function.
const REMINDER: Duration = Duration::from_millis(10);

struct Call {
    id: u64,
    due: Instant,
    engine: Engine,
}

struct Clock {
    /// As many as run at the same time: few.
    calls: Vec<Call>,
    next_id: u64,
    /// When the thread looks next; `None` while there is no thread.
    wakes: Option<Instant>,
}

static CLOCK: Mutex<Clock> = Mutex::new(Clock {
    calls: Vec::new(),
    next_id: 0,
    wakes: None,
});
static SOONER: Condvar = Condvar::new();

fn clock() -> MutexGuard<'static, Clock> {
    // Nothing panics while it is held.
    CLOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Disarmed when dropped.
#[derive(Debug)]
pub(super) struct Alarm {
    id: Option<u64>,
}

/// Has the store's guest trap with [`GuestFailure::Deadline`] once `patience` is over.
///
/// # Errors
/// When no thread can be started.
pub(super) fn set<T: 'static>(store: &mut Store<T>, patience: Duration) -> io::Result<Alarm> {
    // What no clock reaches is no deadline.
    let deadline = Instant::now().checked_add(patience);
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(move |_| match deadline {
        Some(deadline) if Instant::now() >= deadline => Err(GuestFailure::Deadline {
            seconds: patience.as_secs_f64(),
        }
        .into()),
        _ => Ok(UpdateDeadline::Continue(1)),
    });
    let Some(due) = deadline else {
        return Ok(Alarm { id: None });
    };
    let mut clock = clock();
    match clock.wakes {
        Some(wakes) if wakes <= due => {}
        Some(_) => SOONER.notify_one(),
        None => {
            thread::Builder::new()
                .name("tightfit-deadline".to_owned())
                .spawn(watch)?;
        }
    }
    clock.wakes = Some(clock.wakes.map_or(due, |wakes| wakes.min(due)));
    let id = clock.next_id;
    clock.next_id += 1;
    clock.calls.push(Call {
        id,
        due,
        engine: store.engine().clone(),
    });
    Ok(Alarm { id: Some(id) })
}

impl Drop for Alarm {
    fn drop(&mut self) {
        clock().calls.retain(|call| Some(call.id) != self.id);
    }
}

fn watch() {
    let mut clock = clock();
    loop {
        let now = Instant::now();
        for call in clock.calls.iter_mut().filter(|call| call.due <= now) {
            call.engine.increment_epoch();
            call.due = now + REMINDER;
        }
        clock.wakes = clock.calls.iter().map(|call| call.due).min();
        let Some(wakes) = clock.wakes else {
            return;
        };
        let sleep = wakes.saturating_duration_since(now);
        clock = match SOONER.wait_timeout(clock, sleep) {
            Ok((clock, _)) => clock,
            Err(poisoned) => poisoned.into_inner().0,
        };
    }
}
