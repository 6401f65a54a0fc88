//! Policies that mean harm: one that is told what to do, and hand-written ones for what Rust does
//! not express.

use std::sync::OnceLock;

use tightfit_wasm::policy::WasmPolicy;
use tightfit_wasm::sandbox::Limits;
use wasmparser::{Parser, Payload};

/// The module built from `guests/`. What its `plan` does is said by the setting `behavior`.
pub const HOSTILE: &[u8] = include_bytes!(env!("HOSTILE_POLICY"));

/// The module built from `guests/slices`, which cuts tensors. What its `plan-slices` does is said by the setting
/// `behavior`.
pub const HOSTILE_SLICES: &[u8] = include_bytes!(env!("HOSTILE_SLICES"));

/// That policy with the default limits, compiled once.
pub fn hostile_slices() -> &'static WasmPolicy {
    static POLICY: OnceLock<WasmPolicy> = OnceLock::new();
    POLICY.get_or_init(|| compile(HOSTILE_SLICES, Limits::default()))
}

/// Compiles a policy that is well-formed.
pub fn compile(bytes: &[u8], limits: Limits) -> WasmPolicy {
    WasmPolicy::new("test.wasm", bytes, limits).unwrap_or_else(|error| panic!("{error}"))
}

/// The hostile policy with the default limits, compiled once.
pub fn hostile() -> &'static WasmPolicy {
    static POLICY: OnceLock<WasmPolicy> = OnceLock::new();
    POLICY.get_or_init(|| compile(HOSTILE, Limits::default()))
}

/// The hostile policy with this behavior in `describe`.
pub fn hostile_in_describe(behavior: &str) -> Vec<u8> {
    const MARKER: &[u8] = b"in-describe:honest              ";
    let mut bytes = HOSTILE.to_vec();
    let at = bytes
        .windows(MARKER.len())
        .position(|window| window == MARKER)
        .expect("the hostile policy has its marker");
    let text = format!("{:32}", format!("in-describe:{behavior}"));
    assert_eq!(text.len(), MARKER.len(), "`{behavior}` is too long");
    bytes[at..at + MARKER.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// A policy as a core module in text. By default it describes itself and proposes nothing.
#[derive(Debug, Clone)]
pub struct Handwritten {
    /// Body of `cabi_realloc`, with parameters 0 to 3. By default it never gives back.
    pub realloc: String,
    /// Body of `describe`: the address of a description, which is 16.
    pub describe: String,
    /// Body of `plan`: the address of its result, 128, which is zero: a proposal of nothing.
    pub plan: String,
    /// What it imports.
    pub imports: String,
    /// Further parts of the module.
    pub extra: String,
    /// The section that says which world it is for, if that is not the one of policies: its name
    /// and its contents.
    pub component_type: Option<(String, Vec<u8>)>,
}

impl Default for Handwritten {
    fn default() -> Handwritten {
        Handwritten {
            realloc: "(global.set $next (i32.and (i32.add (global.get $next) (i32.const 15))
                        (i32.const -16)))
                      (global.get $next)
                      (global.set $next (i32.add (global.get $next) (local.get 3)))"
                .to_owned(),
            describe: "(i32.const 16)".to_owned(),
            plan: "(i32.const 128)".to_owned(),
            imports: String::new(),
            extra: String::new(),
            component_type: None,
        }
    }
}

impl Handwritten {
    /// The binary, with the component type that the SDK put into the hostile policy.
    pub fn module(&self) -> Vec<u8> {
        let Handwritten {
            realloc,
            describe,
            plan,
            imports,
            extra,
            component_type: other,
        } = self;
        let (section, data) = other.clone().unwrap_or_else(|| component_type(HOSTILE));
        // At 16: name "wat" and version "1" (address, length), no settings.
        let text = format!(
            r#"(module
                {imports}
                (memory (export "memory") 4)
                (global $next (mut i32) (i32.const 4096))
                (data (i32.const 16) "\40\00\00\00\03\00\00\00\43\00\00\00\01\00\00\00")
                (data (i32.const 64) "wat1")
                (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) {realloc})
                (func (export "tightfit:host/planner@0.1.0#describe") (result i32) {describe})
                (func (export "tightfit:host/planner@0.1.0#plan")
                    (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i64 i64)
                    (result i32) {plan})
                {extra}
                (@custom "{section}" "{}"))"#,
            escaped(&data)
        );
        wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// The component that is made of a core module.
pub fn component(module: &[u8]) -> Vec<u8> {
    wit_component::ComponentEncoder::default()
        .module(module)
        .and_then(|encoder| encoder.validate(true).encode())
        .unwrap_or_else(|error| panic!("{error:#}"))
}

/// A component with one more core module, in text, that is instantiated so many times.
pub fn with_module(component: &[u8], module: &str, times: u32) -> Vec<u8> {
    let modules = Parser::new(0)
        .parse_all(component)
        .filter(|payload| matches!(payload, Ok(Payload::ModuleSection { .. })))
        .count();
    let module = wat::parse_str(module).unwrap_or_else(|error| panic!("{error}"));
    // What each instance is made of: by instantiation, which module, no arguments.
    let instance = [&[0], &leb128(modules as u32)[..], &[0]].concat();
    let instances = [leb128(times), instance.repeat(times as usize)].concat();
    let mut component = component.to_vec();
    // The sections of core modules and of core instances.
    for (id, contents) in [(1, module), (2, instances)] {
        component.push(id);
        component.extend(leb128(contents.len() as u32));
        component.extend(contents);
    }
    component
}

/// A number as the binary format has it.
fn leb128(mut number: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// Where a core module says which world it is for.
pub fn component_type_range(module: &[u8]) -> (usize, usize) {
    let (_, data) = component_type(module);
    let start = module
        .windows(data.len())
        .position(|window| window == data)
        .expect("the section is in the module");
    (start, start + data.len())
}

/// Name and contents of the section that says which world a core module is for.
fn component_type(module: &[u8]) -> (String, Vec<u8>) {
    Parser::new(0)
        .parse_all(module)
        .find_map(|payload| match payload {
            Ok(Payload::CustomSection(section)) if section.name().starts_with("component-type") => {
                Some((section.name().to_owned(), section.data().to_vec()))
            }
            _ => None,
        })
        .expect("the hostile policy has a component type")
}

/// Bytes as they stand in a string of the text format.
fn escaped(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\{byte:02x}")).collect()
}
