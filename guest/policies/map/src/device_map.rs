//! A device map as it is written.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// A device as a map names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Number(u64),
    Name(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Number(number) => write!(f, "{number}"),
            Target::Name(name) => write!(f, "\"{name}\""),
        }
    }
}

/// From the beginnings of names to devices.
#[derive(Debug)]
pub(crate) struct DeviceMap(pub(crate) BTreeMap<String, Target>);

impl DeviceMap {
    /// Reads JSON. Nothing but the entries is ever built, however deep or wide the text is.
    ///
    /// # Errors
    /// Where and why it is no device map.
    pub(crate) fn parse(json: &str) -> Result<DeviceMap, serde_json::Error> {
        serde_json::from_str(json)
    }
}

impl<'de> Deserialize<'de> for DeviceMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DeviceMap, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = DeviceMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from module names to devices")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DeviceMap, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((module, target)) = map.next_entry::<String, Target>()? {
                    if entries.contains_key(&module) {
                        return Err(A::Error::custom(format!("\"{module}\" is there twice")));
                    }
                    entries.insert(module, target);
                }
                Ok(DeviceMap(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Target, D::Error> {
        struct OneTarget;

        impl Visitor<'_> for OneTarget {
            type Value = Target;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a device's number or name")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Target, E> {
                Ok(Target::Number(number))
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<Target, E> {
                Ok(Target::Name(name.to_owned()))
            }
        }

        deserializer.deserialize_any(OneTarget)
    }
}
