//! Small checkpoints.

use std::fs;
use std::path::Path;

use serde_json::{Map, json};
use tightfit::synth::{self, Model, SynthOptions, Tensor};

/// A decoder with random weights. A layer has 16 x `hidden`² parameters.
pub fn write_decoder(directory: &Path, layers: u64, hidden: u64) {
    write_decoder_with(directory, layers, hidden, 4 * hidden);
}

/// The same whose MLPs have so many columns.
pub fn write_decoder_with(directory: &Path, layers: u64, hidden: u64, intermediate: u64) {
    let mut tensors = vec![Tensor::new("model.embed_tokens.weight", &[1000, hidden])];
    for layer in 0..layers {
        for (name, shape) in [
            ("self_attn.q_proj.weight", &[hidden, hidden][..]),
            ("self_attn.k_proj.weight", &[hidden, hidden]),
            ("self_attn.v_proj.weight", &[hidden, hidden]),
            ("self_attn.o_proj.weight", &[hidden, hidden]),
            ("mlp.gate_proj.weight", &[intermediate, hidden]),
            ("mlp.up_proj.weight", &[intermediate, hidden]),
            ("mlp.down_proj.weight", &[hidden, intermediate]),
            ("input_layernorm.weight", &[hidden]),
        ] {
            tensors.push(Tensor::new(format!("model.layers.{layer}.{name}"), shape));
        }
    }
    tensors.push(Tensor::new("lm_head.weight", &[1000, hidden]));
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "tie_word_embeddings": false,
    });
    let model = Model {
        tensors,
        config_json: config.to_string(),
    };
    synth::write_model(&model, directory, &SynthOptions::default())
        .unwrap_or_else(|error| panic!("{error}"));
}

/// A checkpoint that offers something to every kind of bad plan: a tie that is stored, a matrix,
/// and a tensor that cannot be quantized. In this order.
pub fn write_awkward(directory: &Path) {
    let small: Vec<u8> = (0..4096u32).map(|byte| (byte % 61) as u8).collect();
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": true,
        "num_hidden_layers": 1,
    });
    fs::write(directory.join("config.json"), config.to_string()).unwrap();
    write_safetensors(
        &directory.join("model.safetensors"),
        &[
            ("model.embed_tokens.weight", "BF16", &[64, 32], &[0; 4096]),
            ("lm_head.weight", "BF16", &[64, 32], &[0; 4096]),
            (
                "model.layers.0.mlp.up_proj.weight",
                "BF16",
                &[64, 32],
                &small,
            ),
            ("model.position_ids", "I64", &[16], &[0; 128]),
        ],
    );
}

/// Writes a file of tensors: name, element type, shape and data.
pub fn write_safetensors(path: &Path, tensors: &[(&str, &str, &[u64], &[u8])]) {
    let mut header = Map::new();
    let mut data = Vec::new();
    for &(name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend_from_slice(bytes);
        let offsets = [begin, data.len()];
        header.insert(
            name.to_owned(),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }),
        );
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    fs::write(path, file).unwrap();
}
