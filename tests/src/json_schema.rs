//! The part of JSON Schema that `host/cli/output.schema.json` is written in.
//!
//! It is stricter than the schema: a field that no `properties` or `additionalProperties` describes
//! is an error, so that the schema cannot fall behind what is printed.

use serde_json::{Map, Value};

/// A schema with its definitions.
#[derive(Debug)]
pub struct Schema {
    root: Value,
}

impl Schema {
    /// Parses a schema.
    ///
    /// # Panics
    /// When it is not JSON or uses a keyword that is not known here: it would not be checked.
    pub fn new(text: &str) -> Schema {
        let root: Value = serde_json::from_str(text).expect("a schema is JSON");
        known_keywords(&root, "#");
        Schema { root }
    }

    /// The names of its definitions.
    pub fn definitions(&self) -> Vec<&str> {
        let definitions = self.root["$defs"].as_object().expect("it has definitions");
        definitions.keys().map(String::as_str).collect()
    }

    /// What is wrong with a value that ought to be one of this definition; nothing where it is.
    pub fn errors(&self, definition: &str, value: &Value) -> Vec<String> {
        let schema = &self.root["$defs"][definition];
        assert!(schema.is_object(), "there is no definition {definition}");
        let mut errors = Vec::new();
        self.check(schema, value, "", &mut errors);
        errors
    }

    fn check(&self, schema: &Value, value: &Value, at: &str, errors: &mut Vec<String>) {
        let mut wrong = |what: String| errors.push(format!("{at}: {what}"));
        if let Some(expected) = schema.get("const")
            && expected != value
        {
            wrong(format!("{value} is not {expected}"));
        }
        if let Some(allowed) = schema.get("enum")
            && !allowed.as_array().expect("a list").contains(value)
        {
            wrong(format!("{value} is none of {allowed}"));
        }
        if let Some(types) = schema.get("type") {
            let types = types.as_array().cloned().unwrap_or(vec![types.clone()]);
            if !types.iter().any(|name| is_of(name, value)) {
                wrong(format!("{value} is not of type {types:?}"));
            }
        }
        for (keyword, holds) in [
            ("minimum", (|n, limit| n >= limit) as fn(f64, f64) -> bool),
            ("maximum", |n, limit| n <= limit),
        ] {
            if let Some(limit) = schema.get(keyword).and_then(Value::as_f64)
                && value.as_f64().is_some_and(|number| !holds(number, limit))
            {
                wrong(format!("{value} against {keyword} {limit}"));
            }
        }
        if let Some(list) = value.as_array() {
            let limit = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
            let length = list.len() as u64;
            if limit("minItems").is_some_and(|least| length < least)
                || limit("maxItems").is_some_and(|most| length > most)
            {
                wrong(format!("{length} items"));
            }
            if let Some(items) = schema.get("items") {
                for (index, item) in list.iter().enumerate() {
                    self.check(items, item, &format!("{at}[{index}]"), errors);
                }
            }
        }
        if let Some(object) = value.as_object() {
            self.check_object(schema, object, at, errors);
        }
        if let Some(reference) = schema.get("$ref") {
            let name = reference
                .as_str()
                .and_then(|text| text.strip_prefix("#/$defs/"));
            let target = &self.root["$defs"][name.expect("a reference to a definition")];
            assert!(target.is_object(), "{reference} leads nowhere");
            self.check(target, value, at, errors);
        }
        if let Some(choices) = schema.get("anyOf").and_then(Value::as_array) {
            let tries = choices.iter().map(|choice| {
                let mut errors = Vec::new();
                self.check(choice, value, at, &mut errors);
                errors
            });
            // The errors of the choice that is nearest.
            errors.extend(tries.min_by_key(Vec::len).unwrap_or_default());
        }
    }

    fn check_object(
        &self,
        schema: &Value,
        object: &Map<String, Value>,
        at: &str,
        errors: &mut Vec<String>,
    ) {
        for name in schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let name = name.as_str().expect("a name");
            if !object.contains_key(name) {
                errors.push(format!("{at}: it lacks '{name}'"));
            }
        }
        let properties = schema.get("properties");
        let others = schema.get("additionalProperties");
        if properties.is_none() && others.is_none() {
            return;
        }
        for (name, value) in object {
            let at = format!("{at}/{name}");
            match properties.and_then(|known| known.get(name)).or(others) {
                Some(schema) => self.check(schema, value, &at, errors),
                None => errors.push(format!("{at}: it is not described")),
            }
        }
    }
}

fn is_of(name: &Value, value: &Value) -> bool {
    match name.as_str().expect("a type's name") {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("'{other}' is no type"),
    }
}

fn known_keywords(schema: &Value, at: &str) {
    for (keyword, value) in schema.as_object().expect("a schema is an object") {
        let at = format!("{at}/{keyword}");
        match keyword.as_str() {
            "$schema" | "title" | "description" | "$ref" | "const" | "enum" | "type"
            | "required" | "minimum" | "maximum" | "minItems" | "maxItems" => {}
            "items" | "additionalProperties" => known_keywords(value, &at),
            "properties" | "$defs" => {
                for (name, schema) in value.as_object().expect("schemas by name") {
                    known_keywords(schema, &format!("{at}/{name}"));
                }
            }
            "anyOf" => {
                for schema in value.as_array().expect("a list of schemas") {
                    known_keywords(schema, &at);
                }
            }
            _ => panic!("{at} is not known"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Schema {
        let part = json!({
            "type": "object",
            "required": ["n"],
            "properties": {
                "n": { "type": "integer", "minimum": 1, "maximum": 3 },
                "s": { "type": ["string", "null"] },
                "k": { "enum": ["a", "b"] },
                "l": { "type": "array", "maxItems": 1, "items": { "$ref": "#/$defs/part" } },
                "m": { "additionalProperties": { "type": "boolean" } },
                "c": { "anyOf": [{ "type": "null" }, { "const": 7 }] },
            },
        });
        Schema::new(&json!({ "$defs": { "part": part } }).to_string())
    }

    #[test]
    fn what_fits_has_no_errors() {
        let value =
            json!({ "n": 1, "s": null, "k": "a", "l": [{ "n": 3 }], "m": { "x": true }, "c": 7 });
        assert_eq!(schema().errors("part", &value), Vec::<String>::new());
    }

    #[test]
    fn what_does_not_fit_has_an_error_with_its_place() {
        for (value, at) in [
            (json!([]), ": [] is not of type"),
            (json!({}), ": it lacks 'n'"),
            (json!({ "n": 0 }), "/n: 0 against minimum"),
            (json!({ "n": 4 }), "/n: 4 against maximum"),
            (json!({ "n": 1.5 }), "/n: 1.5 is not of type"),
            (json!({ "n": 1, "s": 2 }), "/s: 2 is not of type"),
            (json!({ "n": 1, "k": "c" }), "/k: \"c\" is none of"),
            (json!({ "n": 1, "l": [{ "n": 9 }] }), "/l[0]/n: 9 against"),
            (
                json!({ "n": 1, "l": [{ "n": 1 }, { "n": 1 }] }),
                "/l: 2 items",
            ),
            (json!({ "n": 1, "m": { "x": 1 } }), "/m/x: 1 is not of type"),
            (json!({ "n": 1, "c": 8 }), "/c: 8 is not"),
            (json!({ "n": 1, "new": 8 }), "/new: it is not described"),
        ] {
            let errors = schema().errors("part", &value);
            assert!(
                errors.iter().any(|error| error.starts_with(at)),
                "{value}: {errors:?}"
            );
        }
    }

    #[test]
    #[should_panic(expected = "#/pattern is not known")]
    fn a_schema_that_would_not_be_checked_is_no_schema() {
        Schema::new(r#"{ "pattern": "a*" }"#);
    }
}
