//! `config.json` with the `quantization_config` that transformers writes.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::layout::pretty;
use super::target::Target;
use super::{SaveError, is_4bit};
use crate::checkpoint::{Config, TensorInfo, in_place, without_mark};
use crate::types::{DType, Format, QuantType};

const KEY: &str = "quantization_config";
/// What a configuration says of other methods.
const METHODS: [&str; 2] = [KEY, "compression_config"];
/// Objects that a model's configuration is in, at most.
const MAX_DEPTH: usize = 2;
/// Which modules bitsandbytes leaves as they are.
const SKIPPED: &str = "llm_int8_skip_modules";

/// Writes the model's configuration, where it has one.
pub(super) fn write(
    config: Option<&Config>,
    weights: &[(TensorInfo, Format)],
    is_decoded: bool,
    skipped_on_request: bool,
    target: &Target,
) -> Result<(), SaveError> {
    let Some(config) = config else {
        return Ok(());
    };
    let quantized = weights
        .iter()
        .any(|(tensor, format)| is_4bit(tensor, *format));
    // transformers refuses a byte order mark.
    let mut text = without_mark(&config.text).to_owned();
    if is_decoded {
        text = without_method(&text, 0).unwrap_or(text);
    }
    if quantized {
        text = with_quantization(config, &text, weights, is_decoded, skipped_on_request)?;
    }
    target.write_text("config.json", &text)
}

/// The text of the configuration with one more entry; the others stay to the letter.
fn with_quantization(
    config: &Config,
    text: &str,
    weights: &[(TensorInfo, Format)],
    is_decoded: bool,
    skipped_on_request: bool,
) -> Result<String, SaveError> {
    let Some(mut entries) = entries(text) else {
        return Err(SaveError::Internal("a configuration cannot be read again"));
    };
    // A checkpoint that was quantized already says so itself.
    if let Some((_, settings)) = entries.iter_mut().find(|(key, _)| key == KEY) {
        let Some(changed) = without_quantized(settings, weights) else {
            return Ok(text.to_owned());
        };
        *settings = &changed;
        return Ok(rendered(&entries, "\n", ""));
    }
    if config.states_quantization() && !is_decoded {
        return Ok(text.to_owned());
    }
    let value = quantization_config(config, weights, skipped_on_request);
    let indented = pretty(&value).replace('\n', "\n  ");
    // transformers sorts its keys; in a file that is not sorted it comes last.
    let position = match entries.is_sorted_by(|(a, _), (b, _)| a <= b) {
        true => entries.partition_point(|(key, _)| key.as_str() < KEY),
        false => entries.len(),
    };
    entries.insert(position, (KEY.to_owned(), &indented));
    Ok(rendered(&entries, "\n", ""))
}

/// An object without what it says of a method that has quantized a model, wherever it does; `None` where
/// it says nothing. `depth` is how many objects it is in.
fn without_method(text: &str, depth: usize) -> Option<String> {
    let mut is_changed = false;
    let mut kept = Vec::new();
    for (key, value) in entries(text)? {
        let is_object = value.trim_start().starts_with('{');
        if is_object && METHODS.contains(&&*key) {
            is_changed = true;
            continue;
        }
        let inner = match is_object && depth < MAX_DEPTH {
            true => without_method(value, depth + 1),
            false => None,
        };
        is_changed |= inner.is_some();
        kept.push((key, inner.unwrap_or_else(|| value.to_owned())));
    }
    let kept: Vec<(String, &str)> = kept
        .iter()
        .map(|(key, value)| (key.clone(), &**value))
        .collect();
    let end = if depth == 0 { "\n" } else { "" };
    is_changed.then(|| rendered(&kept, end, &"  ".repeat(depth)))
}

/// The settings of a checkpoint that was quantized before, with those of its weights that are
/// quantized now out of the list of modules that are not; `None` where that changes nothing.
fn without_quantized(settings: &str, weights: &[(TensorInfo, Format)]) -> Option<String> {
    let is_new = |(tensor, format): &(TensorInfo, Format)| {
        tensor.quantized.is_none() && matches!(format, Format::Nf4 { .. })
    };
    if !weights.iter().any(is_new) {
        return None;
    }
    let mut entries = entries(settings)?;
    let (_, list) = entries.iter_mut().find(|(key, _)| key == SKIPPED)?;
    if list.trim() == "null" {
        return None;
    }
    let modules = pretty(&unquantized_modules(weights)).replace('\n', "\n    ");
    *list = &modules;
    Some(rendered(&entries, "", "  "))
}

/// An object with these entries, each in a line of its own, that ends with `end`.
fn rendered(entries: &[(String, &str)], end: &str, indentation: &str) -> String {
    let lines: Vec<String> = entries
        .iter()
        .map(|(key, value)| format!("{indentation}  {}: {value}", Value::from(key.as_str())))
        .collect();
    format!("{{\n{}\n{indentation}}}{end}", lines.join(",\n"))
}

/// The entries of an object in their order, values as they are written: `NaN` and `Infinity` too,
/// which Python writes.
fn entries(text: &str) -> Option<Vec<(String, &str)>> {
    let json = in_place(text);
    let Entries(entries) = serde_json::from_str(&json).ok()?;
    let written = |(key, value): (String, &RawValue)| {
        // A value is a part of the JSON, which has it where the text has it.
        let start = value.get().as_ptr() as usize - json.as_ptr() as usize;
        Some((key, text.get(start..start + value.get().len())?))
    };
    entries.into_iter().map(written).collect()
}

/// What transformers 5.23 writes for such weights.
fn quantization_config(
    config: &Config,
    weights: &[(TensorInfo, Format)],
    skipped_on_request: bool,
) -> Value {
    let mut quant_type = QuantType::Nf4;
    let mut double = false;
    // Then what is not quantized was left out by whoever did it.
    let was_quantized = weights.iter().any(|(tensor, _)| tensor.quantized.is_some());
    for (tensor, format) in weights {
        match (&tensor.quantized, format) {
            (Some(quantized), _) => {
                quant_type = quantized.quant_type;
                double |= quantized.nested.is_some();
            }
            (
                None,
                Format::Nf4 {
                    double_quantized, ..
                },
            ) => double |= double_quantized,
            _ => {}
        }
    }
    let named = |key: &str| config.json.get(key).and_then(Value::as_str);
    let compute = named("dtype")
        .or_else(|| named("torch_dtype"))
        .filter(|dtype| matches!(*dtype, "float16" | "float32"))
        .unwrap_or("bfloat16");
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type.name(),
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": (skipped_on_request || was_quantized).then(|| unquantized_modules(weights)),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}

/// Modules whose matrix is not quantized. A list replaces the default one of transformers, so that
/// it has to be complete; that some of these modules would not be quantized anyway does no harm.
fn unquantized_modules(weights: &[(TensorInfo, Format)]) -> Vec<String> {
    weights
        .iter()
        .filter(|(tensor, format)| {
            let float = matches!(tensor.dtype, DType::Bf16 | DType::F16 | DType::F32);
            tensor.shape.len() == 2 && float && !is_4bit(tensor, *format)
        })
        .filter_map(|(tensor, _)| tensor.name.strip_suffix(".weight"))
        .map(str::to_owned)
        .collect()
}

/// The entries of an object in their order.
struct Entries<'t>(Vec<(String, &'t RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries<'de>, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
