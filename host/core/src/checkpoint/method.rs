//! By which method a checkpoint has been quantized: as config.json says, or as its tensors show.
//!
//! Names of methods are those of transformers' `quantization_config.quant_method`. A checkpoint that
//! is quantized has its matrices in the form that the method gives them, and what the method has left
//! in floating point was left so on purpose.

use std::fmt;

use serde_json::{Map, Value};

use super::error::shortened;
use super::{TensorInfo, find};
use crate::cancel::{CancelToken, Cancelled, Watch};
use crate::types::DType;

const BITSANDBYTES: &str = "bitsandbytes";

/// Where the method of a checkpoint is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MethodSource {
    /// config.json.
    Config,
    /// Names and types of the tensors.
    Tensors,
}

impl MethodSource {
    /// Returns a word for programs.
    pub fn name(self) -> &'static str {
        match self {
            MethodSource::Config => "config",
            MethodSource::Tensors => "tensors",
        }
    }
}

/// The method by which a checkpoint has been quantized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizationMethod {
    /// Its name, for example `fp8`, `gptq` or `bitsandbytes`; `unnamed` where config.json has settings
    /// of a method without its name.
    pub name: String,
    /// Bits of an element, where config.json says so.
    pub bits: Option<u64>,
    /// Where it is known from.
    pub source: MethodSource,
}

impl QuantizationMethod {
    fn of_tensors(name: &str, bits: Option<u64>) -> QuantizationMethod {
        QuantizationMethod {
            name: name.to_owned(),
            bits,
            source: MethodSource::Tensors,
        }
    }

    /// Returns whether it is bitsandbytes' 4 bits, which are read, kept and written here.
    pub fn is_bitsandbytes_4bit(&self) -> bool {
        self.name == BITSANDBYTES && self.bits != Some(8)
    }
}

impl fmt::Display for QuantizationMethod {
    /// Its name and the bits; not escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        match self.bits {
            Some(bits) => write!(f, " ({bits} bits)"),
            None => Ok(()),
        }
    }
}

/// What config.json says: at its top, or in the configuration of a model that it nests.
pub(super) fn of_config(json: &Value) -> Option<QuantizationMethod> {
    let top = json.as_object()?;
    stated(top).or_else(|| {
        let nested = || top.values().filter_map(Value::as_object);
        let deeper = || nested().flat_map(|map| map.values().filter_map(Value::as_object));
        nested()
            .find_map(stated)
            .or_else(|| deeper().find_map(stated))
    })
}

/// What this object says of the model that it configures.
fn stated(model: &Map<String, Value>) -> Option<QuantizationMethod> {
    // The second is an old name of compressed-tensors', the last MLX'.
    ["quantization_config", "compression_config", "quantization"]
        .into_iter()
        .filter_map(|key| Some((key, model.get(key)?.as_object()?)))
        .find_map(|(key, settings)| method(key, settings))
}

fn method(key: &str, settings: &Map<String, Value>) -> Option<QuantizationMethod> {
    let is_set = |key: &str| settings.get(key).and_then(Value::as_bool) == Some(true);
    let text = |key: &str| settings.get(key).and_then(Value::as_str);
    let number = |key: &str| settings.get(key).and_then(Value::as_u64);
    let loads = |bits: &str| {
        is_set(&format!("load_in_{bits}bit")) || is_set(&format!("_load_in_{bits}bit"))
    };
    let named = [
        "quant_method",
        "quantization_method",
        "quant_algo",
        "quant_type",
    ]
    .into_iter()
    .find_map(text)
    // As `str` of Python's enumeration writes it.
    .map(|name| {
        name.strip_prefix("QuantizationMethod.")
            .unwrap_or(name)
            .to_lowercase()
    });
    let bits = match (loads("4"), loads("8")) {
        (true, _) => Some(4),
        (false, true) => Some(8),
        (false, false) => ["bits", "w_bit", "nbits"].into_iter().find_map(number),
    };
    let name = match named {
        Some(name) if matches!(&*name, "" | "none") => return None,
        Some(name) if name.starts_with(BITSANDBYTES) => {
            let bits = bits.or_else(|| name.ends_with("_8bit").then_some(8));
            return Some(QuantizationMethod {
                name: BITSANDBYTES.to_owned(),
                bits,
                source: MethodSource::Config,
            });
        }
        Some(name) => shortened(&name),
        None if loads("4") || loads("8") => BITSANDBYTES.to_owned(),
        // Settings of bitsandbytes with which nothing is quantized.
        None if settings.contains_key("load_in_4bit") || settings.contains_key("load_in_8bit") => {
            return None;
        }
        None if key == "quantization" => {
            // Others have such a key for something else.
            bits?;
            number("group_size")?;
            "mlx".to_owned()
        }
        None if key == "compression_config" => "compressed-tensors".to_owned(),
        None if settings.is_empty() => return None,
        None => "unnamed".to_owned(),
    };
    Some(QuantizationMethod {
        name,
        bits,
        source: MethodSource::Config,
    })
}

/// What the tensors show, which are sorted by name in `by_name`.
pub(super) fn of_tensors(
    tensors: &[TensorInfo],
    by_name: &[u32],
    cancel: &CancelToken,
) -> Result<Option<QuantizationMethod>, Cancelled> {
    let mut watch = Watch::new(cancel);
    for tensor in tensors {
        watch.item(tensor.name.len())?;
        let beside = |end: &str, other: &str| {
            let stem = tensor.name.strip_suffix(end)?;
            find(&format!("{stem}{other}"), tensors, by_name)
        };
        let ends = |ends: &[&str]| ends.iter().any(|end| tensor.name.ends_with(end));
        let is_matrix = tensor.shape.len() >= 2;
        let method = if tensor.quantized.is_some() {
            QuantizationMethod::of_tensors(BITSANDBYTES, Some(4))
        } else if ends(&[".SCB"]) {
            QuantizationMethod::of_tensors(BITSANDBYTES, Some(8))
        } else if ends(&[".qweight"]) && beside(".qweight", ".scales").is_some() {
            let name = match beside(".qweight", ".g_idx") {
                Some(_) => "gptq",
                None => "awq",
            };
            QuantizationMethod::of_tensors(name, None)
        } else if ends(&[".weight_packed"]) {
            QuantizationMethod::of_tensors("compressed-tensors", None)
        } else if beside("_blocks", "_scales").is_some() && tensor.dtype == DType::U8 {
            QuantizationMethod::of_tensors("mxfp4", None)
        } else if ends(&[".weight_scale_2"]) {
            QuantizationMethod::of_tensors("modelopt", None)
        } else if ends(&[".W_q"]) {
            QuantizationMethod::of_tensors("hqq", None)
        } else if beside("._data", "._scale").is_some() {
            QuantizationMethod::of_tensors("quanto", None)
        } else if beside("_weight_qdata", "_weight_scale").is_some() {
            QuantizationMethod::of_tensors("torchao", None)
        } else if beside(".codes", ".codebooks").is_some() {
            QuantizationMethod::of_tensors("aqlm", None)
        } else if ends(&[".Qidxs"]) {
            QuantizationMethod::of_tensors("quip", None)
        } else if tensor.dtype == DType::U32 && beside(".weight", ".scales").is_some() {
            QuantizationMethod::of_tensors("mlx", None)
        } else if ends(&["weight_scale_inv"]) || (is_matrix && is_float8(tensor.dtype)) {
            QuantizationMethod::of_tensors("fp8", None)
        } else if is_matrix
            && tensor.dtype == DType::I8
            && [".weight_scale", ".scales", ".scale"]
                .iter()
                .any(|scale| beside(".weight", scale).is_some())
        {
            QuantizationMethod::of_tensors("int8", None)
        } else {
            continue;
        };
        return Ok(Some(method));
    }
    Ok(None)
}

/// Types of weights; the scales of others are in F8_E8M0.
fn is_float8(dtype: DType) -> bool {
    matches!(
        dtype.safetensors_name(),
        "F8_E4M3" | "F8_E5M2" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn config(text: &str) -> Option<String> {
        let method = of_config(&serde_json::from_str(text).unwrap())?;
        assert_eq!(method.source, MethodSource::Config);
        Some(method.to_string())
    }

    #[test]
    fn config_names_the_method_wherever_it_is() {
        for method in [
            "fp8",
            "mxfp4",
            "gptq",
            "awq",
            "compressed-tensors",
            "hqq",
            "quanto",
            "torchao",
            "aqlm",
            "new",
        ] {
            let settings =
                format!(r#"{{"quant_method":"{method}","modules_to_not_convert":["lm_head"]}}"#);
            for text in [
                format!(r#"{{"quantization_config":{settings}}}"#),
                format!(r#"{{"text_config":{{"quantization_config":{settings}}}}}"#),
                format!(
                    r#"{{"thinker_config":{{"text_config":{{"quantization_config":{settings}}}}}}}"#
                ),
            ] {
                assert_eq!(config(&text).as_deref(), Some(method), "{text}");
            }
        }
        for (settings, method) in [
            (
                r#"{"quant_method":"QuantizationMethod.GPTQ","bits":4}"#,
                "gptq (4 bits)",
            ),
            (
                r#"{"quant_method":"bitsandbytes","load_in_8bit":true,"load_in_4bit":false}"#,
                "bitsandbytes (8 bits)",
            ),
            (
                r#"{"quant_method":"bitsandbytes","_load_in_4bit":true}"#,
                "bitsandbytes (4 bits)",
            ),
            (r#"{"load_in_8bit":true}"#, "bitsandbytes (8 bits)"),
            (
                r#"{"quant_method":"bitsandbytes_8bit"}"#,
                "bitsandbytes (8 bits)",
            ),
            (
                r#"{"quant_algo":"NVFP4","producer":{"name":"modelopt"}}"#,
                "nvfp4",
            ),
            (r#"{"bits":3}"#, "unnamed (3 bits)"),
        ] {
            let text = format!(r#"{{"quantization_config":{settings}}}"#);
            assert_eq!(config(&text).as_deref(), Some(method), "{text}");
        }
        let mlx = r#"{"quantization":{"group_size":64,"bits":4}}"#;
        assert_eq!(config(mlx).as_deref(), Some("mlx (4 bits)"));
        let old = r#"{"compression_config":{"format":"pack-quantized"}}"#;
        assert_eq!(config(old).as_deref(), Some("compressed-tensors"));
        for none in [
            "{}",
            "[]",
            r#"{"quantization_config":null}"#,
            r#"{"quantization_config":{}}"#,
            r#"{"quantization_config":"fp8"}"#,
            r#"{"quantization_config":{"quant_method":"none"}}"#,
            r#"{"quantization_config":{"load_in_4bit":false,"load_in_8bit":false}}"#,
            r#"{"quantization":{"codebooks":8}}"#,
        ] {
            assert_eq!(config(none), None, "{none}");
        }
    }

    #[test]
    fn tensors_show_the_method() {
        let method = |tensors: &[(&str, DType)]| {
            let mut tensors: Vec<TensorInfo> = tensors
                .iter()
                .map(|&(name, dtype)| testing::tensor(name, dtype, &[64, 64]))
                .collect();
            tensors.sort_by(|a, b| a.name.cmp(&b.name));
            let by_name: Vec<u32> = (0..tensors.len() as u32).collect();
            let method = of_tensors(&tensors, &by_name, &CancelToken::new()).unwrap();
            method.map(|method| method.to_string())
        };
        let float8 = DType::from_safetensors_name("F8_E4M3").unwrap();
        for (tensors, name) in [
            (&[("a.weight", float8)][..], "fp8"),
            (
                &[
                    ("a.weight", DType::Bf16),
                    ("a.weight_scale_inv", DType::F32),
                ],
                "fp8",
            ),
            (
                &[("e.up_blocks", DType::U8), ("e.up_scales", DType::U8)],
                "mxfp4",
            ),
            (
                &[
                    ("a.qweight", DType::I32),
                    ("a.scales", DType::F16),
                    ("a.g_idx", DType::I32),
                ],
                "gptq",
            ),
            (
                &[("a.qweight", DType::I32), ("a.scales", DType::F16)],
                "awq",
            ),
            (&[("a.weight_packed", DType::I32)], "compressed-tensors"),
            (
                &[("a.weight", DType::I8), ("a.SCB", DType::F32)],
                "bitsandbytes (8 bits)",
            ),
            (
                &[("a.weight", DType::I8), ("a.weight_scale", DType::F32)],
                "int8",
            ),
            (&[("a.weight", DType::U32), ("a.scales", DType::F16)], "mlx"),
            (&[("a.W_q", DType::U8)], "hqq"),
            (
                &[
                    ("a.weight._data", DType::I8),
                    ("a.weight._scale", DType::F16),
                ],
                "quanto",
            ),
        ] {
            assert_eq!(method(tensors).as_deref(), Some(name), "{tensors:?}");
        }
        for none in [
            &[][..],
            &[("a.weight", DType::Bf16), ("position_ids", DType::I64)],
            &[("table.weight", DType::I8)],
            &[("down_blocks", DType::Bf16), ("down_scales", DType::Bf16)],
        ] {
            assert_eq!(method(none), None, "{none:?}");
        }
    }
}
