//! What the user set, with types and defaults.
//!
//! A policy lists its settings once; [`describe`] shows them to the host, and [`Settings`] reads
//! their values. The host has already refused names that are not in the list.

use std::ops::RangeInclusive;

pub use tightfit_common::bytes::parse_bytes;

use crate::patterns::Patterns;
use crate::{Device, Refusal, Request, Setting};

/// One setting that a policy understands.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// As in `--set name=value`.
    pub name: &'static str,
    /// The value when the user gives none.
    pub default: &'static str,
    /// One sentence for the user.
    pub help: &'static str,
}

impl Spec {
    /// Returns a setting in one line.
    pub const fn new(name: &'static str, default: &'static str, help: &'static str) -> Spec {
        Spec {
            name,
            default,
            help,
        }
    }
}

/// The setting `reserve`, by default `0`: the bytes that are left free on every device.
pub const RESERVE: Spec = Spec::new(
    "reserve",
    "0",
    "Bytes left free on every device, for example 2GiB.",
);

/// Returns the list as a [`Description`](crate::Description) holds it.
pub fn describe(specs: &[Spec]) -> Vec<Setting> {
    let setting = |spec: &Spec| Setting {
        name: spec.name.into(),
        default: spec.default.into(),
        help: spec.help.into(),
    };
    specs.iter().map(setting).collect()
}

/// The values of a request.
///
/// Every getter takes the name of a setting in the list, and panics for another: that is a mistake
/// in the policy, not the user's. A value that cannot be used is a refusal that names the setting,
/// the value and what is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    specs: &'a [Spec],
    given: &'a [(String, String)],
    devices: &'a [Device],
}

impl<'a> Settings<'a> {
    /// Returns the values that `request` gives to the settings in `specs`.
    pub fn new(specs: &'a [Spec], request: &'a Request) -> Settings<'a> {
        Settings {
            specs,
            given: &request.settings,
            devices: &request.devices,
        }
    }

    /// Returns the text itself.
    pub fn text(&self, name: &str) -> &'a str {
        if let Some((_, value)) = self.given.iter().find(|(given, _)| given == name) {
            return value.trim();
        }
        match self.specs.iter().find(|spec| spec.name == name) {
            Some(spec) => spec.default,
            None => panic!("the policy has no setting `{name}`"),
        }
    }

    /// `true` or `false`, also written `yes`, `on`, `1` and `no`, `off`, `0`.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn bool(&self, name: &str) -> Result<bool, Refusal> {
        match self.text(name).to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Ok(true),
            "false" | "no" | "off" | "0" => Ok(false),
            _ => Err(self.bad(name, "true or false")),
        }
    }

    /// Returns a whole number within a range.
    ///
    /// # Errors
    /// When it is no number or outside the range.
    pub fn u32(&self, name: &str, allowed: RangeInclusive<u32>) -> Result<u32, Refusal> {
        match self.text(name).parse() {
            Ok(value) if allowed.contains(&value) => Ok(value),
            _ => {
                let (low, high) = (allowed.start(), allowed.end());
                Err(self.bad(name, &format!("a whole number from {low} to {high}")))
            }
        }
    }

    /// Returns a number of bytes, as [`parse_bytes`] reads it.
    ///
    /// # Errors
    /// When it is none.
    pub fn bytes(&self, name: &str) -> Result<u64, Refusal> {
        parse_bytes(self.text(name))
            .map_err(|_| self.bad(name, "a number of bytes such as 2GiB, 512MiB or 1000000"))
    }

    /// Returns the index of a device of the request, which is given by its index or its name.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn device(&self, name: &str) -> Result<usize, Refusal> {
        let text = self.text(name);
        let index = match text.parse() {
            Ok(index) => Some(index).filter(|&index| index < self.devices.len()),
            Err(_) => self.devices.iter().position(|device| device.name == text),
        };
        index.ok_or_else(|| {
            let names: Vec<&str> = self.devices.iter().map(|d| d.name.as_str()).collect();
            self.bad(
                name,
                &format!("a device ({}) or its index", names.join(", ")),
            )
        })
    }

    /// Returns one of a few words.
    ///
    /// # Errors
    /// When it is another.
    pub fn choice(&self, name: &str, allowed: &[&'static str]) -> Result<&'static str, Refusal> {
        let text = self.text(name);
        let found = allowed.iter().find(|word| word.eq_ignore_ascii_case(text));
        found
            .copied()
            .ok_or_else(|| self.bad(name, &allowed.join(" or ")))
    }

    /// Reads patterns separated by commas.
    pub fn patterns(&self, name: &str) -> Patterns {
        Patterns::parse(self.text(name))
    }

    /// Returns the refusal for a value that cannot be used.
    pub fn bad(&self, name: &str, allowed: &str) -> Refusal {
        let value = self.text(name);
        Refusal::bad_setting(format!(
            "setting `{name}` is `{value}`: it must be {allowed}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RefusalReason;

    const SPECS: &[Spec] = &[
        Spec {
            name: "reserve",
            default: "1GiB",
            help: "Bytes left free.",
        },
        Spec {
            name: "double",
            default: "false",
            help: "Whether.",
        },
        Spec {
            name: "block",
            default: "64",
            help: "Elements.",
        },
        Spec {
            name: "experts",
            default: "nf4",
            help: "Format.",
        },
        Spec {
            name: "skip",
            default: "",
            help: "Modules.",
        },
    ];

    fn request(settings: &[(&str, &str)]) -> Request {
        let none = Request::new(vec![], vec![]);
        let set = |request: Request, &(name, value): &(&str, &str)| request.set(name, value);
        settings.iter().fold(none, set)
    }

    #[test]
    fn bytes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("1000", Some(1000)),
            ("2GiB", Some(2 << 30)),
            ("2 gib", Some(2 << 30)),
            ("1.5GiB", Some(3 << 29)),
            ("0.1KB", Some(100)),
            ("512M", Some(512 << 20)),
            ("16Ti", Some(16 << 40)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("16777216TiB", None),
            ("99999999999999999999GiB", None),
            ("", None),
            ("GiB", None),
            (".", None),
            ("1.", None),
            (".5GiB", None),
            ("1.2.3", None),
            ("-1", None),
            ("1 GiB more", None),
            ("1e9", None),
            ("½GiB", None),
        ] {
            assert_eq!(parse_bytes(text).ok(), bytes, "{text}");
        }
    }

    #[test]
    fn defaults_hold_until_a_value_is_given() {
        let none = request(&[]);
        let settings = Settings::new(SPECS, &none);
        assert_eq!(settings.bytes("reserve"), Ok(1 << 30));
        assert_eq!(settings.bool("double"), Ok(false));
        assert_eq!(settings.u32("block", 32..=4096), Ok(64));
        assert_eq!(settings.choice("experts", &["nf4", "stored"]), Ok("nf4"));
        assert!(settings.patterns("skip").is_empty());

        let given = request(&[("double", "On"), ("experts", "Stored"), ("skip", "visual")]);
        let settings = Settings::new(SPECS, &given);
        assert_eq!(settings.bool("double"), Ok(true));
        assert_eq!(settings.choice("experts", &["nf4", "stored"]), Ok("stored"));
        assert!(settings.patterns("skip").matches("model.visual.x.weight"));
    }

    #[test]
    fn a_bad_value_is_refused_by_name() {
        let given = request(&[
            ("reserve", "much"),
            ("double", "maybe"),
            ("block", "16"),
            ("experts", "fp4"),
        ]);
        let settings = Settings::new(SPECS, &given);
        let refusals = [
            (
                settings.bytes("reserve").unwrap_err(),
                ["reserve", "much", "2GiB"],
            ),
            (
                settings.bool("double").unwrap_err(),
                ["double", "maybe", "true or false"],
            ),
            (
                settings.u32("block", 32..=4096).unwrap_err(),
                ["block", "16", "32 to 4096"],
            ),
            (
                settings.choice("experts", &["nf4", "stored"]).unwrap_err(),
                ["experts", "fp4", "nf4 or stored"],
            ),
        ];
        for (refusal, words) in refusals {
            assert_eq!(refusal.reason, RefusalReason::BadSetting);
            for word in words {
                assert!(
                    refusal.message.contains(word),
                    "{} lacks {word}",
                    refusal.message
                );
            }
        }
    }

    #[test]
    #[should_panic(expected = "no setting `reserv`")]
    fn a_name_that_is_not_in_the_list_is_the_authors_mistake() {
        let none = request(&[]);
        Settings::new(SPECS, &none).text("reserv");
    }

    #[test]
    fn a_device_is_named_or_counted() {
        let device = |name: &str| Device::new(name, 1000);
        let specs = [Spec::new("device", "0", "Where.")];
        let index = |text: &str| {
            let mut request = request(&[("device", text)]);
            request.devices = vec![device("sim:0"), device("cpu")];
            Settings::new(&specs, &request).device("device")
        };
        assert_eq!((index("0"), index("1")), (Ok(0), Ok(1)));
        assert_eq!((index("sim:0"), index(" cpu ")), (Ok(0), Ok(1)));
        for text in ["2", "-1", "sim:1", ""] {
            let refusal = index(text).unwrap_err();
            assert_eq!(refusal.reason, RefusalReason::BadSetting);
            assert!(refusal.message.contains("sim:0, cpu"), "{refusal:?}");
        }
        let mut request = request(&[]);
        request.devices = vec![device("sim:0")];
        assert_eq!(request.check_room(0, "it", 1000), Ok(()));
        let refusal = request.check_room(0, "it", 1001).unwrap_err();
        assert_eq!(refusal.missing_bytes, Some(1));
        assert_eq!(refusal.message, "it takes 0.01 MiB, sim:0 has 0.00 MiB");
    }
}
