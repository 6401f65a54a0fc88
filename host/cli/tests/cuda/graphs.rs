//! Products captured into graphs, which are replayed with other operands and another routing in the same
//! memory.

use std::thread;

use cuda_stand_in::application::Application;
use tightfit::device::DeviceOperands;
use tightfit::kernels::half::bf16;
use tightfit::kernels::{Activation, FloatType};
use tightfit::load::QuantizeOn;
use tightfit::plan::PlanOptions;
use tightfit::products::WorkspaceOptions;
use tightfit_tests::loading::contents;

use super::experts::{LAYERS, Placed};
use super::memory::open;
use super::products::{bytes, loaded, numbers};
use super::{Driver, Kinds, MIB};

#[test]
fn a_captured_product_is_replayed_with_other_operands() {
    let kinds = Kinds::new(LAYERS);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let options = PlanOptions::default().with_rows(20).with_gradients(true);
    let model = loaded(&kinds, &devices, &options.with_reserved_headroom(true), MIB);
    let application = Application::start(0);
    let wanted = WorkspaceOptions::rows(20).with_gradients(true);
    let workspace = model.product_workspace(0, &wanted).unwrap();
    let at = workspace.address().unwrap().pointer;
    // One of its own, and one that begins between nested scales.
    let own = model.linear("apart.0.w1.weight").unwrap();
    for (linear, is_own) in [
        (own, true),
        (model.linear_of("fast.gate_up_proj", 1).unwrap(), false),
    ] {
        let (outputs, inputs) = (linear.outputs(), linear.inputs());
        let tail = model.tail(0).unwrap();
        let place = |elements: usize| tail.allocate(2 * elements as u64).unwrap();
        let pieces = [20 * inputs, outputs, 20 * outputs, 20 * inputs].map(place);
        let [x, bias, y, dx] = pieces
            .each_ref()
            .map(|piece| piece.address().unwrap().pointer);
        let of_bias: Vec<bf16> = numbers(outputs, 9);
        application.put(bias, &bytes(&of_bias));
        let stream = application.stream();
        let forward = DeviceOperands::new(x, y, stream)
            .with_bias(bias)
            .with_workspace(at, workspace.bytes());
        let backward = DeviceOperands::new(y, dx, stream).with_workspace(at, workspace.bytes());
        let graph = application.capture(|| {
            // SAFETY: pointers to memory of the device that outlives the graph.
            unsafe {
                let bf16 = FloatType::Bf16;
                linear.forward_on_device(bf16, 20, &forward, false).unwrap();
                if is_own {
                    linear
                        .input_gradient_on_device(bf16, 20, &backward, false)
                        .unwrap();
                }
            }
        });
        for seed in [1, 2, 3] {
            let values: Vec<bf16> = numbers(20 * inputs, seed);
            application.put(x, &bytes(&values));
            application.put(y, &vec![0xff; 2 * 20 * outputs]);
            graph.replay();
            let mut need = vec![bf16::ZERO; 20 * outputs];
            linear
                .forward(&values, 20, Some(&of_bias), &mut need)
                .unwrap();
            let have = application.get(y, 2 * 20 * outputs);
            assert!(have == bytes(&need), "{linear:?}, {seed}");
            if is_own {
                let mut of_x = vec![bf16::ZERO; 20 * inputs];
                linear.input_gradient(&need, 20, &mut of_x).unwrap();
                assert!(
                    application.get(dx, 2 * 20 * inputs) == bytes(&of_x),
                    "{seed}"
                );
            }
        }
        drop(graph);
    }
    drop(workspace);
    drop((model, application, devices));
    driver.clean_report("graphs");
}

#[test]
fn a_capture_outlives_what_other_threads_do() {
    let kinds = Kinds::new(Kinds::ALL);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let application = Application::start(0);
    let options = PlanOptions::default().with_reserved_headroom(true);
    let model = loaded(&kinds, &devices, &options, MIB);
    let memory = model.tail(0).unwrap().allocate(64).unwrap();
    let at = memory.address().unwrap().pointer;
    let need = kinds.on_the_processor();
    for quantize_on in [QuantizeOn::Gpu, QuantizeOn::Cpu] {
        // From what opens a device and has its kernels loaded to what gives all of it back.
        let other = || {
            let devices = open(&["cuda:0"]);
            let model = kinds.load(&devices, quantize_on, 2).unwrap();
            assert!(contents(&model) == need);
        };
        let graph = application.capture(|| {
            application.set(at, 7, 64);
            thread::scope(|scope| scope.spawn(other).join()).unwrap();
            application.set(at, 9, 32);
        });
        application.put(at, &[0; 64]);
        graph.replay();
        let have = application.get(at, 64);
        assert_eq!((&have[..32], &have[32..]), (&[9; 32][..], &[7; 32][..]));
    }
    drop(memory);
    drop((model, application, devices));
    driver.clean_report("what others do");
}

#[test]
fn a_captured_layer_is_replayed_with_another_routing() {
    let kinds = Kinds::new(LAYERS);
    let driver = Driver::start(1);
    let devices = open(&["cuda:0"]);
    let options = PlanOptions::default()
        .with_rows(20)
        .with_reserved_headroom(true);
    let model = loaded(&kinds, &devices, &options, MIB);
    let application = Application::start(0);
    let wanted = WorkspaceOptions::rows(20).with_experts_per_token(3);
    let workspace = model.product_workspace(0, &wanted).unwrap();
    let place = (workspace.address().unwrap().pointer, workspace.bytes());
    for (module, activation) in [
        ("fast", Activation::Silu),
        ("odd", Activation::Clamped { limit: 0.5 }),
    ] {
        let layer = model.experts(module, activation).unwrap();
        let placed = Placed::new(&application, &model, layer, [20, 3], place);
        for tokens in [1, 20] {
            placed.put(0, tokens, 0);
            let graph = application.capture(|| {
                placed.give(tokens, &placed.operands()).unwrap();
            });
            for seed in [1, 2, 3, 4] {
                placed.put(0, tokens, seed);
                graph.replay();
                let need = placed.expected(tokens, seed);
                assert!(
                    placed.y(tokens) == need,
                    "{module}, {tokens} tokens, {seed}"
                );
            }
            drop(graph);
        }
    }
    drop(workspace);
    drop((model, application, devices));
    driver.clean_report("graphs of experts");
}
