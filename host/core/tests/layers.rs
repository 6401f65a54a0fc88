//! Modules import in one direction: the picture in ARCHITECTURE.md.

use std::fs;
use std::path::Path;

/// Every module, each with those that it may import beside itself. What is to the left of a module
/// knows nothing of it.
const LAYERS: [(&str, &[&str]); 22] = [
    ("types", &[]),
    ("cancel", &[]),
    ("progress", &[]),
    ("text", &[]),
    ("windows", &[]),
    ("status", &[]),
    ("memory", &["types"]),
    ("device", &["types", "status", "memory", "windows"]),
    (
        "checkpoint",
        &["types", "cancel", "text", "status", "windows"],
    ),
    (
        "synth",
        &[
            "types",
            "cancel",
            "progress",
            "status",
            "checkpoint",
            "windows",
        ],
    ),
    (
        "hub",
        &["cancel", "text", "status", "checkpoint", "windows"],
    ),
    (
        "policy",
        &["types", "text", "status", "device", "checkpoint"],
    ),
    (
        "plan",
        &[
            "types",
            "cancel",
            "status",
            "memory",
            "device",
            "checkpoint",
            "policy",
        ],
    ),
    (
        "model",
        &[
            "types",
            "cancel",
            "status",
            "memory",
            "device",
            "checkpoint",
            "plan",
        ],
    ),
    (
        "load",
        &[
            "types",
            "cancel",
            "progress",
            "status",
            "memory",
            "device",
            "checkpoint",
            "policy",
            "plan",
            "model",
        ],
    ),
    (
        "ranks",
        &[
            "types",
            "cancel",
            "text",
            "status",
            "device",
            "checkpoint",
            "plan",
        ],
    ),
    ("dlpack", &["types", "device", "plan", "model"]),
    ("products", &["types", "status", "device", "plan", "model"]),
    (
        "save",
        &[
            "types",
            "cancel",
            "progress",
            "status",
            "memory",
            "device",
            "checkpoint",
            "plan",
            "model",
            "load",
        ],
    ),
    (
        "report",
        &[
            "types",
            "text",
            "memory",
            "device",
            "checkpoint",
            "plan",
            "model",
            "load",
            "ranks",
        ],
    ),
    ("testing", &["types", "checkpoint", "device"]),
    ("lib", &[]),
];

#[test]
fn modules_import_only_what_lies_to_their_left() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    let mut wrong = Vec::new();
    visit(&src, &mut |file, text| {
        let path = file.strip_prefix(&src).unwrap();
        let module = path.components().next().unwrap().as_os_str();
        let module = module.to_str().unwrap().trim_end_matches(".rs");
        let allowed = LAYERS.iter().find(|(name, _)| *name == module);
        let Some((_, allowed)) = allowed else {
            wrong.push(format!("{} has no layer", path.display()));
            return;
        };
        // What tests need may lie anywhere.
        let name = path.to_str().unwrap();
        if name.contains("test") || name.contains("samples") || module == "lib" {
            return;
        }
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for (number, line) in code.lines().enumerate() {
            if line.trim_start().starts_with("//") {
                continue;
            }
            // One `use` for each module keeps this test, and readers, simple.
            if line.contains("crate::{") {
                wrong.push(format!("{}:{}: crate::{{", path.display(), number + 1));
            }
            for import in imports(line) {
                seen += 1;
                if import != module && !allowed.contains(&import) {
                    wrong.push(format!("{}:{}: {import}", path.display(), number + 1));
                }
            }
        }
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 100, "{seen} imports were found");
}

/// The modules after each `crate::` of a line.
fn imports(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("crate::").filter_map(|(at, path)| {
        let rest = &line[at + path.len()..];
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_');
        let name = &rest[..end.unwrap_or(rest.len())];
        (!name.is_empty()).then_some(name)
    })
}

fn visit(directory: &Path, each: &mut dyn FnMut(&Path, &str)) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            visit(&path, each);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            each(&path, &fs::read_to_string(&path).unwrap());
        }
    }
}
