//! Ends what blocks in the network: when the user asks for it, and when its time is up.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ureq::Agent;

use crate::cancel::CancelToken;

/// How often it is looked at what is under way.
const TICK: Duration = Duration::from_millis(50);

/// A thread that looks at what another one waits for.
#[derive(Debug)]
pub(super) struct Watchdog(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Whose connections are waited for, and until when.
    waiting: Option<(Agent, Instant)>,
    /// Whether these were shut down because time was up.
    was_late: bool,
    is_over: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watchdog {
    /// Without a thread, which a system may refuse, only the client's own limits of time hold.
    pub(super) fn new(cancel: CancelToken) -> Watchdog {
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let builder = thread::Builder::new().name("tightfit-hub".to_owned());
        if let Err(error) = builder.spawn(move || watch(&seen, &cancel)) {
            tracing::warn!("no thread to watch downloads: {error}");
        }
        Watchdog(shared)
    }

    /// Does what may block in the connections of this agent. When it takes longer, or the user asks
    /// to stop, the connections are shut down, which ends it with some error; the agent is of no use
    /// any more. Says whether it took too long.
    pub(super) fn limited<T>(
        &self,
        agent: &Agent,
        most: Duration,
        block: impl FnOnce() -> T,
    ) -> (T, bool) {
        let mut state = self.0.lock();
        state.was_late = false;
        state.waiting = Some((agent.clone(), Instant::now() + most));
        drop(state);
        self.0.changed.notify_one();
        let result = block();
        let mut state = self.0.lock();
        state.waiting = None;
        (result, state.was_late)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.changed.notify_one();
    }
}

fn watch(shared: &Shared, cancel: &CancelToken) {
    let mut state = shared.lock();
    while !state.is_over {
        let is_late = |(_, due): &(Agent, Instant)| Instant::now() >= *due;
        state = match &state.waiting {
            None => shared.changed.wait(state),
            Some(waiting) if is_late(waiting) || cancel.is_cancelled() => {
                state.was_late = is_late(waiting);
                if let Some((agent, _)) = state.waiting.take() {
                    agent.shutdown();
                }
                Ok(state)
            }
            Some(_) => {
                let waited = shared.changed.wait_timeout(state, TICK);
                waited
                    .map(|(state, _)| state)
                    .map_err(|poisoned| std::sync::PoisonError::new(poisoned.into_inner().0))
            }
        }
        .unwrap_or_else(PoisonError::into_inner);
    }
}
