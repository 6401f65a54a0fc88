//! A WASI with nothing in it, for components whose language runtime asks for one.
//!
//! What a component imports of it is made as the component names it, so it fits every 0.2.x; it has to
//! be of the type that WASI declares. Calls that a runtime makes as it starts and ends are answered;
//! any other call ends the guest with [`GuestFailure::EmptyWasi`], which names it.

use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, Linker, Resource, ResourceType, Val};
use wasmtime::{StoreContextMut, bail, format_err};

use super::run::State;
use super::wasi_types::{Declared, Resources, WASI};
use super::{GuestFailure, Mismatch};
use crate::wit::bindings::tightfit::host::log::{Host as _, Level};

/// What an empty WASI remembers of one guest.
#[derive(Debug, Default)]
pub(super) struct EmptyWasi {
    /// Number of random numbers it has been given.
    drawn: u64,
    /// The end of what it wrote to standard error.
    errors: Tail,
}

impl EmptyWasi {
    /// Returns the end of what the guest wrote to its standard error.
    pub(super) fn last_words(&self) -> Option<String> {
        let words = String::from_utf8_lossy(&self.errors.0);
        let words = words.trim();
        (!words.is_empty()).then(|| words.to_owned())
    }

    /// Random numbers as good as any, and the same for every guest (Vigna's SplitMix64).
    fn draw(&mut self) -> u64 {
        self.drawn = self.drawn.wrapping_add(1);
        let mut z = self.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// The last bytes of a text.
#[derive(Debug, Default)]
struct Tail(Vec<u8>);

impl Tail {
    const MOST: usize = 4 << 10;

    fn push(&mut self, bytes: &[u8]) {
        self.0
            .extend_from_slice(&bytes[bytes.len().saturating_sub(Self::MOST)..]);
        self.0.drain(..self.0.len().saturating_sub(Self::MOST));
    }
}

/// Whatever a guest has a handle of. All that matters is what it was made as.
struct Nothing;

/// What a stream was made as: its representation.
const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;
const POLLABLE: u32 = 3;

/// Bytes that a stream says it takes at once.
const AT_ONCE: u64 = 64 << 10;

/// Random bytes that a guest is given at once.
const MOST_RANDOM: u64 = 64 << 10;

/// Adds what the component imports of WASI.
///
/// # Errors
/// [`GuestFailure::WrongWorld`] where it imports a function that WASI does not have, or not of this type.
pub(super) fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<State<T>>,
    component: &Component,
) -> Result<(), GuestFailure> {
    let engine = linker.engine().clone();
    let ty = component.component_type();
    let instances: Vec<_> = ty
        .imports(&engine)
        .filter_map(|(interface, import)| match import.ty {
            ComponentItem::ComponentInstance(import) if interface.starts_with("wasi:") => {
                Some((interface, import))
            }
            _ => None,
        })
        .collect();
    let mut resources = Resources::new();
    for (interface, import) in &instances {
        for (name, export) in import.exports(&engine) {
            if let ComponentItem::Resource(resource) = export.ty {
                resources.push((resource, full_name(interface, name)));
            }
        }
    }
    for (interface, import) in &instances {
        let mut instance = linker.instance(interface).map_err(GuestFailure::host)?;
        for (name, export) in import.exports(&engine) {
            let added = match export.ty {
                ComponentItem::Resource(_) => {
                    instance.resource(name, ResourceType::host::<Nothing>(), |_, _| Ok(()))
                }
                ComponentItem::ComponentFunc(declared) => {
                    let function = full_name(interface, name);
                    let mismatch = match WASI.check(&function, &declared, &resources) {
                        Declared::Well => None,
                        Declared::Otherwise => Some(Mismatch::ImportType {
                            import: (*interface).to_owned(),
                            reason: format!("WASI 0.2 declares its function {name} otherwise"),
                        }),
                        Declared::Unknown => Some(Mismatch::Import {
                            import: format!("{interface}#{name}"),
                        }),
                    };
                    if let Some(mismatch) = mismatch {
                        return Err(GuestFailure::WrongWorld(mismatch));
                    }
                    instance.func_new(name, move |store, _, parameters, results| {
                        let result = answer(store, &function, parameters)?;
                        match (results, result) {
                            ([], None) => Ok(()),
                            ([slot], Some(value)) => {
                                *slot = value;
                                Ok(())
                            }
                            _ => Err(undeclared(&function)),
                        }
                    })
                }
                _ => Ok(()),
            };
            added.map_err(GuestFailure::host)?;
        }
    }
    Ok(())
}

/// Returns a name without the version: `wasi:io/poll#pollable`.
fn full_name(interface: &str, name: &str) -> String {
    let plain = interface.split('@').next().unwrap_or(interface);
    format!("{plain}#{name}")
}

/// Returns what a call gives.
fn answer<T: Send + 'static>(
    mut store: StoreContextMut<'_, State<T>>,
    function: &str,
    parameters: &[Val],
) -> wasmtime::Result<Option<Val>> {
    let nothing = || Val::List(Vec::new());
    let none = || Val::Option(None);
    let done = || Val::Result(Ok(None));
    let value = match function {
        "wasi:cli/environment#get-environment"
        | "wasi:cli/environment#get-arguments"
        | "wasi:filesystem/preopens#get-directories" => nothing(),
        "wasi:cli/environment#initial-cwd"
        | "wasi:cli/terminal-stdin#get-terminal-stdin"
        | "wasi:cli/terminal-stdout#get-terminal-stdout"
        | "wasi:cli/terminal-stderr#get-terminal-stderr"
        | "wasi:filesystem/types#filesystem-error-code" => none(),
        "wasi:cli/exit#exit" | "wasi:cli/exit#exit-with-code" => {
            let status = match parameters {
                [Val::U8(status)] => *status,
                [Val::Result(Ok(_))] => 0,
                _ => 1,
            };
            return Err(GuestFailure::Exit { status }.into());
        }
        "wasi:cli/stdin#get-stdin" => handle(&mut store, STDIN)?,
        "wasi:cli/stdout#get-stdout" => handle(&mut store, STDOUT)?,
        "wasi:cli/stderr#get-stderr" => handle(&mut store, STDERR)?,
        "wasi:clocks/monotonic-clock#now" => Val::U64(0),
        "wasi:clocks/monotonic-clock#resolution" => Val::U64(1),
        "wasi:clocks/wall-clock#now" | "wasi:clocks/wall-clock#resolution" => Val::Record(vec![
            ("seconds".to_owned(), Val::U64(0)),
            ("nanoseconds".to_owned(), Val::U32(0)),
        ]),
        "wasi:clocks/monotonic-clock#subscribe-instant"
        | "wasi:clocks/monotonic-clock#subscribe-duration"
        | "wasi:io/streams#[method]input-stream.subscribe"
        | "wasi:io/streams#[method]output-stream.subscribe" => handle(&mut store, POLLABLE)?,
        "wasi:io/poll#[method]pollable.ready" => Val::Bool(true),
        "wasi:io/poll#[method]pollable.block" => return Ok(None),
        // All of them are ready.
        "wasi:io/poll#poll" => match parameters {
            [Val::List(handles)] => {
                Val::List((0..).zip(handles).map(|(i, _)| Val::U32(i)).collect())
            }
            _ => return Err(undeclared(function)),
        },
        "wasi:io/streams#[method]input-stream.read"
        | "wasi:io/streams#[method]input-stream.blocking-read"
        | "wasi:io/streams#[method]input-stream.skip"
        | "wasi:io/streams#[method]input-stream.blocking-skip" => {
            let closed = Val::Variant("closed".to_owned(), None);
            Val::Result(Err(Some(Box::new(closed))))
        }
        "wasi:io/streams#[method]output-stream.check-write" => {
            Val::Result(Ok(Some(Box::new(Val::U64(AT_ONCE)))))
        }
        "wasi:io/streams#[method]output-stream.write"
        | "wasi:io/streams#[method]output-stream.blocking-write-and-flush" => {
            write(&mut store, parameters)?;
            done()
        }
        "wasi:io/streams#[method]output-stream.flush"
        | "wasi:io/streams#[method]output-stream.blocking-flush" => done(),
        "wasi:random/random#get-random-bytes"
        | "wasi:random/insecure#get-insecure-random-bytes" => match parameters {
            [Val::U64(length)] if *length <= MOST_RANDOM => {
                let wasi = &mut store.data_mut().wasi;
                Val::List((0..*length).map(|_| Val::U8(wasi.draw() as u8)).collect())
            }
            [Val::U64(length)] => bail!("it asked for {length} random bytes at once"),
            _ => return Err(undeclared(function)),
        },
        "wasi:random/random#get-random-u64" | "wasi:random/insecure#get-insecure-random-u64" => {
            Val::U64(store.data_mut().wasi.draw())
        }
        "wasi:random/insecure-seed#insecure-seed" => {
            let wasi = &mut store.data_mut().wasi;
            Val::Tuple(vec![Val::U64(wasi.draw()), Val::U64(wasi.draw())])
        }
        _ => {
            let function = function.to_owned();
            return Err(GuestFailure::EmptyWasi { function }.into());
        }
    };
    Ok(Some(value))
}

fn undeclared(function: &str) -> wasmtime::Error {
    format_err!("{function} is not declared as it is in WASI 0.2")
}

fn handle<T: 'static>(
    store: &mut StoreContextMut<'_, State<T>>,
    made_as: u32,
) -> wasmtime::Result<Val> {
    let resource = Resource::<Nothing>::new_own(made_as);
    Ok(Val::Resource(resource.try_into_resource_any(store)?))
}

/// Logs what is written to standard output and error.
fn write<T: Send + 'static>(
    store: &mut StoreContextMut<'_, State<T>>,
    parameters: &[Val],
) -> wasmtime::Result<()> {
    let [Val::Resource(stream), Val::List(bytes)] = parameters else {
        return Err(undeclared("wasi:io/streams#[method]output-stream.write"));
    };
    let stream = Resource::<Nothing>::try_from_resource_any(*stream, &mut *store)?.rep();
    let bytes: Vec<u8> = bytes
        .iter()
        .map(|byte| match byte {
            Val::U8(byte) => *byte,
            _ => 0,
        })
        .collect();
    let state = store.data_mut();
    if stream == STDERR {
        state.wasi.errors.push(&bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    if !text.is_empty() {
        state.context.write(Level::Info, text.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_the_end_of_all_that_was_pushed() {
        let mut tail = Tail::default();
        tail.push(b"begin");
        tail.push(&vec![b'x'; 2 * Tail::MOST]);
        tail.push(b"end");
        assert_eq!(tail.0.len(), Tail::MOST);
        assert!(tail.0.ends_with(b"xend"));
    }

    #[test]
    fn random_numbers_are_those_of_splitmix64() {
        // The first three of seed 0, as its reference implementation gives them.
        let mut wasi = EmptyWasi::default();
        let drawn = [wasi.draw(), wasi.draw(), wasi.draw()];
        let expected = [
            0xe220_a839_7b1d_cdaf,
            0x6e78_9e6a_a1b9_65f4,
            0x06c4_5d18_8009_454f,
        ];
        assert_eq!(drawn, expected);
    }
}
