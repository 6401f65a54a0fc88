//! The same request takes the same fuel and gives the same proposal, however often, wherever and by
//! whatever it is answered.

use std::sync::Arc;
use std::thread;

use tempfile::TempDir;
use tightfit::policy::{Answer, Policy, Request};
use tightfit_tests::guests::{self, compile, hostile};
use tightfit_tests::loading::auto;
use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::Limits;
use tightfit_wasm::sandbox::{Cache, SandboxOptions};

use super::Bench;

fn fuel_and_proposal(policy: &dyn Policy, request: &Request<'_>) -> Answer {
    let answer = policy.plan(request).unwrap();
    assert!(answer.fuel.is_some_and(|fuel| fuel > 0), "{answer:?}");
    answer
}

#[test]
fn again_and_compiled_anew() {
    let bench = Bench::new();
    let devices = bench.infos();
    let request = bench.request(&devices);
    let again = compile(guests::HOSTILE, Limits::default());
    for policies in [[hostile(), &again], [auto(), auto()]] {
        let [first, second] = policies.map(|policy| fuel_and_proposal(policy, &request));
        assert_eq!(first, second);
    }
    let fewer = Request {
        tensors: &request.tensors[..3],
        ..request
    };
    let [some, more] = [fewer, request].map(|request| auto().plan(&request).unwrap().fuel);
    assert_ne!(some, more, "a larger request takes more");
}

#[test]
fn in_many_threads_at_once() {
    let bench = Bench::new();
    let devices = bench.infos();
    let request = bench.request(&devices);
    let expected = fuel_and_proposal(auto(), &request);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let answers = (0..20).map(|_| fuel_and_proposal(auto(), &request));
                    answers.collect::<Vec<_>>()
                })
            })
            .collect();
        for thread in threads {
            for answer in thread.join().unwrap() {
                assert_eq!(answer, expected);
            }
        }
    });
}

#[test]
fn while_another_guest_is_stopped_by_the_clock() {
    let bench = Bench::new();
    let devices = bench.infos();
    let request = bench.request(&devices);
    let expected = fuel_and_proposal(hostile(), &request);
    let impatient = Limits::default()
        .with_fuel(u64::MAX)
        .with_deadline(std::time::Duration::from_millis(20));
    let looping = compile(guests::HOSTILE, impatient);
    let settings = [("behavior".to_owned(), "loop".to_owned())];
    thread::scope(|scope| {
        let stopped = scope.spawn(|| {
            let request = Request {
                settings: &settings,
                ..bench.request(&devices)
            };
            (0..10).for_each(|_| {
                looping.plan(&request).unwrap_err();
            });
        });
        while !stopped.is_finished() {
            assert_eq!(fuel_and_proposal(hostile(), &request), expected);
        }
        stopped.join().unwrap();
    });
}

#[test]
fn out_of_the_cache() {
    let directory = TempDir::new().unwrap();
    let cache = Cache::open(&directory.path().join("cache"), Cache::MOST_BYTES).unwrap();
    let options = SandboxOptions::default().with_cache(Some(Arc::new(cache)));
    let bench = Bench::new();
    let devices = bench.infos();
    let request = bench.request(&devices);
    let expected = fuel_and_proposal(hostile(), &request);
    // Compiled and kept, then taken from there.
    for _ in 0..2 {
        let policy = WasmPolicy::new("test.wasm", guests::HOSTILE, options.clone()).unwrap();
        assert_eq!(fuel_and_proposal(&policy, &request), expected);
    }
}
