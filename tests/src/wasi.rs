//! A world for policies that ask for WASI. What is declared here of it is what a language's runtime
//! calls as it starts and ends, in the form that WASI 0.2 gives it.

use std::path::Path;

use wit_component::StringEncoding;
use wit_parser::{LiftLowerAbi, ManglingAndAbi, Resolve};

const WORLD: &str = "
package test:guest;

world asks-for-wasi {
    include tightfit:host/policy@0.1.0;
    import wasi:cli/environment@0.2.6;
    import wasi:cli/exit@0.2.6;
    import wasi:cli/stdout@0.2.6;
    import wasi:cli/stderr@0.2.6;
    import wasi:cli/terminal-stdout@0.2.6;
    import wasi:clocks/monotonic-clock@0.2.6;
    import wasi:clocks/wall-clock@0.2.6;
    import wasi:filesystem/preopens@0.2.6;
    import wasi:random/random@0.2.6;
    import wasi:sockets/instance-network@0.2.6;
}
";

const WASI: [&str; 6] = [
    "package wasi:io@0.2.6;
    interface error { resource error { to-debug-string: func() -> string; } }
    interface poll {
        resource pollable { ready: func() -> bool; block: func(); }
        poll: func(in: list<borrow<pollable>>) -> list<u32>;
    }
    interface streams {
        use error.{error};
        use poll.{pollable};
        variant stream-error { last-operation-failed(error), closed }
        resource output-stream {
            check-write: func() -> result<u64, stream-error>;
            write: func(contents: list<u8>) -> result<_, stream-error>;
            blocking-write-and-flush: func(contents: list<u8>) -> result<_, stream-error>;
            blocking-flush: func() -> result<_, stream-error>;
            subscribe: func() -> pollable;
        }
    }",
    "package wasi:cli@0.2.6;
    interface environment {
        get-environment: func() -> list<tuple<string, string>>;
        get-arguments: func() -> list<string>;
        initial-cwd: func() -> option<string>;
    }
    interface exit { exit: func(status: result); }
    interface stdout { use wasi:io/streams@0.2.6.{output-stream}; get-stdout: func() -> output-stream; }
    interface stderr { use wasi:io/streams@0.2.6.{output-stream}; get-stderr: func() -> output-stream; }
    interface terminal-output { resource terminal-output; }
    interface terminal-stdout {
        use terminal-output.{terminal-output};
        get-terminal-stdout: func() -> option<terminal-output>;
    }",
    "package wasi:clocks@0.2.6;
    interface monotonic-clock { now: func() -> u64; resolution: func() -> u64; }
    interface wall-clock {
        record datetime { seconds: u64, nanoseconds: u32 }
        now: func() -> datetime;
    }",
    "package wasi:filesystem@0.2.6;
    interface types { resource descriptor { sync: func(); } }
    interface preopens {
        use types.{descriptor};
        get-directories: func() -> list<tuple<descriptor, string>>;
    }",
    "package wasi:random@0.2.6;
    interface random { get-random-bytes: func(len: u64) -> list<u8>; get-random-u64: func() -> u64; }",
    "package wasi:sockets@0.2.6;
    interface network { resource network; }
    interface instance-network { use network.{network}; instance-network: func() -> network; }",
];

/// The WIT by which the sandbox knows WASI.
const DECLARED: &str = include_str!("../../host/wasm/src/sandbox/wasi-0.2.wit");

/// A policy that imports all functions of WASI that the sandbox knows, but those of these names, and
/// traps whatever it is asked.
pub fn importing_all_but(left_out: &[&str]) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit");
    resolve
        .push_dir(wit)
        .unwrap_or_else(|error| panic!("{error:#}"));
    let mut push = |text: &str| {
        let pushed = resolve.push_str("test.wit", text);
        pushed.unwrap_or_else(|error| panic!("{error:#}"))
    };
    let is_kept = |line: &&str| {
        let name = line.trim_start().split(": func").next();
        !name.is_some_and(|name| left_out.contains(&name))
    };
    push(
        &DECLARED
            .lines()
            .filter(is_kept)
            .collect::<Vec<_>>()
            .join("\n"),
    );
    let mut world =
        "package test:guest; world all { include tightfit:host/policy@0.1.0;".to_owned();
    let mut package = "";
    let mut count = 0;
    for line in DECLARED.lines() {
        if let Some(name) = line.strip_prefix("package wasi:") {
            package = name.split('@').next().unwrap();
        } else if let Some(name) = line.strip_prefix("  interface ") {
            let interface = name.trim_end_matches(" {");
            world += &format!(" import wasi:{package}/{interface}@0.2.0;");
            count += 1;
        }
    }
    assert!(count > 25, "{count} interfaces: {world}");
    let package = push(&(world + " }"));
    let world = resolve.select_world(&[package], Some("all"));
    let world = world.unwrap_or_else(|error| panic!("{error:#}"));
    let mut module =
        wit_component::dummy_module(&resolve, world, ManglingAndAbi::Legacy(LiftLowerAbi::Sync));
    wit_component::embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)
        .unwrap_or_else(|error| panic!("{error:#}"));
    crate::guests::component(&module)
}

/// The section by which a core module says that it is for this world: its name and its contents.
pub fn component_type() -> (String, Vec<u8>) {
    let mut resolve = Resolve::default();
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit");
    resolve
        .push_dir(wit)
        .unwrap_or_else(|error| panic!("{error:#}"));
    let mut push = |text: &str| {
        let pushed = resolve.push_str("test.wit", text);
        pushed.unwrap_or_else(|error| panic!("{error:#}"))
    };
    for text in WASI {
        push(text);
    }
    let package = push(WORLD);
    let world = resolve.select_world(&[package], Some("asks-for-wasi"));
    let encoded = world.map_err(|error| error.to_string()).and_then(|world| {
        wit_component::metadata::encode(&resolve, world, StringEncoding::UTF8, None)
            .map_err(|error| error.to_string())
    });
    let encoded = encoded.unwrap_or_else(|error| panic!("{error}"));
    ("component-type:asks-for-wasi".to_owned(), encoded)
}
