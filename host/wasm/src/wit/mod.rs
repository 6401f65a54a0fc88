//! The WIT interfaces of `tightfit:host`, implemented for any wasmtime host.
//!
//! 1. Keep a [`TightfitCtx`] in the data of your store.
//! 2. Implement [`TightfitView`] for that data.
//! 3. Call [`add_to_linker`], or add single interfaces with [`HasTightfit`].
//! 4. Instantiate a policy and ask it through [`Planner`].
//!
//! What `cargo build` makes of a policy that is written with the SDK is a core module.
//! [`component_from_module`](crate::component_from_module), with the feature `component`, makes it
//! the component that wasmtime compiles.
//!
#![cfg_attr(feature = "compile", doc = "```no_run")]
#![cfg_attr(not(feature = "compile"), doc = "```ignore")]
//! use tightfit::policy::Request;
//! use tightfit_wasm::component_from_module;
//! use tightfit_wasm::wit::{Planner, TightfitCtx, TightfitView, add_to_linker};
//! use wasmtime::component::{Component, Linker};
//! use wasmtime::{Engine, Store};
//!
//! struct Data {
//!     tightfit: TightfitCtx,
//! }
//!
//! impl TightfitView for Data {
//!     fn tightfit(&mut self) -> &mut TightfitCtx {
//!         &mut self.tightfit
//!     }
//! }
//!
//! let engine = Engine::default();
//! let mut linker = Linker::<Data>::new(&engine);
//! add_to_linker(&mut linker)?;
//! let component = component_from_module(&std::fs::read("pin_layer.wasm")?)?;
//! let component = Component::from_binary(&engine, &component)?;
//!
//! let tightfit = TightfitCtx::new();
//! let mut store = Store::new(&engine, Data { tightfit });
//! let instance = linker.instantiate(&mut store, &component)?;
//! let planner = Planner::new(&mut store, &instance)?;
//! println!("{}", planner.describe(&mut store)?.name);
//! let request = Request {
//!     config_json: "{}",
//!     tensors: &[],
//!     ties: &[],
//!     devices: &[],
//!     settings: &[],
//!     required_formats: &[],
//!     failure: None,
//! };
//! match planner.plan(&mut store, &request)? {
//!     Ok(proposal) => println!("{} placements", proposal.placements.len()),
//!     Err(refusal) => println!("{}", refusal.message),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Asynchronous stores need nothing else: the host functions are added by the same
//! [`add_to_linker`], and with the feature `async` a [`Planner`] can be awaited.
//!
//! No engine is made and no guest is called here; the runner in [`crate::policy`] is one user of
//! this module and another application's linker can be the next. Host functions never block; what a
//! guest logs goes to `tracing` as it comes, so that a subscriber that blocks makes the guest wait.
//!
//! Programs, which load models and use devices' memory, import more: see [`program`].

pub mod bindings;
pub(crate) mod convert;
#[cfg(feature = "compile")]
pub(crate) mod messages;
mod planner;
pub mod program;

pub use convert::{BadPlacement, TooManyRanges};
pub use planner::Planner;

use wasmtime::component::{HasData, Linker};

use bindings::slicing::tightfit::host::slices;
use bindings::tightfit::host::{log, sizing, types};
#[cfg(feature = "compile")]
use messages::Messages;
use tightfit::plan::{SizeError, part_sizes};
use tightfit::text::{shown_bytes, truncate};

/// What the host functions need of one guest's state.
#[derive(Debug)]
pub struct TightfitCtx {
    last_error: Option<String>,
    /// Bytes of messages that may still be passed on.
    log_left: usize,
    text_limit: usize,
    /// The queue in which messages wait for the end of the call, if they do.
    #[cfg(feature = "compile")]
    kept: Option<Messages>,
}

/// Bytes that each message counts for beyond its own, as whoever shows it begins a line with whose it
/// is. An empty message takes room as well.
pub const MESSAGE_BYTES: usize = 16;

/// Bytes of messages that are passed on for one guest unless told otherwise.
const LOG_LIMIT: usize = 64 << 10;

/// Bytes that are kept of a single message, or of another text to be shown, unless told otherwise.
pub(crate) const TEXT_LIMIT: usize = 4 << 10;

impl Default for TightfitCtx {
    fn default() -> TightfitCtx {
        TightfitCtx::with_limits(LOG_LIMIT, TEXT_LIMIT)
    }
}

impl TightfitCtx {
    /// Returns a context that passes on 64 KiB of messages, 4 KiB of each.
    pub fn new() -> TightfitCtx {
        TightfitCtx::default()
    }

    /// Returns a context that passes on this many bytes of messages, and of a single one at most
    /// `text_bytes`. What is longer is cut; what comes after is dropped.
    pub fn with_limits(log_bytes: usize, text_bytes: usize) -> TightfitCtx {
        TightfitCtx {
            last_error: None,
            log_left: log_bytes,
            text_limit: text_bytes,
            #[cfg(feature = "compile")]
            kept: None,
        }
    }

    /// Returns the same, but messages are put aside.
    #[cfg(feature = "compile")]
    pub(crate) fn keeping(messages: Messages, log_bytes: usize, text_bytes: usize) -> TightfitCtx {
        TightfitCtx {
            kept: Some(messages),
            ..TightfitCtx::with_limits(log_bytes, text_bytes)
        }
    }

    /// Puts a message aside where messages wait, and hands it to `tracing` otherwise.
    fn pass_on(&self, level: log::Level, message: &str) {
        #[cfg(feature = "compile")]
        if let Some(messages) = &self.kept {
            messages.push(level, message.to_owned());
            return;
        }
        emit(level, message);
    }

    /// Returns the last message that the guest logged as an error: before a trap, why it gave up.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }
}

/// Hands a message to `tracing`, and waits as long as its subscriber does.
fn emit(level: log::Level, message: &str) {
    match level {
        log::Level::Error => tracing::error!(target: "tightfit::guest", "{message}"),
        log::Level::Warn => tracing::warn!(target: "tightfit::guest", "{message}"),
        log::Level::Info => tracing::info!(target: "tightfit::guest", "{message}"),
        log::Level::Debug => tracing::debug!(target: "tightfit::guest", "{message}"),
        log::Level::Trace => tracing::trace!(target: "tightfit::guest", "{message}"),
    }
}

/// Gives access to the context inside a store's data.
pub trait TightfitView: Send {
    /// Returns the context.
    fn tightfit(&mut self) -> &mut TightfitCtx;
}

/// Adds the interfaces that a policy imports (`types`, `sizing`, `log`, `slices`) to a linker.
///
/// # Errors
/// When the linker has one of them already.
pub fn add_to_linker<T: TightfitView + 'static>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    types::add_to_linker::<T, HasTightfit>(linker, T::tightfit)?;
    sizing::add_to_linker::<T, HasTightfit>(linker, T::tightfit)?;
    log::add_to_linker::<T, HasTightfit>(linker, T::tightfit)?;
    slices::add_to_linker::<T, HasTightfit>(linker, T::tightfit)
}

/// How a single interface is told where in a store's data the context is, for linkers that are to
/// have fewer than [`add_to_linker`] adds.
///
/// ```
/// use tightfit_wasm::wit::bindings::tightfit::host::sizing;
/// use tightfit_wasm::wit::{HasTightfit, TightfitView};
/// use wasmtime::component::Linker;
///
/// fn add_sizing<T: TightfitView + 'static>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
///     sizing::add_to_linker::<T, HasTightfit>(linker, T::tightfit)
/// }
/// ```
#[derive(Debug)]
pub struct HasTightfit;

impl HasData for HasTightfit {
    type Data<'a> = &'a mut TightfitCtx;
}

impl types::Host for TightfitCtx {}

impl slices::Host for TightfitCtx {}

impl sizing::Host for TightfitCtx {
    fn stored_bytes(
        &mut self,
        dtype: types::Dtype,
        shape: Vec<u64>,
        format: types::Format,
    ) -> Result<sizing::StoredSize, types::Error> {
        let format = match convert::format(format) {
            Ok(format) => format,
            Err(error) => {
                return Err(types::Error {
                    code: types::ErrorCode::IllegalFormat,
                    message: error.to_string(),
                });
            }
        };
        match part_sizes(convert::dtype(dtype), &shape, format) {
            Ok(sizes) => Ok(sizing::StoredSize {
                requested: sizes.requested(),
                padded: sizes.padded(),
            }),
            Err(error) => Err(types::Error {
                code: match error {
                    SizeError::Overflow { .. } => types::ErrorCode::Overflow,
                    _ => types::ErrorCode::IllegalFormat,
                },
                message: match error {
                    // Nobody reads a million lengths.
                    SizeError::Overflow { .. } if shape.len() > MOST_LENGTHS => format!(
                        "a tensor of {} dimensions has no size in 64 bits",
                        shape.len()
                    ),
                    error => error.to_string(),
                },
            }),
        }
    }
}

/// Lengths of a shape that are repeated in a message.
const MOST_LENGTHS: usize = 64;

impl log::Host for TightfitCtx {
    fn write(&mut self, level: log::Level, mut message: String) {
        truncate(&mut message, self.text_limit);
        if self.log_left > 0 {
            let shown: usize = message.chars().map(shown_bytes).sum();
            self.log_left = self.log_left.saturating_sub(MESSAGE_BYTES + shown);
            self.pass_on(level, &message);
        }
        if let log::Level::Error = level {
            self.last_error = Some(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Host as _;
    use sizing::Host as _;

    #[test]
    fn sizing_is_the_plans_own_arithmetic() {
        let mut context = TightfitCtx::new();
        let nf4 = types::Format::Nf4(types::Nf4Format {
            block_size: 64,
            double_quantized: false,
        });
        let size = context
            .stored_bytes(types::Dtype::Bf16, vec![5, 13], nf4)
            .unwrap();
        assert_eq!((size.requested, size.padded), (41, 512));
        let error = context.stored_bytes(types::Dtype::U8, vec![5], nf4);
        assert_eq!(error.unwrap_err().code, types::ErrorCode::IllegalFormat);
        let error = context.stored_bytes(types::Dtype::Bf16, vec![u64::MAX, 2], nf4);
        assert_eq!(error.unwrap_err().code, types::ErrorCode::Overflow);
        let error = context.stored_bytes(types::Dtype::Bf16, vec![u64::MAX; 1_000_000], nf4);
        let message = error.unwrap_err().message;
        assert!(message.len() < 100, "{message}");
    }

    #[test]
    fn what_is_kept_of_a_flood_of_messages_is_bounded() {
        let mut context = TightfitCtx::new();
        for _ in 0..1000 {
            context.write(log::Level::Error, "é".repeat(100_000));
        }
        assert!(context.last_error().unwrap().len() <= TEXT_LIMIT + '…'.len_utf8());
        assert_eq!(context.log_left, 0);
        assert!(context.last_error.unwrap().capacity() < 2 * TEXT_LIMIT);
    }

    #[cfg(feature = "compile")]
    #[test]
    fn messages_count_as_they_are_shown() {
        for message in [
            "",
            "\0",
            "\u{202e}\u{202e}",
            "é",
            "plain",
            &"\n".repeat(10_000),
        ] {
            let messages = Messages::default();
            let mut context = TightfitCtx::with_limits(LOG_LIMIT, TEXT_LIMIT);
            context.kept = Some(messages.clone());
            for _ in 0..10_000 {
                context.write(log::Level::Warn, message.to_owned());
            }
            let shown = messages.shown_bytes(MESSAGE_BYTES);
            // The last is not cut.
            let most = LOG_LIMIT + TEXT_LIMIT + MESSAGE_BYTES;
            assert!((LOG_LIMIT..=most).contains(&shown), "{message:?}: {shown}");
        }
    }
}
