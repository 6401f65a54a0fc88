#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tightfit_fuzzing::program(data);
});
