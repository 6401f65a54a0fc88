//! Programs with buffers and models in GPUs' memory.

use tightfit_tests::programs::{Bench, hostile};

use super::memory::open;
use super::{Driver, MIB};

#[test]
fn programs_work_in_a_gpus_memory() {
    let driver = Driver::start(1);
    // The hostile program counts on two devices.
    let devices = open(&["cuda:0", "sim:64MiB"]).into();
    let bench = Bench::with_devices(devices, 20 * MIB);
    for (arguments, answer) in [
        (&["honest"][..], "63 292"),
        (&["never-free"], "1000000"),
        (&["scribble", "165"], "[165]"),
        (&["zeros", "3"], "zeros"),
        (&["many-small", "9000"], "4194304"),
        (&["copy", "50", "0", "50"], "copied"),
        (&["write-much", "4194304"], "written"),
        (&["plan", "none"], "3 tensors"),
        (&["drop-checkpoint-in-use"], "256 bytes"),
        // Ten times what a GPU gives at least.
        (&["load-and-forget"], "20971520"),
    ] {
        assert_eq!(bench.answer(hostile(), arguments), answer, "{arguments:?}");
    }
    for behavior in ["panic-with-memory", "panic-with-model"] {
        bench.failure(hostile(), &[behavior]);
    }
    let told = bench.told(hostile(), &["allocate", "20971521"]);
    assert!(told.starts_with("Error::QuotaExceeded"), "{told}");
    drop(bench);
    driver.clean_report("programs");
}
