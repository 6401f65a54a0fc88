//! The glue between the generated export and [`Program`].

use std::marker::PhantomData;

use crate::bindings::exports::tightfit::host::run::Guest;
use crate::{Level, Program, log};

/// What [`program!`](crate::program) exports.
#[derive(Debug)]
pub struct Exported<D>(PhantomData<D>);

impl<D: Program> Guest for Exported<D> {
    fn run(arguments: Vec<String>) -> Result<String, String> {
        // A panic ends in a trap, which carries no text. The message goes to the log before that,
        // where the host finds it.
        std::panic::set_hook(Box::new(|panic| log(Level::Error, &panic.to_string())));
        D::run(arguments).map_err(|error| error.to_string())
    }
}
