//! Gradients of inputs, `dx = dy * W`, with weights in a GPU's memory.

use cuda_stand_in::application::Application;
use tightfit::device::DeviceOperands;
use tightfit::kernels::FloatType;
use tightfit::kernels::half::{bf16, f16};
use tightfit::plan::PlanOptions;
use tightfit::products::{Linear, LinearOptions, WorkspaceOptions};

use super::memory::open;
use super::products::{Number, bytes, loaded, numbers, on_the_processor};
use super::{Driver, Kind, Kinds, MIB, nf4};

/// The fast kernels' and the others'; some that are dealt out to shares.
const WEIGHTS: &[Kind] = &[
    ("fast", "BF16", 2, &[136, 192], nf4(64, false)),
    ("dealt out", "BF16", 2, &[1024, 64], nf4(64, true)),
    ("small blocks", "F32", 4, &[33, 96], nf4(32, true)),
    ("odd", "BF16", 2, &[17, 45], nf4(64, false)),
];

fn gradient<T: Number>(linear: &Linear<'_>, rows: usize, by_row: bool) -> Vec<T> {
    let dy: Vec<T> = numbers(rows * linear.outputs(), 3);
    let mut dx = vec![T::of(f32::NAN); rows * linear.inputs()];
    let options = LinearOptions::default().with_by_row(by_row);
    linear
        .input_gradient_with(&dy, rows, &mut dx, &options)
        .unwrap_or_else(|error| panic!("{error}"));
    dx
}

fn compare<T: Number>(here: &Linear<'_>, there: &Linear<'_>, rows: usize, by_row: bool) {
    let need = gradient::<T>(here, rows, by_row);
    let have = gradient::<T>(there, rows, by_row);
    let largest = need
        .iter()
        .fold(0.0, |most, dx| f32::max(most, dx.value().abs()));
    for (index, (need, have)) in need.iter().zip(&have).enumerate() {
        assert!(
            (need.value() - have.value()).abs() <= T::APART * largest,
            "{there:?} of {}, {rows} rows: {index} is {}, should be {}",
            T::TYPE,
            have.value(),
            need.value()
        );
    }
}

#[test]
fn a_gpus_gradients_are_those_of_the_processor() {
    let kinds = Kinds::new(WEIGHTS);
    let here = on_the_processor(&kinds);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let there = loaded(&kinds, &devices, &PlanOptions::default(), 0);
    for (name, ..) in WEIGHTS {
        let (here, there) = (here.linear(name).unwrap(), there.linear(name).unwrap());
        for rows in [0, 1, 5, 70] {
            for by_row in [false, true] {
                compare::<bf16>(&here, &there, rows, by_row);
            }
            compare::<f32>(&here, &there, rows, false);
        }
        compare::<f16>(&here, &there, 130, false);
    }
    drop(there);
    assert_eq!(devices[0].usage().reserved.now, 0);
    drop(devices);
    driver.clean_report("gradients");
}

#[test]
fn gradients_are_given_to_a_stream_within_what_was_planned() {
    let kinds = Kinds::new(WEIGHTS);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let options = PlanOptions::default()
        .with_rows(130)
        .with_gradients(true)
        .with_reserved_headroom(true);
    let without = PlanOptions::default().with_rows(130);
    let planned_without = {
        let model = loaded(&kinds, &devices, &without, 0);
        model.plan().devices[0].products
    };
    let model = loaded(&kinds, &devices, &options, 2 * MIB);
    let planned = model.plan().devices[0].clone();
    assert!(planned.products >= planned_without);
    let application = Application::start(0);
    let wanted = WorkspaceOptions::rows(130).with_gradients(true);
    let workspace = model.product_workspace(0, &wanted).unwrap();
    assert!(workspace.bytes() <= planned.products);
    let at = workspace.address().unwrap().pointer;
    for (name, ..) in WEIGHTS {
        let linear = model.linear(name).unwrap();
        let tail = model.tail(0).unwrap();
        let place = |elements: usize| tail.allocate(2 * elements as u64).unwrap();
        let (dy, dx) = (place(130 * linear.outputs()), place(130 * linear.inputs()));
        let address = |piece: &tightfit::model::TailAllocation| piece.address().unwrap().pointer;
        let reserved = devices[0].usage().reserved.now;
        let mut all = vec![];
        for (rows, by_row) in [(130, true), (130, false), (3, true)] {
            let need = linear.input_gradient_workspace_bytes(rows, FloatType::Bf16, by_row);
            assert!(need <= 16 * MIB);
            let values: Vec<bf16> = numbers(rows * linear.outputs(), 3);
            application.put(address(&dy), &bytes(&values));
            let operands = DeviceOperands::new(address(&dy), address(&dx), application.stream())
                .with_workspace(at, need);
            // SAFETY: pointers to memory of the device that is kept, in a stream that is waited for.
            unsafe { linear.input_gradient_on_device(FloatType::Bf16, rows, &operands, by_row) }
                .unwrap_or_else(|error| panic!("{error}"));
            application.synchronize();
            let have = application.get(address(&dx), 2 * rows * linear.inputs());
            assert_eq!(devices[0].usage().reserved.now, reserved);
            assert!(
                have == bytes(&gradient::<bf16>(&linear, rows, by_row)),
                "{name}"
            );
            match (rows, by_row) {
                (130, true) => all = have,
                // By row others do not matter.
                (3, true) => assert!(have == all[..have.len()], "{name}"),
                _ => {}
            }
            // There is no bias, and some workspace.
            let refused = |operands: &DeviceOperands, text: &str| {
                // SAFETY: refused before anything is done with the pointers.
                let error = unsafe {
                    linear.input_gradient_on_device(FloatType::Bf16, rows, operands, by_row)
                };
                let error = error.unwrap_err().to_string();
                assert!(error.contains(text), "{error}");
            };
            refused(&operands.with_bias(256), "need 0");
            if need > 0 {
                refused(&operands.with_workspace(at, need - 1), "workspace");
            }
            let mut odd = operands;
            odd.y = 1;
            refused(&odd, "dx");
        }
    }
    drop(workspace);
    drop((model, application, devices));
    driver.clean_report("gradients in a stream");
}
