//! Shows what the library and policies log, on stderr.

use std::fmt::{self, Write as _};

use tightfit::text::printable;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, Subscriber};
use tracing::{Event, Level, Metadata};

use crate::command::stderr;
use crate::draw::paint;

/// Prints our own events and those of policies; all of them, or from warnings on.
struct Printer {
    least: Level,
}

/// Starts showing messages.
pub(crate) fn install(verbose: bool) {
    let least = if verbose { Level::TRACE } else { Level::WARN };
    // The command sets it once, first of all; there is no other.
    let _ = tracing::subscriber::set_global_default(Printer { least });
}

impl Subscriber for Printer {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event()
            && metadata.target().starts_with("tightfit")
            && *metadata.level() <= self.least
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        let who = match event.metadata().target() {
            "tightfit::guest" => "policy",
            _ => "tightfit",
        };
        let level = *event.metadata().level();
        let style = match level {
            Level::ERROR => paint::ERROR,
            Level::WARN => paint::WARNING,
            _ => paint::ASIDE,
        };
        let begin = format!("{who}: {}:", level.as_str().to_ascii_lowercase());
        stderr::write_painted(style, &begin, &format!(" {}\n", printable(&message.0)));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // Writing to a string does not fail.
            let _ = write!(self.0, "{value:?}");
        }
    }
}
