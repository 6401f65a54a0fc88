//! Long work beside the interpreter: without its lock, with progress, messages and Ctrl-C.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use pyo3::prelude::*;
use tightfit::Progress;
use tightfit::cancel::CancelToken;

use crate::failure::Failure;
use crate::log;

/// How often the caller's thread looks at signals and reports.
const TURN: Duration = Duration::from_millis(50);

/// How far work has come. Written by the library's threads, read by the caller's.
#[derive(Default)]
pub(crate) struct Counter {
    done: AtomicU64,
    total: AtomicU64,
}

impl Counter {
    pub(crate) fn set(&self, progress: Progress) {
        self.set_bytes(progress.bytes_done, progress.bytes_total);
    }

    pub(crate) fn set_bytes(&self, done: u64, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        // Several workers report, and not in the order of the bytes.
        match self.done.load(Ordering::Relaxed) > total {
            true => self.done.store(done, Ordering::Relaxed),
            false => {
                self.done.fetch_max(done, Ordering::Relaxed);
            }
        }
    }

    /// For the next of several pieces of work.
    pub(crate) fn restart(&self) {
        self.done.store(0, Ordering::Relaxed);
    }

    fn get(&self) -> (u64, u64) {
        let total = self.total.load(Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed).min(total), total)
    }
}

/// Runs `work` on a thread of its own and waits for it without the interpreter's lock. `progress` is
/// called on this thread with the bytes that are done and those of all. An exception in it, or from a
/// signal's handler, asks the work to stop and is raised when it has given everything back.
pub(crate) fn run<T: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&CancelToken, &Counter) -> Result<T, Failure> + Send,
) -> PyResult<T> {
    log::start(py);
    let cancel = CancelToken::new();
    let counter = Counter::default();
    let outcome = py.detach(|| {
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel::<()>();
            let (token, counter) = (&cancel, &counter);
            let worker = thread::Builder::new()
                .name("tightfit-work".to_owned())
                .spawn_scoped(scope, move || {
                    // Dropped when the work ends, however that is.
                    let _ended = sender;
                    work(token, counter)
                })
                .map_err(|error| Failure::internal(format_args!("cannot start a thread: {error}")));
            let worker = match worker {
                Ok(worker) => worker,
                Err(failure) => return (Ok(Err(failure)), None),
            };
            let mut raised = None;
            let mut shown = (0, 0);
            loop {
                match receiver.recv_timeout(TURN) {
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                    Err(RecvTimeoutError::Timeout) => {}
                }
                if raised.is_some() {
                    continue;
                }
                if let Err(error) = Python::attach(|py| {
                    py.check_signals()?;
                    log::drain(py)?;
                    report(py, progress.as_ref(), counter, &mut shown)
                }) {
                    token.cancel();
                    raised = Some(error);
                }
            }
            let outcome = worker.join();
            if raised.is_none() && matches!(outcome, Ok(Ok(_))) {
                raised =
                    Python::attach(|py| report(py, progress.as_ref(), counter, &mut shown)).err();
            }
            (outcome, raised)
        })
    });
    let (outcome, raised) = outcome;
    let logged = log::drain(py);
    if let Some(error) = raised {
        return Err(error);
    }
    logged?;
    // A signal of the last moments.
    py.check_signals()?;
    match outcome {
        Ok(result) => result.map_err(|failure| failure.raise(py)),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().copied();
            let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            Err(Failure::internal(format_args!(
                "internal error: {}; please report it",
                text.unwrap_or("no message")
            ))
            .raise(py))
        }
    }
}

fn report(
    py: Python<'_>,
    progress: Option<&Py<PyAny>>,
    counter: &Counter,
    shown: &mut (u64, u64),
) -> PyResult<()> {
    let now = counter.get();
    if let Some(progress) = progress
        && now != *shown
    {
        *shown = now;
        progress.call1(py, now)?;
    }
    Ok(())
}
