//! The interface between host and guests as a package: its binary form, as registries take it, and
//! its reference for people.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use wit_component::DecodedWasm;
use wit_parser::{
    Docs, Function, FunctionKind, Handle, Interface, InterfaceId, PackageId, Resolve, Type,
    TypeDef, TypeDefKind, TypeOwner, World, WorldItem, WorldKey,
};

/// Where the interface's sources are.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit")
}

/// The package, parsed from its sources.
#[derive(Debug)]
pub struct WitPackage {
    resolve: Resolve,
    id: PackageId,
}

impl WitPackage {
    /// Parses the files in a directory.
    pub fn parse(directory: &Path) -> WitPackage {
        let mut resolve = Resolve::default();
        let (id, _) = resolve
            .push_dir(directory)
            .unwrap_or_else(|error| panic!("{error:#}"));
        WitPackage { resolve, id }
    }

    /// The package that a binary form was decoded to.
    pub fn decoded(decoded: DecodedWasm) -> WitPackage {
        match decoded {
            DecodedWasm::WitPackage(resolve, id) => WitPackage { resolve, id },
            DecodedWasm::Component(..) => panic!("it is a component"),
        }
    }

    /// Its binary form, with its documentation.
    pub fn binary(&self) -> Vec<u8> {
        wit_component::encode(&self.resolve, self.id).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Its reference, in Markdown.
    pub fn reference(&self) -> String {
        let package = &self.resolve.packages[self.id];
        let mut text = format!(
            "# {}\n\n<!-- Made from wit/*.wit by a test: see README.md. -->\n",
            package.name
        );
        for &id in package.worlds.values() {
            self.world(&mut text, &self.resolve.worlds[id]);
        }
        for &id in package.interfaces.values() {
            self.interface(&mut text, &self.resolve.interfaces[id]);
        }
        text
    }

    /// Worlds, interfaces, types and functions that nothing is said about.
    pub fn undocumented(&self) -> Vec<String> {
        let package = &self.resolve.packages[self.id];
        let mut missing = Vec::new();
        let mut check = |name: String, docs: &Docs| {
            if docs.contents.as_deref().unwrap_or("").trim().is_empty() {
                missing.push(name);
            }
        };
        for (name, &id) in &package.worlds {
            check(format!("world {name}"), &self.resolve.worlds[id].docs);
        }
        for (name, &id) in &package.interfaces {
            let interface = &self.resolve.interfaces[id];
            check(format!("interface {name}"), &interface.docs);
            for (of, &id) in &interface.types {
                let definition = &self.resolve.types[id];
                if self.used_from(definition).is_none() {
                    check(format!("{name}.{of}"), &definition.docs);
                }
            }
            for (of, function) in &interface.functions {
                check(format!("{name}.{of}"), &function.docs);
            }
        }
        missing
    }

    fn world(&self, text: &mut String, world: &World) {
        let _ = write!(text, "\n## world `{}`\n", world.name);
        paragraph(text, &world.docs);
        for (verb, items) in [("Imports", &world.imports), ("Exports", &world.exports)] {
            let names: Vec<String> = items
                .iter()
                .map(|(key, item)| match (key, item) {
                    (WorldKey::Interface(id), _) | (_, WorldItem::Interface { id, .. }) => {
                        let name = self.interface_name(*id);
                        format!("[`{name}`](#interface-{name})")
                    }
                    (WorldKey::Name(name), _) => format!("`{name}`"),
                })
                .collect();
            let _ = write!(text, "\n{verb}: {}.\n", names.join(", "));
        }
    }

    fn interface(&self, text: &mut String, interface: &Interface) {
        let name = interface.name.as_deref().unwrap_or_default();
        let _ = write!(text, "\n## interface `{name}`\n");
        paragraph(text, &interface.docs);
        for (name, &id) in &interface.types {
            let definition = &self.resolve.types[id];
            if let Some(from) = self.used_from(definition) {
                let _ = write!(
                    text,
                    "\n`{name}` is that of [`{from}`](#interface-{from}).\n"
                );
                continue;
            }
            self.definition(text, name, definition);
            let methods = interface.functions.values();
            for function in methods.filter(|function| function.kind.resource() == Some(id)) {
                self.function(text, function);
            }
        }
        let free = interface.functions.values();
        for function in free.filter(|function| function.kind.resource().is_none()) {
            self.function(text, function);
        }
    }

    fn definition(&self, text: &mut String, name: &str, definition: &TypeDef) {
        let kind = &definition.kind;
        let _ = write!(text, "\n### {} `{name}`\n", kind.as_str());
        paragraph(text, &definition.docs);
        let parts: Vec<(&str, Option<&Type>, &Docs)> = match kind {
            TypeDefKind::Record(record) => (record.fields.iter())
                .map(|field| (field.name.as_str(), Some(&field.ty), &field.docs))
                .collect(),
            TypeDefKind::Variant(variant) => (variant.cases.iter())
                .map(|case| (case.name.as_str(), case.ty.as_ref(), &case.docs))
                .collect(),
            TypeDefKind::Enum(of) => (of.cases.iter())
                .map(|case| (case.name.as_str(), None, &case.docs))
                .collect(),
            TypeDefKind::Flags(flags) => (flags.flags.iter())
                .map(|flag| (flag.name.as_str(), None, &flag.docs))
                .collect(),
            TypeDefKind::Resource => return,
            other => {
                let _ = write!(text, "\n`{}`\n", self.kind_name(other));
                return;
            }
        };
        text.push('\n');
        for (name, of, docs) in parts {
            let of = of.map_or(String::new(), |of| format!(": {}", self.name(of)));
            let words: Vec<&str> = docs
                .contents
                .as_deref()
                .unwrap_or("")
                .split_whitespace()
                .collect();
            let separator = if words.is_empty() { "" } else { " - " };
            let _ = writeln!(text, "- `{name}{of}`{separator}{}", words.join(" "));
        }
    }

    fn function(&self, text: &mut String, function: &Function) {
        let is_method = matches!(function.kind, FunctionKind::Method(_));
        let (of, stand) = match function.kind.resource() {
            Some(id) => {
                let of = self.resolve.types[id].name.as_deref().unwrap_or_default();
                (format!("{of}."), if is_method { "" } else { "static " })
            }
            None => (String::new(), ""),
        };
        let parameters: Vec<String> = function
            .params
            .iter()
            .skip(usize::from(is_method))
            .map(|parameter| format!("{}: {}", parameter.name, self.name(&parameter.ty)))
            .collect();
        let result = function.result.as_ref();
        let result = result.map_or(String::new(), |result| format!(" -> {}", self.name(result)));
        let name = function.item_name();
        let _ = write!(
            text,
            "\n#### `{of}{name}: {stand}func({}){result}`\n",
            parameters.join(", ")
        );
        paragraph(text, &function.docs);
    }

    /// The interface that a type is taken from, if it is defined elsewhere.
    fn used_from(&self, definition: &TypeDef) -> Option<&str> {
        let TypeDefKind::Type(Type::Id(id)) = definition.kind else {
            return None;
        };
        match self.resolve.types[id].owner {
            TypeOwner::Interface(interface)
                if definition.owner != TypeOwner::Interface(interface) =>
            {
                Some(self.interface_name(interface))
            }
            _ => None,
        }
    }

    fn interface_name(&self, id: InterfaceId) -> &str {
        self.resolve.interfaces[id]
            .name
            .as_deref()
            .unwrap_or_default()
    }

    fn name(&self, of: &Type) -> String {
        let primitive = match of {
            Type::Id(id) => {
                let definition = &self.resolve.types[*id];
                return match &definition.name {
                    Some(name) => name.clone(),
                    None => self.kind_name(&definition.kind),
                };
            }
            Type::Bool => "bool",
            Type::U8 => "u8",
            Type::U16 => "u16",
            Type::U32 => "u32",
            Type::U64 => "u64",
            Type::S8 => "s8",
            Type::S16 => "s16",
            Type::S32 => "s32",
            Type::S64 => "s64",
            Type::F32 => "f32",
            Type::F64 => "f64",
            Type::Char => "char",
            Type::String => "string",
            Type::ErrorContext => "error-context",
        };
        primitive.to_owned()
    }

    fn kind_name(&self, kind: &TypeDefKind) -> String {
        let optional = |of: &Option<Type>| of.as_ref().map_or("_".to_owned(), |of| self.name(of));
        match kind {
            TypeDefKind::List(of) => format!("list<{}>", self.name(of)),
            TypeDefKind::Option(of) => format!("option<{}>", self.name(of)),
            TypeDefKind::Result(of) if of.err.is_none() => format!("result<{}>", optional(&of.ok)),
            TypeDefKind::Result(of) => {
                format!("result<{}, {}>", optional(&of.ok), optional(&of.err))
            }
            TypeDefKind::Tuple(of) => {
                let names: Vec<String> = of.types.iter().map(|of| self.name(of)).collect();
                format!("tuple<{}>", names.join(", "))
            }
            TypeDefKind::Handle(Handle::Own(id)) => self.name(&Type::Id(*id)),
            TypeDefKind::Handle(Handle::Borrow(id)) => {
                format!("borrow<{}>", self.name(&Type::Id(*id)))
            }
            TypeDefKind::Type(of) => self.name(of),
            other => panic!("the reference has no form for {other:?}"),
        }
    }
}

fn paragraph(text: &mut String, docs: &Docs) {
    let docs = docs.contents.as_deref().unwrap_or("").trim();
    let _ = write!(text, "\n{docs}\n");
}
