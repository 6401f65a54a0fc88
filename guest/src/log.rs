use crate::Level;

/// Writes a message for whoever runs the policy. The host bounds how much of it is kept. Natively,
/// in tests, the message goes to stderr.
pub fn log(level: Level, message: &str) {
    #[cfg(target_family = "wasm")]
    crate::bindings::tightfit::host::log::write(level, message);
    #[cfg(not(target_family = "wasm"))]
    eprintln!("{level:?}: {message}");
}
