//! How a component and this host can fail to be made for each other.

/// What a component imports and this host does not have, or the other way round.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// It imports something that nobody here has heard of.
    #[error("it imports {import}, which this host does not have")]
    Import {
        /// The import.
        import: String,
    },
    /// It imports an interface of WASI.
    #[error(
        "it imports {import}, and there is no WASI here: build it without, or give it one with nothing in it (`--wasi empty`)"
    )]
    Wasi {
        /// The interface.
        import: String,
    },
    /// It imports another version of an interface.
    #[error("it imports {import}, this host has {have}: {}", older_or_newer(*newer))]
    ImportVersion {
        /// The import with its version.
        import: String,
        /// The version that is here.
        have: String,
        /// Whether the component's is the later one.
        newer: bool,
    },
    /// The interface is here, but a function of it is not, or is another.
    #[error("it imports {import}, which this host has in another form: {reason}")]
    ImportType {
        /// The interface.
        import: String,
        /// What differs.
        reason: String,
    },
    /// It does not export what it would be asked through.
    #[error("it does not export {export}")]
    Export {
        /// The interface that it lacks.
        export: String,
    },
    /// It exports another version of what it would be asked through.
    #[error("it exports {export}, this host asks through {want}: {}", older_or_newer(*newer))]
    ExportVersion {
        /// The export with its version.
        export: String,
        /// The version that is asked for.
        want: String,
        /// Whether the component's is the later one.
        newer: bool,
    },
    /// It exports the interface, but a function of it is missing or another.
    #[error("its {export} is not what this host asks for: {reason}")]
    ExportType {
        /// The interface.
        export: String,
        /// What differs.
        reason: String,
    },
}

#[cfg(feature = "compile")]
impl Mismatch {
    /// Returns everything in it that the guest may have written.
    pub(super) fn texts(&mut self) -> impl Iterator<Item = &mut String> {
        let (one, other) = match self {
            Mismatch::Import { import } | Mismatch::Wasi { import } => (import, None),
            Mismatch::ImportVersion { import, have, .. } => (import, Some(have)),
            Mismatch::ImportType { import, reason } => (import, Some(reason)),
            Mismatch::Export { export } => (export, None),
            Mismatch::ExportVersion { export, want, .. } => (export, Some(want)),
            Mismatch::ExportType { export, reason } => (export, Some(reason)),
        };
        [Some(one), other].into_iter().flatten()
    }
}

fn older_or_newer(newer: bool) -> &'static str {
    match newer {
        true => "it is for a newer release",
        false => "it is for an older release",
    }
}
