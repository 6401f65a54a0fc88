//! Values as people write them in a scenario file.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use tightfit::types::{Bytes, DType, parse_bytes};

/// One value, or a list of them.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct OneOrMany<T>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Values<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one value or a list")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(OneOrMany(vec![T::deserialize(StrDeserializer::new(text))?]))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let one = T::deserialize(MapAccessDeserializer::new(map))?;
                Ok(OneOrMany(vec![one]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element()? {
                    values.push(value);
                }
                if values.is_empty() {
                    return Err(A::Error::custom("an empty list"));
                }
                Ok(OneOrMany(values))
            }
        }
        deserializer.deserialize_any(Values(PhantomData))
    }
}

/// A table, or a string that stands for one.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TextOr<T>(pub(super) T);

impl<'de, T> Deserialize<'de> for TextOr<T>
where
    T: Deserialize<'de> + FromStr<Err: fmt::Display>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value<T>(PhantomData<T>);
        impl<'de, T> Visitor<'de> for Value<T>
        where
            T: Deserialize<'de> + FromStr<Err: fmt::Display>,
        {
            type Value = TextOr<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a table")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                text.parse().map(TextOr).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(TextOr)
            }
        }
        deserializer.deserialize_any(Value(PhantomData))
    }
}

/// What is read from a string by `FromStr`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Parsed<T>(pub(super) T);

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Parsed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Parsed).map_err(D::Error::custom)
    }
}

/// An element type: `bf16`, `f32`, `i64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DTypeName(pub(super) DType);

impl<'de> Deserialize<'de> for DTypeName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        DType::ALL
            .into_iter()
            .find(|dtype| dtype.to_string() == text.to_ascii_lowercase())
            .map(DTypeName)
            .ok_or_else(|| {
                D::Error::custom(format!(
                    "'{text}' is not an element type such as bf16 or f32"
                ))
            })
    }
}

/// Settings in the order of the file: of several format rules the last one counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settings(pub(super) Vec<(String, String)>);

impl Settings {
    /// These, except where `own` has another value, and what else `own` has.
    pub(super) fn overridden_by(&self, own: &Settings) -> Vec<(String, String)> {
        let is_own = |name: &str| own.0.iter().any(|(other, _)| other == name);
        let kept = self.0.iter().filter(|(name, _)| !is_own(name));
        kept.chain(&own.0).cloned().collect()
    }
}

impl<'de> Deserialize<'de> for Settings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Table;
        impl<'de> Visitor<'de> for Table {
            type Value = Settings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of settings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Settings, A::Error> {
                let mut settings = Vec::new();
                while let Some((name, SettingValue(value))) = map.next_entry()? {
                    settings.push((name, value));
                }
                Ok(Settings(settings))
            }
        }
        deserializer.deserialize_map(Table)
    }
}

/// A setting's value, as the text that `--set` would give.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SettingValue(String);

impl<'de> Deserialize<'de> for SettingValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;
        impl<'de> Visitor<'de> for Value {
            type Value = SettingValue;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a number, true, false or a list of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<SettingValue, E> {
                Ok(SettingValue(text.to_owned()))
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<SettingValue, E> {
                Ok(SettingValue(value.to_string()))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<SettingValue, E> {
                Ok(SettingValue(value.to_string()))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<SettingValue, E> {
                Ok(SettingValue(value.to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<SettingValue, A::Error> {
                let mut values: Vec<String> = Vec::new();
                while let Some(value) = list.next_element()? {
                    values.push(value);
                }
                Ok(SettingValue(values.join(",")))
            }
        }
        deserializer.deserialize_any(Value)
    }
}

/// A number with a unit that says how it is written and shown.
pub(super) trait Quantity: Copy {
    /// What is wanted.
    const EXPECTING: &'static str;
    /// Reads it.
    fn parse(text: &str) -> Result<u64, String>;
    /// Shows it, exactly.
    fn show(value: u64) -> String;
}

/// Bytes: `"1.5GiB"` or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size;

impl Quantity for Size {
    const EXPECTING: &'static str = "a number of bytes, or a size such as \"24GiB\"";

    fn parse(text: &str) -> Result<u64, String> {
        parse_bytes(text)
    }

    fn show(value: u64) -> String {
        match value {
            0..1024 => Bytes(value).to_string(),
            // Rounded, two sizes that differ can look alike.
            _ => format!("{} ({value} B)", Bytes(value)),
        }
    }
}

/// A number of things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count;

impl Quantity for Count {
    const EXPECTING: &'static str = "a number";

    fn parse(text: &str) -> Result<u64, String> {
        Err(format!("'{text}' is not a number without quotes"))
    }

    fn show(value: u64) -> String {
        value.to_string()
    }
}

/// A value of a quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Amount<Q>(pub(super) u64, PhantomData<Q>);

impl<'de, Q: Quantity> Deserialize<'de> for Amount<Q> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value<Q>(PhantomData<Q>);
        impl<Q: Quantity> Visitor<'_> for Value<Q> {
            type Value = Amount<Q>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(Q::EXPECTING)
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
                let value =
                    u64::try_from(value).map_err(|_| E::custom(format!("{value} is negative")))?;
                Ok(Amount(value, PhantomData))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
                Ok(Amount(value, PhantomData))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let value = Q::parse(text).map_err(E::custom)?;
                Ok(Amount(value, PhantomData))
            }
        }
        deserializer.deserialize_any(Value(PhantomData))
    }
}

/// Bounds of a quantity: a table of them, or the exact value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range<Q> {
    at_least: Option<Amount<Q>>,
    at_most: Option<Amount<Q>>,
    exactly: Option<Amount<Q>>,
}

impl<Q: Quantity> Range<Q> {
    /// Whether the value is inside.
    pub(super) fn holds(&self, value: u64) -> bool {
        self.at_least.is_none_or(|bound| value >= bound.0)
            && self.at_most.is_none_or(|bound| value <= bound.0)
            && self.exactly.is_none_or(|bound| value == bound.0)
    }
}

impl<Q: Quantity> fmt::Display for Range<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bounds = [
            ("at least", self.at_least),
            ("at most", self.at_most),
            ("exactly", self.exactly),
        ];
        let shown: Vec<String> = bounds
            .into_iter()
            .filter_map(|(word, bound)| Some(format!("{word} {}", Q::show(bound?.0))))
            .collect();
        f.write_str(&shown.join(" and "))
    }
}

impl<'de, Q: Quantity> Deserialize<'de> for Range<Q> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case", bound = "Q: Quantity")]
        struct Bounds<Q> {
            at_least: Option<Amount<Q>>,
            at_most: Option<Amount<Q>>,
            exactly: Option<Amount<Q>>,
        }

        struct Value<Q>(PhantomData<Q>);
        impl<'de, Q: Quantity> Visitor<'de> for Value<Q> {
            type Value = Range<Q>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(
                    f,
                    "{}, or a table with at-least, at-most or exactly",
                    Q::EXPECTING
                )
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
                let value =
                    u64::try_from(value).map_err(|_| E::custom(format!("{value} is negative")))?;
                Ok(exactly(value))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(exactly(Q::parse(text).map_err(E::custom)?))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let bounds = Bounds::deserialize(MapAccessDeserializer::new(map))?;
                let Bounds {
                    at_least,
                    at_most,
                    exactly,
                } = bounds;
                if at_least.is_none() && at_most.is_none() && exactly.is_none() {
                    return Err(A::Error::custom("give at-least, at-most or exactly"));
                }
                Ok(Range {
                    at_least,
                    at_most,
                    exactly,
                })
            }
        }
        deserializer.deserialize_any(Value(PhantomData))
    }
}

fn exactly<Q>(value: u64) -> Range<Q> {
    Range {
        at_least: None,
        at_most: None,
        exactly: Some(Amount(value, PhantomData)),
    }
}

/// The factor between two amounts: finite, at least 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ratio(pub(super) f64);

impl<'de> Deserialize<'de> for Ratio {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = f64::deserialize(deserializer)?;
        if value.is_finite() && value >= 1.0 {
            Ok(Ratio(value))
        } else {
            Err(D::Error::custom(format!(
                "{value} is not a ratio of 1 or more"
            )))
        }
    }
}
