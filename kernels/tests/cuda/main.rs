//! The GPU kernels give the bytes of the CPU kernels: their sources compiled for the CPU wherever
//! there is a C++ compiler, and the embedded PTX wherever there is a GPU.
//!
//! `TIGHTFIT_REQUIRE_CXX=1` and `TIGHTFIT_REQUIRE_CUDA=1` turn their absence into failures.

mod calls;
#[path = "../cases/mod.rs"]
mod cases;
mod decoder;
#[path = "../decoding/mod.rs"]
mod decoding;
mod device;
mod double;
mod emulator;
mod expert_calls;
mod experts;
mod golden;
mod gpu;
mod large;
#[path = "../layers/mod.rs"]
mod layers;
mod linear;
mod sources;
mod transposed;
mod values;
mod weights;

macro_rules! on_every_device {
    ($($module:ident::$test:ident,)*) => {
        mod emulated {
            $(#[test]
            fn $test() {
                if let Some(mut emulator) = crate::emulator::start() {
                    crate::$module::$test(&mut emulator);
                }
            })*
        }

        mod on_gpu {
            $(#[test]
            fn $test() {
                if let Some(mut gpu) = crate::gpu::Gpu::open() {
                    crate::$module::$test(&mut gpu);
                }
            })*
        }
    };
}

on_every_device! {
    weights::every_16_bit_pattern,
    weights::thresholds_and_their_neighbors_at_every_scale,
    weights::special_values_among_weights,
    weights::random_bits_in_every_block_size,
    weights::lengths_and_alignments,
    weights::pieces_equal_the_whole,
    weights::dequantizing,
    sources::every_code_with_every_kind_of_scale,
    sources::any_run_of_any_weight,
    sources::pieces_of_a_weight_as_it_is_loaded,
    double::means,
    double::absmax_to_codes_and_back,
    double::every_code_and_every_midpoint,
    linear::few_and_some_rows,
    linear::many_rows,
    linear::every_format_and_block_size,
    linear::odd_lengths_and_alignments,
    linear::rows_by_themselves,
    linear::huge_blocks,
    transposed::transposed,
    transposed::many_rows_transposed,
    experts::layers_of_experts,
    experts::every_format,
    experts::experts_that_are_quantized_apart,
    experts::whatever_lengths_and_alignments,
    experts::replays_with_other_ids,
    experts::tokens_by_themselves,
    experts::products_without_activation,
    experts::huge_blocks_stay_in_their_rows,
    decoder::norms,
    decoder::elementwise,
    decoder::gathering,
    decoder::dense_products,
    decoder::rotations,
    decoder::attentions,
    decoder::extreme_attentions,
    decoder::choices,
    decoder::routes,
    decoder::combinations,
    golden::quantizing,
    golden::double_quantizing,
    golden::dequantizing_all,
}
