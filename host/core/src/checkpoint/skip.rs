//! JSON that is of no interest: skipped value by value, so that skipping much can be stopped.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::cancel::Watch;

/// Counts a value of this many bytes, for visitors. What it says goes through serde as text;
/// [`Watch::has_stopped`] tells it from other errors.
pub(super) fn counted<E: de::Error>(watch: &mut Watch<'_>, bytes: usize) -> Result<(), E> {
    watch.item(bytes).map_err(E::custom)
}

/// Skips any value. What is nested deeper than serde_json goes is an error.
pub(super) struct Skip<'a, 'p>(pub(super) &'a mut Watch<'p>);

impl<'de> DeserializeSeed<'de> for Skip<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Skip<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        counted(self.0, 0)
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<(), E> {
        counted(self.0, 0)
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<(), E> {
        counted(self.0, 0)
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<(), E> {
        counted(self.0, 0)
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<(), E> {
        counted(self.0, 0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<(), E> {
        counted(self.0, text.len())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        counted(self.0, 0)?;
        while seq.next_element_seed(Skip(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        counted(self.0, 0)?;
        while map.next_key_seed(Skip(self.0))?.is_some() {
            map.next_value_seed(Skip(self.0))?;
        }
        Ok(())
    }
}
