//! Logits of the golden models, from their weights as loaded and quantized by us, against those of
//! transformers and bitsandbytes.

use tempfile::TempDir;
use tightfit::model::Model;
use tightfit_kernels::Activation;
use tightfit_tests::double_quant::double_quantize;
use tightfit_tests::golden::{GoldenModel, MODELS, MOE_MODELS};
use tightfit_tests::loading::load_with_auto;
use tightfit_tests::reference::{Config, Reference, SavedWeights, Weight, Weights};
use tightfit_tests::tensors::{FileTensors, floats};

/// How far logits may be apart. Sums in another order move them by about 1e-5, a single block of
/// wrong sign by more than 3e-3.
const TOLERANCE: f32 = 2e-4;

/// How far the logits of double-quantized weights may be from those that bitsandbytes gave on a
/// CPU: there its lookup takes a neighbor of the nearest 8-bit scale in up to one block of a
/// hundred, which moves logits by up to 3.6e-3. Nothing else is compared this loosely: from weights
/// double-quantized by hand, the way a GPU does it, the same logits are within [`TOLERANCE`].
const CPU_SCALES_TOLERANCE: f32 = 5e-3;

const SIM: &[&str] = &["sim:1GiB"];
const TWO_SIMS: &[&str] = &["sim:1GiB", "sim:1GiB"];

type Settings = &'static [(&'static str, &'static str)];

const UNQUANTIZED: Settings = &[("skip", "*")];
/// As transformers does it: experts stay as they are.
const NF4: Settings = &[("experts", "stored")];
const NF4_DQ: Settings = &[("experts", "stored"), ("double-quant", "true")];
const NF4_WITH_EXPERTS: Settings = &[];
const NF4_DQ_WITH_EXPERTS: Settings = &[("double-quant", "true")];

/// A golden model with what it is to be run on, and what comes out.
struct Golden {
    model: GoldenModel,
    config: Config,
    expected: FileTensors,
    texts: Vec<Vec<usize>>,
}

impl Golden {
    fn unpack(name: &str) -> Golden {
        let model = GoldenModel::unpack(name);
        let config = Config::read(&model.path("bf16/config.json"));
        let expected = model.tensors("expected.safetensors");
        let input_ids = expected.get("input_ids");
        let (ids, _) = input_ids.data.as_chunks::<8>();
        let ids: Vec<usize> = ids
            .iter()
            .map(|&id| usize::try_from(i64::from_le_bytes(id)).expect("a token"))
            .collect();
        let texts = ids.chunks(input_ids.shape[1]).map(<[_]>::to_vec).collect();
        Golden {
            model,
            config,
            expected,
            texts,
        }
    }

    fn logits(&self, weights: &dyn Weights) -> Vec<f32> {
        let reference = Reference::new(&self.config, weights);
        let texts = self.texts.iter();
        texts.flat_map(|text| reference.logits(text).data).collect()
    }

    /// The largest distance of any logit from the expected one.
    fn difference(&self, weights: &dyn Weights, expected: &str) -> f32 {
        let expected = floats(self.expected.data(expected));
        largest_difference(&self.logits(weights), &expected)
    }

    fn check(&self, weights: &dyn Weights, expected: &str, context: &str) {
        self.check_within(TOLERANCE, weights, expected, context);
    }

    fn check_within(&self, tolerance: f32, weights: &dyn Weights, expected: &str, context: &str) {
        let difference = self.difference(weights, expected);
        let name = &self.model.name;
        println!("{name}, {context}, {expected}: {difference:.1e}");
        assert!(
            difference <= tolerance,
            "{name}, {context}: {expected} differ by {difference}"
        );
    }

    /// Checks a model loaded with double quantization: strictly against weights whose scales are
    /// quantized by hand, as a GPU does it, and within what the CPU's scales make of it against
    /// the logits of bitsandbytes.
    fn check_double_quantized(
        &self,
        model: &Model,
        by_hand: &SavedWeights,
        expected: &str,
        context: &str,
    ) {
        let difference = largest_difference(&self.logits(model), &self.logits(by_hand));
        let name = &self.model.name;
        println!("{name}, {context}, {expected} by hand: {difference:.1e}");
        assert!(
            difference <= TOLERANCE,
            "{name}, {context}: {expected} by hand differ by {difference}"
        );
        self.check_within(CPU_SCALES_TOLERANCE, model, expected, context);
    }

    /// The 256 values of 8-bit scales.
    fn nested_map(&self) -> Vec<f32> {
        let weight = self.model.linear_weights().next().expect("there is one");
        let saved = self.model.tensors("nf4_dq");
        floats(saved.data(&format!("{weight}.nested_quant_map")))
    }

    /// The files of the model together, as weights.
    fn saved(&self, files: &[&str]) -> SavedWeights {
        let mut weights = FileTensors::default();
        for file in files {
            weights.0.extend(self.model.tensors(file).0);
        }
        SavedWeights(weights)
    }
}

/// Weights that bitsandbytes quantized without double quantization, with their scales replaced by
/// what double quantization by hand leaves of them.
fn double_quantized_by_hand(mut weights: SavedWeights, map: &[f32]) -> SavedWeights {
    for name in weights.quantized() {
        let name = format!("{name}.absmax");
        let absmax = weights.0.0.get_mut(&name).expect("it has scales");
        let double = double_quantize(&floats(&absmax.data), map);
        let codes = double.codes.iter().enumerate();
        absmax.data = codes
            .map(|(block, &code)| map[usize::from(code)] * double.nested[block / 256])
            .flat_map(|distance| (distance + double.offset).to_le_bytes())
            .collect();
    }
    weights
}

fn largest_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let apart = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, |largest, apart| {
        // `f32::max` would lose it.
        assert!(!apart.is_nan(), "a logit is not a number");
        largest.max(apart)
    })
}

#[test]
fn the_forward_pass_gives_the_logits_of_transformers_for_weights_of_bitsandbytes() {
    for name in MODELS {
        let golden = Golden::unpack(name);
        let check = |files: &[&str], expected: &str| {
            golden.check(&golden.saved(files), expected, "as saved");
        };
        check(&["bf16"], "logits_unquantized_f32");
        check(&["nf4"], "logits_nf4_f32");
        check(&["nf4_dq"], "logits_nf4_dq_f32");
        if MOE_MODELS.contains(&name) {
            let experts = "experts_nf4.safetensors";
            check(&["nf4", experts], "logits_nf4_with_experts_f32");
            let experts = "experts_nf4_dq.safetensors";
            check(&["nf4_dq", experts], "logits_nf4_dq_with_experts_f32");
        }
    }
}

#[test]
fn loaded_models_give_the_logits_of_transformers() {
    for name in MODELS {
        let golden = Golden::unpack(name);
        let map = golden.nested_map();
        let by_hand = double_quantized_by_hand(golden.saved(&["nf4"]), &map);
        for devices in [SIM, TWO_SIMS] {
            let load = |settings| load_with_auto(&golden.model.path("bf16"), devices, settings);
            let context = format!("loaded on {devices:?}");
            golden.check(&load(UNQUANTIZED), "logits_unquantized_f32", &context);
            golden.check(&load(NF4), "logits_nf4_f32", &context);
            let expected = "logits_nf4_dq_f32";
            golden.check_double_quantized(&load(NF4_DQ), &by_hand, expected, &context);
        }
    }
}

#[test]
fn models_with_quantized_experts_give_the_logits_of_transformers() {
    for name in MOE_MODELS {
        let golden = Golden::unpack(name);
        let stacked = TempDir::new().unwrap();
        golden.model.write_with_fused_experts(stacked.path());
        let separate = golden.model.path("bf16");
        let expected = "logits_nf4_with_experts_f32";
        for (path, context) in [(&*separate, "separate"), (stacked.path(), "stacked")] {
            let model = load_with_auto(path, SIM, NF4_WITH_EXPERTS);
            has_layers_of_experts(&model);
            golden.check(&model, expected, &format!("{context} experts"));
        }
        // Double quantization takes the mean over a tensor, and what bitsandbytes quantized are
        // the stacks.
        let saved = golden.saved(&["nf4", "experts_nf4.safetensors"]);
        let by_hand = double_quantized_by_hand(saved, &golden.nested_map());
        let model = load_with_auto(stacked.path(), SIM, NF4_DQ_WITH_EXPERTS);
        let expected = "logits_nf4_dq_with_experts_f32";
        golden.check_double_quantized(&model, &by_hand, expected, "stacked experts");
    }
}

/// Whether its experts are computed as layers ([`Model::experts`]), so that the logits are theirs.
fn has_layers_of_experts(model: &Model) {
    let modules = ["mlp.experts", "block_sparse_moe.experts"];
    let layers = modules.iter().filter_map(|module| {
        let module = format!("model.layers.1.{module}");
        model.experts(&module, Activation::Silu).ok()
    });
    assert_eq!(layers.count(), 1);
}

/// Weights of which one block of 64 elements has the wrong sign.
struct Flipped<'m> {
    weights: &'m dyn Weights,
    name: &'m str,
}

impl Weights for Flipped<'_> {
    fn find(&self, name: &str) -> Option<Weight> {
        let mut weight = self.weights.find(name)?;
        if name == self.name {
            for element in &mut weight.data[..64] {
                *element = -*element;
            }
        }
        Some(weight)
    }
}

#[test]
fn one_wrong_block_of_any_weight_is_noticed() {
    for model_name in MODELS {
        let golden = Golden::unpack(model_name);
        let model = load_with_auto(&golden.model.path("bf16"), SIM, NF4_WITH_EXPERTS);
        let expected = if MOE_MODELS.contains(&model_name) {
            "logits_nf4_with_experts_f32"
        } else {
            "logits_nf4_f32"
        };
        for name in golden.model.quantized_weights() {
            let flipped = Flipped {
                weights: &model,
                name: &name,
            };
            let difference = golden.difference(&flipped, expected);
            println!("{model_name}, {name}: {difference:.1e}");
            // The router gives no token of the texts to this expert.
            let unused = model_name == "qwen3_moe" && name.contains("layers.0.mlp.experts.0.");
            assert_eq!(
                // With a margin, so that it is no matter of luck.
                difference > 10.0 * TOLERANCE,
                !unused,
                "{model_name}: one block of {name} moves the logits by {difference}"
            );
        }
    }
}
