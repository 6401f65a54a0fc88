//! Which interfaces guests are given and asked through, and whether a component is made for them.

use semver::Version;

#[cfg(feature = "compile")]
use crate::sandbox::{Mismatch, Wasi};
use crate::wit::{bindings, program};

/// What a kind of guest imports at most, and exports at least.
#[derive(Debug)]
pub(crate) struct World {
    /// Interfaces with their versions, for example `tightfit:host/log@0.1.0`.
    #[cfg(feature = "compile")]
    pub(crate) imports: &'static [&'static str],
    pub(crate) exports: &'static [&'static str],
    /// The same as wit-component encodes it, with types and functions: for core modules.
    pub(crate) component_type: &'static [u8],
    /// What it may export besides.
    pub(crate) more: Option<More>,
}

/// An interface that a guest may export or not, and is asked through if it does.
#[derive(Debug)]
pub(crate) struct More {
    pub(crate) export: &'static str,
    /// The world with this export.
    pub(crate) component_type: &'static [u8],
}

/// The interface that a policy exports.
pub(crate) const PLANNER: &str = "tightfit:host/planner@0.1.0";

/// The interface that a policy exports besides if it cuts tensors.
pub(crate) const SLICER: &str = "tightfit:host/slicer@0.1.0";

/// The interface that a program exports.
pub(crate) const RUN: &str = "tightfit:host/run@0.1.0";

/// The versions of WASI of which there is an empty one.
#[cfg(feature = "compile")]
const WASI: &str = "0.2.0";

impl World {
    /// What a policy may import and has to export.
    pub(crate) const POLICY: World = World {
        #[cfg(feature = "compile")]
        imports: &[
            "tightfit:host/types@0.1.0",
            "tightfit:host/sizing@0.1.0",
            "tightfit:host/log@0.1.0",
            "tightfit:host/slices@0.1.0",
        ],
        exports: &[PLANNER],
        component_type: bindings::COMPONENT_TYPE,
        more: Some(More {
            export: SLICER,
            component_type: bindings::slicing::COMPONENT_TYPE,
        }),
    };

    /// What a program may import and has to export.
    pub(crate) const PROGRAM: World = World {
        #[cfg(feature = "compile")]
        imports: &[
            "tightfit:host/types@0.1.0",
            "tightfit:host/sizing@0.1.0",
            "tightfit:host/log@0.1.0",
            "tightfit:host/errors@0.1.0",
            "tightfit:host/devices@0.1.0",
            "tightfit:host/buffers@0.1.0",
            "tightfit:host/nf4@0.1.0",
            "tightfit:host/checkpoints@0.1.0",
            "tightfit:host/models@0.1.0",
            "tightfit:host/slices@0.1.0",
            "tightfit:host/sliced-models@0.1.0",
            "tightfit:host/linear@0.1.0",
            "tightfit:host/transformer@0.1.0",
            "tightfit:host/output@0.1.0",
        ],
        exports: &[RUN],
        component_type: program::bindings::COMPONENT_TYPE,
        more: None,
    };

    /// Returns how this host calls what a core module exports of another version that matches its own.
    pub(crate) fn export_here(&self, name: &str) -> Option<String> {
        let (interface, rest) = name.split_once('@')?;
        let (version, function) = rest.split_once('#')?;
        let known = interface.strip_prefix("cabi_post_").unwrap_or(interface);
        let want = self.export_version(known)?;
        (version != want && is_compatible(version, want))
            .then(|| format!("{interface}@{want}#{function}"))
    }

    /// Returns the version of an interface that guests are asked through.
    fn export_version(&self, interface: &str) -> Option<&'static str> {
        let more = self.more.as_ref().map(|more| more.export);
        find(self.exports, interface).or_else(|| find(more.as_slice(), interface))
    }

    /// Returns the world as a core module is described that exports functions of these names, as a
    /// module has them: `tightfit:host/planner@0.1.0#plan`.
    pub(crate) fn component_type_of<'a>(
        &self,
        mut names: impl Iterator<Item = &'a str>,
    ) -> &'static [u8] {
        match &self.more {
            Some(more) if names.any(|name| split(name).0 == split(more.export).0) => {
                more.component_type
            }
            _ => self.component_type,
        }
    }
}

#[cfg(feature = "compile")]
impl World {
    /// Checks that this host has what is imported under this name.
    pub(crate) fn check_import(&self, name: &str, wasi: Wasi) -> Result<(), Mismatch> {
        let import = name.to_owned();
        let (interface, version) = split(name);
        let other_version = |have: &str| Mismatch::ImportVersion {
            import: import.clone(),
            have: have.to_owned(),
            newer: is_newer(version, have),
        };
        if interface.starts_with("wasi:") {
            return match wasi {
                Wasi::None => Err(Mismatch::Wasi { import }),
                Wasi::Empty if is_compatible(version, WASI) => Ok(()),
                Wasi::Empty => Err(other_version(WASI)),
            };
        }
        match find(self.imports, interface) {
            Some(have) if is_compatible(version, have) => Ok(()),
            Some(have) => Err(other_version(have)),
            None => Err(Mismatch::Import { import }),
        }
    }

    /// Checks that an export of this name is no other version of what is asked for.
    pub(crate) fn check_export(&self, name: &str) -> Result<(), Mismatch> {
        let (interface, version) = split(name);
        match self.export_version(interface) {
            Some(want) if !is_compatible(version, want) => Err(Mismatch::ExportVersion {
                export: name.to_owned(),
                want: want.to_owned(),
                newer: is_newer(version, want),
            }),
            _ => Ok(()),
        }
    }

    /// Checks that all that is asked for is among the exports, whatever their versions.
    pub(crate) fn check_exports<'a>(
        &self,
        names: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<(), Mismatch> {
        let is_there = |wanted: &str| names.clone().any(|name| split(name).0 == split(wanted).0);
        match self.exports.iter().find(|wanted| !is_there(wanted)) {
            Some(&missing) => Err(Mismatch::Export {
                export: missing.to_owned(),
            }),
            None => Ok(()),
        }
    }
}

/// Returns an interface and its version, which may be missing.
fn split(name: &str) -> (&str, &str) {
    name.split_once('@').unwrap_or((name, ""))
}

/// Returns the version that a list has of an interface.
fn find(list: &[&'static str], interface: &str) -> Option<&'static str> {
    list.iter()
        .map(|name| split(name))
        .find(|(known, _)| *known == interface)
        .map(|(_, version)| version)
}

/// Returns whether one can stand for the other, by the rules by which wasmtime links.
fn is_compatible(version: &str, have: &str) -> bool {
    match (Version::parse(version), Version::parse(have)) {
        (Ok(version), Ok(have)) => {
            let track = |v: &Version| match (v.major, v.minor) {
                (0, 0) => (0, 0, v.patch),
                (0, minor) => (0, minor, 0),
                (major, _) => (major, 0, 0),
            };
            version.pre.is_empty() && have.pre.is_empty() && track(&version) == track(&have)
        }
        _ => version == have,
    }
}

#[cfg(feature = "compile")]
fn is_newer(version: &str, have: &str) -> bool {
    match (Version::parse(version), Version::parse(have)) {
        (Ok(version), Ok(have)) => version > have,
        _ => false,
    }
}

#[cfg(all(test, feature = "compile"))]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compatible_as_semver_says() {
        for (version, have, compatible) in [
            ("0.1.0", "0.1.0", true),
            ("0.1.7", "0.1.0", true),
            ("0.2.0", "0.1.0", false),
            ("0.0.1", "0.0.2", false),
            ("1.4.0", "1.0.0", true),
            ("2.0.0", "1.0.0", false),
            ("0.1.0-rc1", "0.1.0", false),
            ("", "0.1.0", false),
            ("new", "0.1.0", false),
        ] {
            assert_eq!(is_compatible(version, have), compatible, "{version} {have}");
        }
    }

    #[test]
    fn each_mismatch_names_the_interface_and_both_versions() {
        let world = World {
            imports: &["tightfit:host/log@0.1.0"],
            exports: &["tightfit:host/planner@0.1.0"],
            component_type: &[1],
            more: Some(More {
                export: "tightfit:host/slicer@0.1.0",
                component_type: &[2],
            }),
        };
        let import = |name, wasi| world.check_import(name, wasi).unwrap_err().to_string();
        assert_eq!(
            import("tightfit:host/log@0.2.0", Wasi::None),
            "it imports tightfit:host/log@0.2.0, this host has 0.1.0: it is for a newer release"
        );
        assert_eq!(
            import("tightfit:host/log@0.0.9", Wasi::None),
            "it imports tightfit:host/log@0.0.9, this host has 0.1.0: it is for an older release"
        );
        let wasi = import("wasi:cli/environment@0.2.6", Wasi::None);
        assert!(wasi.contains("--wasi empty"), "{wasi}");
        let wasi = import("wasi:cli/environment@0.3.0", Wasi::Empty);
        assert!(wasi.contains("this host has 0.2.0"), "{wasi}");
        assert_eq!(
            import("env", Wasi::Empty),
            "it imports env, which this host does not have"
        );
        assert!(
            world
                .check_import("tightfit:host/log@0.1.3", Wasi::None)
                .is_ok()
        );
        assert!(
            world
                .check_import("wasi:io/streams@0.2.6", Wasi::Empty)
                .is_ok()
        );
        let export = world.check_export("tightfit:host/planner@1.0.0");
        assert_eq!(
            export.unwrap_err().to_string(),
            "it exports tightfit:host/planner@1.0.0, this host asks through 0.1.0: it is for a newer release"
        );
        assert!(world.check_export("tightfit:host/planner@0.1.9").is_ok());
        assert!(world.check_export("something:else/here@3.0.0").is_ok());
        for (name, here) in [
            (
                "tightfit:host/planner@0.1.9#plan",
                Some("tightfit:host/planner@0.1.0#plan"),
            ),
            (
                "cabi_post_tightfit:host/planner@0.1.9#plan",
                Some("cabi_post_tightfit:host/planner@0.1.0#plan"),
            ),
            ("tightfit:host/planner@0.1.0#plan", None),
            ("tightfit:host/planner@0.2.0#plan", None),
            (
                "tightfit:host/slicer@0.1.9#plan-slices",
                Some("tightfit:host/slicer@0.1.0#plan-slices"),
            ),
            ("something:else/here@0.1.9#plan", None),
            ("memory", None),
        ] {
            assert_eq!(world.export_here(name).as_deref(), here, "{name}");
        }
        let newer = world.check_export("tightfit:host/slicer@0.2.0");
        assert!(newer.unwrap_err().to_string().contains("slicer@0.2.0"));
        let described = |names: &[&'static str]| world.component_type_of(names.iter().copied());
        assert_eq!(
            described(&["memory", "tightfit:host/planner@0.1.0#plan"]),
            [1]
        );
        let both = [
            "tightfit:host/planner@0.1.0#plan",
            "tightfit:host/slicer@0.1.4#plan-slices",
        ];
        assert_eq!(described(&both), [2]);
        assert_eq!(described(&["tightfit:host/slicers@0.1.0#plan-slices"]), [1]);
        let missing = world.check_exports(["run", "tightfit:host/log@0.1.0"].into_iter());
        assert_eq!(
            missing.unwrap_err(),
            Mismatch::Export {
                export: "tightfit:host/planner@0.1.0".to_owned()
            }
        );
    }
}
