//! Products in a GPU's memory through the C interface, on a stand-in for NVIDIA's driver.
#![cfg(target_os = "linux")]

use std::ffi::{CStr, CString};
use std::ptr::{null, null_mut};

use cuda_stand_in::application::Application;
use cuda_stand_in::control::{Setup, StandIn};
use tightfit_c::*;
use tightfit_kernels::half::bf16;
use tightfit_tests::golden::GoldenModel;

const TENSOR: &CStr = c"model.layers.0.mlp.up_proj.weight";
const ROWS: usize = 3;

#[track_caller]
fn done(status: TightfitStatus) {
    // SAFETY: a text of the library's that is valid until the next failure.
    let error = unsafe { CStr::from_ptr(tightfit_last_error()) };
    assert_eq!(status, TightfitStatus::Done, "{error:?}");
}

#[track_caller]
fn refused(status: TightfitStatus, text: &str) {
    // SAFETY: as above.
    let error = unsafe { CStr::from_ptr(tightfit_last_error()) };
    let error = error.to_str().unwrap();
    assert_eq!(status, TightfitStatus::Usage, "{error}");
    assert!(error.contains(text), "{error}");
}

fn setting(name: &'static CStr, value: &'static CStr) -> TightfitSetting {
    TightfitSetting {
        name: name.as_ptr(),
        value: value.as_ptr(),
    }
}

/// Loads a model onto the device in 4 bits with double quantization, with room for products and more.
///
/// # Safety
/// As the library's.
unsafe fn load(path: &CStr) -> *mut TightfitModel {
    let (mut checkpoint, mut policy, mut devices) = (null_mut(), null_mut(), null_mut());
    let mut model = null_mut();
    let settings = [
        setting(c"double-quant", c"true"),
        setting(c"rows", c"3"),
        setting(c"reserve", c"1000000"),
    ];
    // SAFETY: texts end in zeros, and what is written to outlives the calls.
    unsafe {
        done(tightfit_checkpoint_open(path.as_ptr(), &raw mut checkpoint));
        done(tightfit_policy_open(
            c"auto".as_ptr(),
            null(),
            0,
            &raw mut policy,
        ));
        done(tightfit_devices_open(
            &c"cuda:0".as_ptr(),
            1,
            &raw mut devices,
        ));
        let mut options: TightfitLoadOptions = std::mem::zeroed();
        options.struct_size = size_of::<TightfitLoadOptions>();
        options.reserve_headroom = 1;
        done(tightfit_load(
            checkpoint,
            policy,
            devices,
            settings.as_ptr(),
            settings.len(),
            &raw const options,
            &raw mut model,
        ));
        tightfit_devices_close(&raw mut devices);
        tightfit_policy_close(&raw mut policy);
        tightfit_checkpoint_close(&raw mut checkpoint);
    }
    model
}

#[test]
fn a_product_is_given_to_a_stream() {
    let golden = GoldenModel::unpack("llama");
    let path = CString::new(golden.path("bf16").to_str().unwrap()).unwrap();
    let stand_in = StandIn::start(&Setup::default());
    // SAFETY: handles are given back once, in an order that the header allows, and pointers are of what
    // outlives the calls.
    unsafe {
        let mut model = load(&path);
        let (mut linear, mut workspace) = (null_mut(), null_mut());
        done(tightfit_model_linear(
            model,
            TENSOR.as_ptr(),
            &raw mut linear,
        ));
        let mut info: TightfitLinearInfo = std::mem::zeroed();
        info.struct_size = size_of::<TightfitLinearInfo>();
        done(tightfit_linear_info(linear, &raw mut info));
        assert_eq!((info.on_gpu, info.double_quantized), (1, 1));
        done(tightfit_model_linear_workspace(
            model,
            0,
            ROWS,
            &raw mut workspace,
        ));
        let mut memory: TightfitMemory = std::mem::zeroed();
        memory.struct_size = size_of::<TightfitMemory>();
        done(tightfit_linear_workspace_memory(workspace, &raw mut memory));
        let mut need = 0;
        let bf16 = TIGHTFIT_FLOAT_BF16;
        done(tightfit_linear_workspace_bytes(
            linear,
            bf16,
            ROWS,
            1,
            &raw mut need,
        ));
        assert!(need <= memory.length);

        // Memory of the application's behind the weights: x, y.
        let (inputs, outputs) = (ROWS * info.inputs, ROWS * info.outputs);
        let x: Vec<bf16> = (0..inputs)
            .map(|i| bf16::from_f32((i % 9) as f32 - 4.0))
            .collect();
        let mut pieces = [(null_mut(), 0); 2];
        for ((piece, address), elements) in pieces.iter_mut().zip([inputs, outputs]) {
            let mut at: TightfitMemory = std::mem::zeroed();
            at.struct_size = size_of::<TightfitMemory>();
            done(tightfit_model_allocate(
                model,
                0,
                2 * elements as u64,
                piece,
            ));
            done(tightfit_allocation_memory(*piece, &raw mut at));
            *address = at.device_address;
        }
        let application = Application::start(0);
        let bytes = |values: &[bf16]| -> Vec<u8> {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        };
        application.put(pieces[0].1, &bytes(&x));
        let mut operands = TightfitDeviceOperands {
            struct_size: size_of::<TightfitDeviceOperands>(),
            x: pieces[0].1,
            bias: 0,
            y: pieces[1].1,
            workspace: memory.device_address,
            workspace_length: memory.length,
            stream: application.stream(),
        };
        let options = TightfitLinearOptions {
            struct_size: size_of::<TightfitLinearOptions>(),
            threads: 0,
            by_row: 1,
        };
        let give = |operands: &TightfitDeviceOperands| {
            tightfit_linear_forward_on_device(linear, bf16, ROWS, operands, &raw const options)
        };
        done(give(&operands));
        application.synchronize();
        let have = application.get(operands.y, 2 * outputs);

        // The same through host memory.
        let mut y = vec![0u8; 2 * outputs];
        let x = bytes(&x);
        let on_host = TightfitHostOperands {
            struct_size: size_of::<TightfitHostOperands>(),
            x: x.as_ptr().cast(),
            x_length: x.len(),
            bias: null(),
            bias_length: 0,
            y: y.as_mut_ptr().cast(),
            y_length: y.len(),
        };
        done(tightfit_linear_forward(
            linear,
            bf16,
            ROWS,
            &raw const on_host,
            &raw const options,
        ));
        assert_eq!(have, y);

        operands.y = 0;
        refused(give(&operands), "y for tensor");
        operands.y = pieces[1].1 + 1;
        refused(give(&operands), "a multiple of 2");
        operands.y = pieces[1].1;
        operands.workspace_length = need.saturating_sub(1);
        if need > 0 {
            refused(give(&operands), "workspace");
        }
        operands.struct_size = 0;
        refused(give(&operands), "struct_size");

        for (mut piece, _) in pieces {
            tightfit_allocation_free(&raw mut piece);
        }
        tightfit_linear_workspace_free(&raw mut workspace);
        tightfit_linear_free(&raw mut linear);
        tightfit_model_unload(&raw mut model);
    }
    stand_in.report().is_clean("products in C");
}

#[test]
fn a_layer_of_experts_is_given_to_a_stream() {
    let golden = GoldenModel::unpack("qwen3_5_moe");
    let stacked = tempfile::TempDir::new().unwrap();
    golden.write_with_fused_experts(stacked.path());
    let path = CString::new(stacked.path().to_str().unwrap()).unwrap();
    let stand_in = StandIn::start(&Setup::default());
    // SAFETY: handles are given back once, in an order that the header allows, and pointers are of what
    // outlives the calls.
    unsafe {
        let mut model = load(&path);
        let (mut experts, mut workspace) = (null_mut(), null_mut());
        let module = c"model.layers.1.mlp.experts";
        let silu = TIGHTFIT_ACTIVATION_SILU;
        done(tightfit_model_experts(
            model,
            module.as_ptr(),
            silu,
            0.0,
            &raw mut experts,
        ));
        let mut info: TightfitExpertsInfo = std::mem::zeroed();
        info.struct_size = size_of::<TightfitExpertsInfo>();
        done(tightfit_experts_info(experts, &raw mut info));
        assert_eq!(info.on_gpu, 1);
        let (bf16, choices) = (TIGHTFIT_FLOAT_BF16, 2);
        let wanted = TightfitWorkspaceOptions {
            struct_size: size_of::<TightfitWorkspaceOptions>(),
            rows: ROWS,
            experts_per_token: choices,
            gradients: 1,
        };
        done(tightfit_model_product_workspace(
            model,
            0,
            &raw const wanted,
            &raw mut workspace,
        ));
        let mut memory: TightfitMemory = std::mem::zeroed();
        memory.struct_size = size_of::<TightfitMemory>();
        done(tightfit_linear_workspace_memory(workspace, &raw mut memory));
        let mut need = 0;
        let bytes = tightfit_experts_workspace_bytes(experts, bf16, ROWS, choices, &raw mut need);
        done(bytes);
        assert!(need > 0 && need <= memory.length);

        // Memory of the application's behind the weights: x, ids, their weights, y.
        let elements = ROWS * info.hidden;
        let ids = [0, 1, -1, 2, 1, 0].map(i32::to_le_bytes).concat();
        let shares = [0.5, 0.5, 1.0, 2.0, 0.25, -1.0]
            .map(f32::to_le_bytes)
            .concat();
        let x: Vec<u8> = (0..elements)
            .flat_map(|i| bf16::from_f32((i % 9) as f32 / 4.0 - 1.0).to_le_bytes())
            .collect();
        let mut pieces = [(null_mut(), 0); 4];
        for ((piece, address), bytes) in pieces.iter_mut().zip([x.len(), 24, 24, x.len()]) {
            let mut at: TightfitMemory = std::mem::zeroed();
            at.struct_size = size_of::<TightfitMemory>();
            done(tightfit_model_allocate(model, 0, bytes as u64, piece));
            done(tightfit_allocation_memory(*piece, &raw mut at));
            *address = at.device_address;
        }
        let application = Application::start(0);
        for ((_, address), bytes) in pieces.iter().zip([&x, &ids, &shares]) {
            application.put(*address, bytes);
        }
        let operands = TightfitDeviceExpertsOperands {
            struct_size: size_of::<TightfitDeviceExpertsOperands>(),
            x: pieces[0].1,
            ids: pieces[1].1,
            weights: pieces[2].1,
            bias: 0,
            down_bias: 0,
            y: pieces[3].1,
            workspace: memory.device_address,
            workspace_length: need,
            stream: application.stream(),
        };
        let give = |operands: &TightfitDeviceExpertsOperands| {
            tightfit_experts_forward_on_device(experts, bf16, ROWS, choices, operands)
        };
        done(give(&operands));
        application.synchronize();
        let have = application.get(operands.y, x.len());

        // The same through host memory.
        let mut y = vec![0u8; x.len()];
        let numbers: Vec<i32> = ids
            .as_chunks()
            .0
            .iter()
            .map(|id| i32::from_le_bytes(*id))
            .collect();
        let shares: Vec<f32> = shares
            .as_chunks()
            .0
            .iter()
            .map(|share| f32::from_le_bytes(*share))
            .collect();
        let on_host = TightfitHostExpertsOperands {
            struct_size: size_of::<TightfitHostExpertsOperands>(),
            x: x.as_ptr().cast(),
            x_length: x.len(),
            ids: numbers.as_ptr(),
            weights: shares.as_ptr(),
            choices,
            bias: null(),
            bias_length: 0,
            down_bias: null(),
            down_bias_length: 0,
            y: y.as_mut_ptr().cast(),
            y_length: y.len(),
        };
        done(tightfit_experts_forward(
            experts,
            bf16,
            ROWS,
            &raw const on_host,
            null(),
        ));
        assert_eq!(have, y);

        refused(
            give(&TightfitDeviceExpertsOperands {
                workspace_length: need - 1,
                ..operands
            }),
            "workspace",
        );
        for (mut piece, _) in pieces {
            tightfit_allocation_free(&raw mut piece);
        }
        tightfit_linear_workspace_free(&raw mut workspace);
        tightfit_experts_free(&raw mut experts);
        tightfit_model_unload(&raw mut model);
    }
    stand_in.report().is_clean("experts in C");
}
