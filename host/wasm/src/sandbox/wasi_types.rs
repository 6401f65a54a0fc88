//! Which functions WASI has, and of which types.
//!
//! A guest declares what it imports itself, and what it hands over becomes values of the types that
//! it has declared. Of types that it makes up a few bytes can become a thousand, so it is only given
//! functions of the types that WASI gives them.

use std::collections::HashMap;
use std::sync::LazyLock;

use wasmtime::component::ResourceType;
use wasmtime::component::types::{ComponentFunc, Type as Given};
use wit_parser::{Handle, Resolve, Type, TypeDefKind, TypeId, TypeOwner};

/// WASI 0.2.
pub(super) struct Functions {
    types: Resolve,
    /// Parameters and results by name, for example `wasi:cli/exit#exit`.
    functions: HashMap<String, (Vec<Type>, Option<Type>)>,
}

/// Resources that a guest imports, and what they are called: `wasi:io/poll#pollable`.
pub(super) type Resources = Vec<(ResourceType, String)>;

/// How a guest declares a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Declared {
    /// As WASI does.
    Well,
    /// With other types.
    Otherwise,
    /// WASI has none of this name.
    Unknown,
}

/// WASI 0.2, read when it is first asked for.
pub(super) static WASI: LazyLock<Functions> = LazyLock::new(|| {
    let mut types = Resolve::default();
    types
        .push_str("wasi-0.2.wit", include_str!("wasi-0.2.wit"))
        .expect("the WIT of WASI is part of this program, and a test reads it");
    let mut functions = HashMap::new();
    for (id, interface) in types.interfaces.iter() {
        let Some(name) = plain_name(&types, TypeOwner::Interface(id)) else {
            continue;
        };
        for function in interface.functions.values() {
            let parameters = function.params.iter().map(|parameter| parameter.ty);
            let declared = (parameters.collect(), function.result);
            functions.insert(format!("{name}#{}", function.name), declared);
        }
    }
    Functions { types, functions }
});

impl Functions {
    /// Returns whether a guest declares the function of this name as WASI does.
    pub(super) fn check(
        &self,
        name: &str,
        given: &ComponentFunc,
        resources: &Resources,
    ) -> Declared {
        let Some((parameters, result)) = self.functions.get(name) else {
            return Declared::Unknown;
        };
        let same = |wanted: &Type, given: &Given| self.is_same(*wanted, given, resources);
        let parameters_agree = all(parameters.iter(), given.params(), |wanted, (_, given)| {
            same(wanted, &given)
        });
        let results_agree = all(result.iter(), given.results(), |wanted, given| {
            same(wanted, &given)
        });
        match parameters_agree && results_agree && !given.async_() {
            true => Declared::Well,
            false => Declared::Otherwise,
        }
    }

    /// Returns the names of all functions.
    #[cfg(test)]
    fn names(&self) -> impl Iterator<Item = &str> {
        self.functions.keys().map(String::as_str)
    }

    /// Takes as many steps as WASI's own type has parts, whatever the guest's is.
    fn is_same(&self, wanted: Type, given: &Given, resources: &Resources) -> bool {
        let same = |wanted: Type, given: &Given| self.is_same(wanted, given, resources);
        let same_option = |wanted: Option<Type>, given: Option<Given>| match (wanted, given) {
            (Some(wanted), Some(given)) => same(wanted, &given),
            (None, None) => true,
            _ => false,
        };
        let wanted = match (wanted, given) {
            (Type::Bool, Given::Bool)
            | (Type::U8, Given::U8)
            | (Type::U16, Given::U16)
            | (Type::U32, Given::U32)
            | (Type::U64, Given::U64)
            | (Type::S8, Given::S8)
            | (Type::S16, Given::S16)
            | (Type::S32, Given::S32)
            | (Type::S64, Given::S64)
            | (Type::F32, Given::Float32)
            | (Type::F64, Given::Float64)
            | (Type::Char, Given::Char)
            | (Type::String, Given::String) => return true,
            (Type::Id(id), _) => id,
            _ => return false,
        };
        match (&self.types.types[wanted].kind, given) {
            // Another name, or in WIT's own terms an owned handle.
            (TypeDefKind::Type(wanted), given) => same(*wanted, given),
            (TypeDefKind::Handle(Handle::Own(wanted)), Given::Own(given))
            | (TypeDefKind::Handle(Handle::Borrow(wanted)), Given::Borrow(given)) => {
                let name = self.resource_name(*wanted);
                let mut named = resources
                    .iter()
                    .filter(|(_, known)| Some(known) == name.as_ref());
                named.any(|(known, _)| *known == *given)
            }
            (TypeDefKind::List(wanted), Given::List(given)) => same(*wanted, &given.ty()),
            (TypeDefKind::Option(wanted), Given::Option(given)) => same(*wanted, &given.ty()),
            (TypeDefKind::Result(wanted), Given::Result(given)) => {
                same_option(wanted.ok, given.ok()) && same_option(wanted.err, given.err())
            }
            (TypeDefKind::Tuple(wanted), Given::Tuple(given)) => {
                all(wanted.types.iter(), given.types(), |wanted, given| {
                    same(*wanted, &given)
                })
            }
            (TypeDefKind::Record(wanted), Given::Record(given)) => {
                all(wanted.fields.iter(), given.fields(), |wanted, given| {
                    wanted.name == given.name && same(wanted.ty, &given.ty)
                })
            }
            (TypeDefKind::Variant(wanted), Given::Variant(given)) => {
                all(wanted.cases.iter(), given.cases(), |wanted, given| {
                    wanted.name == given.name && same_option(wanted.ty, given.ty)
                })
            }
            (TypeDefKind::Enum(wanted), Given::Enum(given)) => {
                all(wanted.cases.iter(), given.names(), |wanted, given| {
                    wanted.name == given
                })
            }
            (TypeDefKind::Flags(wanted), Given::Flags(given)) => {
                all(wanted.flags.iter(), given.names(), |wanted, given| {
                    wanted.name == given
                })
            }
            _ => false,
        }
    }

    /// Returns what a resource is called, by whatever name it is used.
    fn resource_name(&self, mut id: TypeId) -> Option<String> {
        while let TypeDefKind::Type(Type::Id(other)) = self.types.types[id].kind {
            id = other;
        }
        let resource = &self.types.types[id];
        let interface = plain_name(&self.types, resource.owner)?;
        Some(format!("{interface}#{}", resource.name.as_ref()?))
    }
}

/// Returns whether there are as many of both, and they agree one by one.
fn all<A, B>(
    wanted: impl ExactSizeIterator<Item = A>,
    given: impl ExactSizeIterator<Item = B>,
    agree: impl Fn(A, B) -> bool,
) -> bool {
    wanted.len() == given.len()
        && wanted
            .zip(given)
            .all(|(wanted, given)| agree(wanted, given))
}

/// Returns what an interface is called, without the version.
fn plain_name(types: &Resolve, owner: TypeOwner) -> Option<String> {
    let TypeOwner::Interface(id) = owner else {
        return None;
    };
    let interface = &types.interfaces[id];
    let package = &types.packages[interface.package?].name;
    let (namespace, package) = (&package.namespace, &package.name);
    Some(format!(
        "{namespace}:{package}/{}",
        interface.name.as_ref()?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_of_wasi_is_there() {
        let count = |package: &str| {
            let names = WASI.names().filter(|name| name.starts_with(package));
            names.count()
        };
        for (package, functions) in [
            ("wasi:io/", 19),
            ("wasi:clocks/", 8),
            ("wasi:random/", 5),
            ("wasi:filesystem/", 30),
            ("wasi:sockets/", 53),
            ("wasi:cli/", 12),
        ] {
            assert_eq!(count(package), functions, "{package}");
        }
        assert!(
            WASI.names()
                .any(|name| name == "wasi:io/streams#[method]output-stream.write")
        );
    }
}
