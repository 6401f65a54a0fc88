//! Binaries that are cut short, or in which bytes are others: turned down or run, never more.

use tightfit::policy::Policy;
use tightfit_tests::guests::{self, HOSTILE, compile};
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::{GuestFailure, Limits};

use super::{Bench, rejection};

#[test]
fn no_beginning_of_a_policy_is_one() {
    let component = guests::component(HOSTILE);
    for whole in [HOSTILE, &component] {
        // Up to the last section, which only carries names.
        for length in 0..whole.len() {
            let result = WasmPolicy::new("test.wasm", &whole[..length], Limits::default());
            let error = match result {
                Err(error) => error.to_string(),
                // What is cut off is a section that need not be there.
                Ok(_) => continue,
            };
            assert!(error.starts_with("policy 'test.wasm' failed: "), "{error}");
        }
    }
    for length in [0, 4, 7, 8, 9, 100, HOSTILE.len() / 2, HOSTILE.len() - 1] {
        let failure = rejection(&HOSTILE[..length]);
        assert!(
            matches!(failure, GuestFailure::NotAComponent { .. }),
            "{length}: {failure:?}"
        );
    }
}

#[test]
fn a_policy_with_a_wrong_byte_is_turned_down_or_held_to_its_limits() {
    let bench = Bench::new();
    let limits = Limits::default()
        .with_fuel(5_000_000)
        .with_fuel_per_tensor(0);
    for (step, whole) in [(997, HOSTILE.to_vec()), (1013, guests::component(HOSTILE))] {
        for at in (8..whole.len()).step_by(step) {
            let mut wrong = whole.clone();
            wrong[at] ^= 1 << (at % 8);
            if let Ok(policy) = WasmPolicy::new("test.wasm", &wrong, limits.clone()) {
                // Any answer will do, and any failure.
                let _ = bench.propose(&policy, "");
            }
        }
    }
    bench.is_unharmed();
}

/// A description of a world can be made such that what decodes it never comes to an end.
#[test]
fn what_a_module_says_of_its_world_is_not_believed() {
    let (start, end) = guests::component_type_range(HOSTILE);
    for at in (start..end).step_by(61) {
        let mut wrong = HOSTILE.to_vec();
        wrong[at] ^= 0x55;
        let policy = compile(&wrong, Limits::default());
        assert_eq!(policy.describe().unwrap().name, "hostile", "{at}");
    }
    Bench::new().is_unharmed();
}

#[test]
fn a_policy_with_many_wrong_bytes_is_turned_down() {
    let mut scrambled = HOSTILE.to_vec();
    for byte in scrambled.iter_mut().skip(1000).step_by(97) {
        *byte ^= 0x55;
    }
    let failure = rejection(&scrambled);
    assert!(
        matches!(failure, GuestFailure::NotAComponent { .. }),
        "{failure:?}"
    );
}
