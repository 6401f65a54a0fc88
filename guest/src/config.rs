//! What config.json says, for policies that look for more than names and shapes.
//!
//! Nothing here fails: a configuration comes from whoever published the model, and what cannot be read
//! says nothing.

pub use serde_json::Value;

/// Keys under which the configuration of the language model lies in that of a larger model.
const LANGUAGE_MODELS: [&str; 5] = [
    "text_config",
    "llm_config",
    "language_config",
    "decoder",
    "decoder_config",
];

/// Returns the configuration, or [`Value::Null`] where it is no JSON. Python's `NaN` and `Infinity`, which
/// some published configurations have, are read as null.
pub fn parse(json: &str) -> Value {
    serde_json::from_str(json)
        .or_else(|_| serde_json::from_str(&without_python_constants(json)))
        .unwrap_or(Value::Null)
}

/// Returns the part of a configuration that describes the language model: the configuration itself where
/// the model is nothing else.
pub fn language_model(root: &Value) -> &Value {
    let object = |map: &'_ Value, name: &str| map.get(name).is_some_and(Value::is_object);
    let mut config = root;
    if object(config, "thinker_config") {
        config = &config["thinker_config"];
    }
    match LANGUAGE_MODELS.iter().find(|name| object(config, name)) {
        Some(name) => &config[*name],
        None => config,
    }
}

/// Returns the first of these keys that holds a number that is not negative.
pub fn number(config: &Value, keys: &[&str]) -> Option<u64> {
    keys.iter().find_map(|key| config.get(key)?.as_u64())
}

/// Calls `visit` with every key and value of the configuration and of all objects within it.
pub fn visit<'a>(config: &'a Value, visit: &mut impl FnMut(&'a str, &'a Value)) {
    // No deeper than the parser goes.
    match config {
        Value::Object(map) => {
            for (key, value) in map {
                visit(key, value);
                self::visit(value, visit);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| self::visit(value, visit)),
        _ => {}
    }
}

fn without_python_constants(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    let (mut in_string, mut escaped) = (false, false);
    while let Some(c) = rest.chars().next() {
        if !in_string {
            let constants = ["-Infinity", "Infinity", "NaN"];
            if let Some(after) = constants.iter().find_map(|word| rest.strip_prefix(word)) {
                out.push_str("null");
                rest = after;
                continue;
            }
        }
        if c == '"' && !escaped {
            in_string = !in_string;
        }
        escaped = in_string && c == '\\' && !escaped;
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_constants_are_read_as_null() {
        for (json, expected) in [
            ("[NaN, Infinity, -Infinity, -1]", "[null, null, null, -1]"),
            (
                r#"{"NaN": "Infinity", "\"": NaN}"#,
                r#"{"NaN": "Infinity", "\"": null}"#,
            ),
            (r#"["\\", NaN]"#, r#"["\\", null]"#),
            ("\"é\u{1F600}", "\"é\u{1F600}"),
        ] {
            assert_eq!(without_python_constants(json), expected);
        }
        let config = parse(r#"{"time_step_limit": [0.0, Infinity], "n_layer": 3}"#);
        assert_eq!(number(&config, &["num_layers", "n_layer"]), Some(3));
        assert_eq!(parse("{"), Value::Null);
    }

    #[test]
    fn the_language_model_of_a_larger_one_is_found() {
        for json in [
            r#"{"x": 1}"#,
            r#"{"text_config": {"x": 1}, "vision_config": {"x": 2}}"#,
            r#"{"thinker_config": {"text_config": {"x": 1}}}"#,
            r#"{"text_encoder": {"x": 2}, "decoder": {"x": 1}}"#,
            r#"{"text_config": null, "x": 1}"#,
        ] {
            let root = parse(json);
            assert_eq!(number(language_model(&root), &["x"]), Some(1), "{json}");
        }
        let root = parse(r#"{"a": {"vocab_size": 1}, "b": [{"vocab_size": 2}]}"#);
        let mut found = vec![];
        visit(&root, &mut |key, value| {
            if key == "vocab_size" {
                found.push(value.as_u64());
            }
        });
        assert_eq!(found, [Some(1), Some(2)]);
    }
}
