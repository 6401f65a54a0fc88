//! The models that can be made, by name.

use std::fmt;
use std::str::FromStr;

use super::config;
use super::deepseek::DeepseekV3;
use super::error::SynthError;
use super::gpt_oss::GptOss;
use super::layout::{Decoder, Experts, Qwen35, Vision};
use super::model::{Model, Tensor};

/// A model whose shape is known.
///
/// Sizes of Qwen2.5, Llama-3.1, Mixtral and Qwen3 are those of the published `config.json` files
/// and agree with the published numbers of parameters. Those of Qwen3.5 are the defaults of its
/// configuration classes in transformers; that its experts are stored as stacks, and which tensors
/// its vision tower has, is inferred from the modeling code and from how vLLM loads the model.
/// DeepSeek-V3 has its linear layers in FP8 with a scale for every tile of 128 x 128, and gpt-oss its
/// experts in MXFP4, both as published; all other tensors are bf16 here. The draft layers (`mtp.*`,
/// and layer 61 of DeepSeek-V3) of the real files are left out, as every loader skips them. `demo`
/// is made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Built like Qwen2.5 but small: 220 MB.
    Demo,
    /// Qwen2.5-0.5B, whose output head is the embedding: 1 GB.
    Qwen25_0_5b,
    /// Qwen2.5-7B: 15 GB.
    Qwen25_7b,
    /// Llama-3.1-8B: 16 GB.
    Llama31_8b,
    /// Llama-3.1-70B: 141 GB.
    Llama31_70b,
    /// Mixtral-8x7B: 93 GB.
    Mixtral8x7b,
    /// Qwen3-30B-A3B, every expert's matrices on their own: 61 GB.
    Qwen3_30bA3b,
    /// Qwen3.5-35B-A3B, experts as stacks, with vision: 70 GB.
    Qwen35_35bA3b,
    /// DeepSeek-V3, in FP8 with 90,427 tensors: 673 GB.
    DeepseekV3,
    /// gpt-oss-20b, experts as stacks in MXFP4: 14 GB.
    GptOss20b,
    /// gpt-oss-120b, experts as stacks in MXFP4: 65 GB.
    GptOss120b,
}

impl Preset {
    /// Returns every preset, small ones first within a family.
    pub const fn all() -> &'static [Preset] {
        &[
            Preset::Demo,
            Preset::Qwen25_0_5b,
            Preset::Qwen25_7b,
            Preset::Llama31_8b,
            Preset::Llama31_70b,
            Preset::Mixtral8x7b,
            Preset::Qwen3_30bA3b,
            Preset::Qwen35_35bA3b,
            Preset::DeepseekV3,
            Preset::GptOss20b,
            Preset::GptOss120b,
        ]
    }

    /// Returns the name that users give, for example `qwen2.5-7b`.
    pub const fn name(self) -> &'static str {
        match self {
            Preset::Demo => "demo",
            Preset::Qwen25_0_5b => "qwen2.5-0.5b",
            Preset::Qwen25_7b => "qwen2.5-7b",
            Preset::Llama31_8b => "llama-3.1-8b",
            Preset::Llama31_70b => "llama-3.1-70b",
            Preset::Mixtral8x7b => "mixtral-8x7b",
            Preset::Qwen3_30bA3b => "qwen3-30b-a3b",
            Preset::Qwen35_35bA3b => "qwen3.5-35b-a3b",
            Preset::DeepseekV3 => "deepseek-v3",
            Preset::GptOss20b => "gpt-oss-20b",
            Preset::GptOss120b => "gpt-oss-120b",
        }
    }

    /// Returns the tensors in the order of the model's modules.
    pub fn tensors(self) -> Vec<Tensor> {
        self.shape().tensors()
    }

    /// Returns the number of parameters: two in a byte of MXFP4, and none in scales.
    pub fn parameters(self) -> u64 {
        self.tensors().iter().filter_map(Tensor::parameters).sum()
    }

    /// `config.json` as transformers writes it.
    pub fn config_json(self) -> String {
        self.config_of(&self.shape())
    }

    /// Returns the model with its first layers only, to try with what is too large as a whole. With
    /// all of its layers it is the preset.
    ///
    /// # Errors
    /// [`SynthError::Layers`] for none and for more than it has.
    pub fn first_layers(self, layers: u64) -> Result<Model, SynthError> {
        let mut shape = self.shape();
        let all = shape.layers_mut();
        if !(1..=*all).contains(&layers) {
            return Err(SynthError::Layers {
                preset: self,
                need: layers,
                have: *all,
            });
        }
        *all = layers;
        Ok(self.model_of(&shape))
    }

    fn model_of(self, shape: &Shape) -> Model {
        Model {
            tensors: shape.tensors(),
            config_json: self.config_of(shape),
        }
    }

    fn config_of(self, shape: &Shape) -> String {
        let config = match (self, shape) {
            (Preset::Llama31_8b | Preset::Llama31_70b, Shape::Decoder(d)) => config::llama(d),
            (Preset::Mixtral8x7b, Shape::Decoder(d)) => config::mixtral(d),
            (Preset::Qwen3_30bA3b, Shape::Decoder(d)) => config::qwen3_moe(d),
            (_, Shape::Decoder(d)) => config::qwen2(d),
            (_, Shape::Qwen35(model)) => config::qwen35(model),
            (_, Shape::DeepseekV3(model)) => model.config(),
            (_, Shape::GptOss(model)) => model.config(),
        };
        format!("{config:#}\n")
    }

    fn shape(self) -> Shape {
        let qwen2 = Decoder {
            layers: 28,
            hidden: 3584,
            heads: 28,
            kv_heads: 4,
            head_dim: 128,
            vocab: 152_064,
            qkv_bias: true,
            qk_norm: false,
            tied: false,
            intermediate: 18_944,
            experts: Experts::None,
        };
        let llama = Decoder {
            layers: 32,
            hidden: 4096,
            heads: 32,
            kv_heads: 8,
            vocab: 128_256,
            qkv_bias: false,
            intermediate: 14_336,
            ..qwen2
        };
        Shape::Decoder(match self {
            Preset::Demo => Decoder {
                layers: 16,
                hidden: 768,
                heads: 12,
                kv_heads: 2,
                head_dim: 64,
                vocab: 8192,
                intermediate: 2048,
                ..qwen2
            },
            Preset::Qwen25_0_5b => Decoder {
                layers: 24,
                hidden: 896,
                heads: 14,
                kv_heads: 2,
                head_dim: 64,
                vocab: 151_936,
                tied: true,
                intermediate: 4864,
                ..qwen2
            },
            Preset::Qwen25_7b => qwen2,
            Preset::Llama31_8b => llama,
            Preset::Llama31_70b => Decoder {
                layers: 80,
                hidden: 8192,
                heads: 64,
                intermediate: 28_672,
                ..llama
            },
            Preset::Mixtral8x7b => Decoder {
                vocab: 32_000,
                experts: Experts::Mixtral { count: 8 },
                ..llama
            },
            Preset::Qwen3_30bA3b => Decoder {
                layers: 48,
                hidden: 2048,
                heads: 32,
                kv_heads: 4,
                vocab: 151_936,
                qkv_bias: false,
                qk_norm: true,
                intermediate: 768,
                experts: Experts::Qwen3 { count: 128 },
                ..qwen2
            },
            Preset::Qwen35_35bA3b => {
                return Shape::Qwen35(Qwen35 {
                    layers: 40,
                    full_attention_interval: 4,
                    hidden: 2048,
                    vocab: 248_320,
                    heads: 16,
                    kv_heads: 2,
                    head_dim: 256,
                    linear_key_heads: 16,
                    linear_value_heads: 32,
                    linear_head_dim: 128,
                    conv_kernel: 4,
                    experts: 256,
                    intermediate: 512,
                    vision: Vision {
                        blocks: 27,
                        hidden: 1152,
                        intermediate: 4304,
                        channels: 3,
                        patch: 16,
                        temporal_patch: 2,
                        merge: 2,
                        positions: 2304,
                    },
                });
            }
            Preset::DeepseekV3 => {
                return Shape::DeepseekV3(DeepseekV3 {
                    layers: 61,
                    dense_layers: 3,
                    hidden: 7168,
                    vocab: 129_280,
                    heads: 128,
                    query_rank: 1536,
                    key_value_rank: 512,
                    plain_dim: 128,
                    rotary_dim: 64,
                    value_dim: 128,
                    intermediate: 18_432,
                    experts: 256,
                    expert_intermediate: 2048,
                });
            }
            Preset::GptOss20b => {
                return Shape::GptOss(GptOss {
                    layers: 24,
                    experts: 32,
                    ..GPT_OSS_120B
                });
            }
            Preset::GptOss120b => return Shape::GptOss(GPT_OSS_120B),
        })
    }
}

const GPT_OSS_120B: GptOss = GptOss {
    layers: 36,
    hidden: 2880,
    vocab: 201_088,
    heads: 64,
    kv_heads: 8,
    head_dim: 64,
    experts: 128,
    intermediate: 2880,
};

/// The kinds of models.
enum Shape {
    Decoder(Decoder),
    Qwen35(Qwen35),
    DeepseekV3(DeepseekV3),
    GptOss(GptOss),
}

impl Shape {
    fn tensors(&self) -> Vec<Tensor> {
        match self {
            Shape::Decoder(decoder) => decoder.tensors(),
            Shape::Qwen35(model) => model.tensors(),
            Shape::DeepseekV3(model) => model.tensors(),
            Shape::GptOss(model) => model.tensors(),
        }
    }

    fn layers_mut(&mut self) -> &mut u64 {
        match self {
            Shape::Decoder(decoder) => &mut decoder.layers,
            Shape::Qwen35(model) => &mut model.layers,
            Shape::DeepseekV3(model) => &mut model.layers,
            Shape::GptOss(model) => &mut model.layers,
        }
    }
}

impl From<Preset> for Model {
    fn from(preset: Preset) -> Model {
        preset.model_of(&preset.shape())
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Preset {
    type Err = SynthError;

    /// The preset of this name, in upper or lower case.
    fn from_str(name: &str) -> Result<Preset, SynthError> {
        let mut all = Preset::all().iter().copied();
        all.find(|preset| preset.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| {
                let known: Vec<&str> = Preset::all().iter().map(|preset| preset.name()).collect();
                SynthError::UnknownPreset {
                    name: name.into(),
                    known: known.join(", "),
                }
            })
    }
}

#[cfg(test)]
mod tests;
