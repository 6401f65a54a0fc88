//! What the library and policies log, for Python's `logging`: loggers `tightfit` and `tightfit.policy`.
//!
//! Threads of the library put messages into a queue, which a thread that holds the interpreter's lock
//! hands on.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use pyo3::prelude::*;
use tightfit::text::printable;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, Subscriber};
use tracing::{Event, Level, Metadata};

/// Messages that wait at most; of more the oldest are forgotten.
const MOST_WAITING: usize = 4096;

/// `logging.DEBUG`, `INFO`, `WARNING`, `ERROR`: below this a message is not even made.
static LEAST: AtomicU8 = AtomicU8::new(30);

static WAITING: Mutex<VecDeque<Message>> = Mutex::new(VecDeque::new());

struct Message {
    level: u8,
    logger: &'static str,
    text: String,
}

/// Begins to collect messages of the levels that Python's logger asks for now.
pub(crate) fn start(py: Python<'_>) {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // The command shows its messages by itself, and was first then.
        let _ = tracing::subscriber::set_global_default(Collector);
    });
    let level = || -> PyResult<u8> {
        let logger = py
            .import("logging")?
            .call_method1("getLogger", ("tightfit",))?;
        let level: i64 = logger.call_method0("getEffectiveLevel")?.extract()?;
        Ok(level.clamp(0, 100) as u8)
    };
    // A logger of the user's own that cannot say.
    LEAST.store(level().unwrap_or(30), Ordering::Relaxed);
}

/// Hands waiting messages on.
///
/// # Errors
/// What a handler raises.
pub(crate) fn drain(py: Python<'_>) -> PyResult<()> {
    loop {
        let next = WAITING
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        let Some(message) = next else { return Ok(()) };
        let logger = py
            .import("logging")?
            .call_method1("getLogger", (message.logger,))?;
        // An argument, not a format: what checkpoints say may have percent signs.
        logger.call_method1("log", (message.level, "%s", message.text))?;
    }
}

struct Collector;

/// Whether a message is of this library, its module for Python included.
fn is_ours(target: &str) -> bool {
    target.starts_with("tightfit") || target.starts_with(env!("CARGO_CRATE_NAME"))
}

fn python_level(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => 20,
        Level::DEBUG | Level::TRACE => 10,
    }
}

impl Subscriber for Collector {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match metadata.is_event() && is_ours(metadata.target()) {
            true => Interest::sometimes(),
            false => Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event()
            && is_ours(metadata.target())
            && python_level(metadata.level()) >= LEAST.load(Ordering::Relaxed)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let message = Message {
            level: python_level(event.metadata().level()),
            logger: match event.metadata().target() {
                "tightfit::guest" => "tightfit.policy",
                _ => "tightfit",
            },
            text: printable(&text.0).into_owned(),
        };
        let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() == MOST_WAITING {
            waiting.pop_front();
        }
        waiting.push_back(message);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // Writing to a string does not fail.
            let _ = write!(self.0, "{value:?}");
        }
    }
}
