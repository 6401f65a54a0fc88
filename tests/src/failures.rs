//! How guests fail, out of the errors that say so.

use tightfit::policy::PolicyError;
use tightfit_wasm::sandbox::GuestFailure;

/// The policy that an error names, and how it failed.
#[track_caller]
pub fn failure_of(error: PolicyError) -> (String, GuestFailure) {
    let Some(failure) = GuestFailure::of(&error).cloned() else {
        panic!("it is another error: {error:?}");
    };
    let PolicyError::Failed { policy, .. } = error else {
        panic!("a failure in another error: {error:?}");
    };
    (policy, failure)
}
