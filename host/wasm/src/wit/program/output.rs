//! The interface `output`.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use super::ProgramCtxView;
use super::bindings::tightfit::host::output as wit;
use super::error::CallError;

/// Bytes of one text.
const MOST_TEXT: usize = 64 << 10;

/// Texts that nobody has taken yet.
const WAITING: usize = 64;

/// How long is slept where whoever takes texts is behind.
const PAUSE: Duration = Duration::from_millis(1);

/// Where a program's texts go: [`output`].
#[derive(Debug, Clone)]
pub struct Output(SyncSender<String>);

/// Returns an output for [`ProgramCtx::with_output`](super::ProgramCtx::with_output), and where what the program
/// says comes out. It ends with the program. The texts are the program's: whoever shows them looks at what they
/// do to a terminal.
///
/// Whoever takes them does so on another thread than the program's: at most 64 texts of at most 64 KiB wait, and
/// then the program does, up to its deadline.
pub fn output() -> (Output, Receiver<String>) {
    let (sender, receiver) = sync_channel(WAITING);
    (Output(sender), receiver)
}

impl wit::Host for ProgramCtxView<'_> {
    fn write(&mut self, text: String) -> Result<(), CallError> {
        let (context, _) = self.begin()?;
        if text.len() > MOST_TEXT {
            return Err(CallError::invalid(format_args!(
                "{} bytes are too many for one text: at most {MOST_TEXT}",
                text.len()
            )));
        }
        let Some(Output(sender)) = &context.output else {
            return Ok(());
        };
        let mut text = text;
        loop {
            match sender.try_send(text) {
                // Nobody listens any more.
                Ok(()) | Err(TrySendError::Disconnected(_)) => return Ok(()),
                Err(TrySendError::Full(unsent)) => text = unsent,
            }
            context.stop.check()?;
            std::thread::sleep(PAUSE);
        }
    }
}
